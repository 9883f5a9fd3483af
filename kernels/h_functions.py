"""Triton twins of the h-functions: value and slope together, for `sequence_loss`.

Each takes f, whether the sequence is chosen, and the limit C, and returns l_1(f) and its slope for a
chosen sequence, l_-1(f) and its slope for a rejected one. Above C an exponential goes on as its
tangent (losses, docs/math.md): g = min(f, C), e^{kf} -> e^{kg} (1 + k (f - g)). C = inf: none.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def lsif(f, chosen, limit):
    """l_1 = -e^f, l_-1 = e^{2f} / 2."""
    g = tl.minimum(f, limit)
    past = f - g
    e = tl.exp2(g * LOG2E)
    value = tl.where(chosen, -e * (1.0 + past), 0.5 * e * e * (1.0 + 2.0 * past))
    return value, tl.where(chosen, -e, e * e)


@triton.jit
def ukl(f, chosen, limit):
    """l_1 = -f, l_-1 = e^f."""
    g = tl.minimum(f, limit)
    e = tl.exp2(g * LOG2E)
    return tl.where(chosen, -f, e * (1.0 + (f - g))), tl.where(chosen, -1.0, e)


@triton.jit
def bce(f, chosen, limit):
    """l_1 = log(1 + e^-f), l_-1 = log(1 + e^f): linear by itself, so the limit has no part in it."""
    x = tl.where(chosen, -f, f)
    small = tl.exp2(-tl.abs(x) * LOG2E)
    # log(1 + s) for s in (0, 1]: exact in the last place also where 1 + s rounds to 1.
    one = 1.0 + small
    log1p = tl.where(one == 1.0, small, tl.log2(one) * LN2 * (small / (one - 1.0)))
    slope = tl.where(x > 0, 1.0, small) / one
    return tl.maximum(x, 0.0) + log1p, tl.where(chosen, -slope, slope)
