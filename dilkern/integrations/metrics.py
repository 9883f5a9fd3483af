"""Metrics of a trainer: over the sequences of all ranks and steps since its last log."""

from __future__ import annotations

from typing import Any

import torch

from dilkern.output import PreferenceLossOutput, joined, preference_metrics

# Of this many steps the outputs are put together: a dozen small tensors each, and logs may be rare.
_AT_ONCE = 256


class LoggedOutputs:
    """What the steps since the last log returned; kept apart for training and evaluation.

    Metrics are computed once per log: a spread over batches of one pair is that of all their pairs.
    """

    def __init__(self) -> None:
        self._kept: dict[bool, list[PreferenceLossOutput]] = {True: [], False: []}

    def keep(self, training: bool, output: PreferenceLossOutput, accelerator: Any) -> None:
        """Keep an output, with the sequences of all ranks; called on each of them."""
        kept = self._kept[training]
        output = output._replace(loss=output.loss.detach())
        kept.append(_over_ranks(output, accelerator) if accelerator.num_processes > 1 else output)
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


def _over_ranks(output: PreferenceLossOutput, accelerator: Any) -> PreferenceLossOutput:
    """Return an output with the sequences of all ranks, some of them padding of length -1."""
    columns: dict[str, Any] = {}
    for side in ("chosen", "rejected"):
        names = [name for name in output._fields if name.startswith(f"{side}_")]
        table = torch.stack([getattr(output, name).float() for name in names], 1)
        table = accelerator.pad_across_processes(table, pad_index=-1)
        columns.update(zip(names, accelerator.gather(table).unbind(1)))
    return output._replace(**columns)
