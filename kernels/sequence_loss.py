"""From token log-probs to log-ratios, the DIL loss, and its derivative for each token.

S sequences packed into T tokens; sequence s has the tokens bounds[s] to bounds[s + 1].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dilkern.kernels import configs
from dilkern.kernels.operands import dense, on_device


@triton.jit
def _sequence_loss_kernel(
    logps_ptr,  # (T,)
    ref_tokens_ptr,  # (T,) or None
    ref_ptr,  # (S,) or None
    scored_ptr,  # (T,) bool
    bounds_ptr,  # (S + 1,)
    is_chosen_ptr,  # (S,) bool
    factor_ptr,  # (S,) what the sequence counts in the loss
    sums_ptr,  # (S,) out: policy log-prob
    ratios_ptr,  # (S,) out: f
    values_ptr,  # (S,) out: l_1 or l_-1 of beta f
    grad_ptr,  # (T,) out: d loss / d logp of the token
    beta,
    limit,
    param,
    H: tl.constexpr,
    BY_LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0)
    begin = tl.load(bounds_ptr + s).to(tl.int64)
    end = tl.load(bounds_ptr + s + 1).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    chosen = tl.load(is_chosen_ptr + s) != 0
    policy = tl.zeros((BLOCK,), dtype=tl.float32)
    ratio = tl.zeros((BLOCK,), dtype=tl.float32)
    count = tl.zeros((BLOCK,), dtype=tl.float32)
    for a in tl.range(begin, end, BLOCK):
        inside = a + offs < end
        scored = tl.load(scored_ptr + a + offs, mask=inside, other=0) != 0
        logp = tl.load(logps_ptr + a + offs, mask=scored, other=0.0)
        policy += logp
        count += scored.to(tl.float32)
        if ref_tokens_ptr is not None:
            logp -= tl.load(ref_tokens_ptr + a + offs, mask=scored, other=0.0)
        ratio += logp
    f = tl.sum(ratio, 0)
    if ref_ptr is not None:
        f -= tl.load(ref_ptr + s)
    per_token = 1.0
    if BY_LENGTH:
        length = tl.maximum(tl.sum(count, 0), 1.0)
        f = f / length
        per_token = 1.0 / length
    value, slope = H(f * beta, chosen, limit, param)
    tl.store(sums_ptr + s, tl.sum(policy, 0))
    tl.store(ratios_ptr + s, f)
    tl.store(values_ptr + s, value)
    g = slope * beta * per_token * tl.load(factor_ptr + s)
    for a in tl.range(begin, end, BLOCK):
        inside = a + offs < end
        scored = tl.load(scored_ptr + a + offs, mask=inside, other=0) != 0
        tl.store(grad_ptr + a + offs, tl.where(scored, g, 0.0), mask=inside)


class SequenceLoss(NamedTuple):
    loss: Tensor  # () sum of factor * value
    logps: Tensor  # (S,) policy log-prob, nats
    log_ratios: Tensor  # (S,) f, per token if by length
    values: Tensor  # (S,) l_1 or l_-1 of beta f
    grad: Tensor  # (T,) d loss / d token_logps


def sequence_loss(
    token_logps: Tensor,  # (T,) fp32
    scored: Tensor,  # (T,) bool
    bounds: Tensor,  # (S + 1,) integer, rising from 0 to T
    is_chosen: Tensor,  # (S,) bool
    factor: Tensor,  # (S,) fp32
    *,
    h: Any,  # one of h_functions, or any jit function of that form
    ref_token_logps: Tensor | None = None,  # (T,) fp32
    ref_logps: Tensor | None = None,  # (S,) fp32
    beta: float = 1.0,
    length_normalize: bool = True,
    max_log_ratio: float | None = 10.0,
    param: float = 0.0,  # of h
) -> SequenceLoss:
    """Compute the sum over sequences of factor * l_{1 or -1}(beta f), and its slope per token.

    One launch, one program per sequence, no atomics; `factor` carries weights and the denominators of
    the means. A sequence without scored tokens has f = 0 before its reference is subtracted.
    """
    sequences = is_chosen.numel()
    logps, ratios, values = (
        token_logps.new_empty(sequences, dtype=torch.float32) for _ in range(3)
    )
    grad = token_logps.new_empty(token_logps.shape, dtype=torch.float32)
    config = configs.rows("sequence", token_logps.device)
    if sequences:
        with on_device(token_logps):
            _sequence_loss_kernel[(sequences,)](
                dense(token_logps),
                dense(ref_token_logps),
                dense(ref_logps),
                dense(scored),
                dense(bounds),
                dense(is_chosen),
                dense(factor),
                logps,
                ratios,
                values,
                grad,
                beta,
                float("inf") if max_log_ratio is None else max_log_ratio,
                param,
                H=h,
                BY_LENGTH=length_normalize,
                BLOCK=config.block,
                **config.launch,
            )
    # A sequence without weight has no part in the loss, whatever its value.
    terms = torch.where(factor == 0, 0.0, values * factor)
    return SequenceLoss(terms.sum(), logps, ratios, values, grad)
