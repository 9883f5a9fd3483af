"""The small op in one kernel launch: from token log-probs to a pointwise DIL loss and its slopes.

It serves the h-functions that have a Triton twin; `preference.py` says when. S sequences, T tokens
(flat). Equations: docs/math.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor


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
        token_logps,
        scored,
        bounds,
        is_chosen,
        factor,
        h=getattr(h_functions, twin),
        ref_token_logps=ref_token_logps,
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


class PointwiseLoss(NamedTuple):
    loss: Tensor  # (), differentiable in the token log-probs
    logps: Tensor  # (S,) summed, nats
    log_ratios: Tensor  # (S,) f, per token if length-normalised
    values: Tensor  # (S,) l_1 or l_-1 of beta f


def pointwise_loss(
    token_logps: Tensor,  # (S, L) or (T,), fp32
    scored: Tensor,  # like token_logps, bool
    bounds: Tensor,  # (S+1,) first token of each sequence in the flat order
    is_chosen: Tensor,  # (S,) bool
    factor: Tensor,  # (S,) what each sequence counts in the loss
    *,
    ref_token_logps: Tensor | None,  # like token_logps
    ref_logps: Tensor | None,  # (S,)
    twin: str,  # name in dilkern.kernels.h_functions
    beta: float,
    length_normalize: bool,
    limit: float,  # inf for none
    param: float,  # of h
) -> PointwiseLoss:
    """Compute the sum over sequences of factor * l_{1 or -1}(beta f)."""
    outputs = _pointwise(
        token_logps.reshape(-1),
        scored.reshape(-1),
        bounds,
        is_chosen,
        factor,
        None if ref_token_logps is None else ref_token_logps.reshape(-1),
        ref_logps,
        twin,
        beta,
        length_normalize,
        limit,
        param,
    )
    return PointwiseLoss(*outputs[:4])
