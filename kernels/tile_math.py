"""What the tile kernels share: the product, the map from product to logit, exponentials and P.

Exponentials are taken in base 2 against an integer exponent: exp(z) = e * 2^k with k = ceil(max z
log2 e) of the (row, tile) and e in (0, 1]. Moving P or a sum from one reference to another is then
a product with a power of two. T tokens, V words, D hidden size.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# log2 e in two parts; the first has 12 significant bits.
LOG2E_HIGH = tl.constexpr(1.4423828125)
LOG2E_LOW = tl.constexpr(0.0003122283889634)
LN2 = tl.constexpr(0.6931471805599453)
# ln 2 in two parts; the first has so few bits that its products with exponents are exact.
LN2_HIGH = tl.constexpr(0.693138122558594)
LN2_LOW = tl.constexpr(9.0580006145e-06)
# P is written relative to the row's running reference, and to its own tile's maximum only where that
# lies more than this many powers of two higher: 2^11 stays in range for fp16.
SLACK = tl.constexpr(11.0)


@triton.jit
def exp(x):
    """e^x to 2 units: exp2(x log2 e) alone would lose |x| of them to the rounding of the product."""
    n = tl.floor(x * LOG2E + 0.5)
    rest = (x - n * LN2_HIGH) - n * LN2_LOW
    return tl.exp2(rest * LOG2E) * tl.exp2(n)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0: exact in the last place also where 1 + x rounds to 1."""
    one = 1.0 + x
    return tl.where(one == 1.0, x, tl.log2(one) * LN2 * (x / (one - 1.0)))


@triton.jit
def product(
    h,  # (n, d) pointer or descriptor
    w,  # (v, d) pointer or descriptor
    row,
    word,
    n,
    v,
    d,
    stride_h,
    stride_w,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK_T, BLOCK_V) of H W^T in fp32; rows past n and words past v hold copies or zeros."""
    acc = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    # Without an edge around the loop: it would define `acc` outside the products, and Triton 3.6
    # then waits for each of Hopper's (ptxas: C7515).
    tl.assume(d > 0)
    if DESCRIPTORS:
        for k in tl.range(0, d, BLOCK_D):
            acc = tl.dot(h.load([row, k]), w.load([word, k]).T, acc, input_precision=PRECISION)
    else:
        offs_d = tl.arange(0, BLOCK_D)
        # The last row stands in for rows past the end: no mask in the loop.
        offs_t = tl.minimum(row + tl.arange(0, BLOCK_T), n - 1).to(tl.int64)
        offs_v = tl.minimum(word + tl.arange(0, BLOCK_V), v - 1).to(tl.int64)
        h_ptrs = h + offs_t[:, None] * stride_h + offs_d[None, :]
        w_ptrs = w + offs_v[None, :] * stride_w + offs_d[:, None]
        for k in tl.range(0, d, BLOCK_D):
            if EVEN_D:
                a, b = tl.load(h_ptrs), tl.load(w_ptrs)
            else:
                a = tl.load(h_ptrs, mask=offs_d[None, :] < d - k, other=0.0)
                b = tl.load(w_ptrs, mask=offs_d[:, None] < d - k, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            h_ptrs += BLOCK_D
            w_ptrs += BLOCK_D
    return acc


@triton.jit
def add_bias(raw, bias_ptr, offs_v, v):
    """raw + bias; `bias_ptr` may be None."""
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_v, mask=offs_v < v, other=0.0)
        raw += bias.to(tl.float32)[None, :]
    return raw


@triton.jit
def logits(raw, scale, softcap, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """Apply scale and softcap: the logits z, and t = z / softcap (z itself without one)."""
    if SCALED:
        raw *= scale
    if CAPPED:
        # tanh without libdevice: neither the interpreter nor every target has it.
        t = 1.0 - 2.0 / (tl.exp2(raw * (2.0 * LOG2E / softcap)) + 1.0)
        return t * softcap, t
    else:
        return raw, raw


@triton.jit
def excess(x, exponent):
    """x log2(e) - exponent, for exponent near it, with the digits that one product would lose."""
    high = (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    exact = high * LOG2E_HIGH - exponent  # 12 bits times 12 bits: nothing is rounded
    rest = exact + ((x - high) * LOG2E + high * LOG2E_LOW)
    # Beyond |x| = 2^24 neighbours of x lie further apart than 1; which of them is not known.
    return tl.minimum(tl.maximum(rest, -1.0), 1.0)


@triton.jit
def store_softmax_tile(
    raw,  # (BLOCK_T, BLOCK_V) fp32 products with bias
    offs_t,
    tile,  # index of the tile within the vocabulary block
    labels_ptr,  # (n,)
    reference_ptr,  # (n,) integer exponents of 2, -inf at first
    exponents_ptr,  # (n, tiles) out
    sums_ptr,  # (n, tiles) out
    p_ptr,  # (n, v) out, if store_p
    n,
    v,
    start,
    tiles,
    stride_p,
    scale,
    softcap,
    store_p,
    BLOCK_V: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Store a tile's exponent k, its sum of exp(z) / 2^k over wrong words, and P if asked.

    `store_p` is a run-time value on purpose: with and without P it is the same machine code, so the
    sums have the same bits.
    """
    mask_t = offs_t < n
    word = tile * BLOCK_V
    offs_v = word + tl.arange(0, BLOCK_V)
    z, t = logits(raw, scale, softcap, SCALED, CAPPED)
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
    at = offs_t.to(tl.int64) * tiles + tile
    tl.store(exponents_ptr + at, exponent, mask=mask_t)
    tl.store(sums_ptr + at, tl.sum(e, 1), mask=mask_t)
    if store_p != 0:
        reference = tl.load(reference_ptr + offs_t, mask=mask_t, other=0.0)
        local = tl.where(exponent > reference + SLACK, exponent, reference)
        # A tile without a wrong word has e = 0, whatever the factor.
        local = tl.where(empty, 0.0, local)
        p = e * tl.exp2(base - local)[:, None]
        if CAPPED:
            p *= 1.0 - t * t
        ptrs = p_ptr + offs_t.to(tl.int64)[:, None] * stride_p + offs_v[None, :]
        inside = mask_t[:, None] & (offs_v[None, :] < v)
        tl.store(ptrs, p.to(p_ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_dz_tile(
    raw,  # (BLOCK_T, BLOCK_V) fp32 products with bias
    offs_t,
    word,  # first word of the tile within the vocabulary block
    labels_ptr,  # (n,)
    lse_ptr,  # (n,) log-sum-exp
    lost_ptr,  # (n,) what rounding it lost
    miss_ptr,  # (n,) 1 - p_y
    g_ptr,  # (n,) d loss / d logp, times scale
    dz_ptr,  # (n, v) out
    n,
    v,
    start,
    stride_dz,
    scale,
    softcap,
    BLOCK_V: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Store g (1[v = y] - p) (1 - (z / softcap)^2): the gradient of the logits, to the factor scale."""
    mask_t = offs_t < n
    offs_v = word + tl.arange(0, BLOCK_V)
    z, t = logits(raw, scale, softcap, SCALED, CAPPED)
    lse = tl.load(lse_ptr + offs_t, mask=mask_t, other=0.0)
    lost = tl.load(lost_ptr + offs_t, mask=mask_t, other=0.0)
    g = tl.load(g_ptr + offs_t, mask=mask_t, other=0.0)
    label = (tl.load(labels_ptr + offs_t, mask=mask_t, other=-1) - start).to(tl.int32)
    dz = -tl.exp2(((z - lse[:, None]) - lost[:, None]) * LOG2E)
    if tl.sum(((label >= word) & (label < word + BLOCK_V)).to(tl.int32), 0) > 0:
        miss = tl.load(miss_ptr + offs_t, mask=mask_t, other=0.0)
        dz = tl.where(offs_v[None, :] == label[:, None], miss[:, None], dz)
    dz *= g[:, None]
    if CAPPED:
        dz *= 1.0 - t * t
    inside = mask_t[:, None] & (offs_v[None, :] < v)
    ptrs = dz_ptr + offs_t.to(tl.int64)[:, None] * stride_dz + offs_v[None, :]
    tl.store(ptrs, dz.to(dz_ptr.dtype.element_ty), mask=inside)
