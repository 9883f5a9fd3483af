"""What the head tests share: problems, the naive truth, and the one comparison.

Truth is fp64 autograd over the full logits of the dense-equivalent weight. In 16 bits the error may
be at most twice that of PyTorch in the same dtype, plus the rounding of the result's own format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dilkern import linear_logps

V, D, T = 301, 64, 23
DenseParts = Callable[[], tuple[Tensor, Tensor | None]]


def problem(
    dtype: torch.dtype = torch.float64, *, vocab_size: int = V, hidden_size: int = D
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states (T, D) that require grad, labels (T,), two ignored, and g (T,)."""
    hidden = torch.randn(T, hidden_size, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab_size, (T,))
    labels[[0, 7]] = -100
    labels[1], labels[2] = vocab_size - 1, 0
    return hidden, labels, torch.randn(T, dtype=torch.float64)


def gather_logps(logits: Tensor, labels: Tensor) -> Tensor:
    scored = labels != -100
    logps = logits.log_softmax(-1)
    picked = logps.gather(-1, labels.where(scored, 0).unsqueeze(-1)).squeeze(-1)
    return picked.where(scored, 0.0)


def naive_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float
) -> Tensor:
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * scale
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def results(
    logps: Tensor, g: Tensor, inputs: Sequence[Tensor], retain: bool = False
) -> list[Tensor]:
    """Return the logps and the gradients of (g * logps).sum() in fp64."""
    loss = (logps * g.to(logps.dtype)).sum()
    grads = torch.autograd.grad(loss, list(inputs), retain_graph=retain)
    return [logps.detach().double(), *(x.double() for x in grads)]


def assert_close(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> None:
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        error = (a - b).abs().max() / b.abs().max().clamp_min(1e-3)
        assert error <= tolerance, f"result {index} (0: logps) is off by {error:.3g}"


def check_exact(
    lm_head: Any,
    dense: DenseParts,
    params: Sequence[Tensor] = (),
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    tolerance: float = 1e-9,
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
    assert_close(got, results(gather_logps(logits, labels), g, [hidden, *params]), tolerance)


def check_budget(
    got: Sequence[Tensor], peer: Sequence[Tensor], truth: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """error <= 2 * error of the peer + rounding of the result itself, largest and mean."""
    for index, (a, b, c) in enumerate(zip(got, peer, truth, strict=True)):
        # The logps are fp32; a gradient is rounded to its tensor's dtype.
        eps = torch.finfo(torch.float32 if index == 0 else dtype).eps
        band = 4 * eps * c.abs().max()
        for reduce in (Tensor.max, Tensor.mean):
            error, allowed = reduce((a - c).abs()), 2 * reduce((b - c).abs()) + band
            assert error <= allowed, f"result {index}: {error:.3g} > {allowed:.3g}"
