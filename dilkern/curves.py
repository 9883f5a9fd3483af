"""Scalar curves of the losses: x -> (value, slope), elementwise, in the dtype of x.

f is a log-ratio, r = e^f, m a margin, a a mean log-prob per token. Nothing here knows of tokens,
batches or vocabularies. Derivations: docs/math.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Curve = Callable[..., tuple[Tensor, Tensor]]
Growth = Literal["", "up", "down"]  # where |curve| grows exponentially in its argument


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x); torch's own softplus is linear above 20, which costs 1e-10 in fp64."""
    return -F.logsigmoid(-x)


def lsif_chosen(f: Tensor) -> tuple[Tensor, Tensor]:
    value = -f.exp()
    return value, value


def lsif_rejected(f: Tensor) -> tuple[Tensor, Tensor]:
    slope = (2 * f).exp()
    return 0.5 * slope, slope


def ukl_chosen(f: Tensor) -> tuple[Tensor, Tensor]:
    return -f, -torch.ones_like(f)


def ukl_rejected(f: Tensor) -> tuple[Tensor, Tensor]:
    value = f.exp()
    return value, value


def logistic_falling(x: Tensor) -> tuple[Tensor, Tensor]:
    """sp(-x) = -log s(x): BCE's l_1, and the loss of DPO's margin."""
    return _softplus(-x), -torch.sigmoid(-x)


def logistic_rising(x: Tensor) -> tuple[Tensor, Tensor]:
    return _softplus(x), torch.sigmoid(x)


def power_chosen(f: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    if lam == 0.0:
        return ukl_chosen(f)
    return -torch.expm1(lam * f) / lam, -(lam * f).exp()


def power_rejected(f: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    up = 1.0 + lam
    if up == 0.0:
        return f, torch.ones_like(f)
    return torch.expm1(up * f) / up, (up * f).exp()


def nce_chosen(f: Tensor, nu: float) -> tuple[Tensor, Tensor]:
    shift = torch.as_tensor(nu, dtype=f.dtype).log().item()
    return _softplus(shift - f), -torch.sigmoid(shift - f)


def nce_rejected(f: Tensor, nu: float) -> tuple[Tensor, Tensor]:
    shift = torch.as_tensor(nu, dtype=f.dtype).log().item()
    return nu * _softplus(f - shift), nu * torch.sigmoid(f - shift)


def brier_chosen(f: Tensor) -> tuple[Tensor, Tensor]:
    miss, hit = torch.sigmoid(-f), torch.sigmoid(f)
    return miss.square(), -2 * hit * miss.square()


def brier_rejected(f: Tensor) -> tuple[Tensor, Tensor]:
    miss, hit = torch.sigmoid(-f), torch.sigmoid(f)
    return hit.square(), 2 * hit.square() * miss


def hinge(m: Tensor) -> tuple[Tensor, Tensor]:
    return F.relu(1 - m), -(m < 1).to(m.dtype)


def slic_hinge(m: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    return F.relu(delta - m), -(m < delta).to(m.dtype)


def smoothed(curve: Curve, x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(1 - epsilon) L(x) + epsilon L(-x)."""
    (value, slope), (other, other_slope) = curve(x), curve(-x)
    return (
        (1 - epsilon) * value + epsilon * other,
        (1 - epsilon) * slope - epsilon * other_slope,
    )


def cdpo(m: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return smoothed(logistic_falling, m, epsilon)


def robust(m: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    (value, slope), (other, other_slope) = logistic_falling(m), logistic_falling(-m)
    scale = 1 / (1 - 2 * epsilon)
    return (
        scale * ((1 - epsilon) * value - epsilon * other),
        scale * ((1 - epsilon) * slope + epsilon * other_slope),
    )


def squared_to_target(delta: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    gap = delta - 1 / (2 * tau)
    return gap.square(), 2 * gap


def logistic_with_margin(m: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    return logistic_falling(m - gamma)


def logistic_weighted(m: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    value, slope = logistic_falling(m)
    return lam * value, lam * slope


def kto_chosen(x: Tensor, lambda_chosen: float, lambda_rejected: float) -> tuple[Tensor, Tensor]:
    miss = torch.sigmoid(-x)
    return lambda_chosen * miss, -lambda_chosen * miss * torch.sigmoid(x)


def kto_rejected(x: Tensor, lambda_chosen: float, lambda_rejected: float) -> tuple[Tensor, Tensor]:
    hit = torch.sigmoid(x)
    return lambda_rejected * hit, lambda_rejected * hit * torch.sigmoid(-x)


def forward_kl(f: Tensor) -> tuple[Tensor, Tensor]:
    slope = (-f).exp()
    return -slope, slope


def jensen_shannon(f: Tensor) -> tuple[Tensor, Tensor]:
    return F.logsigmoid(f), torch.sigmoid(-f)


def alpha_divergence(f: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    if alpha == 0.0:
        return f, torch.ones_like(f)
    return -torch.expm1(-alpha * f) / alpha, (-alpha * f).exp()


def log_odds(a: Tensor) -> tuple[Tensor, Tensor]:
    # 1 - e^a; it is 0 where every token is certain, whose odds are infinite.
    miss = (-torch.expm1(a)).clamp_min(torch.finfo(a.dtype).tiny)
    return a - miss.log(), 1 / miss


# Generators of the h-functions: r -> (h(r), h'(r)).


def h_lsif(r: Tensor) -> tuple[Tensor, Tensor]:
    return 0.5 * (r - 1).square(), r - 1


def h_ukl(r: Tensor) -> tuple[Tensor, Tensor]:
    return r * r.log() - r, r.log()


def h_bce(r: Tensor) -> tuple[Tensor, Tensor]:
    return r * r.log() - (r + 1) * torch.log1p(r), r.log() - torch.log1p(r)


def h_power(r: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    if lam == 0.0:
        return r * r.log() - r, r.log()
    if lam == -1.0:
        return -r.log(), -1 / r
    return r.pow(1 + lam) / (lam * (1 + lam)), r.pow(lam) / lam


def h_nce(r: Tensor, nu: float) -> tuple[Tensor, Tensor]:
    return r * r.log() - (r + nu) * (r + nu).log(), r.log() - (r + nu).log()


def h_brier(r: Tensor) -> tuple[Tensor, Tensor]:
    return 1 / (1 + r), -1 / (1 + r).square()


def power_growth(lam: float) -> tuple[Growth, Growth]:
    def direction(exponent: float) -> Growth:
        return "up" if exponent > 0 else "down" if exponent < 0 else ""

    return direction(lam), direction(1 + lam)


def extended(
    curve: Curve, growth: Growth, limit: float | None, x: Tensor, params: Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    """Evaluate a curve, continued linearly beyond `limit` where it grows (docs/math.md, 14).

    Value and slope stay continuous and finite, and a sample beyond the limit keeps a gradient, which
    a hard clamp would take from it.
    """
    if limit is None or not growth:
        return curve(x, **params)
    inside = x.clamp(max=limit) if growth == "up" else x.clamp(min=-limit)
    value, slope = curve(inside, **params)
    return value + slope * (x - inside), slope


def on_extension(growth: Growth, limit: float | None, x: Tensor) -> Tensor:
    """Where the linear extension acts: a bool tensor like x."""
    if limit is None or not growth:
        return torch.zeros_like(x, dtype=torch.bool)
    return x > limit if growth == "up" else x < -limit
