"""What every loss returns, and the metrics of a training step.

C chosen, R rejected sequences.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class PreferenceLossOutput(NamedTuple):
    """What every loss returns; all but `loss` is detached. C chosen, R rejected sequences."""

    loss: Tensor  # 0-d, differentiable; fp32, or fp64 for fp64 log-probs
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
    pairwise: bool  # one loss per pair, in chosen_losses
    paired: bool  # chosen and rejected sequence i belong together
    length_normalize: bool  # f is a mean over tokens, else a sum
    reference: bool  # f is a log-ratio to a reference, else a log-prob


DILLossOutput = PreferenceLossOutput


def joined(outputs: list[PreferenceLossOutput]) -> PreferenceLossOutput:
    """Put outputs of one loss together, of parts of a batch or of batches; the loss is their sum."""
    if len(outputs) == 1:
        return outputs[0]
    columns: dict[str, Any] = {
        name: torch.cat([getattr(output, name) for output in outputs])
        for name in PreferenceLossOutput._fields
        if name.startswith(("chosen_", "rejected_"))
    }
    clipped = torch.cat([columns["chosen_clipped"], columns["rejected_clipped"]])
    loss = torch.stack([output.loss for output in outputs]).sum()
    return outputs[0]._replace(**columns, loss=loss, clip_fraction=clipped.to(loss.dtype).mean())


def _line(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Slope of the line through (N,) and (N,), and their correlation; 0 where one is constant."""
    x, y = x - x.mean(), y - y.mean()
    both, of_x, of_y = (x * y).sum(), x.square().sum(), y.square().sum()
    scale = (of_x * of_y).sqrt()
    slope = torch.where(of_x == 0, 0.0, both / of_x)
    return slope, torch.where(scale == 0, 0.0, both / scale)


def preference_metrics(output: PreferenceLossOutput) -> dict[str, Tensor]:
    """Return the metrics of a step under TRL's names, each a detached 0-d tensor.

    rewards/* are beta f with the f that the loss used; rewards/accuracies is the strict share of
    pairs with a larger chosen reward (absent for unpaired batches), so 0.0 where policy ==
    reference; logps/* are means over sequences of summed log-probs, logps/*_avg of means per token;
    log_ratio/*_avg are means over sequences of the log-ratio to the reference per token, whatever
    the f of the loss, log_ratio/*_std their standard deviations (both absent without a reference);
    length/chosen and length/rejected are means of scored tokens; length/margin_slope is by how much,
    over pairs, the margin grows per token of difference in length, length/margin_corr their
    correlation (both absent for unpaired batches); clip_frac/* are shares on the linear extension;
    loss/chosen and loss/rejected are the means of the two sides of a pointwise loss, loss/pair that
    of a pairwise one.

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
    metrics: dict[str, Tensor] = {}
    rewards, lengths = [], []
    for side in ("chosen", "rejected"):
        logps, f, length, losses, clipped = (
            getattr(o, f"{side}_{name}")
            for name in ("logps", "log_ratios", "lengths", "losses", "clipped")
        )
        length = length.to(f.dtype)
        tokens = length.clamp(min=1)
        rewards.append(o.beta * f)
        lengths.append(length)
        metrics[f"rewards/{side}"] = rewards[-1].mean()
        metrics[f"logps/{side}"] = logps.mean()
        metrics[f"logps/{side}_avg"] = (logps / tokens).mean()
        if o.reference:
            per_token = f if o.length_normalize else f / tokens
            mean = per_token.mean()
            metrics[f"log_ratio/{side}_avg"] = mean
            metrics[f"log_ratio/{side}_std"] = (per_token - mean).square().mean().sqrt()
        metrics[f"length/{side}"] = length.mean()
        metrics[f"clip_frac/{side}"] = clipped.to(f.dtype).mean()
        if not o.pairwise:
            metrics[f"loss/{side}"] = losses.mean()
    if o.pairwise:
        metrics["loss/pair"] = o.chosen_losses.mean()
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    if o.paired:
        chosen, rejected = rewards
        metrics["rewards/accuracies"] = (chosen > rejected).to(chosen.dtype).mean()
        slope, correlation = _line(lengths[0] - lengths[1], chosen - rejected)
        metrics["length/margin_slope"] = slope
        metrics["length/margin_corr"] = correlation
    return metrics
