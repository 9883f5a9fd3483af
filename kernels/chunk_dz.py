"""Gradient with respect to a block of logits that a library product left in memory.

n tokens, v words of the block that starts at word `start`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dilkern.kernels import configs
from dilkern.kernels.operands import dense
from dilkern.kernels.tile_math import add_bias, store_dz_tile


# Not `v`: a mask `offs_v < v` of unknown alignment costs every vector access.
@triton.jit(do_not_specialize=["n", "start", "tiles"])
def _chunk_dz_kernel(
    z_ptr,  # (n, v) fp32 products
    bias_ptr,  # (v,) or None
    labels_ptr,  # (n,)
    lse_ptr,  # (n,)
    lost_ptr,  # (n,)
    miss_ptr,  # (n,)
    g_ptr,  # (n,)
    dz_ptr,  # (n, v) out
    n,
    v,
    start,
    tiles,
    stride_z,
    stride_dz,
    scale,
    softcap,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    word = tl.program_id(0) % tiles * BLOCK_V
    offs_t = tl.program_id(0) // tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_v = word + tl.arange(0, BLOCK_V)
    inside = (offs_t[:, None] < n) & (offs_v[None, :] < v)
    ptrs = z_ptr + offs_t.to(tl.int64)[:, None] * stride_z + offs_v[None, :]
    raw = add_bias(tl.load(ptrs, mask=inside, other=0.0), bias_ptr, offs_v, v)
    store_dz_tile(
        raw,
        offs_t,
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


def chunk_dz(
    z: Tensor,  # (n, v) fp32 products, rows contiguous
    labels: Tensor,  # (n,) word numbers in the whole vocabulary
    lse: Tensor,  # (2, n) fp32 log-sum-exp, and what rounding it lost
    miss: Tensor,  # (n,) fp32, 1 - p_y
    g: Tensor,  # (n,) fp32
    dz: Tensor,  # (n, v) written, may be z itself
    *,
    start: int,
    bias: Tensor | None = None,  # (v,)
    scale: float = 1.0,
    softcap: float = 0.0,
) -> None:
    """Write g (1[v = y] - p_v) (1 - (z_v / softcap)^2); see tile_math.store_dz_tile."""
    n, v = z.shape
    assert z.stride(1) == dz.stride(1) == 1
    config = configs.chunk(z.device)
    tiles = triton.cdiv(v, config.block)
    _chunk_dz_kernel[(tiles * triton.cdiv(n, config.block_t),)](
        z,
        dense(bias),
        dense(labels),
        dense(lse[0]),
        dense(lse[1]),
        dense(miss),
        dense(g),
        dz,
        n,
        v,
        start,
        tiles,
        z.stride(0),
        dz.stride(0),
        scale,
        softcap,
        BLOCK_T=config.block_t,
        BLOCK_V=config.block,
        SCALED=scale != 1.0,
        CAPPED=softcap != 0.0,
        **config.launch,
    )
