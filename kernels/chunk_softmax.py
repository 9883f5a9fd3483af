"""P and its partial sums from a block of fp32 logits that a library product left in memory.

n tokens, v words of the block that starts at word `start`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dilkern.kernels import configs
from dilkern.kernels.operands import dense
from dilkern.kernels.tile_math import add_bias, store_softmax_tile

# Not `v`: a mask `offs_v < v` of unknown alignment costs every vector access.
_FREE = ["n", "start", "tiles", "store_p"]


@triton.jit(do_not_specialize=_FREE)
def _chunk_softmax_kernel(
    z_ptr,  # (n, v) fp32 products
    bias_ptr,  # (v,) or None
    labels_ptr,
    reference_ptr,
    exponents_ptr,
    sums_ptr,
    p_ptr,
    n,
    v,
    start,
    tiles,
    stride_z,
    stride_p,
    scale,
    softcap,
    store_p,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    tile = tl.program_id(0) % tiles
    offs_t = tl.program_id(0) // tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (offs_t[:, None] < n) & (offs_v[None, :] < v)
    ptrs = z_ptr + offs_t.to(tl.int64)[:, None] * stride_z + offs_v[None, :]
    raw = add_bias(tl.load(ptrs, mask=inside, other=0.0), bias_ptr, offs_v, v)
    store_softmax_tile(
        raw,
        offs_t,
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


def chunk_softmax(
    z: Tensor,  # (n, v) fp32 products, rows contiguous
    labels: Tensor,  # (n,) word numbers in the whole vocabulary
    reference: Tensor,  # (n,) fp32, integer exponents of 2
    exponents: Tensor,  # (n, tiles) fp32, written
    sums: Tensor,  # (n, tiles) fp32, written
    p: Tensor,  # (n, v) written, may be z itself; (0, v): the statistics alone
    *,
    start: int,
    bias: Tensor | None = None,  # (v,)
    scale: float = 1.0,
    softcap: float = 0.0,
) -> None:
    """Write each tile's exponent, sum and, if asked, its P; see tile_math.store_softmax_tile."""
    n, v = z.shape
    config = configs.chunk(z.device)
    tiles = triton.cdiv(v, config.block)
    assert exponents.shape == sums.shape == (n, tiles) and exponents.is_contiguous()
    assert sums.is_contiguous() and z.stride(1) == p.stride(1) == 1
    _chunk_softmax_kernel[(tiles * triton.cdiv(n, config.block_t),)](
        z,
        dense(bias),
        dense(labels),
        dense(reference),
        exponents,
        sums,
        p,
        n,
        v,
        start,
        tiles,
        z.stride(0),
        p.stride(0),
        scale,
        softcap,
        int(p.shape[0] > 0),
        BLOCK_T=config.block_t,
        BLOCK_V=config.block,
        SCALED=scale != 1.0,
        CAPPED=softcap != 0.0,
        **config.launch,
    )
