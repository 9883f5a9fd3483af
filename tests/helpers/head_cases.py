"""What the head tests share: problems, the naive truth, and the one comparison.

Truth is fp64 autograd over the full logits of the dense-equivalent weight; the tolerances are those
of budget.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from budget import Budget
from naive import gather_logps
from torch import Tensor

from dilkern import linear_logps

V, D, T = 301, 64, 23
# Where problems and heads are made: the fixture `device` of heads/conftest.py says "cuda" on a GPU.
DEVICE = ContextVar("device under test", default="cpu")
DenseParts = Callable[[], tuple[Tensor, Tensor | None]]


@contextmanager
def made_on(device: str) -> Iterator[None]:
    """Let problems and heads be made on `device`."""
    token = DEVICE.set(device)
    try:
        yield
    finally:
        DEVICE.reset(token)


def placed(thing: Any) -> Any:
    """Return a tensor or module on the device under test."""
    return thing.to(DEVICE.get())


def leaf(*shape: int, grad: bool = True) -> Tensor:
    """Return an fp64 tensor on the device under test."""
    return placed(torch.randn(*shape, dtype=torch.float64)).requires_grad_(grad)


def problem(
    dtype: torch.dtype = torch.float64, *, vocab_size: int = V, hidden_size: int = D
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states (T, D) that require grad, labels (T,), two ignored, and g (T,)."""
    hidden = torch.randn(T, hidden_size, dtype=torch.float64)
    labels = torch.randint(0, vocab_size, (T,))
    labels[[0, 7]] = -100
    labels[1], labels[2] = vocab_size - 1, 0
    g = torch.randn(T, dtype=torch.float64)
    return placed(hidden.to(dtype)).requires_grad_(), placed(labels), placed(g)


def naive_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float
) -> Tensor:
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * scale
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def results(logps: Tensor, g: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the logps and the gradients of (g * logps).sum()."""
    loss = (logps * g.to(logps.dtype)).sum()
    return [logps.detach(), *torch.autograd.grad(loss, list(inputs))]


def assert_exact(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        Budget().exact64(f"result {index} (0: logps)", a, b)


def check_budget(got: Sequence[Tensor], peer: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    for index, (a, b, c) in enumerate(zip(got, peer, truth, strict=True)):
        Budget().check(f"result {index} (0: logps)", a, b, c)


def check_exact(
    lm_head: Any,
    dense: DenseParts,
    params: Sequence[Tensor] = (),
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    workspace_mib: float = 0.1,
    hidden_size: int = D,
    vocab_size: int = V,
    **options: Any,
) -> None:
    """Check forward and the gradients of hidden states and `params` in fp64, in several blocks."""
    hidden, labels, g = problem(vocab_size=vocab_size, hidden_size=hidden_size)
    got = results(
        linear_logps(hidden, lm_head, labels, workspace_mib=workspace_mib, **options),
        g,
        [hidden, *params],
    )
    weight, bias = dense()
    logits = naive_logits(hidden, weight, bias, scale, softcap)
    assert_exact(got, results(gather_logps(logits, labels), g, [hidden, *params]))


def four_bit_linear(
    vocab_size=V,
    hidden_size=D,
    *,
    quant_type="nf4",
    nested=True,
    blocksize=64,
    storage=torch.uint8,
    dtype=torch.float32,
    bias=False,
):
    import bitsandbytes as bnb

    linear = bnb.nn.Linear4bit(hidden_size, vocab_size, bias=bias)
    linear.weight = bnb.nn.Params4bit(
        torch.randn(vocab_size, hidden_size).to(dtype),
        requires_grad=False,
        blocksize=blocksize,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
        module=linear,
    )
    return placed(linear)  # which quantises it


def eight_bit_linear(vocab_size=V, *, bias=False):
    import bitsandbytes as bnb

    linear = bnb.nn.Linear8bitLt(D, vocab_size, bias=bias, has_fp16_weights=False)
    linear.weight.data.normal_()
    return placed(linear)


def recipe(module):
    """The whole 4-bit weight after the written description of the format (ecosystem notes)."""
    packed, state = module.weight.data, module.weight.quant_state
    absmax = state.absmax
    if state.nested:
        spread = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: absmax.numel()]
        absmax = state.state2.code[absmax.long()] * spread + state.offset
    raw = packed.reshape(-1).view(torch.uint8)
    count = state.shape.numel()
    index = torch.stack((raw >> 4, raw & 0xF), 1).reshape(-1)[:count].long()
    scale = absmax.float().repeat_interleave(state.blocksize)[:count]
    return (state.code[index] * scale).to(state.dtype).reshape(state.shape)
