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
from dilkern.kernels.operands import on_device


@triton.jit(do_not_specialize=["sequences"])
def _sequence_loss_kernel(
    logps_ptr,  # (T,)
    ref_tokens_ptr,  # (T,) or None
    ref_ptr,  # (S,) or None
    scored_ptr,  # (T,) bool
    bounds_ptr,  # (S + 1,)
    is_chosen_ptr,  # (S,) bool
    sums_ptr,  # (S,) out: policy log-prob
    ratios_ptr,  # (S,) out: log-ratio as the loss uses it
    terms_ptr,  # (S,) out: weighted term of the loss
    grad_ptr,  # (T,) out: d loss / d logp of the token
    sequences,
    beta,
    limit,
    H: tl.constexpr,
    BY_LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0)
    begin = tl.load(bounds_ptr + s).to(tl.int64)
    end = tl.load(bounds_ptr + s + 1).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    chosen = tl.load(is_chosen_ptr + s) != 0
    # How many sequences share this one's side: every program counts for itself, nothing waits.
    alike = tl.zeros((BLOCK,), dtype=tl.float32)
    for a in tl.range(0, sequences, BLOCK):
        inside = a + offs < sequences
        other = tl.load(is_chosen_ptr + a + offs, mask=inside, other=0) != 0
        alike += tl.where(inside & (other == chosen), 1.0, 0.0)
    weight = 1.0 / tl.sum(alike, 0)
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
    log_ratio = tl.sum(ratio, 0)
    if ref_ptr is not None:
        log_ratio -= tl.load(ref_ptr + s)
    scale = beta
    if BY_LENGTH:
        scale = beta / tl.maximum(tl.sum(count, 0), 1.0)
    value, slope = H(log_ratio * scale, chosen, limit)
    tl.store(sums_ptr + s, tl.sum(policy, 0))
    tl.store(ratios_ptr + s, log_ratio * scale)
    tl.store(terms_ptr + s, value * weight)
    g = slope * scale * weight
    for a in tl.range(begin, end, BLOCK):
        inside = a + offs < end
        scored = tl.load(scored_ptr + a + offs, mask=inside, other=0) != 0
        tl.store(grad_ptr + a + offs, tl.where(scored, g, 0.0), mask=inside)


class SequenceLoss(NamedTuple):
    loss: Tensor  # () sum of terms
    logps: Tensor  # (S,) policy log-prob, nats
    log_ratios: Tensor  # (S,) beta f, f per token if by length
    terms: Tensor  # (S,) each divided by the number of sequences on its side
    grad: Tensor  # (T,) d loss / d token_logps


def sequence_loss(
    token_logps: Tensor,  # (T,) fp32, contiguous
    scored: Tensor,  # (T,) bool, contiguous
    bounds: Tensor,  # (S + 1,) integer, rising from 0 to T
    is_chosen: Tensor,  # (S,) bool
    *,
    h: Any,  # one of h_functions, or any jit function of that form
    ref_token_logps: Tensor | None = None,  # (T,) fp32
    ref_logps: Tensor | None = None,  # (S,) fp32
    beta: float = 1.0,
    length_normalize: bool = True,
    max_log_ratio: float | None = 10.0,
) -> SequenceLoss:
    """Compute mean over chosen of l_1(beta f) + mean over rejected of l_-1(beta f), and its slope.

    One launch, one program per sequence, no atomics. A sequence without scored tokens has f = 0
    before its sequence-level reference is subtracted.
    """
    sequences = is_chosen.numel()
    per_sequence = [token_logps.new_empty(sequences, dtype=torch.float32) for _ in range(3)]
    grad = token_logps.new_empty(token_logps.shape, dtype=torch.float32)
    config = configs.sequence(token_logps.device)
    if sequences:
        with on_device(token_logps):
            _sequence_loss_kernel[(sequences,)](
                token_logps,
                ref_token_logps,
                ref_logps,
                scored,
                bounds,
                is_chosen,
                *per_sequence,
                grad,
                sequences,
                beta,
                float("inf") if max_log_ratio is None else max_log_ratio,
                H=h,
                BY_LENGTH=length_normalize,
                BLOCK=config.block,
                **config.launch,
            )
    logps, ratios, terms = per_sequence
    return SequenceLoss(terms.sum(), logps, ratios, terms, grad)
