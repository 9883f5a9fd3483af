"""What the word filter would do to given inputs: look before you trust it (docs/filter.md)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dilkern.backends import torch as backend
from dilkern.backends.base import Blocks, HeadView, Quiet, accumulation_dtype, weight_block
from dilkern.backends.word_filter import threshold
from dilkern.lm_head import as_head
from dilkern.logps import compute_dtype, mask_first_labels
from dilkern.validation import (
    check_bool,
    check_hidden_and_labels,
    check_ignore_index,
    check_label_values,
    check_positive,
    reject,
)


class FilterReport(NamedTuple):
    """What `filter_report` found; per token entries are 0 where a label is ignored."""

    loud: float  # share of words that are multiplied exactly, over all blocks of rows
    whole: float  # share of words in blocks where the filter stood back
    quiet_mass: Tensor  # (S, L) or (T,) probability of a token's quiet words
    error_bound: (
        Tensor  # of |error of u|, u = d logp / d hidden state, but for rounding (math.md, 18)
    )
    gradient_norm: Tensor  # |u|

    def __str__(self) -> str:
        bound = (self.error_bound.norm() / self.gradient_norm.norm()).item()
        scored = self.gradient_norm > 0
        mass = self.quiet_mass[scored] if scored.any() else self.quiet_mass.new_zeros(1)
        return (
            f"loud words {self.loud:.1%} (whole blocks {self.whole:.1%}), "
            f"quiet mass {mass.mean().item():.2%} (at most {mass.max().item():.2%}), "
            f"error of the gradient at most {bound:.1e}"
        )


def filter_report(
    hidden_states: Tensor,  # (S, L, D) or (T, D)
    lm_head: Any,
    labels: Tensor,  # (S, L) or (T,)
    *,
    filter_eps: float | str = "auto",
    shift: bool = False,
    ignore_index: int = -100,
    workspace_mib: float = 256,
) -> FilterReport:
    """Report how many words the filter takes for loud and how far the gradient can be off.

    The bound holds for every token; the error itself is several times smaller, because the errors of
    the quiet words cancel. The torch backend computes it, whichever trains.

    Args:
        hidden_states, lm_head, labels, filter_eps, shift, ignore_index, workspace_mib: see
            `linear_logps`; a vocabulary-parallel head reports of its own rows.

    Raises:
        ValueError: as `linear_logps`; no token to score.

    Example:
        >>> import torch
        >>> from dilkern import filter_report
        >>> weight, labels = torch.randn(4096, 64), torch.randint(0, 4096, (32,))
        >>> report = filter_report(weight[labels], weight, labels, filter_eps=2**-16)
        >>> report.loud < 0.5, report.error_bound.shape
        (True, torch.Size([32]))
    """
    check_hidden_and_labels(hidden_states, labels)
    check_positive("workspace_mib", workspace_mib)
    check_bool("shift", shift)
    check_ignore_index(ignore_index)
    if filter_eps is None:
        reject("a report needs a filter", "filter_eps=None", "Pass filter_eps='auto' or a number.")
    if shift:
        labels = mask_first_labels(labels, ignore_index=ignore_index)
    with torch.no_grad(), torch.autocast(hidden_states.device.type, enabled=False):
        head = as_head(lm_head)
        head.check(hidden_states)
        hidden = head.project(hidden_states.to(compute_dtype(hidden_states, head)))
        hidden = hidden.reshape(-1, hidden.shape[-1])
        flat = head.local_labels(labels.reshape(-1), ignore_index)
        scored = (flat != ignore_index).nonzero().squeeze(1)
        targets = flat.index_select(0, scored).long()
        check_label_values(targets, head.vocab_size, ignore_index)
        if not scored.numel():
            reject("a report needs a label that is scored", "none", "Pass labels of a batch.")
        workspace_bytes = int(workspace_mib * 2**20)
        found = backend.forward(
            hidden, scored - int(shift), targets, head, workspace_bytes=workspace_bytes, need_u=True,
            filter_eps=threshold(filter_eps, hidden.dtype), need_quiet=True,
        )  # fmt: skip
        blocks = backend.plan(scored.numel(), head, hidden, workspace_bytes)
        assert found.quiet is not None
        to_states = None
        if hidden.shape[1] != hidden_states.shape[-1]:  # of an adapter: project is linear
            unit = torch.eye(hidden_states.shape[-1], dtype=hidden.dtype, device=hidden.device)
            to_states = (head.project(unit) - head.project(torch.zeros_like(unit))).t()
        bound = _error_bound(found.quiet, blocks, head, hidden.dtype, to_states)

    def per_token(values: Tensor) -> Tensor:
        out = values.new_zeros(flat.shape).index_copy_(0, scored, values)
        return out.reshape(labels.shape)

    is_loud = found.quiet.weights < 0
    cuts = [is_loud[:, start:end] for start, end in blocks.words(head.vocab_size)]
    whole = torch.cat([cut.all(1, keepdim=True).expand_as(cut) for cut in cuts], 1)
    return FilterReport(
        is_loud.float().mean().item(),
        whole.float().mean().item(),
        per_token(found.quiet.mass.sum(0)),
        per_token(bound),
        per_token(_norm(found.u.to(bound.dtype), to_states)),
    )


def _norm(rows: Tensor, to_states: Tensor | None) -> Tensor:
    """Return |row| (n,), of gradients of what the head multiplies as gradients of hidden states."""
    norms: Tensor = (rows if to_states is None else rows @ to_states.to(rows.dtype)).norm(dim=1)
    return norms


def _error_bound(
    quiet: Quiet, blocks: Blocks, head: HeadView, dtype: torch.dtype, to_states: Tensor | None
) -> Tensor:
    """Sum over blocks of d_i max_quiet |w_v - mu| (18), (N,)."""
    acc = accumulation_dtype(dtype)
    bound = quiet.mass.new_zeros(quiet.mass.shape[1])
    for number, (start, end) in enumerate(blocks.words(head.vocab_size)):
        weight = weight_block(head, start, end, dtype).to(acc)
        for q, part in zip(quiet.weights[:, start:end], blocks.parts(bound.numel())):
            words = (q >= 0).nonzero().squeeze(1)
            if words.numel():
                share = q[words] / q[words].sum().clamp_min(torch.finfo(acc).tiny)
                far = _norm(weight[words] - share @ weight[words], to_states).max()
                bound[part] += quiet.mass[number, part] * far * head.scale
    return bound
