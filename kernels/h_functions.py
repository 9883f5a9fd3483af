"""Triton twins of the h-functions: value and slope together, for `sequence_loss`.

Each takes f, whether the sequence is chosen, the limit C and the parameter of h (0 where it has none),
and returns l_1(f) and its slope for a chosen sequence, l_-1(f) and its slope for a rejected one. Beyond
C an exponential goes on as its tangent (14 in docs/math.md): with g = min(f, C), e^{kf} becomes
e^{kg} (1 + k (f - g)). C = inf: none. By `where`: on a GPU the minimum of NaN and C is C.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dilkern.kernels.tile_math import LN2, exp, log1p


@triton.jit
def lsif(f, chosen, limit, param):
    """l_1 = -e^f, l_-1 = e^{2f} / 2."""
    g = tl.where(f > limit, limit, f)
    past = f - g
    e = exp(g)
    value = tl.where(chosen, -e * (1.0 + past), 0.5 * e * e * (1.0 + 2.0 * past))
    return value, tl.where(chosen, -e, e * e)


@triton.jit
def ukl(f, chosen, limit, param):
    """l_1 = -f, l_-1 = e^f."""
    g = tl.where(f > limit, limit, f)
    e = exp(g)
    return tl.where(chosen, -f, e * (1.0 + (f - g))), tl.where(chosen, -1.0, e)


@triton.jit
def _softplus(x):
    """log(1 + e^x) and the sigmoid of x."""
    small = exp(-tl.abs(x))
    return tl.where(x < 0, 0.0, x) + log1p(small), tl.where(x > 0, 1.0, small) / (1.0 + small)


@triton.jit
def bce(f, chosen, limit, param):
    """l_1 = log(1 + e^-f), l_-1 = log(1 + e^f): linear by itself, so the limit has no part in it."""
    value, sigmoid = _softplus(tl.where(chosen, -f, f))
    return value, tl.where(chosen, -sigmoid, sigmoid)


@triton.jit
def nce(f, chosen, limit, param):
    """l_1 = log(1 + nu e^-f), l_-1 = nu log(1 + e^f / nu), nu the parameter."""
    shift = tl.log2(param) * LN2
    value, sigmoid = _softplus(tl.where(chosen, shift - f, f - shift))
    return tl.where(chosen, value, param * value), tl.where(chosen, -sigmoid, param * sigmoid)


@triton.jit
def brier(f, chosen, limit, param):
    """l_1 = s(-f)^2, l_-1 = s(f)^2, s the sigmoid."""
    small = exp(-tl.abs(f))
    large_side = 1.0 / (1.0 + small)
    small_side = small / (1.0 + small)
    hit = tl.where(f > 0, large_side, small_side)
    miss = tl.where(f > 0, small_side, large_side)
    value = tl.where(chosen, miss * miss, hit * hit)
    return value, tl.where(chosen, -2.0 * hit * miss * miss, 2.0 * hit * hit * miss)


@triton.jit
def power(f, chosen, limit, param):
    """l_1 = -expm1(lam f) / lam, l_-1 = expm1((1 + lam) f) / (1 + lam), lam the parameter.

    Where the exponent k of a side is 0, that side is linear: -f, or f.
    """
    k = tl.where(chosen, param, 1.0 + param)
    sign = tl.where(chosen, -1.0, 1.0)
    # It grows upwards for k > 0 and downwards for k < 0: the limit acts there.
    above, below = (k > 0) & (f > limit), (k < 0) & (f < -limit)
    g = tl.where(above, limit, tl.where(below, -limit, f))
    x = k * g
    e = exp(x)
    # expm1 to the last digits: the error of e - 1 cancels against that of log(e).
    log_e = tl.log2(e) * LN2
    expm1 = tl.where(e == 1.0, x, (e - 1.0) * tl.where(tl.abs(x) < 0.5, x / log_e, 1.0))
    value = tl.where(k == 0, g, expm1 / tl.where(k == 0, 1.0, k)) + e * (f - g)
    return sign * value, sign * e
