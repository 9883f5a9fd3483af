"""Take a vocabulary block's tiles into the state of each row, and P and U to one anchor."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dilkern.kernels import configs
from dilkern.kernels.tile_math import SLACK, Partial, State


# Not `v` and `d`: masks of unknown alignment cost every vector access.
@triton.jit(do_not_specialize=["n", "tiles", "rescale"])
def _fold_block_kernel(
    partial,  # (n, tiles) each
    state,  # (n,) each, in and out
    p_ptr,  # (n, v)
    u_ptr,  # (n, d)
    n,
    v,
    d,
    tiles,
    stride_p,
    stride_u,
    rescale,  # run-time: the state has the same bits with and without P and U
    TILE_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < n
    rows = offs_t.to(tl.int64)[:, None]
    offs = tl.arange(0, BLOCK)[None, :]
    old_top = tl.load(state.top + offs_t, mask=mask_t, other=0.0)
    old = tl.load(state.anchor + offs_t, mask=mask_t, other=0.0)
    top = old_top
    for a in tl.range(0, tiles, BLOCK):
        inside = mask_t[:, None] & (a + offs < tiles)
        k = tl.load(partial.exponents + rows * tiles + a + offs, mask=inside, other=-float("inf"))
        top = tl.maximum(top, tl.max(k, 1))
    base = tl.where(top == -float("inf"), 0.0, top)
    total = tl.load(state.total + offs_t, mask=mask_t, other=0.0) * tl.exp2(old_top - base)
    for a in tl.range(0, tiles, BLOCK):
        inside = mask_t[:, None] & (a + offs < tiles)
        k = tl.load(partial.exponents + rows * tiles + a + offs, mask=inside, other=-float("inf"))
        s = tl.load(partial.sums + rows * tiles + a + offs, mask=inside, other=0.0)
        total += tl.sum(s * tl.exp2(k - base[:, None]), 1)
    tl.store(state.top + offs_t, top, mask=mask_t)
    tl.store(state.total + offs_t, total, mask=mask_t)
    if rescale != 0:
        # Every tile of this block is relative to `old` or, if that is too low, to its own exponent;
        # so the highest of them is `top` or `old`.
        anchor = tl.where(top > old + SLACK, top, old)
        tl.store(state.anchor + offs_t, anchor, mask=mask_t)
        if tl.sum((anchor != old).to(tl.int32), 0) > 0:
            moved = mask_t & (anchor != old)
            for a in tl.range(0, v, BLOCK):
                inside = moved[:, None] & (a + offs < v)
                k_ptrs = partial.exponents + rows * tiles + (a + offs) // TILE_V
                k = tl.load(k_ptrs, mask=inside, other=0.0)
                local = tl.where(k > old[:, None] + SLACK, k, old[:, None])
                ptrs = p_ptr + rows * stride_p + a + offs
                p = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
                p *= tl.exp2(local - tl.where(moved, anchor, 0.0)[:, None])
                tl.store(ptrs, p.to(p_ptr.dtype.element_ty), mask=inside)
            shift = tl.where(moved, old, 0.0) - tl.where(moved, anchor, 0.0)
            decay = tl.exp2(shift)[:, None]
            for a in tl.range(0, d, BLOCK):
                inside = moved[:, None] & (a + offs < d)
                ptrs = u_ptr + rows * stride_u + a + offs
                tl.store(ptrs, tl.load(ptrs, mask=inside, other=0.0) * decay, mask=inside)


def fold_block(
    partial: Tensor,  # (2, n, tiles) fp32, of `softmax_tile`
    state: Tensor,  # (3, n) fp32, the fields of `State`, updated; its anchor unless p is empty
    p: Tensor,  # (n, v), updated; or (0, v)
    u: Tensor,  # (n, D) fp32, updated; or (0, D)
    *,
    tile: int,  # words per tile
) -> None:
    """Update the rows' state by one vocabulary block."""
    _, n, tiles = partial.shape
    assert state.stride(1) == p.stride(1) == u.stride(1) == 1
    config = configs.rows("fold", partial.device)
    _fold_block_kernel[(triton.cdiv(n, config.block_t),)](
        partial=Partial(*partial.contiguous()),
        state=State(*state),
        p_ptr=p,
        u_ptr=u,
        n=n,
        v=p.shape[1],
        d=u.shape[1],
        tiles=tiles,
        stride_p=p.stride(0),
        stride_u=u.stride(0),
        rescale=int(p.shape[0] > 0),
        TILE_V=tile,
        BLOCK_T=config.block_t,
        BLOCK=config.block,
        **config.launch,
    )
