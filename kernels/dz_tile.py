"""Gradient of the log-probs with respect to a block of logits, recomputed: for trainable heads.

n tokens, v words of the block that starts at word `start`, D hidden size.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dilkern.kernels import configs
from dilkern.kernels.operands import tile_operands
from dilkern.kernels.tile_math import LOG2E, add_bias, logits, product


@triton.jit(do_not_specialize=["n", "v", "start"])
def _dz_tile_kernel(
    h,  # (n, d) pointer or descriptor
    w,  # (v, d) pointer or descriptor
    bias_ptr,  # (v,) or None
    labels_ptr,  # (n,)
    z_y_ptr,  # (n,) target logits
    logps_ptr,  # (n,)
    miss_ptr,  # (n,) 1 - p_y
    g_ptr,  # (n,) d loss / d logp, times scale
    dz_ptr,  # (n, v) out
    n,
    v,
    d,
    start,
    stride_h,
    stride_w,
    stride_dz,
    scale,
    softcap,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    tiles_t = tl.cdiv(n, BLOCK_T)
    word = tl.program_id(0) // tiles_t * BLOCK_V
    row = tl.program_id(0) % tiles_t * BLOCK_T
    raw = product(
        h,
        w,
        row,
        word,
        n,
        v,
        d,
        stride_h,
        stride_w,
        BLOCK_T,
        BLOCK_V,
        BLOCK_D,
        DESCRIPTORS,
        EVEN_D,
        PRECISION,
    )
    offs_t = row + tl.arange(0, BLOCK_T)
    offs_v = word + tl.arange(0, BLOCK_V)
    mask_t = offs_t < n
    raw = add_bias(raw, bias_ptr, offs_v, v)
    z, t = logits(raw, scale, softcap, SCALED, CAPPED)
    z_y = tl.load(z_y_ptr + offs_t, mask=mask_t, other=0.0)
    logps = tl.load(logps_ptr + offs_t, mask=mask_t, other=0.0)
    g = tl.load(g_ptr + offs_t, mask=mask_t, other=0.0)
    label = (tl.load(labels_ptr + offs_t, mask=mask_t, other=-1) - start).to(tl.int32)
    # Not z - lse: lse is a rounded difference of these two, and large where both logits are.
    dz = -tl.exp2(((z - z_y[:, None]) + logps[:, None]) * LOG2E)
    if tl.sum(((label >= word) & (label < word + BLOCK_V)).to(tl.int32), 0) > 0:
        miss = tl.load(miss_ptr + offs_t, mask=mask_t, other=0.0)
        dz = tl.where(offs_v[None, :] == label[:, None], miss[:, None], dz)
    dz *= g[:, None]
    if CAPPED:
        dz *= 1.0 - t * t
    inside = mask_t[:, None] & (offs_v[None, :] < v)
    ptrs = dz_ptr + offs_t.to(tl.int64)[:, None] * stride_dz + offs_v[None, :]
    tl.store(ptrs, dz.to(dz_ptr.dtype.element_ty), mask=inside)


def dz_tile(
    h: Tensor,  # (n, D)
    weight: Tensor,  # (v, D)
    labels: Tensor,  # (n,) word numbers in the whole vocabulary
    z_y: Tensor,  # (n,) fp32 target logits
    logps: Tensor,  # (n,) fp32
    miss: Tensor,  # (n,) fp32, 1 - p_y
    g: Tensor,  # (n,) fp32
    dz: Tensor,  # (n, v) written
    *,
    start: int,
    bias: Tensor | None = None,  # (v,)
    scale: float = 1.0,
    softcap: float = 0.0,
) -> None:
    """Write g (1[v = y] - p_v) (1 - (z_v / softcap)^2); `g` carries the factor `scale`."""
    n, v = dz.shape
    config = configs.tile(h.device, h.dtype)
    operands = tile_operands(h, weight, config)
    _dz_tile_kernel[(triton.cdiv(v, config.block_v) * triton.cdiv(n, config.block_t),)](
        operands.h,
        operands.w,
        bias,
        labels,
        z_y,
        logps,
        miss,
        g,
        dz,
        n,
        v,
        operands.d,
        start,
        operands.stride_h,
        operands.stride_w,
        dz.stride(0),
        scale,
        softcap,
        SCALED=scale != 1.0,
        CAPPED=softcap != 0.0,
        **operands.constants,
        **config.launch,
    )
