"""The small op: from the log-probs of tokens, or of sequences, to the loss of an objective.

One function serves the fused calls, plain loops and trainers alike; where a Triton kernel knows the
objective it does the work in one launch. S sequences, L positions, T tokens (packed). Equations:
docs/math.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dilkern.losses import Loss
from dilkern.objective import Objective
from dilkern.options import DEFAULTS, LossKeywords, Unpack
from dilkern.output import PreferenceLossOutput
from dilkern.pointwise import pointwise_loss
from dilkern.validation import check_float, check_same_device, check_tensor, reject, shape_of

_TRITON_INSTALLED = find_spec("triton") is not None
# What the kernel computes; pairing and sft_weight are looked at as settled.
_KERNEL_OPTIONS = ("beta", "length_normalize", "max_log_ratio", "strict", "pairing", "sft_weight")
Counts = tuple[Tensor | float, Tensor | float]


def sum_per_sequence(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sum (S, L) over positions, or packed (T,) between cu_seqlens (S+1,), in a fixed order."""
    if cu_seqlens is None:
        return values.contiguous().sum(-1)
    return torch.segment_reduce(
        values.contiguous(), "sum", offsets=cu_seqlens.contiguous(), initial=0, unsafe=True
    )


def check_sides(num_sequences: int, is_chosen: Any, objective: Objective) -> None:
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
    if objective.pairwise:
        reject(
            f"the pairwise loss {objective.loss.name!r} needs pairs: chosen in the first half, "
            "rejected in the second",
            "is_chosen",
            "Reorder the batch and drop `is_chosen`, or take a pointwise loss.",
        )
    if is_chosen.dtype is not torch.bool or is_chosen.shape != (num_sequences,):
        reject(
            f"`is_chosen` must be a bool tensor of shape ({num_sequences},)",
            f"{shape_of(is_chosen)}, {is_chosen.dtype}",
            "Pass one flag per sequence.",
        )


def check_reference(
    objective: Objective,
    labels: Tensor,  # the shape and device of the token log-probs
    num_sequences: int,
    ref_logps: Tensor | None,
    ref_hidden_states: Tensor | None = None,
    reference_free: bool = False,
) -> None:
    """Exactly one form of reference for a loss that has one, none for any other."""
    name = objective.loss.name
    forms = {
        "ref_logps": ref_logps is not None,
        "ref_hidden_states": ref_hidden_states is not None,
        "reference_free=True": reference_free,
    }
    received = [form for form, there in forms.items() if there]
    if not objective.loss.reference and received:
        reject(
            f"loss {name!r} has no reference",
            ", ".join(received),
            "Leave it out, or take a loss that uses it.",
        )
    if objective.loss.reference and len(received) != 1:
        reject(
            "exactly one of `ref_logps`, `ref_hidden_states` and `reference_free=True` is needed",
            ", ".join(received) or "none",
            "Pass the reference's log-probs or its hidden states, or choose reference_free=True.",
        )
    for argument, value in (("ref_logps", ref_logps), ("ref_hidden_states", ref_hidden_states)):
        if value is None:
            continue
        check_float(argument, value)
        check_same_device(argument, value, "labels", labels)
        if value.requires_grad:
            reject(
                f"`{argument}` must not require grad: the reference is a constant",
                "a tensor with requires_grad=True",
                "Compute it under torch.no_grad(), or pass `.detach()`.",
            )
    if ref_logps is not None and ref_logps.shape not in ((num_sequences,), labels.shape):
        reject(
            f"`ref_logps` must have shape ({num_sequences},) per sequence or "
            f"{tuple(labels.shape)} per token",
            shape_of(ref_logps),
            "Pass summed log-probs in the order of the sequences, or token log-probs.",
        )


def _check_per_sequence(num_sequences: int, device: torch.device, **values: Tensor | None) -> None:
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


def _check_baseline(objective: Objective, kl_log_ratios: Tensor | None) -> None:
    needed = objective.loss.baseline
    if (kl_log_ratios is not None) != needed:
        reject(
            f"`kl_log_ratios` {'is required by' if needed else 'is not used by'} "
            f"loss {objective.loss.name!r}",
            "none" if kl_log_ratios is None else "a tensor",
            "Pass log-ratios of mismatched prompt and completion pairs (zeros for APO-zero)."
            if needed
            else "Remove it; it belongs to KTO.",
        )
    if kl_log_ratios is not None:
        check_tensor("kl_log_ratios", kl_log_ratios)


class _Batch(NamedTuple):
    """Who is who among the S sequences, and what each counts."""

    is_chosen: Tensor | None  # as the caller gave it; None: first half chosen
    chosen: Tensor  # (S,) bool
    lengths: Tensor  # (S,) scored tokens
    weight: Tensor  # (S,) 0 for a sequence without scored tokens
    given_counts: Counts | None
    counts: Counts  # denominators of the means over chosen and over rejected

    @property
    def there(self) -> Tensor:
        return self.lengths > 0


def _batch(
    lengths: Tensor,
    is_chosen: Tensor | None,
    weights: Tensor | None,
    counts: Counts | None,
    dtype: torch.dtype,
) -> _Batch:
    size, there = len(lengths), lengths > 0
    if is_chosen is None:
        chosen = torch.arange(size, device=lengths.device) < size // 2
    else:
        chosen = is_chosen
        if counts is None and (number := int(chosen.sum())) in (0, size):
            reject(
                "a batch needs at least one chosen and one rejected sequence",
                f"{number} chosen, {size - number} rejected",
                "Put both kinds into every batch, or pass the `counts` of a larger one.",
            )
    weight = there.to(dtype)
    if weights is not None:
        weight = weight * weights.detach().to(dtype)
    own = ((there & chosen).sum(), (there & ~chosen).sum())
    return _Batch(is_chosen, chosen, lengths, weight, counts, own if counts is None else counts)


def _attach(value: Tensor, slope: Tensor, x: Tensor) -> Tensor:
    """A tensor equal to `value` whose gradient in x is `slope`, with no other path to x."""
    return value.detach() + slope.detach() * (x - x.detach())


def _at_least_one(count: Tensor | float) -> Tensor | float:
    """A denominator: nothing over nothing is 0."""
    return torch.where(count > 0, count, 1) if isinstance(count, Tensor) else count or 1


def _refuse_clipped(objective: Objective, clipped: Tensor, f: Tensor) -> None:
    """With `strict` no sequence may be on the linear extension."""
    if objective.options.strict and bool(clipped.any()):
        reject(
            f"strict: every log-ratio must be within max_log_ratio={objective.options.max_log_ratio}",
            f"{int(clipped.sum())} of {clipped.numel()} beyond it, largest |f| "
            f"{f.abs().max().item():.4g}",
            "Summed log-probs with an exponential h do this: use length_normalize=True, 'bce', or "
            "a smaller learning rate.",
        )


def _output(
    objective: Objective,
    batch: _Batch,
    loss: Tensor,
    logps: Tensor,  # all (S,) from here
    f: Tensor,
    losses: Tensor,
    clipped: Tensor,
    has_reference: bool,
) -> PreferenceLossOutput:
    _refuse_clipped(objective, clipped, f)

    def sides(values: Tensor) -> tuple[Tensor, Tensor]:
        values = values.detach()
        if batch.is_chosen is None:
            return values[: len(values) // 2], values[len(values) // 2 :]
        return values[batch.is_chosen], values[~batch.is_chosen]

    clip_fraction = clipped.to(f.dtype).mean()
    return PreferenceLossOutput(
        loss, *sides(logps), *sides(f), clip_fraction, *sides(batch.lengths), *sides(losses),
        *sides(clipped), objective.beta, objective.pairwise, batch.is_chosen is None,
        objective.length_normalize, has_reference,
    )  # fmt: skip


def _kernel_knows(objective: Objective, token_logps: Tensor, backend: str) -> bool:
    """Whether one launch of the Triton kernel computes this objective here."""
    o, on_gpu = objective, token_logps.device.type in ("cuda", "xpu")
    return (
        _TRITON_INSTALLED
        and (backend == "triton" or (backend == "auto" and on_gpu))
        and token_logps.dtype is torch.float32
        and o.loss.triton is not None
        and len(o.params) < 2
        and not (o.pairwise or o.sft_weight)
        # Any other option, also one yet to come, is the torch path's.
        and all(
            getattr(o.options, name) == default
            for name, default in DEFAULTS.items()
            if name not in _KERNEL_OPTIONS
        )
    )


def loss_from_token_logps(
    objective: Objective,
    token_logps: Tensor,  # (S, L) or (T,)
    scored: Tensor,  # like token_logps, bool
    *,
    ref_logps: Tensor | None = None,  # (S,) or like token_logps
    reference_free: bool = False,
    is_chosen: Tensor | None = None,  # (S,) bool
    cu_seqlens: Tensor | None = None,  # (S+1,)
    weights: Tensor | None = None,  # (S,)
    counts: Counts | None = None,
    sft_count: Tensor | float | None = None,
    kl_log_ratios: Tensor | None = None,  # any shape
    backend: str = "auto",
) -> PreferenceLossOutput:
    """Compute the loss of an objective from token log-probs: the one way for every caller.

    Args:
        objective: what is minimised.
        token_logps: (S, L), or (T,) packed with cu_seqlens: log-probs of the policy in nats, 0 where
            not scored, as `linear_logps` gives them; differentiable.
        scored: which of them count.
        ref_logps: (S,) summed log-probs of the reference, or its token log-probs.
        reference_free: f = log pi_theta on purpose.
        is_chosen, weights, counts, kl_log_ratios: see `preference_loss`.
        cu_seqlens: (S+1,) cumulative lengths of packed sequences.
        sft_count: the denominator of the likelihood term of `sft_weight`; None: what of this batch
            it is a mean over, chosen tokens or sequences. With `counts` that of a larger batch.
        backend: "auto", "torch" or "triton": whether the Triton kernel may compute the loss.

    Returns:
        PreferenceLossOutput.

    Raises:
        ValueError: as `preference_loss`, and a reference too many or too few.

    Example:
        >>> import torch
        >>> from dilkern import Objective
        >>> from dilkern.preference import loss_from_token_logps
        >>> token_logps = torch.tensor([[0.0, -1.0, -2.0], [0.0, -3.0, 0.0]])
        >>> out = loss_from_token_logps(
        ...     Objective("dpo"), token_logps, token_logps != 0, ref_logps=torch.tensor([-3.0, -3.0])
        ... )
        >>> out.chosen_log_ratios.item(), round(out.loss.item(), 4)
        (0.0, 0.6931)
    """
    num_sequences = token_logps.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    check_sides(num_sequences, is_chosen, objective)
    check_reference(objective, token_logps, num_sequences, ref_logps, reference_free=reference_free)
    _check_per_sequence(num_sequences, token_logps.device, weights=weights)
    _check_baseline(objective, kl_log_ratios)
    lengths = sum_per_sequence(scored.to(token_logps.dtype), cu_seqlens)
    batch = _batch(lengths, is_chosen, weights, counts, token_logps.dtype)
    if ref_logps is not None:
        ref_logps = ref_logps.to(token_logps.dtype)
    if _kernel_knows(objective, token_logps, backend):
        return _loss_in_one_launch(objective, batch, token_logps, scored, ref_logps, cu_seqlens)
    logps = sum_per_sequence(token_logps, cu_seqlens)
    log_ratios: Tensor | None = None
    if reference_free:
        log_ratios = logps
    elif ref_logps is not None and ref_logps.shape == token_logps.shape:
        # Differences first: sums of bf16 or of long sequences would cancel.
        difference = torch.where(scored, token_logps - ref_logps, 0.0)
        log_ratios = sum_per_sequence(difference, cu_seqlens)
    elif ref_logps is not None:
        log_ratios = logps - ref_logps
    return _loss_from_sequences(objective, batch, logps, log_ratios, kl_log_ratios, sft_count)


def _loss_in_one_launch(
    objective: Objective,
    batch: _Batch,
    token_logps: Tensor,
    scored: Tensor,
    ref_logps: Tensor | None,
    cu_seqlens: Tensor | None,
) -> PreferenceLossOutput:
    """The same numbers as `_loss_from_sequences`, without its dozens of small launches."""
    o, bounds, limit = objective, cu_seqlens, objective.options.max_log_ratio
    if bounds is None:
        rows, length = token_logps.shape
        bounds = torch.arange(rows + 1, device=token_logps.device) * length
    count_w, count_l = batch.counts
    count = torch.where(batch.chosen, count_w, count_l)
    per_token = ref_logps is not None and ref_logps.shape == token_logps.shape
    loss, logps, f, losses = pointwise_loss(
        token_logps,
        scored,
        bounds,
        batch.chosen,
        batch.weight / _at_least_one(count),
        ref_token_logps=ref_logps if per_token else None,
        ref_logps=None if per_token else ref_logps,
        twin=o.loss.triton or "",
        beta=o.beta,
        length_normalize=o.length_normalize,
        limit=float("inf") if limit is None else limit,
        param=next(iter(o.params.values()), 0.0),
    )
    clipped = _clipped_sequences(o, batch, o.beta * f)
    return _output(o, batch, loss, logps, f, losses, clipped, ref_logps is not None)


def _clipped_sequences(objective: Objective, batch: _Batch, x: Tensor) -> Tensor:
    chosen, rejected = (objective.clipped_sequence(x, side) for side in (True, False))
    return torch.where(batch.chosen, chosen, rejected)


def _loss_from_sequences(
    objective: Objective,
    batch: _Batch,
    logps: Tensor,  # (S,)
    log_ratios: Tensor | None,  # (S,)
    kl_log_ratios: Tensor | None,
    sft_count: Tensor | float | None = None,
) -> PreferenceLossOutput:
    o, (count_w, count_l) = objective, batch.counts
    base = logps if log_ratios is None else log_ratios
    f = base / batch.lengths.clamp(min=1) if o.length_normalize else base

    def mean(values: Tensor, of: Tensor, count: Tensor | float) -> Tensor:
        # An empty sequence has weight 0 and finite values; one with NaN still spoils the mean.
        return torch.where(of, values * batch.weight, 0.0).sum() / _at_least_one(count)

    if o.pairwise:
        total, losses, clipped = _pairs(o, batch, f)
    elif o.loss.pairing == "none":
        losses, clipped = torch.zeros_like(f), torch.zeros_like(f, dtype=torch.bool)
        total = f.sum() * 0.0
    else:
        baseline = 0.0 if kl_log_ratios is None else kl_log_ratios.detach().mean().clamp(min=0)
        x = o.beta * (f - baseline)
        sides = [o.of_sequence(x.detach(), side) for side in (True, False)]
        value, slope = (torch.where(batch.chosen, a, b) for a, b in zip(*sides))
        losses = _attach(value, slope, x)
        if o.loss.joint_mean:
            count_w = count_l = count_w + count_l
        total = mean(losses, batch.chosen, count_w) + mean(losses, ~batch.chosen, count_l)
        clipped = _clipped_sequences(o, batch, x)
    if o.sft_weight:
        chosen = batch.chosen
        if sft_count is None:
            sft_count = o.sft_count(torch.where(chosen, batch.lengths, 0))
        total = total - o.sft_weight * mean(logps, chosen, sft_count)
    has_reference = log_ratios is not None and log_ratios is not logps
    return _output(o, batch, total, logps, f, losses, clipped, has_reference)


def _pairs(objective: Objective, batch: _Batch, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its terms (S,): a pair's in its chosen half, and who is on a linear extension (S,)."""
    o, half = objective, len(f) // 2
    if o.loss.transform is None:
        m = o.beta * (f[:half] - f[half:])
        clipped = o.clipped_pair(m).repeat(2)
    else:
        # -1 stands in for empty sequences, which carry no weight: ORPO's odds need f < 0.
        f = torch.where(batch.there, f, -1.0)
        transformed = _attach(*o.transformed(f.detach()), f)
        m = o.beta * (transformed[:half] - transformed[half:])
        clipped = o.clipped_sequence(f, True)
    losses = _attach(*o.of_pair(m.detach()), m)
    count: Tensor | float = (batch.there[:half] & batch.there[half:]).sum()
    if batch.given_counts is not None:
        count = batch.given_counts[0]
    total = (losses * batch.weight[:half] * batch.weight[half:]).sum() / _at_least_one(count)
    return total, torch.cat((losses, torch.zeros_like(losses))), clipped


def preference_loss(
    logps: Tensor,  # (S,)
    lengths: Tensor,  # (S,)
    *,
    log_ratios: Tensor | None = None,  # (S,)
    loss: str | Loss | Objective = "lsif",
    params: Mapping[str, float] | None = None,
    is_chosen: Tensor | None = None,  # (S,) bool
    weights: Tensor | None = None,  # (S,)
    counts: Counts | None = None,
    kl_log_ratios: Tensor | None = None,  # any shape
    **options: Unpack[LossKeywords],
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
        loss: name in `dilkern.losses.LOSSES`, an alias, a `Loss`, or an `Objective`, which brings
            params and options.
        params: the entry's own parameters, e.g. {"lam": -0.5}.
        is_chosen: (S,) bool for unpaired data; None: first half chosen, second half rejected.
        weights: (S,) factor per sequence (product of both for pairs), treated as constant.
        counts: the denominators of the means over chosen and over rejected sequences (the first one
            for pairs); None: the non-empty ones of this batch. Under data parallelism pass the
            global counts divided by the number of ranks, and averaged gradients are those of one
            process; a batch may then lack one of the two kinds.
        kl_log_ratios: log-ratios of mismatched prompts and completions, for KTO's z0 and only there;
            pass zeros for APO-zero.
        **options: the fields of `dilkern.options.LossOptions`.

    Returns:
        PreferenceLossOutput; `loss` is 0-d, in the dtype of `logps`.

    Raises:
        ValueError: an option that the loss does not have, shapes that do not fit, no chosen or no
            rejected sequence, or, with `strict`, a log-ratio out of range.
        TypeError: an option that no loss has.

    Numerics: everything in the dtype of `logps` (fp32). The gradient is the registry's slope.

    Example:
        >>> import torch
        >>> from dilkern import preference_loss
        >>> logps, lengths = torch.tensor([-8.0, -9.0]), torch.tensor([4, 3])
        >>> out = preference_loss(logps, lengths, log_ratios=torch.zeros(2), loss="bce")
        >>> round(out.loss.item(), 4)
        1.3863
    """
    objective = Objective.of(loss, params, options)
    check_float("logps", logps)
    if logps.dim() != 1:
        reject(
            "`logps` must have shape (S,)",
            shape_of(logps),
            "Pass one sum of token log-probs per sequence.",
        )
    check_sides(logps.shape[0], is_chosen, objective)
    _check_per_sequence(
        logps.shape[0], logps.device, lengths=lengths, log_ratios=log_ratios, weights=weights
    )
    if (log_ratios is not None) != objective.loss.reference:
        reject(
            f"loss {objective.loss.name!r} "
            + ("needs a reference" if objective.loss.reference else "has no reference"),
            "none" if log_ratios is None else "one",
            "Pass the reference's log-probs, or choose reference_free=True."
            if objective.loss.reference
            else "Leave the reference out, or take a loss that uses it.",
        )
    _check_baseline(objective, kl_log_ratios)
    batch = _batch(lengths, is_chosen, weights, counts, logps.dtype)
    return _loss_from_sequences(objective, batch, logps, log_ratios, kl_log_ratios)
