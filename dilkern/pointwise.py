"""The small op in one kernel launch: from token log-probs to a pointwise DIL loss and its slopes.

The same numbers as `preference_loss`, without its dozens of small launches; it serves the h-functions
that have a Triton twin. S sequences, T tokens (flat). Equations: docs/math.md.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dilkern.sequence_loss import (
    PreferenceLossOutput,
    Settings,
    check_both_sides,
    check_strict,
    clipped,
    split,
    sum_per_sequence,
)

_TRITON_INSTALLED = find_spec("triton") is not None


def serves(settings: Settings, backend: str, token_logps: Tensor) -> bool:
    """Whether the kernel computes this loss here; else the torch path does."""
    s = settings
    on_gpu = token_logps.device.type in ("cuda", "xpu")
    return (
        _TRITON_INSTALLED
        and (backend == "triton" or (backend == "auto" and on_gpu))
        and token_logps.dtype is torch.float32
        and s.entry.triton is not None
        and len(s.params) < 2
        and not (s.pairwise or s.label_smoothing or s.mixture or s.sft_weight)
    )


@torch.library.custom_op("dilkern::pointwise_loss", mutates_args=())
def _pointwise(
    token_logps: Tensor,  # (T,)
    scored: Tensor,  # (T,) bool
    bounds: Tensor,  # (S+1,)
    is_chosen: Tensor,  # (S,) bool
    factor: Tensor,  # (S,)
    ref_token_logps: Tensor | None,  # (T,)
    ref_logps: Tensor | None,  # (S,)
    twin: str,
    beta: float,
    length_normalize: bool,
    limit: float,
    param: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss (), logps, f, values (S,), d loss / d token_logps (T,)."""
    kernel = import_module("dilkern.kernels.sequence_loss")
    h_functions = import_module("dilkern.kernels.h_functions")
    result = kernel.sequence_loss(
        token_logps.contiguous(),
        scored.contiguous(),
        bounds,
        is_chosen,
        factor,
        h=getattr(h_functions, twin),
        ref_token_logps=None if ref_token_logps is None else ref_token_logps.contiguous(),
        ref_logps=ref_logps,
        beta=beta,
        length_normalize=length_normalize,
        max_log_ratio=limit,
        param=param,
    )
    return tuple(result)


@_pointwise.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    token_logps, is_chosen = inputs[0], inputs[3]
    per_sequence = [token_logps.new_empty(is_chosen.shape) for _ in range(3)]
    return (token_logps.new_empty(()), *per_sequence, torch.empty_like(token_logps))


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[4])


def _backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    (slopes,) = ctx.saved_tensors
    return (None if grad is None else grad * slopes, *[None] * 11)


_pointwise.register_autograd(_backward, setup_context=_setup_context)


def pointwise_loss(
    token_logps: Tensor,  # (S, L) or (T,)
    scored: Tensor,  # like token_logps, bool
    settings: Settings,
    *,
    cu_seqlens: Tensor | None,  # (S+1,)
    ref_logps: Tensor | None,  # (S,), the shape of token_logps, or None: f = log pi_theta
    is_chosen: Tensor | None,  # (S,) bool
    weights: Tensor | None,  # (S,)
    counts: tuple[Tensor | float, Tensor | float] | None,
    strict: bool,
) -> PreferenceLossOutput:
    """Compute what `preference_loss` computes, for settings that `serves` accepts."""
    s, device = settings, token_logps.device
    lengths = sum_per_sequence(scored.to(token_logps.dtype), cu_seqlens)
    bounds = cu_seqlens
    if bounds is None:
        bounds = torch.arange(token_logps.shape[0] + 1, device=device) * token_logps.shape[1]
    sides = torch.arange(lengths.shape[0], device=device) < lengths.shape[0] // 2
    sides = sides if is_chosen is None else is_chosen
    if counts is None and is_chosen is not None:
        check_both_sides(int(sides.sum()), int((~sides).sum()))
    valid = lengths > 0
    factor = valid.to(token_logps.dtype)
    if weights is not None:
        factor = factor * weights.detach()
    count_w, count_l = ((valid & sides).sum(), (valid & ~sides).sum()) if counts is None else counts
    count = torch.where(sides, count_w, count_l)
    factor = factor / torch.where(count > 0, count, 1)
    by_token = ref_logps is not None and ref_logps.shape == token_logps.shape
    reference = None if ref_logps is None else ref_logps.to(token_logps.dtype)
    loss, logps, f, values, _ = _pointwise(
        token_logps.reshape(-1), scored.reshape(-1), bounds, sides, factor,
        reference.reshape(-1) if by_token and reference is not None else None,
        None if by_token else reference,
        s.entry.triton or "", s.beta, s.length_normalize,
        float("inf") if s.limit is None else s.limit,
        next(iter(s.params.values()), 0.0),
    )  # fmt: skip
    (f_w, f_l), (logps_w, logps_l) = split(f, is_chosen), split(logps, is_chosen)
    (n_w, n_l), (values_w, values_l) = split(lengths, is_chosen), split(values, is_chosen)
    hits_w, hits_l = clipped(s.beta * f_w, True, s), clipped(s.beta * f_l, False, s)
    clip_fraction = check_strict(torch.cat([hits_w, hits_l]), f, s, strict)
    return PreferenceLossOutput(
        loss,
        logps_w,
        logps_l,
        f_w,
        f_l,
        clip_fraction,
        n_w,
        n_l,
        values_w,
        values_l,
        hits_w,
        hits_l,
        s.beta,
    )
