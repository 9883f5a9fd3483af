"""bitsandbytes 4-bit and 8-bit heads: bits of the decode, gradients, precision."""

import pytest
import torch
from head_cases import (
    D,
    V,
    check_budget,
    check_exact,
    eight_bit_linear,
    four_bit_linear,
    leaf,
    placed,
    problem,
    recipe,
    results,
)
from naive import gather_logps
from torch import nn

from dilkern import linear_logps
from dilkern.lm_head import EightBitHead, FourBitHead, as_head

bnb = pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decode_is_bit_exact(quant_type, nested, blocksize, dtype, device):
    linear = four_bit_linear(quant_type=quant_type, nested=nested, blocksize=blocksize, dtype=dtype)
    head, want = as_head(linear), recipe(linear)
    assert isinstance(head, FourBitHead) and head.vocab_size == V and head.hidden_size == D
    for start, end in ((0, V), (7, 190), (V - 1, V)):
        assert torch.equal(head.block(start, end, dtype), want[start:end])
    ids = placed(torch.tensor([0, V - 1, 5, 5, 17]))
    assert torch.equal(head.gather(ids, dtype), want[ids])
    assert torch.equal(head.gather(ids, torch.float64), want[ids].double())
    if (
        device == "cpu" and D % blocksize == 0
    ):  # elsewhere bitsandbytes' CPU dequantisation is wrong
        by_bnb = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        assert torch.equal(want, by_bnb)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_quant_storage_is_a_view_of_the_same_bytes(storage):
    plain = four_bit_linear()
    torch.manual_seed(0)
    stored = as_head(four_bit_linear(storage=storage))
    assert torch.equal(stored.block(3, V, torch.float32), recipe(plain)[3:])


@pytest.mark.parametrize("shape", [(7, 9), (301, 72), (300, 96), (33, 100), (5, 1)])
def test_blocks_that_cross_rows_and_odd_sizes(shape, monkeypatch):
    # Pieces of 64 elements: every cut falls somewhere else within rows and quantisation blocks.
    monkeypatch.setattr("dilkern.lm_head.quantized._LEAST_PIECE", 64)
    linear = four_bit_linear(*shape)
    head, want = as_head(linear), recipe(linear)
    for start in range(0, shape[0], max(1, shape[0] // 5)):
        assert torch.equal(head.block(start, shape[0], torch.float32), want[start:])
    ids = placed(torch.randint(0, shape[0], (40,)))
    assert torch.equal(head.gather(ids, torch.float32), want[ids])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("bias", [None, False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.5, 4.0)])
def test_four_bit_gradients(quant_type, bias, scale, softcap):
    linear = four_bit_linear(quant_type=quant_type, bias=bias is not None)
    weight = recipe(linear).double()
    if bias is not None:
        linear.bias = nn.Parameter(leaf(V, grad=False), requires_grad=bias)
    params = [linear.bias] if bias else []
    head = as_head(linear, scale=scale, softcap=softcap)
    check_exact(head, lambda: (weight, linear.bias), params, scale=scale, softcap=softcap)


@pytest.mark.parametrize("after_forward", [False, True])
@pytest.mark.parametrize("bias", [None, False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.5, 4.0)])
def test_eight_bit_gradients(after_forward, bias, scale, softcap):
    linear = eight_bit_linear(bias=bias is not None)
    codes, scales = linear.weight.data.clone(), linear.weight.SCB.clone()
    if after_forward:  # bitsandbytes then keeps codes and scales in `state`
        linear(placed(torch.randn(2, D)))
    if bias is not None:
        linear.bias = nn.Parameter(leaf(V, grad=False), requires_grad=bias)
    weight = codes.double() * (scales[:, None] * (1 / 127)).double()
    head = as_head(linear, scale=scale, softcap=softcap)
    assert isinstance(head, EightBitHead)
    check_exact(
        head,
        lambda: (weight, linear.bias),
        [linear.bias] if bias else [],
        scale=scale,
        softcap=softcap,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["four_bit", "eight_bit"])
def test_16_bits_within_twice_the_error_of_bitsandbytes(dtype, kind):
    hidden, labels, g = problem(dtype)
    if kind == "four_bit":
        linear = four_bit_linear(dtype=dtype)
        weight = recipe(linear)
    else:
        linear = eight_bit_linear().train()
        scales = linear.weight.SCB[:, None] * (1 / 127)
        weight = linear.weight.data.double() * scales.double()
    got = results(linear_logps(hidden, linear, labels), g, [hidden])
    peer = results(gather_logps(linear(hidden).float(), labels), g, [hidden])
    wide = hidden.detach().double().requires_grad_()
    truth = results(gather_logps(wide @ weight.double().T, labels), g, [wide])
    check_budget(got, peer, truth)


def test_any_compute_dtype_serves_a_quantised_head():
    linear = four_bit_linear(dtype=torch.bfloat16)
    weight = recipe(linear)
    check_exact(linear, lambda: (weight.double(), None))
    hidden, labels, _ = problem(torch.float32)
    logits = hidden @ weight.float().T
    torch.testing.assert_close(linear_logps(hidden, linear, labels), gather_logps(logits, labels))


def test_a_reloaded_checkpoint_gives_the_same_bits(device):
    linear = four_bit_linear(bias=True)
    state = {k: v.clone() for k, v in linear.state_dict().items()}
    other = bnb.nn.Linear4bit(D, V, quant_type="nf4")
    other.weight = bnb.nn.Params4bit.from_prequantized(
        state["weight"],
        {k: v for k, v in state.items() if k.startswith("weight.")},
        device=device,
        module=other,
    )
    assert torch.equal(
        as_head(other).block(0, V, torch.float32), as_head(linear).block(0, V, torch.float32)
    )


@pytest.mark.parametrize("kind", ["four_bit", "eight_bit"])
def test_the_word_filter_sees_the_decoded_weight(kind):
    linear = four_bit_linear(2048) if kind == "four_bit" else eight_bit_linear(2048)
    head = as_head(linear)
    weight = head.block(0, 2048, torch.float64)
    torch.manual_seed(1)
    common = 0.4 * leaf(D, grad=False)
    hidden = (0.2 * leaf(64, D, grad=False) + common).requires_grad_()
    labels = placed(torch.randint(0, 2048, (64,)))

    def gradient(lm_head, **options):
        logps = linear_logps(hidden, lm_head, labels, **options)
        return torch.autograd.grad(logps.sum(), hidden)[0]

    options = {"filter_eps": 2**-12, "workspace_mib": 4}
    exact, want, got = gradient(weight), gradient(weight, **options), gradient(head, **options)
    assert 1e-6 * exact.norm() < (want - exact).norm() < 0.02 * exact.norm()
    # Its words are not looked through for expected ones: another estimate of the sums to come.
    assert (got - exact).norm() < 2 * (want - exact).norm()
