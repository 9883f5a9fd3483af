"""Metrics of a trainer: over the sequences of all ranks and steps since its last log."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dilkern.output import PreferenceLossOutput, joined, preference_metrics

# Of this many steps the outputs are put together: a dozen small tensors each, and logs may be rare.
_AT_ONCE = 256


class LoggedOutputs:
    """What the steps since the last log returned; kept apart for training and evaluation.

    Metrics are computed once per log: a spread over batches of one pair is that of all their pairs.
    """

    def __init__(self) -> None:
        self._kept: dict[bool, list[PreferenceLossOutput]] = {True: [], False: []}

    def keep(
        self,
        training: bool,
        output: PreferenceLossOutput,
        accelerator: Any,
        is_chosen: Tensor | None = None,  # (S,) of an unpaired batch
    ) -> None:
        """Keep an output, with the sequences of all ranks; called on each of them."""
        kept = self._kept[training]
        output = output._replace(loss=output.loss.detach())
        if accelerator.num_processes > 1:
            if not training:
                output = _without_repeats(output, accelerator, is_chosen)
            output = _over_ranks(output, accelerator)
        kept.append(output)
        if len(kept) == _AT_ONCE:
            kept[:] = [joined(kept)]

    def clear(self, training: bool) -> None:
        """Forget what no log took: that of `predict`, or of an evaluation that broke off."""
        self._kept[training].clear()

    def take(self, training: bool) -> dict[str, float]:
        """Return the metrics of what is kept, and forget it; what has no sequence is left out."""
        kept = self._kept[training]
        if not kept:
            return {}
        output = joined(kept)
        kept.clear()
        columns: dict[str, Any] = {}
        left_out = []
        for side in ("chosen", "rejected"):
            # Padding has a length of -1. A pair stays whole, also with an answer of no tokens.
            real = getattr(output, f"{side}_lengths") > (-1 if output.paired else 0)
            for name in output._fields:
                if name.startswith(f"{side}_"):
                    columns[name] = getattr(output, name)[real]
            if not real.any():
                left_out += [side, "margins"]
        metrics = preference_metrics(output._replace(**columns))
        values = torch.stack([value.float() for value in metrics.values()]).tolist()
        return {
            name: value
            for name, value in zip(metrics, values)
            if not any(word in name for word in left_out)
        }


def _without_repeats(
    output: PreferenceLossOutput, accelerator: Any, is_chosen: Tensor | None
) -> PreferenceLossOutput:
    """Return what this rank's batch adds to an evaluation.

    Where the samples do not fill the last batches of all ranks, accelerate repeats some.
    """
    state = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0:
        return output
    count = output.chosen_logps.numel() if is_chosen is None else is_chosen.numel()
    own = max(0, state.remainder - accelerator.process_index * count)
    chosen = rejected = own
    if is_chosen is not None:
        chosen, rejected = (int(side[:own].sum()) for side in (is_chosen, ~is_chosen))
    first = {"chosen_": chosen, "rejected_": rejected}
    columns: dict[str, Any] = {
        name: getattr(output, name)[:most]
        for name in output._fields
        for side, most in first.items()
        if name.startswith(side)
    }
    return output._replace(**columns)


def _over_ranks(output: PreferenceLossOutput, accelerator: Any) -> PreferenceLossOutput:
    """Return an output with the sequences of all ranks, some of them padding of length -1."""
    columns: dict[str, Any] = {}
    for side in ("chosen", "rejected"):
        names = [name for name in output._fields if name.startswith(f"{side}_")]
        table = torch.stack([getattr(output, name).float() for name in names], 1)
        table = accelerator.pad_across_processes(table, pad_index=-1)
        columns.update(zip(names, accelerator.gather(table).unbind(1)))
    return output._replace(**columns)
