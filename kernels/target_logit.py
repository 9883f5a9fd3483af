"""The logit of each token's own label: a dot product per row, in fp32."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dilkern.kernels import configs
from dilkern.kernels.operands import dense, dense_rows
from dilkern.kernels.tile_math import logits


@triton.jit(do_not_specialize=["n"])
def _target_logit_kernel(
    h_ptr,  # (n, d)
    w_ptr,  # (n, d) rows of the head that belong to the labels
    bias_ptr,  # (n,) or None
    z_ptr,  # (n,) out
    n,
    d,
    stride_h,
    stride_w,
    scale,
    softcap,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < n
    rows = offs_t.to(tl.int64)[:, None]
    acc = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for k in tl.range(0, d, BLOCK_D):
        offs_d = k + tl.arange(0, BLOCK_D)[None, :]
        inside = mask_t[:, None] & (offs_d < d)
        h = tl.load(h_ptr + rows * stride_h + offs_d, mask=inside, other=0.0)
        w = tl.load(w_ptr + rows * stride_w + offs_d, mask=inside, other=0.0)
        acc += h.to(tl.float32) * w.to(tl.float32)
    raw = tl.sum(acc, 1)
    if bias_ptr is not None:
        raw += tl.load(bias_ptr + offs_t, mask=mask_t, other=0.0).to(tl.float32)
    z, _ = logits(raw, scale, softcap, SCALED, CAPPED)
    tl.store(z_ptr + offs_t, z, mask=mask_t)


def target_logit(
    h: Tensor,  # (n, D)
    w_y: Tensor,  # (n, D)
    out: Tensor,  # (n,) fp32, written
    *,
    bias: Tensor | None = None,  # (n,) the labels' biases
    scale: float = 1.0,
    softcap: float = 0.0,
) -> None:
    """Write z_y = softcap tanh(scale (w_y . h + b_y) / softcap)."""
    n, d = h.shape
    assert out.is_contiguous()
    h, w_y = dense_rows(h), dense_rows(w_y)
    config = configs.dot(h.device)
    _target_logit_kernel[(triton.cdiv(n, config.block_t),)](
        h,
        w_y,
        dense(bias),
        out,
        n,
        d,
        h.stride(0),
        w_y.stride(0),
        scale,
        softcap,
        BLOCK_T=config.block_t,
        BLOCK_D=config.block,
        SCALED=scale != 1.0,
        CAPPED=softcap != 0.0,
        **config.launch,
    )
