"""The registry: every entry is checked against its own definition, automatically."""

import math

import pytest
import torch
from batches import batch

from dilkern import LOSSES, fused_preference_loss, preference_loss, preference_metrics
from dilkern.curves import extended
from dilkern.losses import Loss, get_loss

VARIANTS = {"power": [{"lam": v} for v in (1.0, 0.5, 0.0, -0.5, -1.0, -2.0, 1.2)],
            "nce": [{"nu": 1.0}, {"nu": 3.0}], "fdpo_alpha": [{"alpha": v} for v in (0.0, 0.5, 1.0)],
            "robust": [{"epsilon": 0.1}, {"epsilon": 0.4}]}  # fmt: skip
CASES = [
    pytest.param(entry, {**entry.params, **params}, id="-".join([name, *map(str, params.values())]))
    for name, entry in LOSSES.items()
    for params in VARIANTS.get(name, [{}])
]
BREGMAN = [case for case in CASES if case.values[0].bregman is not None]


def curves_of(entry, params):
    own = {k: v for k, v in params.items() if k not in entry.transform_params}
    for side, curve in (("chosen", entry.chosen), ("rejected", entry.rejected)):
        if curve is not None:
            yield side, curve, own
    if entry.transform is not None:
        yield "transform", entry.transform, {k: params[k] for k in entry.transform_params}


def arguments(entry, side):
    x = torch.linspace(-4.03, 4.07, 41, dtype=torch.float64)
    return x - 4.2 if side == "transform" and entry.name == "orpo" else x  # mean log-probs are < 0


@pytest.mark.parametrize("entry, params", CASES)
def test_slope_is_the_derivative_of_the_value(entry, params):
    for side, curve, own in curves_of(entry, params):
        x = arguments(entry, side).requires_grad_()
        value, slope = curve(x, **own)
        derivative = torch.autograd.grad(value.sum(), x)[0] if value.requires_grad else 0 * x
        torch.testing.assert_close(slope.detach(), derivative, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("entry, params", BREGMAN)
def test_curves_are_the_bregman_pair_of_h(entry, params):
    f = arguments(entry, "chosen")
    r = f.exp().requires_grad_()
    h, slope = entry.bregman(r, **params)
    (derivative,) = torch.autograd.grad(h.sum(), r)
    torch.testing.assert_close(slope, derivative, rtol=1e-8, atol=1e-10)
    chosen, rejected = entry.chosen(f, **params)[0], entry.rejected(f, **params)[0]
    for got, want in ((chosen, -slope), (rejected, slope * r - h)):
        shift = got - want.detach()
        torch.testing.assert_close(shift, shift[:1].expand_as(shift), rtol=0, atol=1e-7)


@pytest.mark.parametrize("entry, params", BREGMAN)
def test_slopes_have_ratio_minus_r(entry, params):
    f = arguments(entry, "chosen")
    ratio = entry.rejected(f, **params)[1] / entry.chosen(f, **params)[1]
    torch.testing.assert_close(ratio, -f.exp(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("limit", [None, 10.0])
@pytest.mark.parametrize("entry, params", BREGMAN)
def test_minimiser_is_the_log_density_ratio(entry, params, limit):
    growth = entry.growth(**params)
    for p, q in ((0.3, 0.7), (0.9, 0.02), (0.001, 0.5)):

        def slope(f, p=p, q=q):
            x = torch.tensor(f, dtype=torch.float64)
            chosen = extended(entry.chosen, growth[0], limit, x, params)[1]
            return (
                p * chosen + q * extended(entry.rejected, growth[1], limit, x, params)[1]
            ).item()

        low, high = -9.0, 9.0
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if slope(middle) < 0 else (low, middle)
        assert low == pytest.approx(math.log(p / q), abs=1e-8)
        # one change of sign, from - to +, also where the exponentials continue linearly
        assert slope(-30.0) <= 0 <= slope(30.0)


@pytest.mark.parametrize("entry, params", BREGMAN)
def test_a_tabular_policy_learns_the_log_ratio_of_two_samples(entry, params):
    """Minimise over a table of f, one per outcome, on samples of two known distributions."""
    p, q = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    rng = torch.Generator().manual_seed(0)
    chosen = torch.multinomial(p, 400, replacement=True, generator=rng)
    rejected = torch.multinomial(q, 400, replacement=True, generator=rng)
    outcomes = torch.cat([chosen, rejected])
    table = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([table], max_iter=200, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-12, tolerance_change=1e-14)  # fmt: skip

    def step():
        optimizer.zero_grad()
        f = table[outcomes]
        loss = preference_loss(f, torch.ones_like(f), log_ratios=f, loss=entry, params=params).loss
        loss.backward()
        return loss

    optimizer.step(step)
    counts = [torch.bincount(side, minlength=4).double() for side in (chosen, rejected)]
    expected = (counts[0] / counts[1]).log()
    torch.testing.assert_close(table.detach(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [1e4, 89.0, 45.0])
@pytest.mark.parametrize("entry, params", CASES)
def test_extremes_are_finite_in_fp32(entry, params, size):
    growth = entry.growth(**params)
    for side, curve, own in curves_of(entry, params):
        x = torch.tensor([-size, size] if entry.name != "orpo" else [-size, -1e-3])
        direction = growth[1] if side == "rejected" else growth[0]
        value, slope = extended(curve, direction, 10.0, x, own)
        assert torch.isfinite(value).all() and torch.isfinite(slope).all(), side


@pytest.mark.parametrize("entry, params", CASES)
def test_extension_joins_with_value_and_slope(entry, params):
    growth = entry.growth(**params)
    for side, curve, own in curves_of(entry, params):
        direction = growth[1] if side == "rejected" else growth[0]
        if not direction:
            continue
        edge = 3.0 if direction == "up" else -3.0
        x = edge + torch.tensor([-1e-9, 1e-9], dtype=torch.float64)
        value, slope = extended(curve, direction, 3.0, x, own)
        torch.testing.assert_close(value[0], value[1], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(slope[0], slope[1], rtol=1e-6, atol=1e-6)
        far = extended(curve, direction, 3.0, torch.tensor([2 * edge, 3 * edge]).double(), own)
        torch.testing.assert_close(far[0][1] - far[0][0], far[1][0] * edge, rtol=1e-12, atol=1e-12)


def needs(entry, other):
    kw = {"ref_hidden_states": other} if entry.reference else {}
    return {**kw, "kl_log_ratios": torch.tensor([0.3, -0.1])} if entry.baseline else kw


@pytest.mark.parametrize("entry, params", CASES)
def test_gradcheck_through_hidden_states(entry, params):
    states, weight, labels, other = batch(hidden=4, length=5, vocab=7)
    assert torch.autograd.gradcheck(
        lambda x: (
            fused_preference_loss(
                x, weight, labels, loss=entry, params=params, **needs(entry, other)
            ).loss
        ),
        states.requires_grad_(),
    )


@pytest.mark.parametrize("name", [n for n, e in LOSSES.items() if e.smoothing])
def test_label_smoothing_mixes_with_swapped_sides(name):
    states, weight, labels, other = batch()
    kw = {**needs(LOSSES[name], other), "loss": name}
    swap = torch.tensor([2, 3, 0, 1])
    swapped = {k: v[swap] for k, v in kw.items() if isinstance(v, torch.Tensor)}
    plain = fused_preference_loss(states, weight, labels, sft_weight=0.0, **kw).loss
    flipped = fused_preference_loss(
        states[swap], weight, labels[swap], sft_weight=0.0, **{**kw, **swapped}
    ).loss
    mixed = fused_preference_loss(
        states, weight, labels, label_smoothing=0.2, sft_weight=0.0, **kw
    ).loss
    torch.testing.assert_close(mixed, 0.8 * plain + 0.2 * flipped)


@pytest.mark.parametrize("name", ["cdpo", "robust"])
def test_label_smoothing_is_epsilon_where_the_loss_has_one(name):
    logps, f = torch.zeros(2), torch.tensor([0.3, -0.2])
    kw = {"log_ratios": f, "loss": name}
    here = preference_loss(logps, torch.ones(2), params={"epsilon": 0.3}, **kw).loss
    assert torch.equal(preference_loss(logps, torch.ones(2), label_smoothing=0.3, **kw).loss, here)


@pytest.mark.parametrize("t", [0.25, 0.5, 1.0])
def test_mixture_denominator_shifts_the_minimiser(t):
    p, q = 0.6, 0.2
    f = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([f], max_iter=100, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-14, tolerance_change=1e-16)  # fmt: skip

    def step():
        optimizer.zero_grad()
        both = torch.cat([f, f])
        loss = preference_loss(
            both, torch.ones(2), log_ratios=both, loss="bce", mixture=t,
            weights=torch.tensor([p, q], dtype=torch.float64),
        ).loss  # fmt: skip
        loss.backward()
        return loss

    optimizer.step(step)
    assert f.item() == pytest.approx(math.log(p / (t * p + (1 - t) * q)), abs=1e-6)


def test_weights_multiply_terms_and_pairs():
    logps = torch.tensor([-3.0, -4.0, -5.0, -2.0], dtype=torch.float64)
    f, n = torch.tensor([0.3, -0.2, 0.1, 0.4], dtype=torch.float64), torch.tensor([3, 4, 5, 2])
    w = torch.tensor([1.0, 0.5, 2.0, 0.0], dtype=torch.float64)
    out = preference_loss(logps, n, log_ratios=f, loss="bce", weights=w)
    a = f / n
    expected = (w[:2] * torch.log1p((-a[:2]).exp())).mean() + (
        w[2:] * torch.log1p(a[2:].exp())
    ).mean()
    torch.testing.assert_close(out.loss, expected)
    pair = preference_loss(logps, n, log_ratios=f, loss="dpo", weights=w)
    m = 0.1 * (f[:2] - f[2:])
    torch.testing.assert_close(pair.loss, (w[:2] * w[2:] * torch.log1p((-m).exp())).mean())


@pytest.mark.parametrize("loss", ["lsif", "kto", "dpo"])
def test_counts_make_shards_add_up_to_the_whole(loss):
    """Two ranks with the global counts over the number of ranks: the mean of their losses."""
    logps = -torch.rand(6, dtype=torch.float64) * 9
    f, n = torch.randn(6, dtype=torch.float64), torch.tensor([3, 4, 5, 2, 6, 1])
    kw = {"loss": loss, **({"kl_log_ratios": torch.zeros(1)} if loss == "kto" else {})}
    if loss == "dpo":  # pairs: [chosen; rejected] on either rank
        parts, total = [torch.tensor([0, 3]), torch.tensor([1, 2, 4, 5])], (1.5, 1.5)
        whole = preference_loss(logps, n, log_ratios=f, **kw).loss
    else:  # unpaired, the second rank without a chosen sequence
        kw["is_chosen"] = torch.tensor([True, True, False, False, False, False])
        parts, total = [torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])], (1.0, 2.0)
        whole = preference_loss(logps, n, log_ratios=f, **kw).loss
    losses = []
    for rows in parts:
        own = {k: v[rows] if k == "is_chosen" else v for k, v in kw.items()}
        losses.append(
            preference_loss(logps[rows], n[rows], log_ratios=f[rows], counts=total, **own).loss
        )
    torch.testing.assert_close(torch.stack(losses).mean(), whole)


def test_pairwise_bce_is_twice_dpo():
    states, weight, labels, other = batch()
    kw = {"ref_hidden_states": other, "beta": 0.1}
    dpo = fused_preference_loss(states, weight, labels, loss="dpo", **kw).loss
    pair = fused_preference_loss(
        states, weight, labels, loss="bce", pairing="pairwise", length_normalize=False, **kw
    ).loss
    torch.testing.assert_close(pair, 2 * dpo)


def test_sft_term_is_the_token_mean_over_chosen():
    states, weight, labels, other = batch()
    kw = {"ref_hidden_states": other, "loss": "lsif"}
    plain = fused_preference_loss(states, weight, labels, **kw)
    mixed = fused_preference_loss(states, weight, labels, sft_weight=0.3, **kw)
    nll = -plain.chosen_logps.sum() / plain.chosen_lengths.sum()
    torch.testing.assert_close(mixed.loss, plain.loss + 0.3 * nll)


def test_metrics_follow_trl_names_and_definitions():
    logps = torch.tensor([-3.0, -4.0, -5.0, -2.0])
    f, n = torch.tensor([0.3, -0.2, 0.1, -0.2]), torch.tensor([3, 4, 5, 2])
    out = preference_loss(logps, n, log_ratios=f, loss="dpo", beta=0.5)
    metrics = preference_metrics(out)
    assert metrics["rewards/chosen"].item() == pytest.approx(0.025)
    assert metrics["rewards/margins"].item() == pytest.approx(0.025 + 0.025)
    assert metrics["rewards/accuracies"].item() == 0.5  # strict: a tie is not a win
    assert metrics["logps/chosen"].item() == pytest.approx(-3.5)
    assert metrics["logps/chosen_avg"].item() == pytest.approx(-1.0)
    assert metrics["logps/rejected_avg"].item() == pytest.approx(-1.0)
    assert metrics["loss/pair"] == out.loss and "loss/chosen" not in metrics
    for sides in ([True, False, False, False], [True, True, False, False]):
        unpaired = preference_loss(
            logps, n, log_ratios=f, loss="bce", is_chosen=torch.tensor(sides)
        )
        metrics = preference_metrics(unpaired)
        assert not {"rewards/accuracies", "length/margin_corr", "loss/pair"} & set(metrics)
    torch.testing.assert_close(metrics["loss/chosen"] + metrics["loss/rejected"], unpaired.loss)


@pytest.mark.parametrize("per_token", [True, False])
def test_log_ratios_are_logged_per_token_with_their_spread_whatever_the_loss_makes_of_them(
    per_token,
):
    logps, n = torch.tensor([-3.0, -4.0, -5.0, -2.0]), torch.tensor([3, 4, 5, 2])
    sums = torch.tensor([0.3, -0.8, 0.5, -0.4])  # per token 0.1 and -0.2; 0.1 and -0.2
    f = sums / n if per_token else sums
    out = preference_loss(
        logps, n, log_ratios=f * n if per_token else f, length_normalize=per_token
    )
    metrics = preference_metrics(out)
    for side in ("chosen", "rejected"):
        assert metrics[f"log_ratio/{side}_avg"].item() == pytest.approx(-0.05)
        assert metrics[f"log_ratio/{side}_std"].item() == pytest.approx(0.15)
    free = preference_metrics(preference_loss(logps, n, log_ratios=logps))
    assert not any(name.startswith("log_ratio") for name in free), "log-probs are no ratios"


def test_the_line_of_margin_over_length_is_that_of_least_squares():
    n, f = torch.tensor([3, 9, 5, 2, 4, 4]), torch.tensor([0.3, 0.9, 0.1, 0.2, 0.0, -0.3])
    metrics = preference_metrics(preference_loss(-f, n, log_ratios=f, loss="dpo"))
    table = torch.stack([n[:3] - n[3:], 0.1 * (f[:3] - f[3:])])
    assert metrics["length/margin_corr"].item() == pytest.approx(torch.corrcoef(table)[0, 1].item())
    covariance = torch.cov(table)
    slope = covariance[0, 1] / covariance[0, 0]
    assert metrics["length/margin_slope"].item() == pytest.approx(slope.item())
    assert metrics["length/chosen"].item() == pytest.approx(17 / 3)
    alike = preference_metrics(preference_loss(-f, torch.full((6,), 4), log_ratios=f, loss="dpo"))
    assert alike["length/margin_corr"].item() == 0.0, "no length to follow"


def test_a_loss_of_the_callers_own_needs_only_its_curves():
    """The toy entry of CONTRIBUTING.md: a squared h, h(r) = r^2 / 2, by hand."""
    toy = Loss(
        "toy", "-e^f | e^(2f)/2", "CONTRIBUTING.md",
        chosen=lambda f: (-f.exp(), -f.exp()),
        rejected=lambda f: ((2 * f).exp() / 2, (2 * f).exp()),
        bregman=lambda r: (r.square() / 2, r),
        growth=lambda: ("up", "up"), length_normalize=True,
    )  # fmt: skip
    states, weight, labels, other = batch()
    kw = {"ref_hidden_states": other}
    assert torch.equal(
        fused_preference_loss(states, weight, labels, loss=toy, **kw).loss,
        fused_preference_loss(states, weight, labels, loss="lsif", **kw).loss,
    )


def test_names_and_aliases_are_unique():
    names = [n for e in LOSSES.values() for n in (e.name, *e.aliases)]
    assert len(names) == len(set(names))
    assert get_loss("kliep") is LOSSES["ukl"]


@pytest.mark.parametrize("entry", LOSSES.values(), ids=LOSSES)
def test_every_entry_states_its_formula_and_source(entry):
    assert entry.formula and entry.source
    assert (entry.bregman is not None) == bool(entry.bregman_formula)


@pytest.mark.parametrize("certain", ["chosen", "rejected"])
def test_orpo_of_a_certain_completion_is_finite(certain):
    logps = torch.tensor([0.0, -2.0] if certain == "chosen" else [-2.0, 0.0], requires_grad=True)
    out = preference_loss(logps, torch.ones(2), loss="orpo")
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert torch.isfinite(logps.grad).all()
