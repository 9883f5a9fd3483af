"""Quantised and LoRA heads from bare tensors: what runs on a machine without bitsandbytes or PEFT."""

from types import SimpleNamespace

import pytest
import torch
from head_cases import (
    D,
    V,
    check_budget,
    check_exact,
    leaf,
    placed,
    problem,
    recipe,
    results,
)
from naive import gather_logps

from dilkern import linear_logps
from dilkern.lm_head import Adapter, EightBitHead, FourBit, FourBitHead, LoRAHead

pytestmark = pytest.mark.usefixtures("device")


def four_bit(nested):
    """Return a 4-bit head of random bytes and its weight, decoded after the written format."""
    blocks = -(-V * D // 64)
    packed = placed(torch.randint(0, 256, (V * D // 2, 1), dtype=torch.uint8))
    code, absmax, inner = placed(torch.linspace(-1, 1, 16)), placed(torch.rand(blocks)), None
    extra = []
    if nested:
        absmax = placed(torch.randint(0, 256, (blocks,), dtype=torch.uint8))
        extra = [
            placed(x) for x in (torch.rand(256), torch.rand(-(-blocks // 256)), torch.rand(()))
        ]
        inner = SimpleNamespace(code=extra[0], absmax=extra[1], blocksize=256)
    state = SimpleNamespace(
        absmax=absmax, code=code, nested=nested, state2=inner, offset=extra[-1] if nested else None,
        blocksize=64, dtype=torch.float32, shape=torch.Size((V, D)),
    )  # fmt: skip
    weight = recipe(SimpleNamespace(weight=SimpleNamespace(data=packed, quant_state=state)))
    return FourBitHead(
        FourBit(packed.view(-1), code, absmax, extra, 64, 256, torch.float32), V, D
    ), weight


def eight_bit():
    codes = placed(torch.randint(-127, 128, (V, D), dtype=torch.int8))
    scales = placed(torch.rand(V))
    return EightBitHead(codes, scales), codes.double() * (scales[:, None] * (1 / 127)).double()


KINDS = {
    "four_bit": lambda: four_bit(False),
    "nested": lambda: four_bit(True),
    "eight_bit": eight_bit,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [False, True])
def test_gradients(kind, lora):
    head, weight = KINDS[kind]()
    a, b = leaf(4, D), leaf(V, 4)
    if not lora:
        check_exact(head, lambda: (weight.double(), None))
        return
    head = LoRAHead(head, [Adapter(a, b, 2.0)])
    check_exact(head, lambda: (weight.double() + 2.0 * b @ a, None), [a, b])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_within_twice_the_error_of_torch(kind, dtype):
    head, weight = KINDS[kind]()
    hidden, labels, g = problem(dtype)
    a, b = (p.detach().to(dtype).requires_grad_() for p in (leaf(4, D) / 8, leaf(V, 4) / 8))
    inputs = [hidden, a, b]
    got = results(linear_logps(hidden, LoRAHead(head, [Adapter(a, b, 2.0)]), labels), g, inputs)
    logits = hidden @ weight.to(dtype).T + 2.0 * (hidden @ a.T) @ b.T
    peer = results(gather_logps(logits.float(), labels), g, inputs)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    logits = wide[0] @ weight.double().T + 2.0 * (wide[0] @ wide[1].T) @ wide[2].T
    check_budget(got, peer, results(gather_logps(logits, labels), g, wide))
