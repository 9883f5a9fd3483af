"""What users call: hidden states and head in, loss out.

S sequences, L positions, T tokens (packed), D hidden size, V vocabulary. Equations: docs/math.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dilkern.logps import linear_logps, mask_first_labels
from dilkern.losses import Loss
from dilkern.objective import Objective
from dilkern.options import LossKeywords, Unpack
from dilkern.output import DILLossOutput, PreferenceLossOutput
from dilkern.preference import Counts, check_reference, check_sides, loss_from_token_logps
from dilkern.validation import check_cu_seqlens, check_hidden_and_labels, reject, shape_of


def fused_preference_loss(
    hidden_states: Tensor,  # (S, L, D) or (T, D)
    lm_head: Any,
    labels: Tensor,  # (S, L) or (T,)
    *,
    loss: str | Loss | Objective = "lsif",
    params: Mapping[str, float] | None = None,
    ref_logps: Tensor | None = None,  # (S,) or the shape of labels
    ref_hidden_states: Tensor | None = None,  # (S, L, D) or (T, D)
    ref_lm_head: Any = None,
    reference_free: bool = False,
    is_chosen: Tensor | None = None,  # (S,) bool
    cu_seqlens: Tensor | None = None,  # (S+1,)
    weights: Tensor | None = None,  # (S,)
    counts: Counts | None = None,
    kl_log_ratios: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    backend: str = "auto",
    workspace_mib: float = 256,
    filter_eps: float | str | None = None,
    **options: Unpack[LossKeywords],
) -> PreferenceLossOutput:
    """Compute any loss of the registry from hidden states and head, never holding the logits.

    The token log-probs come from `linear_logps`, the loss of their sums from
    `loss_from_token_logps`; the docstrings of `linear_logps` and `preference_loss` hold here.

    Args:
        hidden_states, lm_head, labels, ignore_index, backend, workspace_mib, filter_eps: see
            `linear_logps`.
        loss, params, is_chosen, weights, counts, kl_log_ratios: see `preference_loss`.
        ref_logps: (S,) summed log-probs of the reference, or token log-probs in the shape of
            `labels`, entry t belonging to label t.
        ref_hidden_states: hidden states of the reference on the same tokens; its log-probs are
            computed here, without gradient.
        ref_lm_head: the head of the reference; None if it is `lm_head`.
        reference_free: f = log pi_theta on purpose.
        cu_seqlens: (S+1,) cumulative lengths of a packed (T,) batch.
        shift: labels are aligned with input_ids (position t-1 predicts label t, never across
            sequences). False if they are already paired with `hidden_states`.
        **options: beta, length_normalize, ...: the fields of `dilkern.options.LossOptions`.

    Returns:
        PreferenceLossOutput.

    Raises:
        ValueError: with the rule, what came and the remedy.
        TypeError: an option that no loss has.

    Example:
        >>> import torch
        >>> from dilkern import fused_preference_loss
        >>> hidden_states, weight = torch.randn(4, 6, 8), torch.randn(11, 8)
        >>> labels = torch.randint(0, 11, (4, 6))
        >>> out = fused_preference_loss(hidden_states, weight, labels, loss="simpo")
        >>> out.loss.shape, out.chosen_logps.shape
        (torch.Size([]), torch.Size([2]))
    """
    objective = Objective.of(loss, params, options)
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
    # Before the heavy op, though `loss_from_token_logps` asks again.
    check_sides(num_sequences, is_chosen, objective)
    check_reference(objective, labels, num_sequences, ref_logps, ref_hidden_states, reference_free)
    if ref_lm_head is not None and ref_hidden_states is None:
        reject(
            "`ref_lm_head` goes with `ref_hidden_states`",
            "ref_lm_head alone",
            "Pass ref_hidden_states too.",
        )
    if shift:
        labels = mask_first_labels(labels, cu_seqlens, ignore_index=ignore_index)
    if ref_hidden_states is not None:
        if ref_hidden_states.shape[:-1] != labels.shape:
            reject(
                f"`ref_hidden_states` must have leading shape {tuple(labels.shape)}, that of `labels`",
                shape_of(ref_hidden_states),
                "Run the reference on the same input_ids.",
            )
        with torch.no_grad():
            ref_logps = linear_logps(
                ref_hidden_states, lm_head if ref_lm_head is None else ref_lm_head, labels,
                shift=shift, ignore_index=ignore_index, backend=backend, workspace_mib=workspace_mib,
            )  # fmt: skip
    token_logps = linear_logps(
        hidden_states, lm_head, labels, shift=shift, ignore_index=ignore_index, backend=backend,
        workspace_mib=workspace_mib, filter_eps=filter_eps,
    )  # fmt: skip
    return loss_from_token_logps(
        objective, token_logps, labels != ignore_index, ref_logps=ref_logps,
        reference_free=reference_free, is_chosen=is_chosen, cu_seqlens=cu_seqlens, weights=weights,
        counts=counts, kl_log_ratios=kl_log_ratios, backend=backend,
    )  # fmt: skip


def fused_dil_loss(
    hidden_states: Tensor,  # (S, L, D) or (T, D)
    lm_head: Any,
    labels: Tensor,  # (S, L) or (T,)
    *,
    h: str | Loss | Objective = "lsif",
    params: Mapping[str, float] | None = None,
    ref_logps: Tensor | None = None,  # (S,) or the shape of labels
    ref_hidden_states: Tensor | None = None,  # (S, L, D) or (T, D)
    ref_lm_head: Any = None,
    reference_free: bool = False,
    is_chosen: Tensor | None = None,  # (S,) bool
    cu_seqlens: Tensor | None = None,  # (S+1,)
    weights: Tensor | None = None,  # (S,)
    counts: Counts | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    backend: str = "auto",
    workspace_mib: float = 256,
    filter_eps: float | str | None = None,
    **options: Unpack[LossKeywords],
) -> DILLossOutput:
    r"""Compute the DIL loss from hidden states and head, never holding the logits.

    $L = \overline{l_1(\beta f)}_{chosen} + \overline{l_{-1}(\beta f)}_{rejected}$ with
    $f = \log \pi_\theta(y|x) - \log \pi_{ref}(y|x)$, $l_1 = -h'(e^f)$ and
    $l_{-1} = h'(e^f) e^f - h(e^f)$ (Xiao et al. 2025, eq. 24; docs/math.md, 10).

    Args:
        hidden_states: (S, L, D), or (T, D) packed: the last hidden layer of the model, after the
            final norm: `model.model(input_ids).last_hidden_state`.
        lm_head: `model.lm_head`: a module or a (V, D) weight; see `linear_logps`.
        labels: (S, L) or (T,), aligned with input_ids as Hugging Face gives them, -100 where not
            scored: prompt and padding.
        h: "lsif", "ukl" (alias "kliep"), "bce", "power", "nce", "brier", a `Loss` with `bregman`, or
            an `Objective` of one of these, which brings params and options.
        params: parameters of h, e.g. {"lam": -0.5} for "power".
        ref_logps: (S,) summed log-probs of the reference, or its token log-probs like `labels`.
        ref_hidden_states, ref_lm_head, reference_free: other forms of reference, see
            `fused_preference_loss`; exactly one form is needed.
        is_chosen: None: first half of the batch chosen, second half rejected (TRL's order); a bool
            (S,) tensor for unpaired data, each side averaged by its own count.
        cu_seqlens: (S+1,) cumulative lengths of a packed (T,) batch.
        weights, counts: see `preference_loss`.
        shift, ignore_index, backend, workspace_mib, filter_eps: see `linear_logps`.
        **options: beta (1 is the paper), length_normalize (True as in the authors' code, False as in
            the paper's text), max_log_ratio, ...: the fields of `dilkern.options.LossOptions`.

    Returns:
        DILLossOutput: `loss` (0-d fp32, differentiable), and detached per-sequence log-probs
        (summed, nats), log-ratios (as the loss used them), lengths, losses, and `clip_fraction`.

    Raises:
        ValueError: with the rule, what came and the remedy.
        TypeError: an option that no loss has.

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
        hidden_states, lm_head, labels,
        loss=Objective.of(h, params, options, bregman_only=True, argument="h"),
        ref_logps=ref_logps, ref_hidden_states=ref_hidden_states, ref_lm_head=ref_lm_head,
        reference_free=reference_free, is_chosen=is_chosen, cu_seqlens=cu_seqlens, weights=weights,
        counts=counts, shift=shift, ignore_index=ignore_index, backend=backend,
        workspace_mib=workspace_mib, filter_eps=filter_eps,
    )  # fmt: skip


class DILLoss(nn.Module):
    """`fused_dil_loss` as a module: options at construction, tensors at the call.

    Args:
        h, params, **options: what `fused_dil_loss` makes an objective of; checked here.
        reference_free, shift, ignore_index, backend, workspace_mib, filter_eps: as there.

    Raises:
        ValueError, TypeError: an option that h does not have, or out of its range.

    Example:
        >>> import torch
        >>> from dilkern import DILLoss
        >>> criterion = DILLoss("bce", beta=0.5)
        >>> hidden_states, weight = torch.randn(2, 6, 8), torch.randn(11, 8)
        >>> labels = torch.randint(0, 11, (2, 6))
        >>> out = criterion(hidden_states, weight, labels, ref_logps=torch.tensor([-9.0, -8.0]))
        >>> out.loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        h: str | Loss | Objective = "lsif",
        params: Mapping[str, float] | None = None,
        *,
        reference_free: bool = False,
        shift: bool = True,
        ignore_index: int = -100,
        backend: str = "auto",
        workspace_mib: float = 256,
        filter_eps: float | str | None = None,
        **options: Unpack[LossKeywords],
    ) -> None:
        super().__init__()
        self.objective: Objective = Objective.of(
            h, params, options, bregman_only=True, argument="h"
        )
        self.scoring: dict[str, Any] = {
            "reference_free": reference_free,
            "shift": shift,
            "ignore_index": ignore_index,
            "backend": backend,
            "workspace_mib": workspace_mib,
            "filter_eps": filter_eps,
        }

    def forward(
        self,
        hidden_states: Tensor,
        lm_head: Any,
        labels: Tensor,
        *,
        ref_logps: Tensor | None = None,
        ref_hidden_states: Tensor | None = None,
        ref_lm_head: Any = None,
        is_chosen: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        weights: Tensor | None = None,
        counts: Counts | None = None,
    ) -> DILLossOutput:
        """Compute the loss; tensors as in `fused_dil_loss`."""
        scoring: dict[str, Any] = self.scoring
        return fused_dil_loss(
            hidden_states, lm_head, labels, h=self.objective, ref_logps=ref_logps,
            ref_hidden_states=ref_hidden_states, ref_lm_head=ref_lm_head, is_chosen=is_chosen,
            cu_seqlens=cu_seqlens, weights=weights, counts=counts, **scoring,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return repr(self.objective)
