"""What users call: hidden states and head in, loss out.

S sequences, L positions, T tokens (packed), D hidden size, V vocabulary. Equations: docs/math.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dilkern.logps import linear_logps
from dilkern.losses import Loss, get_loss
from dilkern.pointwise import pointwise_loss, serves
from dilkern.sequence_loss import (
    DILLossOutput,
    PreferenceLossOutput,
    check_per_sequence,
    check_sequences,
    preference_loss,
    settle,
    sum_per_sequence,
)
from dilkern.validation import (
    check_cu_seqlens,
    check_float,
    check_hidden_and_labels,
    check_same_device,
    reject,
    shape_of,
)


def _first_labels_ignored(labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> Tensor:
    """Nothing predicts the first token of a sequence: never score it, nor pair across sequences."""
    labels = labels.clone()
    if cu_seqlens is None:
        labels[..., :1] = ignore_index
    elif labels.numel():
        starts = cu_seqlens[:-1].long()
        # The start of an empty last sequence is T, one past the end.
        labels[starts.clamp(max=labels.numel() - 1)] = torch.where(
            starts < labels.numel(), ignore_index, labels[starts.clamp(max=labels.numel() - 1)]
        )
    return labels


def _check_reference(
    entry: Loss,
    labels: Tensor,
    num_sequences: int,
    ref_logps: Tensor | None,
    ref_hidden_states: Tensor | None,
    ref_lm_head: Any,
    reference_free: bool,
) -> None:
    given = [
        name
        for name, there in (
            ("ref_logps", ref_logps is not None),
            ("ref_hidden_states", ref_hidden_states is not None),
            ("reference_free=True", reference_free),
        )
        if there
    ]
    if not entry.reference and given:
        reject(
            f"loss {entry.name!r} has no reference",
            ", ".join(given),
            "Leave it out, or take a loss that uses it.",
        )
    if entry.reference and len(given) != 1:
        reject(
            "exactly one of `ref_logps`, `ref_hidden_states` and `reference_free=True` is needed",
            ", ".join(given) or "none",
            "Pass the reference's log-probs or its hidden states, or choose reference_free=True.",
        )
    if ref_lm_head is not None and ref_hidden_states is None:
        reject(
            "`ref_lm_head` goes with `ref_hidden_states`",
            "ref_lm_head alone",
            "Pass ref_hidden_states too.",
        )
    for name, value in (("ref_logps", ref_logps), ("ref_hidden_states", ref_hidden_states)):
        if value is None:
            continue
        check_float(name, value)
        check_same_device(name, value, "labels", labels)
        if value.requires_grad:
            reject(
                f"`{name}` must not require grad: the reference is a constant",
                "a tensor with requires_grad=True",
                "Compute it under torch.no_grad(), or pass `.detach()`.",
            )
    if ref_hidden_states is not None and ref_hidden_states.shape[:-1] != labels.shape:
        reject(
            f"`ref_hidden_states` must have leading shape {tuple(labels.shape)}, that of `labels`",
            shape_of(ref_hidden_states),
            "Run the reference on the same input_ids.",
        )
    if ref_logps is not None and ref_logps.shape not in ((num_sequences,), labels.shape):
        reject(
            f"`ref_logps` must have shape ({num_sequences},) per sequence or "
            f"{tuple(labels.shape)} per token",
            shape_of(ref_logps),
            "Pass summed log-probs in the order of the sequences, or token log-probs.",
        )


def fused_preference_loss(
    hidden_states: Tensor,  # (S, L, D) or (T, D)
    lm_head: Any,
    labels: Tensor,  # (S, L) or (T,)
    *,
    loss: str | Loss = "lsif",
    params: Mapping[str, float] | None = None,
    ref_logps: Tensor | None = None,  # (S,) or the shape of labels
    ref_hidden_states: Tensor | None = None,  # (S, L, D) or (T, D)
    ref_lm_head: Any = None,
    reference_free: bool = False,
    is_chosen: Tensor | None = None,  # (S,) bool
    cu_seqlens: Tensor | None = None,  # (S+1,)
    beta: float | None = None,
    length_normalize: bool | None = None,
    pairing: str | None = None,
    max_log_ratio: float | None = 10.0,
    label_smoothing: float = 0.0,
    mixture: float = 0.0,
    weights: Tensor | None = None,  # (S,)
    sft_weight: float | None = None,
    kl_log_ratios: Tensor | None = None,
    counts: tuple[Tensor | float, Tensor | float] | None = None,
    strict: bool = False,
    shift: bool = True,
    ignore_index: int = -100,
    backend: str = "auto",
    workspace_mib: float = 256,
) -> PreferenceLossOutput:
    """Compute any loss of the registry from hidden states and head, never holding the logits.

    The token log-probs come from `linear_logps`, the loss of their sums from `preference_loss`;
    both docstrings hold here.

    Args:
        hidden_states, lm_head, labels, ignore_index, backend, workspace_mib: see `linear_logps`.
        loss, params, is_chosen, beta, length_normalize, pairing, max_log_ratio, label_smoothing,
            mixture, weights, sft_weight, kl_log_ratios, counts, strict: see `preference_loss`.
        ref_logps: (S,) summed log-probs of the reference, or token log-probs in the shape of
            `labels`, entry t belonging to label t.
        ref_hidden_states: hidden states of the reference on the same tokens; its log-probs are
            computed here, without gradient.
        ref_lm_head: the head of the reference; None if it is `lm_head`.
        reference_free: f = log pi_theta on purpose.
        cu_seqlens: (S+1,) cumulative lengths of a packed (T,) batch.
        shift: labels are aligned with input_ids (position t-1 predicts label t, never across
            sequences). False if they are already paired with `hidden_states`.

    Returns:
        PreferenceLossOutput.

    Raises:
        ValueError: with the rule, what came and the remedy.

    Example:
        >>> import torch
        >>> from dilkern import fused_preference_loss
        >>> hidden_states, weight = torch.randn(4, 6, 8), torch.randn(11, 8)
        >>> labels = torch.randint(0, 11, (4, 6))
        >>> out = fused_preference_loss(hidden_states, weight, labels, loss="simpo")
        >>> out.loss.shape, out.chosen_logps.shape
        (torch.Size([]), torch.Size([2]))
    """
    entry = get_loss(loss)
    check_hidden_and_labels(hidden_states, labels)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, labels)
    elif labels.dim() == 1:
        reject(
            "packed labels of shape (T,) need `cu_seqlens`",
            "none",
            "Pass cu_seqlens (S+1,), or a padded (S, L) batch.",
        )
    num_sequences = labels.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    pairwise = (pairing or entry.pairing) == "pairwise"
    check_sequences(num_sequences, is_chosen, pairwise, entry.name)
    _check_reference(
        entry, labels, num_sequences, ref_logps, ref_hidden_states, ref_lm_head, reference_free
    )
    settings = settle(
        entry, params, beta, length_normalize, pairing, max_log_ratio, label_smoothing, mixture,
        sft_weight,
    )  # fmt: skip
    if shift:
        labels = _first_labels_ignored(labels, cu_seqlens, ignore_index)
    scored = labels != ignore_index

    def score(states: Tensor, head: Any) -> Tensor:
        return linear_logps(
            states, head, labels, shift=shift, ignore_index=ignore_index, backend=backend,
            workspace_mib=workspace_mib,
        )  # fmt: skip

    token_logps = score(hidden_states, lm_head)
    if ref_hidden_states is not None:
        with torch.no_grad():
            ref_logps = score(ref_hidden_states, lm_head if ref_lm_head is None else ref_lm_head)
    if serves(settings, backend, token_logps) and kl_log_ratios is None:
        check_per_sequence(num_sequences, token_logps.device, weights=weights)
        return pointwise_loss(
            token_logps, scored, settings, cu_seqlens=cu_seqlens, ref_logps=ref_logps,
            is_chosen=is_chosen, weights=weights, counts=counts, strict=strict,
        )  # fmt: skip
    logps = sum_per_sequence(token_logps, cu_seqlens)
    lengths = sum_per_sequence(scored.to(token_logps.dtype), cu_seqlens)
    log_ratios: Tensor | None = None
    if reference_free:
        log_ratios = logps
    elif ref_logps is not None and ref_logps.shape == labels.shape:
        # Differences first: sums of bf16 or of long sequences would cancel.
        difference = token_logps - ref_logps.to(token_logps.dtype)
        log_ratios = sum_per_sequence(torch.where(scored, difference, 0.0), cu_seqlens)
    elif ref_logps is not None:
        log_ratios = logps - ref_logps.to(logps.dtype)
    return preference_loss(
        logps, lengths, log_ratios=log_ratios, loss=entry, params=params, is_chosen=is_chosen,
        beta=beta, length_normalize=length_normalize, pairing=pairing, max_log_ratio=max_log_ratio,
        label_smoothing=label_smoothing, mixture=mixture, weights=weights, sft_weight=sft_weight,
        kl_log_ratios=kl_log_ratios, counts=counts, strict=strict,
    )  # fmt: skip


def fused_dil_loss(
    hidden_states: Tensor,  # (S, L, D) or (T, D)
    lm_head: Any,
    labels: Tensor,  # (S, L) or (T,)
    *,
    ref_logps: Tensor | None = None,  # (S,) or the shape of labels
    ref_hidden_states: Tensor | None = None,  # (S, L, D) or (T, D)
    ref_lm_head: Any = None,
    reference_free: bool = False,
    is_chosen: Tensor | None = None,  # (S,) bool
    cu_seqlens: Tensor | None = None,  # (S+1,)
    h: str | Loss = "lsif",
    params: Mapping[str, float] | None = None,
    beta: float = 1.0,
    length_normalize: bool = True,
    max_log_ratio: float | None = 10.0,
    shift: bool = True,
    ignore_index: int = -100,
    backend: str = "auto",
    workspace_mib: float = 256,
    **knobs: Any,
) -> DILLossOutput:
    r"""Compute the DIL loss from hidden states and head, never holding the logits.

    $L = \overline{l_1(\beta f)}_{chosen} + \overline{l_{-1}(\beta f)}_{rejected}$ with
    $f = \log \pi_\theta(y|x) - \log \pi_{ref}(y|x)$, $l_1 = -h'(e^f)$ and
    $l_{-1} = h'(e^f) e^f - h(e^f)$ (Xiao et al. 2025, eq. 24; docs/math.md, 10).

    Args:
        hidden_states, lm_head, labels, shift, ignore_index, backend, workspace_mib: see
            `linear_logps`; labels aligned with input_ids as Hugging Face gives them.
        ref_logps, ref_hidden_states, ref_lm_head, reference_free, cu_seqlens: see
            `fused_preference_loss`; exactly one form of reference.
        is_chosen: None: first half of the batch chosen, second half rejected (TRL's order); a bool
            (S,) tensor for unpaired data, each side averaged by its own count.
        h: "lsif", "ukl" (alias "kliep"), "bce", "power", "nce", "brier", or a `Loss` with `bregman`.
        params: parameters of h, e.g. {"lam": -0.5} for "power".
        beta: factor on f; 1 is the paper.
        length_normalize: True: f is the mean over scored tokens, as in the authors' code; False: the
            sum, as in the paper's text.
        max_log_ratio: beyond it the exponentials of h continue linearly, on both sides of the pair at
            the same point, so that the minimiser stays exact below it; None is the paper's formula.
        **knobs: pairing, label_smoothing, mixture, weights, sft_weight, counts, strict of
            `preference_loss`.

    Returns:
        DILLossOutput: `loss` (0-d fp32, differentiable), and detached per-sequence log-probs
        (summed, nats), log-ratios (as the loss used them), lengths, losses, and `clip_fraction`.

    Raises:
        ValueError: with the rule, what came and the remedy.

    Numerics: fp32 logits, statistics and loss; same inputs, same bits; policy == reference gives
    log-ratios of exactly 0.0. Memory: see `linear_logps`.

    Example:
        >>> import torch
        >>> from dilkern import fused_dil_loss
        >>> hidden_states = torch.randn(4, 6, 8, requires_grad=True)
        >>> lm_head = torch.nn.Linear(8, 11, bias=False).requires_grad_(False)
        >>> labels = torch.randint(0, 11, (4, 6))
        >>> out = fused_dil_loss(
        ...     hidden_states, lm_head, labels, ref_hidden_states=hidden_states.detach()
        ... )
        >>> out.loss.backward()
        >>> out.chosen_log_ratios.tolist(), out.loss.item()
        ([0.0, 0.0], -0.5)
    """
    return fused_preference_loss(
        hidden_states, lm_head, labels, loss=get_loss(h, bregman_only=True, argument="h"),
        params=params, ref_logps=ref_logps, ref_hidden_states=ref_hidden_states,
        ref_lm_head=ref_lm_head, reference_free=reference_free, is_chosen=is_chosen,
        cu_seqlens=cu_seqlens, beta=beta, length_normalize=length_normalize,
        max_log_ratio=max_log_ratio, shift=shift, ignore_index=ignore_index, backend=backend,
        workspace_mib=workspace_mib, **knobs,
    )  # fmt: skip


class DILLoss(nn.Module):
    """`fused_dil_loss` as a module: options at construction, tensors at the call.

    Args:
        h: the h-function, checked at construction.
        **options: any keyword of `fused_dil_loss` that is not a tensor.

    Example:
        >>> import torch
        >>> from dilkern import DILLoss
        >>> criterion = DILLoss(h="bce", beta=0.5)
        >>> hidden_states, weight = torch.randn(2, 6, 8), torch.randn(11, 8)
        >>> labels = torch.randint(0, 11, (2, 6))
        >>> out = criterion(hidden_states, weight, labels, ref_logps=torch.tensor([-9.0, -8.0]))
        >>> out.loss.shape
        torch.Size([])
    """

    def __init__(self, h: str | Loss = "lsif", **options: Any) -> None:
        super().__init__()
        get_loss(h, bregman_only=True, argument="h")
        self.options = {"h": h, **options}

    def forward(
        self, hidden_states: Tensor, lm_head: Any, labels: Tensor, **tensors: Any
    ) -> DILLossOutput:
        return fused_dil_loss(hidden_states, lm_head, labels, **{**self.options, **tensors})

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())
