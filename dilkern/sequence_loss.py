"""The small op: per-sequence log-probs to the loss, with the slopes of the registry as gradient.

S sequences, L positions, T tokens (flat). Equations: docs/math.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dilkern.curves import Growth, beyond, extended, smoothed
from dilkern.losses import Loss, get_loss, merge_params
from dilkern.validation import (
    check_float,
    check_positive,
    check_tensor,
    is_number,
    reject,
    shape_of,
)


class PreferenceLossOutput(NamedTuple):
    """What every loss returns; all but `loss` is detached. C chosen, R rejected sequences."""

    loss: Tensor  # 0-d fp32, differentiable
    chosen_logps: Tensor  # (C,) summed, nats
    rejected_logps: Tensor  # (R,)
    chosen_log_ratios: Tensor  # (C,) f as the loss used it (per token if length-normalised)
    rejected_log_ratios: Tensor  # (R,)
    clip_fraction: Tensor  # 0-d, share of sequences on the linear extension
    chosen_lengths: Tensor  # (C,) scored tokens
    rejected_lengths: Tensor  # (R,)
    chosen_losses: Tensor  # (C,) l_1 per chosen sequence, or the loss per pair
    rejected_losses: Tensor  # (R,) l_-1 per rejected sequence, or zeros for pairs
    chosen_clipped: Tensor  # (C,) bool, on the linear extension; of the pair for pairwise losses
    rejected_clipped: Tensor  # (R,) bool
    beta: float  # temperature in use, 1.0 for losses without one


DILLossOutput = PreferenceLossOutput


def sum_per_sequence(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sum (S, L) over positions, or packed (T,) between cu_seqlens (S+1,), in a fixed order."""
    if cu_seqlens is None:
        return values.sum(-1)
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens, initial=0, unsafe=True)


def split(values: Tensor, is_chosen: Tensor | None) -> tuple[Tensor, Tensor]:
    if is_chosen is None:
        half = values.shape[0] // 2
        return values[:half], values[half:]
    return values[is_chosen], values[~is_chosen]


def _attach(value: Tensor, slope: Tensor, x: Tensor) -> Tensor:
    """A tensor equal to `value` whose gradient in x is `slope`, with no other path to x."""
    return value.detach() + slope.detach() * (x - x.detach())


def _masked_mean(values: Tensor, weights: Tensor, count: Tensor | float) -> Tensor:
    # An empty sequence has weight 0 and finite values; one with NaN still spoils the mean.
    total = (values * weights).sum()
    if isinstance(count, Tensor):
        return total / torch.where(count > 0, count, 1)
    return total / (count or 1)


def check_sequences(num_sequences: int, is_chosen: Any, pairwise: bool, name: str) -> None:
    """Rules on which sequences are chosen and which are rejected."""
    if is_chosen is None:
        if num_sequences == 0 or num_sequences % 2:
            reject(
                "without `is_chosen` the batch is [chosen; rejected], an even number S > 0",
                f"S={num_sequences}",
                "Stack as many chosen as rejected sequences, chosen first, or pass `is_chosen`.",
            )
        return
    check_tensor("is_chosen", is_chosen)
    if pairwise:
        reject(
            f"the pairwise loss {name!r} needs pairs: chosen in the first half, rejected in the "
            "second",
            "is_chosen",
            "Reorder the batch and drop `is_chosen`, or take a pointwise loss.",
        )
    if is_chosen.dtype is not torch.bool or is_chosen.shape != (num_sequences,):
        reject(
            f"`is_chosen` must be a bool tensor of shape ({num_sequences},)",
            f"{shape_of(is_chosen)}, {is_chosen.dtype}",
            "Pass one flag per sequence.",
        )


def _fraction(name: str, value: float, upper: float) -> None:
    if not is_number(value) or not 0 <= value <= upper:
        reject(f"`{name}` must be in [0, {upper}]", repr(value), f"Pass e.g. {name}=0.1.")


def check_per_sequence(num_sequences: int, device: torch.device, **values: Tensor | None) -> None:
    """Every given tensor has one value per sequence, on one device."""
    for name, value in values.items():
        if value is None:
            continue
        check_tensor(name, value)
        if value.device != device:
            reject(
                f"`{name}` must be on the device of the log-probs, {device}",
                str(value.device),
                f"Move it: `{name}.to({str(device)!r})`.",
            )
        if value.shape != (num_sequences,):
            reject(
                f"`{name}` must have the shape of `logps`, ({num_sequences},)",
                shape_of(value),
                "Pass one value per sequence.",
            )


def check_both_sides(num_chosen: int, num_rejected: int) -> None:
    """A mean over nothing is no loss."""
    if num_chosen == 0 or num_rejected == 0:
        reject(
            "a batch needs at least one chosen and one rejected sequence",
            f"{num_chosen} chosen, {num_rejected} rejected",
            "Put both kinds into every batch, or pass the `counts` of a larger one.",
        )


class Settings(NamedTuple):
    """The caller's options after checks and defaults."""

    entry: Loss
    params: dict[str, float]
    beta: float
    length_normalize: bool
    pairwise: bool
    growth: tuple[Growth, Growth]
    limit: float | None
    label_smoothing: float
    mixture: float
    sft_weight: float


def settle(
    loss: str | Loss,
    params: Mapping[str, float] | None,
    beta: float | None,
    length_normalize: bool | None,
    pairing: str | None,
    max_log_ratio: float | None,
    label_smoothing: float,
    mixture: float,
    sft_weight: float | None,
) -> Settings:
    entry = get_loss(loss)
    merged = merge_params(entry, params)
    if beta is None:
        beta = 1.0 if entry.beta is None else entry.beta
    elif entry.beta is None:
        reject(
            f"loss {entry.name!r} has no beta",
            f"beta={beta}",
            f"Its parameters are: {dict(entry.params) or 'none'}.",
        )
    check_positive("beta", beta)
    pairing = entry.pairing if pairing is None else pairing
    if pairing != entry.pairing and (entry.bregman is None or pairing != "pairwise"):
        reject(
            "`pairing` can be 'pairwise' for h-functions only, and is fixed for other losses",
            f"pairing={pairing!r} for {entry.name!r}",
            f"Use pairing={entry.pairing!r} or leave it out.",
        )
    pairwise = pairing == "pairwise"
    if max_log_ratio is not None:
        check_positive("max_log_ratio", max_log_ratio)
    _fraction("label_smoothing", label_smoothing, 0.5)
    if label_smoothing and not entry.smoothing:
        reject(
            f"label_smoothing is not defined for loss {entry.name!r}",
            f"label_smoothing={label_smoothing}",
            "Use 'dpo', 'cdpo', 'robust' or an h-function, or set it to 0.",
        )
    _fraction("mixture", mixture, 1.0)
    if mixture and (entry.bregman is None or pairwise):
        reject(
            "`mixture` goes with a pointwise h-function",
            f"mixture={mixture} for {entry.name!r}, pairing={pairing!r}",
            "Set mixture=0.",
        )
    if label_smoothing and mixture:
        reject(
            "`label_smoothing` and `mixture` cannot be combined",
            f"label_smoothing={label_smoothing}, mixture={mixture}",
            "Set one of them to 0.",
        )
    if sft_weight is not None and (not is_number(sft_weight) or sft_weight < 0):
        reject("`sft_weight` must be a number >= 0", repr(sft_weight), "Pass e.g. sft_weight=0.1.")
    return Settings(
        entry,
        merged,
        beta,
        entry.length_normalize if length_normalize is None else length_normalize,
        pairwise,
        entry.growth(**merged),
        max_log_ratio,
        label_smoothing,
        mixture,
        entry.sft_weight if sft_weight is None else sft_weight,
    )


def _point(x: Tensor, chosen: bool, s: Settings) -> tuple[Tensor, Tensor]:
    """Value and slope of one side of a pointwise loss (10), with smoothing (12) or mixture (13)."""
    e, t = s.label_smoothing, s.mixture
    weights = (1 - e, e + t) if chosen else (e, (1 - e) * (1 - t))
    sides = [
        (weight, extended(curve, growth, s.limit, x, s.params))
        for weight, curve, growth in zip(weights, (s.entry.chosen, s.entry.rejected), s.growth)
        if weight and curve is not None
    ]
    value = sum((weight * v for weight, (v, _) in sides), start=torch.zeros_like(x))
    slope = sum((weight * d for weight, (_, d) in sides), start=torch.zeros_like(x))
    return value, slope


def _pair(m: Tensor, s: Settings) -> tuple[Tensor, Tensor]:
    """Value and slope of a pairwise loss of the margin (11)."""
    entry = s.entry
    assert entry.chosen is not None
    params = {k: v for k, v in s.params.items() if k not in entry.transform_params}
    if entry.bregman is None:
        chosen = entry.chosen

        def curve(x: Tensor) -> tuple[Tensor, Tensor]:
            return chosen(x, **params)
    else:
        sides = (entry.chosen, entry.rejected)

        def curve(x: Tensor) -> tuple[Tensor, Tensor]:
            assert sides[1] is not None
            v1, d1 = extended(sides[0], s.growth[0], s.limit, x, params)
            v2, d2 = extended(sides[1], s.growth[1], s.limit, -x, params)
            return v1 + v2, d1 - d2

    return smoothed(curve, m, s.label_smoothing) if s.label_smoothing else curve(m)


def _transformed(f: Tensor, valid: Tensor, s: Settings) -> Tensor:
    """Apply the entry's transform to f; -1 stands in for empty sequences, which carry no weight."""
    entry = s.entry
    if entry.transform is None:
        return f
    f = torch.where(valid, f, -1.0)
    params = {k: s.params[k] for k in entry.transform_params}
    return _attach(*extended(entry.transform, s.growth[0], s.limit, f.detach(), params), f)


def clipped(x: Tensor, chosen: bool, s: Settings) -> Tensor:
    """Where a sequence, or a margin, is on the linear extension of a curve in use."""
    if s.entry.transform is not None:
        return beyond(s.growth[0], s.limit, x)
    e = s.label_smoothing
    use = (True, bool(e or s.mixture)) if chosen else (bool(e), s.mixture < 1)
    hits = [beyond(g, s.limit, x) for g, used in zip(s.growth, use) if used]
    return torch.stack(hits).any(0) if hits else torch.zeros_like(x, dtype=torch.bool)


def check_strict(hits: Tensor, f: Tensor, s: Settings, strict: bool) -> Tensor:
    """Return the share of sequences on the linear extension; with `strict` there may be none."""
    if strict and s.limit is None:
        reject(
            "`strict` holds log-ratios to `max_log_ratio`",
            "strict=True and max_log_ratio=None",
            "Give a max_log_ratio, or set strict=False.",
        )
    clip_fraction = hits.to(f.dtype).mean()
    if strict and bool(clip_fraction > 0):
        reject(
            f"strict: every log-ratio must be within max_log_ratio={s.limit}",
            f"{int(hits.sum())} of {hits.numel()} beyond it, largest |f| {f.abs().max().item():.4g}",
            "Summed log-probs with an exponential h do this: use length_normalize=True, 'bce', or "
            "a smaller learning rate.",
        )
    return clip_fraction


def preference_loss(
    logps: Tensor,  # (S,)
    lengths: Tensor,  # (S,)
    *,
    log_ratios: Tensor | None = None,  # (S,)
    loss: str | Loss = "lsif",
    params: Mapping[str, float] | None = None,
    is_chosen: Tensor | None = None,  # (S,) bool
    beta: float | None = None,
    length_normalize: bool | None = None,
    pairing: str | None = None,
    max_log_ratio: float | None = 10.0,
    label_smoothing: float = 0.0,
    mixture: float = 0.0,
    weights: Tensor | None = None,  # (S,)
    sft_weight: float | None = None,
    kl_log_ratios: Tensor | None = None,  # any shape
    counts: tuple[Tensor | float, Tensor | float] | None = None,
    strict: bool = False,
) -> PreferenceLossOutput:
    r"""Compute a preference loss from per-sequence log-probs, for any entry of the registry.

    Pointwise: $\overline{l_1(\beta f)}$ over chosen plus $\overline{l_{-1}(\beta f)}$ over rejected
    sequences; pairwise: the mean over pairs of $l(\beta (f_w - f_l))$ (docs/math.md, 10-13).

    Args:
        logps: (S,) summed log-probs of the policy, nats, differentiable.
        lengths: (S,) number of scored tokens; sequences of length 0 carry no weight.
        log_ratios: (S,) sum over tokens of log pi_theta - log pi_ref, differentiable. Required by
            losses with a reference, forbidden for those without; pass `logps` itself to go
            reference-free on purpose.
        loss: name in `dilkern.losses.LOSSES`, an alias, or a `Loss`.
        params: the entry's own parameters, e.g. {"lam": -0.5}.
        is_chosen: (S,) bool for unpaired data; None: first half chosen, second half rejected.
        beta: temperature; None for the entry's default.
        length_normalize: divide f by the number of scored tokens; None for the entry's default.
        pairing: None for the entry's own; "pairwise" makes an h-function a BPO loss
            l_1(m) + l_-1(-m).
        max_log_ratio: beyond it, exponentials in f continue linearly; None for the paper's formula.
            Losses whose slope is bounded have no exponential and are the same for any value.
        label_smoothing: probability that a pair, or a label, is flipped.
        mixture: weight t of chosen samples in the denominator; 0 is the paper's loss.
        weights: (S,) factor per sequence (product of both for pairs), treated as constant.
        sft_weight: weight of the negative log-likelihood of the chosen tokens; None for default.
        kl_log_ratios: log-ratios of mismatched prompts and completions, for KTO's z0 and only there;
            pass zeros for APO-zero.
        counts: the denominators of the means over chosen and over rejected sequences (the first one
            for pairs); None: the non-empty ones of this batch. Under data parallelism pass the
            global counts divided by the number of ranks, and averaged gradients are those of one
            process; a batch may then lack one of the two kinds.
        strict: raise if any sequence is beyond max_log_ratio. One device sync.

    Returns:
        PreferenceLossOutput; `loss` is 0-d, in the dtype of `logps`.

    Raises:
        ValueError: an option that the loss does not have, shapes that do not fit, no chosen or no
            rejected sequence, or, with `strict`, a log-ratio out of range.

    Numerics: everything in the dtype of `logps` (fp32). The gradient is the registry's slope.

    Example:
        >>> import torch
        >>> from dilkern import preference_loss
        >>> logps, lengths = torch.tensor([-8.0, -9.0]), torch.tensor([4, 3])
        >>> out = preference_loss(logps, lengths, log_ratios=torch.zeros(2), loss="bce")
        >>> round(out.loss.item(), 4)
        1.3863
    """
    s = settle(
        loss, params, beta, length_normalize, pairing, max_log_ratio, label_smoothing, mixture,
        sft_weight,
    )  # fmt: skip
    entry = s.entry
    check_float("logps", logps)
    if logps.dim() != 1:
        reject(
            "`logps` must have shape (S,)",
            shape_of(logps),
            "Pass one sum of token log-probs per sequence.",
        )
    check_sequences(logps.shape[0], is_chosen, s.pairwise, entry.name)
    check_per_sequence(
        logps.shape[0], logps.device, lengths=lengths, log_ratios=log_ratios, weights=weights
    )
    if (log_ratios is not None) != entry.reference:
        reject(
            f"loss {entry.name!r} "
            + ("needs a reference" if entry.reference else "has no reference"),
            "none" if log_ratios is None else "one",
            "Pass the reference's log-probs, or choose reference_free=True."
            if entry.reference
            else "Leave the reference out, or take a loss that uses it.",
        )
    if (kl_log_ratios is not None) != entry.baseline:
        reject(
            f"`kl_log_ratios` {'is required by' if entry.baseline else 'is not used by'} "
            f"loss {entry.name!r}",
            "none" if kl_log_ratios is None else "a tensor",
            "Pass log-ratios of mismatched prompt and completion pairs (zeros for APO-zero)."
            if entry.baseline
            else "Remove it; it belongs to KTO.",
        )
    if kl_log_ratios is not None:
        check_tensor("kl_log_ratios", kl_log_ratios)
    base = logps if log_ratios is None else log_ratios
    valid = lengths > 0
    f = base / lengths.clamp(min=1) if s.length_normalize else base
    (f_w, f_l), (valid_w, valid_l) = split(f, is_chosen), split(valid, is_chosen)
    (logps_w, logps_l), (n_w, n_l) = split(logps, is_chosen), split(lengths, is_chosen)
    if counts is None:
        check_both_sides(f_w.numel(), f_l.numel())
    ones = torch.ones_like(f) if weights is None else weights.detach().to(f.dtype)
    weight_w, weight_l = split(ones, is_chosen)
    zeros_l = torch.zeros_like(f_l)
    if s.pairwise:
        both = valid_w & valid_l
        x_w, x_l = _transformed(f_w, valid_w, s), _transformed(f_l, valid_l, s)
        m = s.beta * (x_w - x_l)
        losses_w, losses_l = _attach(*_pair(m.detach(), s), m), zeros_l
        total = _masked_mean(
            losses_w, weight_w * weight_l * both, both.sum() if counts is None else counts[0]
        )
        if entry.transform is not None:
            hits_w, hits_l = clipped(f_w, True, s), clipped(f_l, False, s)
        else:
            hits_w = hits_l = beyond(s.growth[0], s.limit, m) | beyond(s.growth[1], s.limit, -m)
    elif entry.pairing == "none":
        losses_w, losses_l = torch.zeros_like(f_w), zeros_l
        total = f.sum() * 0.0
        hits_w, hits_l = (torch.zeros_like(x, dtype=torch.bool) for x in (f_w, f_l))
    else:
        baseline = 0.0 if kl_log_ratios is None else kl_log_ratios.detach().mean().clamp(min=0)
        x_w, x_l = s.beta * (f_w - baseline), s.beta * (f_l - baseline)
        losses_w = _attach(*_point(x_w.detach(), True, s), x_w)
        losses_l = _attach(*_point(x_l.detach(), False, s), x_l)
        count_w, count_l = (valid_w.sum(), valid_l.sum()) if counts is None else counts
        if entry.joint_mean:
            count_w = count_l = count_w + count_l
        total = _masked_mean(losses_w, weight_w * valid_w, count_w)
        total = total + _masked_mean(losses_l, weight_l * valid_l, count_l)
        hits_w, hits_l = clipped(x_w, True, s), clipped(x_l, False, s)
    if s.sft_weight:
        count = n_w.sum() if entry.sft_per == "token" else valid_w.sum()
        total = total - s.sft_weight * _masked_mean(logps_w, weight_w, count)
    clip_fraction = check_strict(torch.cat([hits_w, hits_l]), f, s, strict)
    return PreferenceLossOutput(
        total, logps_w.detach(), logps_l.detach(), f_w.detach(), f_l.detach(), clip_fraction,
        n_w, n_l, losses_w.detach(), losses_l.detach(), hits_w, hits_l, s.beta,
    )  # fmt: skip


def preference_metrics(output: PreferenceLossOutput) -> dict[str, Tensor]:
    """Return the metrics of a step under TRL's names, each a detached 0-d tensor.

    rewards/* are beta f with the f that the loss used; rewards/accuracies is the strict share of
    pairs with a larger chosen reward (absent for unpaired batches), so 0.0 where policy ==
    reference; logps/* are means over sequences of summed log-probs, logps/*_avg of means per token;
    ratio/* are means of e^f; clip_frac/* are shares on the linear extension; loss/* are means of the
    sides of a pointwise loss.

    Example:
        >>> import torch
        >>> from dilkern import preference_loss, preference_metrics
        >>> out = preference_loss(
        ...     torch.tensor([-8.0, -9.0]), torch.tensor([4, 3]), log_ratios=torch.tensor([4.0, 0.0])
        ... )
        >>> preference_metrics(out)["rewards/margins"].item()
        1.0
    """
    o = output
    chosen, rejected = o.beta * o.chosen_log_ratios, o.beta * o.rejected_log_ratios
    metrics = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": chosen.mean() - rejected.mean(),
        "logps/chosen": o.chosen_logps.mean(),
        "logps/rejected": o.rejected_logps.mean(),
        "logps/chosen_avg": (o.chosen_logps / o.chosen_lengths.clamp(min=1)).mean(),
        "logps/rejected_avg": (o.rejected_logps / o.rejected_lengths.clamp(min=1)).mean(),
        "ratio/chosen": o.chosen_log_ratios.exp().mean(),
        "ratio/rejected": o.rejected_log_ratios.exp().mean(),
        "loss/chosen": o.chosen_losses.mean(),
        "loss/rejected": o.rejected_losses.mean(),
        "clip_frac/chosen": o.chosen_clipped.float().mean(),
        "clip_frac/rejected": o.rejected_clipped.float().mean(),
    }
    if chosen.shape == rejected.shape:
        metrics["rewards/accuracies"] = (chosen > rejected).to(chosen.dtype).mean()
    return metrics
