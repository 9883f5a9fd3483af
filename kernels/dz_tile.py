"""Gradient of the log-probs with respect to a block of logits, recomputed: for trainable heads.

n tokens, v words of the block that starts at word `start`, D hidden size.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dilkern.kernels import configs
from dilkern.kernels.operands import dense, tile_operands
from dilkern.kernels.tile_math import add_bias, product, store_dz_tile


# Not `v`: a mask `offs_v < v` of unknown alignment costs every vector access.
@triton.jit(do_not_specialize=["n", "start"])
def _dz_tile_kernel(
    h,  # (n, d) pointer or descriptor
    w,  # (v, d) pointer or descriptor
    bias_ptr,  # (v,) or None
    labels_ptr,  # (n,)
    lse_ptr,  # (n,)
    lost_ptr,  # (n,)
    miss_ptr,  # (n,)
    g_ptr,  # (n,)
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
    raw = add_bias(raw, bias_ptr, word + tl.arange(0, BLOCK_V), v)
    store_dz_tile(
        raw,
        row + tl.arange(0, BLOCK_T),
        word,
        labels_ptr,
        lse_ptr,
        lost_ptr,
        miss_ptr,
        g_ptr,
        dz_ptr,
        n,
        v,
        start,
        stride_dz,
        scale,
        softcap,
        BLOCK_V,
        SCALED,
        CAPPED,
    )


def dz_tile(
    h: Tensor,  # (n, D)
    weight: Tensor,  # (v, D)
    labels: Tensor,  # (n,) word numbers in the whole vocabulary
    lse: Tensor,  # (2, n) fp32 log-sum-exp, and what rounding it lost
    miss: Tensor,  # (n,) fp32, 1 - p_y
    g: Tensor,  # (n,) fp32
    dz: Tensor,  # (n, v) written
    *,
    start: int,
    bias: Tensor | None = None,  # (v,)
    scale: float = 1.0,
    softcap: float = 0.0,
) -> None:
    """Write g (1[v = y] - p_v) (1 - (z_v / softcap)^2); see tile_math.store_dz_tile."""
    n, v = dz.shape
    assert dz.stride(1) == 1
    config = configs.tile(h.device, h.dtype)
    operands = tile_operands(h, weight, config)
    _dz_tile_kernel[(triton.cdiv(v, config.block_v) * triton.cdiv(n, config.block_t),)](
        operands.h,
        operands.w,
        dense(bias),
        dense(labels),
        dense(lse[0]),
        dense(lse[1]),
        dense(miss),
        dense(g),
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
        **config.launch(softcap),
    )
