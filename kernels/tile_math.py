"""What the tile kernels share: the products of a tile, the map from product to logit, exponentials.

How the softmax is kept in range, and its digits kept, though no kernel sees all words of a row:

- An exponential is e * 2^k with e in (0, 1] and an integer k = ceil(m log2 e), m the largest wrong
  logit of the row in the tile. e comes from z - m, which is exact where e matters, and from m log2 e
  - k, taken once per row in two parts (`excess`); z log2 e - k would have the rounding of z log2 e.
- A tile leaves k and the sum of its e. To move a number to another exponent is a product with a
  power of two, which costs no digits. So sums are combined after the fact (`fold_block`).
- P must be written before the row's largest logit is known. It is relative to the row's anchor, an
  exponent that earlier blocks have left; only where k lies more than SLACK above it, to k itself.
  `fold_block` then moves the anchor to the top, and P and U of that row with it.

T tokens, V words, D hidden size; n and v of them in work.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Keeps the upper 12 of the 24 significant bits of an fp32 number.
UPPER_BITS = tl.constexpr(-4096)
LOG2E = tl.constexpr(1.4426950408889634)
# log2 e in two parts; the first has 12 significant bits.
LOG2E_HIGH = tl.constexpr(1.4423828125)
LOG2E_LOW = tl.constexpr(0.0003122283889634)
LN2 = tl.constexpr(0.6931471805599453)
# ln 2 in two parts; the first has 9 bits: its products with exponents up to 2^15 are exact.
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.1219444005469057e-4)
# Powers of two that P may exceed its anchor by: 2^11 stays in range for fp16.
SLACK = tl.constexpr(11.0)


class Partial(NamedTuple):
    """What a tile leaves of each row: sum of exp(z) = sum 2^exponent, over wrong words."""

    exponents: Any
    sums: Any


class State(NamedTuple):
    """What the words so far have left of each row, (n,) fp32 each: sum of exp(z) = total 2^top."""

    top: Any  # the largest exponent of a wrong word
    total: Any  # over wrong words
    anchor: Any  # the exponent that P and U are relative to


class Mean(NamedTuple):
    """The mean of a block's quiet words, and what each row has of it (kernels/split_words.py)."""

    sums: Any  # (CHUNKS * D,) of weighted words
    shares: Any  # (CHUNKS,) of the weights
    mass: Any  # (n,)


class Transform(NamedTuple):
    """What is between product x and logit: z = softcap tanh(scale (x + bias) / softcap)."""

    bias: Any  # of the words, pointer or None
    scale: Any  # None for 1
    softcap: Any  # None for none


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
def tile_products(
    a,  # (n, d) hidden rows, pointer or descriptor; or, without `w`, (n, v) fp32 products
    w,  # (v, d) words, pointer or descriptor; or None
    d,
    stride_a,
    stride_w,
    n,
    v,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """This program's tile of H W^T in fp32, with its first row and its number among the words.

    Rows past n and words past v hold copies or zeros.
    """
    tiles_t, tiles_v = tl.cdiv(n, BLOCK_T), tl.cdiv(v, BLOCK_V)
    if w is None:
        tile = tl.program_id(0) % tiles_v
        row = tl.program_id(0) // tiles_v * BLOCK_T
        offs_t = row + tl.arange(0, BLOCK_T)[:, None]
        offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
        z_ptrs = a + offs_t.to(tl.int64) * stride_a + offs_v
        return tl.load(z_ptrs, mask=(offs_t < n) & (offs_v < v), other=0.0), row, tile
    else:
        # Tokens vary fastest: programs in flight share a tile of W, and H stays in the L2 cache.
        tile = tl.program_id(0) // tiles_t
        row = tl.program_id(0) % tiles_t * BLOCK_T
        word = tile * BLOCK_V
        acc = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
        # Without an edge around the loop: it would define `acc` outside the products, and Triton 3.6
        # then waits for each of Hopper's (ptxas: C7515).
        tl.assume(d > 0)
        if DESCRIPTORS:
            for k in tl.range(0, d, BLOCK_D):
                acc = tl.dot(a.load([row, k]), w.load([word, k]).T, acc, input_precision=PRECISION)
        else:
            offs_d = tl.arange(0, BLOCK_D)
            # The last row stands in for rows past the end: no mask in the loop.
            offs_t = tl.minimum(row + tl.arange(0, BLOCK_T), n - 1).to(tl.int64)
            offs_v = tl.minimum(word + tl.arange(0, BLOCK_V), v - 1).to(tl.int64)
            a_ptrs = a + offs_t[:, None] * stride_a + offs_d[None, :]
            w_ptrs = w + offs_v[None, :] * stride_w + offs_d[:, None]
            for k in tl.range(0, d, BLOCK_D):
                if EVEN_D:
                    left, right = tl.load(a_ptrs), tl.load(w_ptrs)
                else:
                    left = tl.load(a_ptrs, mask=offs_d[None, :] < d - k, other=0.0)
                    right = tl.load(w_ptrs, mask=offs_d[:, None] < d - k, other=0.0)
                acc = tl.dot(left, right, acc, input_precision=PRECISION)
                a_ptrs += BLOCK_D
                w_ptrs += BLOCK_D
        return acc, row, tile


@triton.jit
def logits(raw, transform):
    """Apply scale and softcap: the logits z, and t = z / softcap (z itself without one)."""
    if transform.scale is not None:
        raw *= transform.scale
    if transform.softcap is not None:
        # tanh without libdevice: neither the interpreter nor every target has it.
        t = 1.0 - 2.0 / (tl.exp2(raw * (2.0 * LOG2E / transform.softcap)) + 1.0)
        return t * transform.softcap, t
    else:
        return raw, raw


@triton.jit
def tile_logits(raw, offs_v, v, transform):
    """The logits of a tile of products."""
    if transform.bias is not None:
        bias = tl.load(transform.bias + offs_v, mask=offs_v < v, other=0.0)
        raw += bias.to(tl.float32)[None, :]
    return logits(raw, transform)


@triton.jit
def excess(x, exponent):
    """x log2(e) - exponent, for exponent near it, with the digits that one product would lose."""
    high = (x.to(tl.int32, bitcast=True) & UPPER_BITS).to(tl.float32, bitcast=True)
    exact = high * LOG2E_HIGH - exponent  # 12 bits times 12 bits: nothing is rounded
    rest = exact + ((x - high) * LOG2E + high * LOG2E_LOW)
    # Beyond |x| = 2^24 neighbours of x lie further apart than 1; which of them is not known.
    return tl.minimum(tl.maximum(rest, -1.0), 1.0)
