"""What a pass over the vocabulary comes to: the label's logit, log-prob, log-sum-exp, and u.

n tokens, D hidden size. Equation numbers are those of docs/math.md.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dilkern.kernels import configs
from dilkern.kernels.operands import dense, dense_rows, transform_of
from dilkern.kernels.tile_math import LN2, LN2_HIGH, LN2_LOW, State, exp, log1p, logits


@triton.jit(do_not_specialize=["n", "store_u"])
def _finish_rows_kernel(
    hidden_ptr,  # (n, d)
    w_ptr,  # (n, d) rows of the head that belong to the labels
    labels_ptr,  # (n,)
    transform,  # bias (V,)
    state,
    sums_ptr,  # (n, d), if store_u
    logps_ptr,  # (n,) out, as the next two
    peak_ptr,
    log_sum_ptr,
    u_ptr,  # (n, d) out, if store_u; may be sums_ptr
    n,
    d,
    stride_hidden,
    stride_w,
    stride_sums,
    stride_u,
    scale,
    store_u,  # run-time: log-probs have the same bits with and without u
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < n
    rows = offs_t.to(tl.int64)[:, None]
    acc = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for k in tl.range(0, d, BLOCK_D):
        offs_d = k + tl.arange(0, BLOCK_D)[None, :]
        inside = mask_t[:, None] & (offs_d < d)
        h = tl.load(hidden_ptr + rows * stride_hidden + offs_d, mask=inside, other=0.0)
        w = tl.load(w_ptr + rows * stride_w + offs_d, mask=inside, other=0.0)
        acc += h.to(tl.float32) * w.to(tl.float32)
    raw = tl.sum(acc, 1)
    if transform.bias is not None:
        label = tl.load(labels_ptr + offs_t, mask=mask_t, other=0)
        raw += tl.load(transform.bias + label, mask=mask_t, other=0.0).to(tl.float32)
    z_y, t_y = logits(raw, transform)
    top = tl.load(state.top + offs_t, mask=mask_t, other=0.0)
    total = tl.load(state.total + offs_t, mask=mask_t, other=0.0)
    anchor = tl.load(state.anchor + offs_t, mask=mask_t, other=0.0)
    # The target against the wrong words, whose log-sum-exp is top ln 2 + log(total) (5): without
    # overflow, and without a difference of what nearly cancels.
    # Without a wrong word `top` is -inf; its second part would be +inf.
    low = tl.where(top == -float("inf"), 0.0, top * LN2_LOW)
    lead = (z_y - top * LN2_HIGH) - low
    ahead = lead > 0
    # `lead` may be inf, of which `exp` knows nothing, and e^-200 is 0; or NaN, which a minimum loses.
    distance = tl.abs(lead)
    small = exp(-tl.where(distance > 200.0, 200.0, distance))
    over = log1p(total * small)
    rest = tl.log2(total + small) * LN2
    tl.store(logps_ptr + offs_t, tl.where(ahead, -over, lead - rest), mask=mask_t)
    # The log-sum-exp stays a pair, a number near the peak and what is above it: exp(z - lse) in
    # backward has the error of lse, and a large lse rounded once is off by more than the logits are.
    tl.store(peak_ptr + offs_t, tl.where(ahead, z_y, top * LN2_HIGH), mask=mask_t)
    # From 2^22 on neighbours of the peak lie half a unit or more apart; 2^-21 of it is more than the
    # roundings come to, so that no exponent of backward is above 0.
    exact = (tl.abs(top) < 4194304.0) | (top == -float("inf"))
    slack = tl.where(exact, 0.0, tl.abs(top) * 4.76837158203125e-07)
    tl.store(log_sum_ptr + offs_t, tl.where(ahead, over, rest + low) + slack, mask=mask_t)
    if store_u != 0:
        share = tl.where(ahead, small / (1.0 + total * small), 1.0 / (total + small))
        miss = total * share  # 1 - p_y
        if transform.softcap is not None:
            miss *= 1.0 - t_y * t_y
        # From `top` to the anchor of the sums (6).
        share *= tl.where(top == anchor, 1.0, tl.exp2(anchor - top))
        for k in tl.range(0, d, BLOCK_D):
            offs_d = k + tl.arange(0, BLOCK_D)[None, :]
            inside = mask_t[:, None] & (offs_d < d)
            w = tl.load(w_ptr + rows * stride_w + offs_d, mask=inside, other=0.0).to(tl.float32)
            sums = tl.load(sums_ptr + rows * stride_sums + offs_d, mask=inside, other=0.0)
            u = (w * miss[:, None] - sums * share[:, None]) * scale
            tl.store(u_ptr + rows * stride_u + offs_d, u.to(u_ptr.dtype.element_ty), mask=inside)


def finish_rows(
    hidden: Tensor,  # (n, D)
    w_y: Tensor,  # (n, D) rows of the head for the labels
    labels: Tensor,  # (n,)
    state: Tensor,  # (3, n) fp32, the fields of `State`
    sums: Tensor,  # (n, D) fp32, sum over wrong words of P w; or (0, D): no u
    logps: Tensor,  # (n,) fp32, written
    lse: Tensor,  # (2, n) fp32, written: peak, and log of the sum of exp(z - peak)
    u: Tensor,  # (n, D) written, d logp / d hidden; may be `sums` itself; or (0, D)
    *,
    bias: Tensor | None = None,  # (V,)
    scale: float = 1.0,
    softcap: float = 0.0,
) -> None:
    """Take the label into the sums of the wrong words: log-prob (5), log-sum-exp, and u (6)."""
    n, d = hidden.shape
    assert logps.stride(0) == lse.stride(1) == state.stride(1) == sums.stride(1) == u.stride(1) == 1
    hidden, w_y = dense_rows(hidden), dense_rows(w_y)
    config = configs.rows("dot", hidden.device)
    _finish_rows_kernel[(triton.cdiv(n, config.block_t),)](
        hidden_ptr=hidden,
        w_ptr=w_y,
        labels_ptr=dense(labels),
        transform=transform_of(bias, scale, softcap),
        state=State(*state),
        sums_ptr=sums,
        logps_ptr=logps,
        peak_ptr=lse[0],
        log_sum_ptr=lse[1],
        u_ptr=u,
        n=n,
        d=d,
        stride_hidden=hidden.stride(0),
        stride_w=w_y.stride(0),
        stride_sums=sums.stride(0),
        stride_u=u.stride(0),
        scale=float(scale),
        store_u=int(u.shape[0] > 0),
        BLOCK_T=config.block_t,
        BLOCK_D=config.block,
        **config.launch,
    )
