"""Gradient of the log-probs with respect to a block of logits, recomputed: for trainable heads.

The products come from the tensor cores in the same kernel or from a library that left them in
memory. n tokens, v words of the block that starts at word `start`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from dilkern.kernels.operands import dense, tile_source, transform_of
from dilkern.kernels.tile_math import LOG2E, tile_logits, tile_products


class Rows(NamedTuple):
    """What is known of each row, (n,) each."""

    labels: Any
    peak: Any  # log-sum-exp, as peak + log_sum
    log_sum: Any
    miss: Any  # 1 - p_y
    g: Any  # d loss / d logp, times scale


# Not `v`: a mask `offs_v < v` of unknown alignment costs every vector access.
@triton.jit(do_not_specialize=["n", "start"])
def _dz_tile_kernel(
    a,
    w,
    d,
    stride_a,
    stride_w,
    rows,
    transform,
    dz_ptr,  # (n, v) out
    stride_dz,
    n,
    v,
    start,
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
    peak = tl.load(rows.peak + offs_t, mask=mask_t, other=0.0)
    log_sum = tl.load(rows.log_sum + offs_t, mask=mask_t, other=0.0)
    g = tl.load(rows.g + offs_t, mask=mask_t, other=0.0)
    label = (tl.load(rows.labels + offs_t, mask=mask_t, other=-1) - start).to(tl.int32)
    dz = -tl.exp2(((z - peak[:, None]) - log_sum[:, None]) * LOG2E)
    if tl.sum(((label >= word) & (label < word + BLOCK_V)).to(tl.int32), 0) > 0:
        miss = tl.load(rows.miss + offs_t, mask=mask_t, other=0.0)
        dz = tl.where(offs_v[None, :] == label[:, None], miss[:, None], dz)
    dz *= g[:, None]
    if transform.softcap is not None:
        dz *= 1.0 - t * t
    inside = mask_t[:, None] & (offs_v[None, :] < v)
    ptrs = dz_ptr + offs_t.to(tl.int64)[:, None] * stride_dz + offs_v[None, :]
    tl.store(ptrs, dz.to(dz_ptr.dtype.element_ty), mask=inside)


def dz_tile(
    a: Tensor,  # (n, D) hidden rows, or (n, v) fp32 products without `weight`
    weight: Tensor | None,  # (v, D), or None
    labels: Tensor,  # (n,) word numbers in the whole vocabulary
    lse: Tensor,  # (2, n) fp32 log-sum-exp: peak, and log of the sum of exp(z - peak)
    miss: Tensor,  # (n,) fp32, 1 - p_y
    g: Tensor,  # (n,) fp32
    dz: Tensor,  # (n, v) written, may be the products
    *,
    start: int,
    bias: Tensor | None = None,  # (v,)
    scale: float = 1.0,
    softcap: float = 0.0,
) -> None:
    """Write g (1[v = y] - p_v) (1 - (z_v / softcap)^2): the logits' gradient, to the factor scale."""
    n, v = dz.shape
    source = tile_source(a, weight, softcap)
    assert dz.stride(1) == 1
    rows = Rows(*(dense(x) for x in (labels, *lse, miss, g)))
    _dz_tile_kernel[(triton.cdiv(v, source.block_v) * triton.cdiv(n, source.block_t),)](
        **source.arguments,
        rows=rows,
        transform=transform_of(bias, scale, softcap),
        dz_ptr=dz,
        stride_dz=dz.stride(0),
        n=n,
        v=v,
        start=start,
    )
