"""The registry: every h-function of DIL and every rival loss, one entry each.

An entry is a name, a formula, a source, parameters with defaults, and scalar curves. A curve maps
a tensor of arguments x to (value, slope) elementwise, both in the dtype of x; nothing here knows of
tokens, batches or vocabularies. Derivations: docs/math.md; forms and traps: README, loss table.

f = log pi_theta(y|x) - log pi_ref(y|x) per sequence, r = e^f, s the logistic sigmoid,
sp(x) = log(1 + e^x), m = beta (f_chosen - f_rejected).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dilkern import curves
from dilkern.curves import Curve, Growth
from dilkern.validation import is_number, nearest, reject


@dataclass(frozen=True)
class Loss:
    """One loss. Pointwise: chosen(x_chosen) + rejected(x_rejected). Pairwise: chosen(margin).

    Args:
        name: how users ask for it.
        formula: the loss of one example, as text.
        source: paper and equation.
        chosen: l_1 of x = beta f for pointwise losses, the whole loss of the margin m for pairwise.
        rejected: l_-1 of x; None for pairwise losses without a pointwise form.
        pairing: "pointwise" or "pairwise"; "none" for a loss that is only its SFT term.
        bregman: r -> (h(r), h'(r)) for the h-functions of DIL; None for every other loss. Such an
            entry estimates a density ratio: its minimiser is f = log(p/q) / beta.
        bregman_formula: h(r) as text.
        params: parameters of the curves with their defaults.
        beta: default temperature; None where the loss has none.
        length_normalize: whether f is divided by the number of scored tokens, by default.
        reference: whether f is relative to a reference model.
        transform: a curve on f before beta (f-DPO, ORPO).
        transform_params: which of `params` belong to `transform` and not to the curves.
        growth: params -> growth of (chosen, rejected), or of (transform, "") where there is one; the
            linear extension beyond max_log_ratio acts there and nowhere else.
        smoothing: whether label smoothing is defined for it.
        sft_weight: default weight of the negative log-likelihood of the chosen tokens.
        sft_per: "token" for its mean over chosen tokens, "sequence" for the mean of sums.
        joint_mean: one mean over all sequences instead of one for chosen and one for rejected.
        baseline: whether a detached batch baseline is subtracted from f (KTO's z0).
        note: what differs from TRL or from the paper.
        aliases: other names.
        triton: name of the twin in dilkern.kernels.h_functions, if any.
    """

    name: str
    formula: str
    source: str
    chosen: Curve | None = None
    rejected: Curve | None = None
    pairing: Literal["pointwise", "pairwise", "none"] = "pointwise"
    bregman: Curve | None = None
    bregman_formula: str = ""
    params: Mapping[str, float] = field(default_factory=dict)
    beta: float | None = 1.0
    length_normalize: bool = False
    reference: bool = True
    transform: Curve | None = None
    transform_params: tuple[str, ...] = ()
    growth: Callable[..., tuple[Growth, Growth]] = lambda **_: ("", "")
    smoothing: bool = False
    sft_weight: float = 0.0
    sft_per: Literal["token", "sequence"] = "token"
    joint_mean: bool = False
    baseline: bool = False
    note: str = ""
    aliases: tuple[str, ...] = ()
    triton: str | None = None

    def __reduce__(self) -> Any:
        # An entry of the registry is pickled by name: its curves may be lambdas.
        if LOSSES.get(self.name) is self:
            return get_loss, (self.name,)
        return super().__reduce__()


_DIL = "Xiao et al. 2025 (DIL), eq. 24"

_ENTRIES = (
    Loss(
        "lsif",
        "-e^f | e^(2f)/2",
        f"{_DIL}, LSIF row; Kanamori et al. 2009",
        curves.lsif_chosen,
        curves.lsif_rejected,
        bregman=curves.h_lsif,
        bregman_formula="(r-1)^2/2",
        growth=lambda: ("up", "up"),
        length_normalize=True,
        smoothing=True,
        triton="lsif",
        note="constants +1 and -1/2 dropped, as in the paper's table and code",
    ),
    Loss(
        "ukl",
        "-f | e^f",
        f"{_DIL}, UKL row; Nguyen et al. 2010",
        curves.ukl_chosen,
        curves.ukl_rejected,
        bregman=curves.h_ukl,
        bregman_formula="r log r - r",
        growth=lambda: ("", "up"),
        length_normalize=True,
        smoothing=True,
        aliases=("kliep",),
        triton="ukl",
    ),
    Loss(
        "bce",
        "sp(-f) | sp(f)",
        f"{_DIL}, BCE row",
        curves.logistic_falling,
        curves.logistic_rising,
        bregman=curves.h_bce,
        bregman_formula="r log r - (r+1) log(r+1)",
        length_normalize=True,
        smoothing=True,
        note="beta=0.1 without length normalisation is TRL's bco_pair; mixture=0.5 is nca_pair",
        triton="bce",
    ),
    Loss(
        "power",
        "-(e^(lam f) - 1)/lam | (e^((1+lam) f) - 1)/(1+lam)",
        "h''(r) = r^(lam-1); Basu et al. 1998; Sugiyama et al. 2012; BPO (2505.19601) Table 2",
        curves.power_chosen,
        curves.power_rejected,
        bregman=curves.h_power,
        bregman_formula="r^(1+lam)/(lam (1+lam))",
        params={"lam": 0.5},
        growth=curves.power_growth,
        length_normalize=True,
        smoothing=True,
        note="lam=1 LSIF, 0 UKL, -1/2 exponential, -1 reverse UKL (constants apart); "
        "alpha-divergence with alpha = 1+lam; Basu BA_lam is (1+lam) times this, SBA_lam 1/s of it",
        triton="power",
    ),
    Loss(
        "nce",
        "sp(log nu - f) | nu sp(f - log nu)",
        "Gutmann & Hyvarinen 2012, prior nu",
        curves.nce_chosen,
        curves.nce_rejected,
        bregman=curves.h_nce,
        bregman_formula="r log r - (r+nu) log(r+nu)",
        params={"nu": 1.0},
        length_normalize=True,
        smoothing=True,
        note="nu=1 is BCE; nu = rejected samples per chosen sample",
        triton="nce",
    ),
    Loss(
        "brier",
        "s(-f)^2 | s(f)^2",
        "Brier score; GSIL code (Xiao et al. 2024)",
        curves.brier_chosen,
        curves.brier_rejected,
        bregman=curves.h_brier,
        bregman_formula="1/(1+r)",
        length_normalize=True,
        smoothing=True,
        triton="brier",
    ),
    Loss(
        "sft",
        "-sum_t log p_t / N_tokens (chosen)",
        "maximum likelihood",
        pairing="none",
        beta=None,
        reference=False,
        sft_weight=1.0,
    ),
    Loss(
        "dpo",
        "sp(-m)",
        "Rafailov et al. 2023, eq. 7",
        curves.logistic_falling,
        pairing="pairwise",
        beta=0.1,
        smoothing=True,
        note="half of pairwise BCE; TRL `sigmoid`, which ignores label_smoothing",
        aliases=("sigmoid", "fdpo_reverse_kl"),
    ),
    Loss(
        "dpo_norm",
        "sp(-m), f per token",
        "DPO with length-averaged log-ratios",
        curves.logistic_falling,
        pairing="pairwise",
        beta=0.1,
        length_normalize=True,
        smoothing=True,
        note="TRL `sigmoid_norm`; the DPO baseline in the DIL authors' code",
        aliases=("sigmoid_norm",),
    ),
    Loss(
        "cdpo",
        "(1-epsilon) sp(-m) + epsilon sp(m)",
        "Mitchell 2023, conservative DPO",
        curves.cdpo,
        pairing="pairwise",
        beta=0.1,
        params={"epsilon": 0.1},
    ),
    Loss(
        "robust",
        "[(1-epsilon) sp(-m) - epsilon sp(m)] / (1-2 epsilon)",
        "Chowdhury et al. 2024, robust DPO",
        curves.robust,
        pairing="pairwise",
        beta=0.1,
        params={"epsilon": 0.1},
        note="TRL `robust`, where epsilon is label_smoothing",
    ),
    Loss(
        "hinge",
        "max(0, 1-m)",
        "Liu et al. 2024 (RSO), hinge-norm",
        curves.hinge,
        pairing="pairwise",
        beta=0.1,
        note="TRL and Liger `hinge`, there called SLiC",
    ),
    Loss(
        "slic",
        "max(0, delta - log p_w + log p_l) - sft_weight log p_w",
        "Zhao et al. 2023 (SLiC-HF), eq. 2",
        curves.slic_hinge,
        pairing="pairwise",
        beta=None,
        reference=False,
        params={"delta": 1.0},
        sft_weight=0.1,
        sft_per="sequence",
        note="no reference model; defaults of HALOs; the paper regularises towards the SFT target",
        aliases=("slic_hf",),
    ),
    Loss(
        "fdpo_forward_kl",
        "sp(-beta (g_w - g_l)), g = -e^(-f)",
        "Wang et al. 2024 (f-DPO), forward KL",
        curves.logistic_falling,
        pairing="pairwise",
        beta=0.1,
        transform=curves.forward_kl,
        growth=lambda: ("down", ""),
        smoothing=True,
        note="TRL gives NaN where both f < -88.8 in fp32; here the exponential is continued linearly",
    ),
    Loss(
        "fdpo_jsd",
        "sp(-beta (g_w - g_l)), g = log s(f)",
        "Wang et al. 2024 (f-DPO), JSD",
        curves.logistic_falling,
        pairing="pairwise",
        beta=0.1,
        transform=curves.jensen_shannon,
        smoothing=True,
    ),
    Loss(
        "fdpo_alpha",
        "sp(-beta (g_w - g_l)), g = (1 - e^(-alpha f))/alpha",
        "Wang et al. 2024 (f-DPO), alpha divergence",
        curves.logistic_falling,
        pairing="pairwise",
        beta=0.1,
        transform=curves.alpha_divergence,
        params={"alpha": 0.5},
        transform_params=("alpha",),
        smoothing=True,
        growth=lambda alpha: ("down" if alpha > 0 else "up" if alpha < 0 else "", ""),
        note="alpha 0 is reverse KL and 1 forward KL, as in the paper; TRL's coefficient is 1-alpha",
    ),
    Loss(
        "ipo",
        "(f_w - f_l - 1/(2 tau))^2",
        "Azar et al. 2023 (IPO), eq. 17",
        curves.squared_to_target,
        pairing="pairwise",
        beta=None,
        params={"tau": 0.1},
        note="sums as in the paper; TRL averages per token: `ipo_norm`",
    ),
    Loss(
        "ipo_norm",
        "(f_w - f_l - 1/(2 tau))^2, f per token",
        "IPO as TRL and HALOs compute it",
        curves.squared_to_target,
        pairing="pairwise",
        beta=None,
        params={"tau": 0.1},
        length_normalize=True,
        note="TRL `ipo`, where tau is beta",
    ),
    Loss(
        "kto",
        "lambda_chosen s(-u) | lambda_rejected s(u), u = beta (f - z0)",
        "Ethayarajh et al. 2024 (KTO), eq. 8",
        curves.kto_chosen,
        curves.kto_rejected,
        beta=0.1,
        params={"lambda_chosen": 1.0, "lambda_rejected": 1.0},
        joint_mean=True,
        baseline=True,
        note="z0 = max(0, mean of kl_log_ratios), detached; not a density-ratio loss",
    ),
    Loss(
        "cpo",
        "sp(-beta (log p_w - log p_l)) + sft_weight NLL_w",
        "Xu et al. 2024 (CPO), eq. 5",
        curves.logistic_falling,
        pairing="pairwise",
        beta=0.1,
        reference=False,
        smoothing=True,
        sft_weight=1.0,
        note="NLL as token mean, as in the authors' code and TRL; the paper's formula is a sum",
    ),
    Loss(
        "simpo",
        "sp(gamma - beta (a_w - a_l)), a = log p / n",
        "Meng et al. 2024 (SimPO), eq. 6",
        curves.logistic_with_margin,
        pairing="pairwise",
        beta=2.0,
        reference=False,
        length_normalize=True,
        params={"gamma": 0.5},
        note="gamma/beta = 0.25 of the authors' repository; TRL's CPO trainer adds CPO's NLL",
    ),
    Loss(
        "orpo",
        "NLL_w + lam sp(-(o_w - o_l)), o = a - log(1 - e^a), a = log p / n",
        "Hong et al. 2024 (ORPO), eq. 6-7",
        curves.logistic_weighted,
        pairing="pairwise",
        beta=None,
        reference=False,
        length_normalize=True,
        transform=curves.log_odds,
        params={"lam": 0.1},
        sft_weight=1.0,
        note="NLL over the chosen completion; TRL's ORPO takes prompt tokens too",
    ),
)

LOSSES: dict[str, Loss] = {entry.name: entry for entry in _ENTRIES}


def get_loss(loss: str | Loss, *, bregman_only: bool = False, argument: str = "loss") -> Loss:
    """Look an entry up by name or alias, or pass a `Loss` of the caller's own through.

    Raises:
        ValueError: unknown name (lists the known), or not an h-function where one is required.
    """
    if isinstance(loss, Loss):
        entry = loss
    else:
        names = {alias: e for e in LOSSES.values() for alias in (e.name, *e.aliases)}
        known = {n: e for n, e in names.items() if e.bregman is not None or not bregman_only}
        if loss not in names or (bregman_only and loss not in known):
            reject(
                f"`{argument}` must be one of: {', '.join(sorted(known))}",
                repr(loss),
                "Rival losses go through fused_preference_loss(loss=...)."
                if loss in names
                else f"Did you mean {near!r}?"
                if (near := nearest(str(loss), known))
                else "Choose one of these.",
            )
        entry = names[loss]
    if bregman_only and entry.bregman is None:
        reject(
            f"`{argument}` must be an h-function, a Loss with `bregman`",
            repr(entry.name),
            "Use fused_preference_loss(loss=...) for other losses.",
        )
    return entry


def merge_params(entry: Loss, given: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the entry's parameters with the caller's values in place of defaults."""
    if given is not None and not isinstance(given, Mapping):
        reject(
            f"the parameters of loss {entry.name!r} must be a mapping of names to numbers",
            repr(given),
            f"Write e.g. {{{next(iter(entry.params), 'lam')!r}: 1.0}}.",
        )
    given = dict(given or {})
    unknown = sorted(set(given) - set(entry.params))
    if unknown:
        known = ", ".join(f"{k}={v}" for k, v in entry.params.items()) or "none"
        reject(
            f"parameters of loss {entry.name!r} are: {known}",
            ", ".join(unknown),
            f"Did you mean {near!r}?"
            if (near := nearest(unknown[0], entry.params))
            else "Remove them; beta, label_smoothing and the like are arguments of their own.",
        )
    for name, value in given.items():
        if not is_number(value):
            reject(f"`{name}` must be a finite number", repr(value), f"Pass e.g. {name}=1.0.")
    merged = {**entry.params, **{k: float(v) for k, v in given.items()}}
    for name, allowed, ok in (
        ("nu", "> 0", lambda v: v > 0),
        ("tau", "> 0", lambda v: v > 0),
        ("epsilon", "in [0, 0.5)", lambda v: 0 <= v < 0.5),
    ):
        if name in merged and not ok(merged[name]):
            reject(f"`{name}` must be {allowed}", repr(merged[name]), "See the loss table.")
    return merged
