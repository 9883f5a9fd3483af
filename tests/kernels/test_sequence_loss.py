"""sequence_loss and the Triton twins of h, against autograd in fp64."""

import pytest
import torch
from guard import guarded

from dilkern import LOSSES
from dilkern.curves import extended
from dilkern.kernels import h_functions
from dilkern.kernels.sequence_loss import sequence_loss

F32, F64 = torch.float32, torch.float64


def extended_exp(f, k, limit):
    g = f.clamp(max=limit)
    return torch.exp(k * g) * (1 + k * (f - g))


TWINS = {  # name -> (l_1, l_-1)
    "lsif": (lambda f, c: -extended_exp(f, 1, c), lambda f, c: extended_exp(f, 2, c) / 2),
    "ukl": (lambda f, c: -f, lambda f, c: extended_exp(f, 1, c)),
    "bce": (
        lambda f, c: -torch.nn.functional.logsigmoid(f),
        lambda f, c: -torch.nn.functional.logsigmoid(-f),
    ),
}


def means(is_chosen):
    """The factors of a mean over chosen plus a mean over rejected sequences."""
    counts = torch.stack([(~is_chosen).sum(), is_chosen.sum()])
    return 1.0 / counts[is_chosen.long()].clamp_min(1)


def plain(h, logps, scored, bounds, is_chosen, ref_tokens, ref, beta, by_length, limit):
    """The same loss in plain PyTorch, one sequence at a time."""
    limit = float("inf") if limit is None else limit
    loss, ratios = logps.new_zeros(()), []
    for s, (a, b) in enumerate(zip(bounds.tolist(), bounds.tolist()[1:])):
        mask = scored[a:b]
        f = logps[a:b][mask].sum()
        f = f - (ref_tokens[a:b][mask].sum() if ref_tokens is not None else 0)
        f = f - (ref[s] if ref is not None else 0)
        f = f / mask.sum().clamp_min(1) if by_length else f
        ratios.append(f)
        side = is_chosen[s]
        loss = loss + TWINS[h][0 if side else 1](beta * f, limit) / (is_chosen == side).sum()
    return loss, torch.stack(ratios)


LENGTHS = {
    "pair": [5, 9],
    "one token": [1, 1],
    "with empty": [0, 7, 3, 0],
    "long": [150, 64, 65, 1],
}


@pytest.mark.parametrize("by_length", [True, False])
@pytest.mark.parametrize("reference", ["none", "tokens", "sequences"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("h", TWINS)
def test_matches_autograd(h, lengths, reference, by_length, budget):
    torch.manual_seed(1)
    lengths = LENGTHS[lengths]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    t, s = int(bounds[-1]), len(lengths)
    logps = -torch.rand(t) * 3
    scored = torch.rand(t) < 0.8
    is_chosen = torch.arange(s) < (s + 1) // 2
    ref_tokens = logps + torch.randn(t) * 0.1 if reference == "tokens" else None
    ref = -torch.rand(s) * 3 if reference == "sequences" else None
    options = {"beta": 0.7, "by_length": by_length, "limit": 2.0}

    def run(dtype):
        leaf = logps.to(dtype).requires_grad_()
        other = [None if x is None else x.to(dtype) for x in (ref_tokens, ref)]
        loss, ratios = plain(h, leaf, scored, bounds, is_chosen, *other, **options)
        (grad,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        return loss.detach(), ratios.detach(), torch.zeros(t) if grad is None else grad

    got = sequence_loss(
        logps,
        scored,
        bounds,
        is_chosen,
        means(is_chosen),
        h=getattr(h_functions, h),
        ref_token_logps=ref_tokens,
        ref_logps=ref,
        beta=0.7,
        length_normalize=by_length,
        max_log_ratio=2.0,
    )
    truth, peer = run(torch.float64), run(torch.float32)
    named = (got.loss, got.log_ratios, got.grad)
    for name, mine, other, true in zip(("loss", "ratios", "grad"), named, peer, truth):
        budget.check(name, mine, other, true)
    # Identical policy and reference: exactly zero.
    same = sequence_loss(
        logps,
        scored,
        bounds,
        is_chosen,
        means(is_chosen),
        h=getattr(h_functions, h),
        ref_token_logps=logps.clone(),
    )
    assert (same.log_ratios == 0).all()


@pytest.mark.parametrize("h", TWINS)
def test_h_value_and_slope_at_extremes(h):
    f = torch.tensor([-1e4, -90, -20, -1e-3, 0, 1e-3, 1, 9.99, 10, 10.01, 20, 90, 1e4])
    n = f.numel()
    for chosen in (True, False):
        is_chosen = torch.full((n,), chosen)
        bounds = torch.arange(n + 1)
        got = sequence_loss(
            f,
            torch.ones(n, dtype=torch.bool),
            bounds,
            is_chosen,
            means(is_chosen),
            h=getattr(h_functions, h),
        )
        twin = TWINS[h][0 if chosen else 1]
        x = f.double().requires_grad_()
        truth = twin(x, 10.0)
        truth.sum().backward()
        assert torch.isfinite(got.values).all() and torch.isfinite(got.grad).all()
        torch.testing.assert_close(got.values, truth.detach().float(), rtol=4e-6, atol=1e-30)
        torch.testing.assert_close(got.grad * n, x.grad.float(), rtol=4e-6, atol=1e-30)


def test_user_h_and_unpaired_counts():
    logps = torch.tensor([1.0, 2.0, 3.0])
    got = sequence_loss(
        logps,
        torch.ones(3, dtype=torch.bool),
        torch.arange(4, dtype=torch.int32),
        torch.tensor([True, False, False]),
        means(torch.tensor([True, False, False])),
        h=h_functions.ukl,
        max_log_ratio=None,
    )
    expected = -1.0 + (torch.tensor([2.0, 3.0]).exp().mean())
    torch.testing.assert_close(got.loss, expected)


def test_nan_stays_in_its_sequence_and_nothing_else_is_written():
    logps, intact_in = guarded(6)
    logps.copy_(torch.tensor([-1.0, float("nan"), -1.0, -1.0, -1.0, -1.0]))
    got = sequence_loss(
        logps,
        torch.ones(6, dtype=torch.bool),
        torch.tensor([0, 2, 6]),
        torch.tensor([True, False]),
        torch.ones(2),
        h=h_functions.lsif,
    )
    assert torch.isnan(got.loss) and torch.isnan(got.values[0]) and torch.isfinite(got.values[1])
    assert torch.isfinite(got.grad[2:]).all()
    intact_in()


def test_no_sequences():
    got = sequence_loss(
        torch.empty(0),
        torch.empty(0, dtype=torch.bool),
        torch.zeros(1, dtype=torch.int64),
        torch.empty(0, dtype=torch.bool),
        torch.empty(0),
        h=h_functions.bce,
    )
    assert got.loss == 0 and got.grad.shape == (0,)


PARAMETERS = {"power": [1.0, 0.5, 1e-6, 0.0, -0.5, -1.0, -2.0], "nce": [1.0, 4.0]}
REGISTRY = [
    pytest.param(entry, param, id=f"{name}-{param}")
    for name, entry in LOSSES.items()
    if entry.triton
    for param in PARAMETERS.get(name, [0.0])
]


@pytest.mark.parametrize("limit", [None, 3.0])
@pytest.mark.parametrize("entry, param", REGISTRY)
def test_every_twin_of_the_registry_against_its_curves(entry, param, limit, budget):
    """Value and slope of both sides, against the torch twin in fp64, the peer being it in fp32."""
    f = torch.cat([torch.linspace(-8, 8, 41), torch.tensor([1e-6, -1e-6, 1e-3, 30.0, -30.0])])
    if limit is None:
        f = f[f.abs() <= 8]
    n, params = f.numel(), dict.fromkeys(entry.params, param)
    for chosen, curve, growth in zip(
        (True, False), (entry.chosen, entry.rejected), entry.growth(**params)
    ):
        got = sequence_loss(
            f, torch.ones(n, dtype=torch.bool), torch.arange(n + 1), torch.full((n,), chosen),
            torch.ones(n), h=getattr(h_functions, entry.triton), max_log_ratio=limit, param=param,
        )  # fmt: skip
        truth, peer = (extended(curve, growth, limit, f.to(d), params) for d in (F64, F32))
        for name, mine, other, true in zip(("value", "slope"), (got.values, got.grad), peer, truth):
            # By size of f: large values must not excuse small ones.
            for low, high in ((0, 0.01), (0.01, 1.5), (1.5, 8.5), (8.5, 40)):
                part = (f.abs() >= low) & (f.abs() < high)
                budget.check(f"{name}, |f| < {high}", mine[part], other[part], true[part])
