"""nf4_dequant, bit by bit against the decode in PyTorch, on random bytes and on bitsandbytes."""

import pytest
import torch

from dilkern.kernels.nf4_dequant import Packed4bit, nf4_dequant


def decode(w: Packed4bit, shape, dtype):
    """The definition (shared design, bitsandbytes 0.50): two rounded fp32 steps, one cast."""
    absmax = w.absmax
    if w.nested_code is not None:
        outer = w.nested_absmax.repeat_interleave(w.nested_blocksize)[: absmax.numel()]
        absmax = w.nested_code[absmax.long()] * outer + w.offset
    numel = shape[0] * shape[1]
    nibbles = torch.stack((w.packed >> 4, w.packed & 15), 1).reshape(-1)[:numel].long()
    scale = absmax.float().repeat_interleave(w.blocksize)[:numel]
    return (w.code[nibbles] * scale).to(dtype).reshape(shape)


def random_weight(v, d, blocksize, nested):
    torch.manual_seed(v * d + blocksize)
    numel = v * d
    blocks = -(-numel // blocksize)
    packed = torch.randint(0, 256, (-(-numel // 2),), dtype=torch.uint8)
    code = torch.randn(16).sort().values
    if not nested:
        return Packed4bit(packed, code, torch.rand(blocks), blocksize, d)
    return Packed4bit(
        packed,
        code,
        torch.randint(0, 256, (blocks,), dtype=torch.uint8),
        blocksize,
        d,
        nested_code=torch.randn(256),
        nested_absmax=torch.rand(-(-blocks // 256)),
        nested_blocksize=256,
        offset=torch.tensor(0.37),
    )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33, 96), (20, 130), (300, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bit_equal_to_the_torch_decode(dtype, shape, blocksize, nested):
    v, d = shape
    weight = random_weight(v, d, blocksize, nested)
    whole = decode(weight, shape, dtype)
    assert torch.equal(nf4_dequant(weight, dtype, start=0, end=v), whole)
    a, b = v // 3, v - v // 4
    assert torch.equal(nf4_dequant(weight, dtype, start=a, end=b), whole[a:b])
    ids = torch.randint(0, v, (11,))
    assert torch.equal(nf4_dequant(weight, dtype, ids=ids), whole[ids])
    assert nf4_dequant(weight, dtype, start=0, end=0).shape == (0, d)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_decodes_what_bitsandbytes_packs(kind, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    original = torch.randn(96, 128)
    packed, state = functional.quantize_4bit(
        original, quant_type=kind, compress_statistics=nested, blocksize=64
    )
    extra = {}
    if state.nested:
        extra = {
            "nested_code": state.state2.code,
            "nested_absmax": state.state2.absmax,
            "nested_blocksize": state.state2.blocksize,
            "offset": state.offset,
        }
    weight = Packed4bit(
        packed.reshape(-1).view(torch.uint8), state.code, state.absmax, 64, 128, **extra
    )
    got = nf4_dequant(weight, torch.float32, start=0, end=96)
    assert torch.equal(got, functional.dequantize_4bit(packed, state))
    assert (got - original).abs().mean() < 0.15


@pytest.mark.parametrize("nested", [False, True])
def test_a_4bit_head_decodes_with_the_kernel_to_the_same_bits(nested, monkeypatch):
    from dilkern.lm_head import FourBit, FourBitHead, quantized

    w = random_weight(41, 64, 64, nested)
    extra = (w.nested_code, w.nested_absmax, w.offset) if nested else ()
    four_bit = FourBit(w.packed, w.code, w.absmax, extra, 64, 256, torch.bfloat16)
    head, ids = FourBitHead(four_bit, 41, 64), torch.tensor([40, 3, 3, 0])
    with_kernel = [head.block(5, 30, torch.float32), head.gather(ids, torch.bfloat16)]
    assert quantized.decode_with_kernel(four_bit, 64, start=5, end=30) is not None
    monkeypatch.setattr(quantized, "decode_with_kernel", lambda *args, **kwargs: None)
    with_torch = [head.block(5, 30, torch.float32), head.gather(ids, torch.bfloat16)]
    assert all(torch.equal(a, b) for a, b in zip(with_kernel, with_torch))
