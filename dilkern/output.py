"""What every loss returns, and the metrics of a training step.

C chosen, R rejected sequences.
"""

from __future__ import annotations

from typing import NamedTuple

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


DILLossOutput = PreferenceLossOutput


def preference_metrics(output: PreferenceLossOutput) -> dict[str, Tensor]:
    """Return the metrics of a step under TRL's names, each a detached 0-d tensor.

    rewards/* are beta f with the f that the loss used; rewards/accuracies is the strict share of
    pairs with a larger chosen reward (absent for unpaired batches), so 0.0 where policy ==
    reference; logps/* are means over sequences of summed log-probs, logps/*_avg of means per token;
    clip_frac/* are shares on the linear extension; loss/chosen and loss/rejected are the means of the
    two sides of a pointwise loss, loss/pair that of a pairwise one.

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
        "clip_frac/chosen": o.chosen_clipped.float().mean(),
        "clip_frac/rejected": o.rejected_clipped.float().mean(),
    }
    if o.pairwise:
        metrics["loss/pair"] = o.chosen_losses.mean()
    else:
        metrics["loss/chosen"] = o.chosen_losses.mean()
        metrics["loss/rejected"] = o.rejected_losses.mean()
    if chosen.shape == rejected.shape:
        metrics["rewards/accuracies"] = (chosen > rejected).to(chosen.dtype).mean()
    return metrics
