"""Softmax statistics of a vocabulary block, tile by tile, and P if asked.

The products come from the tensor cores in the same kernel (logits never lie in memory) or from a
library that left them there. n tokens, v words of the block that starts at word `start`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dilkern.kernels.operands import dense, tile_source, transform_of
from dilkern.kernels.tile_math import LOG2E, SLACK, Partial, excess, tile_logits, tile_products


# Not `v`: a mask `offs_v < v` of unknown alignment costs every vector access.
@triton.jit(do_not_specialize=["n", "start", "store_p"])
def _softmax_tile_kernel(
    a,
    w,
    d,
    stride_a,
    stride_w,
    labels_ptr,  # (n,)
    anchor_ptr,  # (n,) exponents of 2, -inf at first
    transform,
    partial,  # (n, tiles) each, out
    p_ptr,  # (n, v) out, if store_p
    stride_p,
    n,
    v,
    start,
    store_p,  # run-time: with and without P the same machine code, so sums of the same bits
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    raw, row, tile = tile_products(
        a, w, d, stride_a, stride_w, n, v,
        BLOCK_T, BLOCK_V, BLOCK_D, DESCRIPTORS, EVEN_D, PRECISION,
    )  # fmt: skip
    offs_t = row + tl.arange(0, BLOCK_T)
    mask_t = offs_t < n
    word = tile * BLOCK_V
    offs_v = word + tl.arange(0, BLOCK_V)
    z, t = tile_logits(raw, offs_v, v, transform)
    label = (tl.load(labels_ptr + offs_t, mask=mask_t, other=-1) - start).to(tl.int32)
    hit = tl.sum(((label >= word) & (label < word + BLOCK_V)).to(tl.int32), 0) > 0
    if hit | (word + BLOCK_V > v):
        # The target is kept out: its factor 1 - p_y is taken exactly, from logp, elsewhere.
        wrong = (offs_v[None, :] < v) & (offs_v[None, :] != label[:, None])
        z = tl.where(wrong, z, -float("inf"))
    peak = tl.max(z, 1)
    exponent = tl.ceil(peak * LOG2E)
    empty = exponent == -float("inf")
    base, peak = tl.where(empty, 0.0, exponent), tl.where(empty, 0.0, peak)
    # Not z log2(e) - base: that product's rounding is relative to z, which may be large.
    e = tl.exp2((z - peak[:, None]) * LOG2E + excess(peak, base)[:, None])
    at = offs_t.to(tl.int64) * tl.cdiv(v, BLOCK_V) + tile
    tl.store(partial.exponents + at, exponent, mask=mask_t)
    tl.store(partial.sums + at, tl.sum(e, 1), mask=mask_t)
    if store_p != 0:
        anchor = tl.load(anchor_ptr + offs_t, mask=mask_t, other=0.0)
        local = tl.where(exponent > anchor + SLACK, exponent, anchor)
        # A tile without a wrong word has e = 0, whatever the factor.
        local = tl.where(empty, 0.0, local)
        p = e * tl.exp2(base - local)[:, None]
        if transform.softcap is not None:
            p *= 1.0 - t * t
        ptrs = p_ptr + offs_t.to(tl.int64)[:, None] * stride_p + offs_v[None, :]
        inside = mask_t[:, None] & (offs_v[None, :] < v)
        tl.store(ptrs, p.to(p_ptr.dtype.element_ty), mask=inside)


def softmax_tile(
    a: Tensor,  # (n, D) hidden rows, or (n, v) fp32 products without `weight`
    weight: Tensor | None,  # (v, D), or None
    labels: Tensor,  # (n,) word numbers in the whole vocabulary
    anchor: Tensor,  # (n,) fp32, integer exponents of 2
    partial: Tensor,  # (2, n, tiles) fp32, written: each tile's exponent k and sum of exp(z) / 2^k
    p: Tensor,  # (n, v) written, may be the products; (0, v): the statistics alone
    *,
    start: int,
    bias: Tensor | None = None,  # (v,)
    scale: float = 1.0,
    softcap: float = 0.0,
) -> None:
    """Write the sums over wrong words and, if asked, P = exp(z) (1 - (z / softcap)^2) / 2^anchor."""
    n, v = a.shape[0], a.shape[1] if weight is None else weight.shape[0]
    source = tile_source(a, weight, softcap)
    tiles = triton.cdiv(v, source.block_v)
    assert partial.shape == (2, n, tiles) and partial.is_contiguous() and p.stride(1) == 1
    _softmax_tile_kernel[(tiles * triton.cdiv(n, source.block_t),)](
        **source.arguments,
        labels_ptr=dense(labels),
        anchor_ptr=dense(anchor),
        transform=transform_of(bias, scale, softcap),
        partial=Partial(*partial),
        p_ptr=p,
        stride_p=p.stride(0),
        n=n,
        v=v,
        start=start,
        store_p=int(p.shape[0] > 0),
    )
