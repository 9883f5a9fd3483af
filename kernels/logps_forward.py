"""Softmax statistics, and P if asked, straight from hidden states and head: no logits in memory.

n tokens, v words of the block that starts at word `start`, D hidden size.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dilkern.kernels import configs
from dilkern.kernels.operands import dense, tile_operands
from dilkern.kernels.tile_math import add_bias, product, store_softmax_tile


# Not `v`: a mask `offs_v < v` of unknown alignment costs every vector access.
@triton.jit(do_not_specialize=["n", "start", "tiles", "store_p"])
def _logps_forward_kernel(
    h,  # (n, d) pointer or descriptor
    w,  # (v, d) pointer or descriptor
    bias_ptr,  # (v,) or None
    labels_ptr,
    reference_ptr,
    exponents_ptr,
    sums_ptr,
    p_ptr,
    n,
    v,
    d,
    start,
    tiles,
    stride_h,
    stride_w,
    stride_p,
    scale,
    softcap,
    store_p,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    # Tokens vary fastest: programs in flight share a tile of W, and H stays in the L2 cache.
    tiles_t = tl.cdiv(n, BLOCK_T)
    tile = tl.program_id(0) // tiles_t
    row = tl.program_id(0) % tiles_t * BLOCK_T
    raw = product(
        h,
        w,
        row,
        tile * BLOCK_V,
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
    raw = add_bias(raw, bias_ptr, tile * BLOCK_V + tl.arange(0, BLOCK_V), v)
    store_softmax_tile(
        raw,
        row + tl.arange(0, BLOCK_T),
        tile,
        labels_ptr,
        reference_ptr,
        exponents_ptr,
        sums_ptr,
        p_ptr,
        n,
        v,
        start,
        tiles,
        stride_p,
        scale,
        softcap,
        store_p,
        BLOCK_V,
        SCALED,
        CAPPED,
    )


def logps_forward(
    h: Tensor,  # (n, D)
    weight: Tensor,  # (v, D)
    labels: Tensor,  # (n,) word numbers in the whole vocabulary
    reference: Tensor,  # (n,) fp32, integer exponents of 2
    exponents: Tensor,  # (n, tiles) fp32, written
    sums: Tensor,  # (n, tiles) fp32, written
    p: Tensor,  # (n, v) written; (0, v): the statistics alone
    *,
    start: int,
    bias: Tensor | None = None,  # (v,)
    scale: float = 1.0,
    softcap: float = 0.0,
) -> None:
    """Write each tile's exponent, sum and, if asked, its P; see tile_math.store_softmax_tile."""
    n, v = h.shape[0], weight.shape[0]
    config = configs.tile(h.device, h.dtype)
    tiles = triton.cdiv(v, config.block_v)
    assert exponents.shape == sums.shape == (n, tiles) and exponents.is_contiguous()
    assert sums.is_contiguous() and p.stride(1) == 1
    operands = tile_operands(h, weight, config)
    _logps_forward_kernel[(tiles * triton.cdiv(n, config.block_t),)](
        operands.h,
        operands.w,
        dense(bias),
        dense(labels),
        dense(reference),
        exponents,
        sums,
        p,
        n,
        v,
        operands.d,
        start,
        tiles,
        operands.stride_h,
        operands.stride_w,
        p.stride(0),
        scale,
        softcap,
        int(p.shape[0] > 0),
        SCALED=scale != 1.0,
        CAPPED=softcap != 0.0,
        **operands.constants,
        **config.launch(softcap),
    )
