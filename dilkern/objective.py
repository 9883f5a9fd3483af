"""A loss with its options settled: what is minimised, as value and slope of one or two numbers.

f is the log-ratio of a sequence, x = beta f, m = beta (f_chosen - f_rejected). Equations: docs/math.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dilkern.curves import Growth, extended, on_extension, smoothed
from dilkern.losses import Loss, get_loss, merge_params
from dilkern.options import DEFAULTS, LossKeywords, LossOptions, Unpack, check_option_names
from dilkern.validation import check_bool, check_positive, is_number, reject


def _check_fraction(name: str, value: float, upper: float) -> None:
    if not is_number(value) or not 0 <= value <= upper:
        reject(f"`{name}` must be in [0, {upper}]", repr(value), f"Pass e.g. {name}=0.1.")


class Objective:
    """A loss of the registry with its options, checked and with all defaults in place.

    `fused_dil_loss(h=...)`, `fused_preference_loss(loss=...)` and `preference_loss(loss=...)` take one
    in the place of a name: an option set is then checked once and used often.

    Args:
        loss: name or alias in `dilkern.losses.LOSSES`, or a `Loss`.
        params: parameters of the loss, e.g. {"lam": -0.5} for "power".
        **options: the fields of `dilkern.options.LossOptions`.

    Raises:
        ValueError: an option that the loss does not have, or out of its range.
        TypeError: an option that no loss has, with the nearest name.

    Example:
        >>> from dilkern import Objective
        >>> Objective("dpo").beta
        0.1
        >>> Objective("bce", label_smoothing=0.1)
        Objective('bce', beta=1.0, length_normalize=True, label_smoothing=0.1)
    """

    def __init__(
        self,
        loss: str | Loss = "lsif",
        params: Mapping[str, Any] | None = None,
        **options: Unpack[LossKeywords],
    ) -> None:
        check_option_names(options)
        entry, asked = get_loss(loss), LossOptions(**options)
        self.loss = entry
        if asked.label_smoothing and "epsilon" in entry.params:
            params = self._epsilon(params, asked)
        self.params: dict[str, float] = merge_params(entry, params)
        self.growth: tuple[Growth, Growth] = entry.growth(**self.params)
        self.beta: float = self._settled_beta(asked.beta)
        self.pairwise: bool = self._settled_pairing(asked.pairing) == "pairwise"
        self.length_normalize: bool = (
            entry.length_normalize if asked.length_normalize is None else asked.length_normalize
        )
        self.sft_weight: float = entry.sft_weight if asked.sft_weight is None else asked.sft_weight
        self.options = asked
        self._check()

    def _epsilon(self, params: Mapping[str, Any] | None, asked: LossOptions) -> Mapping[str, Any]:
        """What TRL's users call label_smoothing is the parameter epsilon of "cdpo" and "robust"."""
        if params and "epsilon" in params:
            reject(
                f"the flip probability of loss {self.loss.name!r} must be given once",
                f"label_smoothing={asked.label_smoothing} and epsilon={params['epsilon']}",
                "Drop one of them.",
            )
        params = {**(params or {}), "epsilon": asked.label_smoothing}
        asked.label_smoothing = 0.0
        return params

    def _settled_beta(self, beta: float | None) -> float:
        entry = self.loss
        if beta is None:
            return 1.0 if entry.beta is None else entry.beta
        if entry.beta is None:
            reject(
                f"loss {entry.name!r} has no beta",
                f"beta={beta}",
                f"Its parameters are: {dict(entry.params) or 'none'}.",
            )
        check_positive("beta", beta)
        return beta

    def _settled_pairing(self, pairing: str | None) -> str:
        entry = self.loss
        if pairing is None or pairing == entry.pairing:
            return entry.pairing
        if entry.bregman is None or pairing != "pairwise":
            reject(
                "`pairing` can be 'pairwise' for h-functions only, and is fixed for other losses",
                f"pairing={pairing!r} for {entry.name!r}",
                f"Use pairing={entry.pairing!r} or leave it out.",
            )
        return pairing

    def _check(self) -> None:
        entry, o = self.loss, self.options
        check_bool("length_normalize", self.length_normalize)
        check_bool("strict", o.strict)
        if o.max_log_ratio is not None:
            check_positive("max_log_ratio", o.max_log_ratio)
        elif o.strict:
            reject(
                "`strict` holds log-ratios to `max_log_ratio`",
                "strict=True and max_log_ratio=None",
                "Give a max_log_ratio, or set strict=False.",
            )
        _check_fraction("label_smoothing", o.label_smoothing, 0.5)
        if o.label_smoothing and not entry.smoothing:
            reject(
                f"label_smoothing is not defined for loss {entry.name!r}",
                f"label_smoothing={o.label_smoothing}",
                "Use 'dpo', 'cdpo', 'robust' or an h-function, or set it to 0.",
            )
        _check_fraction("mixture", o.mixture, 1.0)
        if o.mixture and (entry.bregman is None or self.pairwise):
            reject(
                "`mixture` goes with a pointwise h-function",
                f"mixture={o.mixture} for {entry.name!r}, "
                f"pairing={'pairwise' if self.pairwise else entry.pairing!r}",
                "Set mixture=0.",
            )
        if o.label_smoothing and o.mixture:
            reject(
                "`label_smoothing` and `mixture` cannot be combined",
                f"label_smoothing={o.label_smoothing}, mixture={o.mixture}",
                "Set one of them to 0.",
            )
        if not is_number(self.sft_weight) or self.sft_weight < 0:
            reject(
                "`sft_weight` must be a number >= 0",
                repr(self.sft_weight),
                "Pass e.g. sft_weight=0.1.",
            )

    @classmethod
    def of(
        cls,
        loss: str | Loss | Objective,
        params: Mapping[str, Any] | None,
        options: LossKeywords,
        *,
        bregman_only: bool = False,
        argument: str = "loss",
    ) -> Objective:
        """Return the objective that a caller asks for: by name and options, or as it is.

        Raises:
            ValueError: an `Objective` together with options, which it has already; as the class.
        """
        if isinstance(loss, Objective):
            given = [*(["params"] if params is not None else []), *options]
            if given:
                reject(
                    f"an Objective as `{argument}` brings its own options",
                    ", ".join(given),
                    "Give them where the Objective is made.",
                )
            get_loss(loss.loss, bregman_only=bregman_only, argument=argument)
            return loss
        return cls(get_loss(loss, bregman_only=bregman_only, argument=argument), params, **options)

    def __repr__(self) -> str:
        shown: dict[str, Any] = {"params": self.params} if self.params else {}
        shown |= {"beta": self.beta, "length_normalize": self.length_normalize}
        for name, default in DEFAULTS.items():
            value = getattr(self.options, name)
            if value != default:
                shown.setdefault(name, value)
        texts = [repr(self.loss.name), *(f"{name}={value!r}" for name, value in shown.items())]
        return f"Objective({', '.join(texts)})"

    def of_sequence(self, x: Tensor, chosen: bool) -> tuple[Tensor, Tensor]:
        """Value and slope of one side of a pointwise loss (10), with smoothing (12) or mixture (13)."""
        e, t = self.options.label_smoothing, self.options.mixture
        weights = (1 - e, e + t) if chosen else (e, (1 - e) * (1 - t))
        curves = (self.loss.chosen, self.loss.rejected)
        sides = [
            (weight, extended(curve, growth, self.options.max_log_ratio, x, self.params))
            for weight, curve, growth in zip(weights, curves, self.growth)
            if weight and curve is not None
        ]
        value = sum((weight * v for weight, (v, _) in sides), start=torch.zeros_like(x))
        slope = sum((weight * d for weight, (_, d) in sides), start=torch.zeros_like(x))
        return value, slope

    def of_pair(self, m: Tensor) -> tuple[Tensor, Tensor]:
        """Value and slope of a pairwise loss of the margin (11)."""
        entry, limit = self.loss, self.options.max_log_ratio
        chosen, rejected = entry.chosen, entry.rejected
        assert chosen is not None
        params = {k: v for k, v in self.params.items() if k not in entry.transform_params}

        def curve(x: Tensor) -> tuple[Tensor, Tensor]:
            if entry.bregman is None:
                return chosen(x, **params)
            assert rejected is not None
            v1, d1 = extended(chosen, self.growth[0], limit, x, params)
            v2, d2 = extended(rejected, self.growth[1], limit, -x, params)
            return v1 + v2, d1 - d2

        e = self.options.label_smoothing
        return smoothed(curve, m, e) if e else curve(m)

    def transformed(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Value and slope of the loss's transform of f (f-DPO, ORPO); f itself where it has none."""
        entry = self.loss
        if entry.transform is None:
            return f, torch.ones_like(f)
        params = {k: self.params[k] for k in entry.transform_params}
        return extended(entry.transform, self.growth[0], self.options.max_log_ratio, f, params)

    def sft_count(self, chosen_lengths: Tensor) -> Tensor:
        """What the likelihood term is a mean over, of the scored tokens of chosen sequences."""
        per_token = self.loss.sft_per == "token"
        return chosen_lengths.sum() if per_token else (chosen_lengths > 0).sum()

    def clipped_sequence(self, x: Tensor, chosen: bool) -> Tensor:
        """Where x, or f under a transform, is on the linear extension of a curve in use: bool."""
        e, t, limit = self.options.label_smoothing, self.options.mixture, self.options.max_log_ratio
        if self.loss.transform is not None:
            return on_extension(self.growth[0], limit, x)
        in_use = (True, bool(e or t)) if chosen else (bool(e), t < 1)
        clipped = torch.zeros_like(x, dtype=torch.bool)
        for growth, used in zip(self.growth, in_use):
            if used:
                clipped = clipped | on_extension(growth, limit, x)
        return clipped

    def clipped_pair(self, m: Tensor) -> Tensor:
        """Where a margin is on the linear extension of one of the two curves: bool."""
        (chosen, rejected), limit = self.growth, self.options.max_log_ratio
        return on_extension(chosen, limit, m) | on_extension(rejected, limit, -m)
