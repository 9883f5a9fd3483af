"""What a run's metrics show, in words, each with the figures that it comes from.

A rule sees a run and returns what it found, or None. Thresholds are in nats per token, or shares;
how often the rules hit and miss stands in docs/guide.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from dilkern.cli.run_folder import Run

# Policy and reference differ by less than half a percent in the probability of a word: over the 100
# words of an answer by less than the batch moves every other metric.
STILL = 0.005
# Chosen answers have lost 5 % per token, and more than the margin that was won for it.
FALL = 0.05
# One sequence in twenty has a gradient that is not that of the formula.
EXTENSION = 0.05
# What is left of the loss: on a logistic curve the slope has then fallen to about as little.
SPENT = 0.05
# A third of the margin comes with the difference in length.
LENGTH = 1 / 3
# What chance does once in 700 runs: so many standard errors away from what it does on average.
SURE = 3.0
# A coin does not come as far above one half in five runs of six.
LEARNT = 1.0


class Finding(NamedTuple):
    what: str
    numbers: str
    anchor: str  # of docs/guide.md


def last(run: Run, metric: str) -> float | None:
    """Return where a metric ends: training, its mean over the last quarter of its logs.

    Held-out pairs are the same every time, so of theirs the last value.
    """
    values = run.points(metric)[1]
    tail = values[-1:] if metric.startswith("eval_") else values[-max(3, len(values) // 4) :]
    return sum(tail) / len(tail) if tail else None


def _rate(run: Run) -> str:
    rates = run.points("learning_rate")[1]
    return f"learning rate up to {max(rates):.3g}" if rates else "learning rate not logged"


def _not_finite(run: Run) -> Finding | None:
    for entry in run.history:
        names = [
            name
            for name, value in entry.items()
            # fp16 looks for its scale by steps that it leaves out, with a norm of infinity or NaN.
            if isinstance(value, float) and not math.isfinite(value) and name != "grad_norm"
        ]
        if names:
            return Finding(
                "the loss is NaN or infinite: nothing was learnt from there on",
                f"{', '.join(names[:3])} from step {entry['step']}; {_rate(run)}",
                "nan",
            )
    return None


def _still(run: Run) -> Finding | None:
    squares, shown = [], []
    for side in ("chosen", "rejected"):
        mean, spread = last(run, f"log_ratio/{side}_avg"), last(run, f"log_ratio/{side}_std")
        if mean is None or spread is None:
            return None
        squares.append(mean**2 + spread**2)
        shown.append(f"{side} {mean:+.4f} +- {spread:.4f}")
    if math.sqrt(max(squares)) >= STILL:
        return None
    return Finding(
        "the model has hardly moved from its reference",
        f"log-ratio per token of {', '.join(shown)} after {run.steps} steps; {_rate(run)}",
        "nothing-moves",
    )


def _change(run: Run, side: str) -> tuple[float, str] | None:
    """How far a side has gone, per token: from the reference, or on held-out pairs since the first."""
    ratio = last(run, f"log_ratio/{side}_avg")
    if ratio is not None:
        return ratio, "log-ratio per token"
    values = run.points(f"eval_logps/{side}_avg")[1]
    if len(values) > 1:
        return values[-1] - values[0], "change of held-out log-probs per token"
    return None


def _both_fall(run: Run) -> Finding | None:
    chosen, rejected = _change(run, "chosen"), _change(run, "rejected")
    if chosen is None or rejected is None:
        return None
    margin = chosen[0] - rejected[0]
    if max(chosen[0], rejected[0]) > -FALL or -chosen[0] < margin:
        return None
    return Finding(
        "both answers become less likely, the chosen one by more than the margin that is won",
        f"{chosen[1]}: chosen {chosen[0]:+.3f}, rejected {rejected[0]:+.3f}, margin {margin:+.3f}",
        "chosen-falls",
    )


def _extension(run: Run) -> Finding | None:
    shares = {side: last(run, f"clip_frac/{side}") or 0.0 for side in ("chosen", "rejected")}
    if max(shares.values()) < EXTENSION:
        return None
    limit = run.summary.get("max_log_ratio")
    beyond = "" if limit is None else f" (max_log_ratio {limit:g})"
    return Finding(
        "sequences are on the linear extension, where the gradient is not the formula's",
        f"chosen {shares['chosen']:.0%}, rejected {shares['rejected']:.0%}{beyond}",
        "linear-extension",
    )


def _spent(run: Run) -> Finding | None:
    for name in ("loss/pair", "loss/chosen", "loss/rejected"):
        values, end = run.points(name)[1], last(run, name)
        # Curves that start at 0 have no share of it left.
        if end is not None and abs(values[0]) > 0.1 and abs(end) < SPENT * abs(values[0]):
            held_out = run.points(f"eval_{name}")[1]
            beside = f"; held out {held_out[0]:.3f} -> {held_out[-1]:.3f}" if held_out else ""
            return Finding(
                "the curve is flat: these pairs teach next to nothing any more",
                f"{name} {values[0]:.3f} -> {end:.4f}{beside}",
                "flat-curve",
            )
    return None


def _pairs(run: Run) -> int | None:
    """How many pairs are held out, from the time that their evaluation took."""
    seconds, rate = last(run, "eval_runtime"), last(run, "eval_samples_per_second")
    return None if seconds is None or rate is None else max(1, round(seconds * rate))


def _supervised(run: Run) -> bool:
    """Whether the loss has no term that tells chosen from rejected: likelihood alone, as `sft`."""
    terms = [run.points(f"loss/{of}")[1] for of in ("pair", "chosen", "rejected")]
    return any(terms) and not any(value for values in terms for value in values)


def _length(run: Run) -> Finding | None:
    if _supervised(run):
        return None
    pairs = _pairs(run)
    prefix = "" if pairs is None else "eval_"
    logged = run.points("length/margin_corr")[1]
    names = [f"length/{name}" for name in ("margin_slope", "margin_corr", "chosen", "rejected")]
    ends = [last(run, prefix + name) for name in [*names, "rewards/margins"]]
    known = [end for end in ends if end is not None]
    if len(known) < len(ends):
        return None
    slope, correlation, chosen, rejected, margin = known
    since = ""
    if last(run, "log_ratio/chosen_avg") is None:
        # Without a reference long answers have other margins before any training; what training adds
        # is seen on pairs that stay the same.
        first = [run.points(prefix + name)[1] for name in (names[0], "rewards/margins")]
        if pairs is None or min(map(len, first)) < 2:
            return None
        slope, margin = slope - first[0][0], margin - first[1][0]
        since = " won since the first evaluation"
    if margin <= 0:
        return None
    if pairs is None:
        # Each log is of two pairs or more, so the error of one is 1 at most.
        pairs, correlation = len(logged), sum(logged) / len(logged)
    share = slope * (chosen - rejected) / margin
    if share < LENGTH or abs(correlation) < SURE / math.sqrt(pairs):
        return None
    return Finding(
        f"{'longer' if chosen > rejected else 'shorter'} answers win by their length",
        f"{share:.0%} of the margin{since} comes with the difference in length (correlation "
        f"{correlation:+.2f}); chosen {chosen:.0f}, rejected {rejected:.0f} tokens",
        "length",
    )


def _held_out(run: Run) -> Finding | None:
    training, held_out = last(run, "rewards/accuracies"), last(run, "eval_rewards/accuracies")
    pairs = _pairs(run)
    if training is None or held_out is None or pairs is None or _supervised(run):
        return None
    error = 0.5 / math.sqrt(pairs)  # of the accuracy of a coin
    numbers = f"accuracy {held_out:.2f} on {pairs} of them, {training:.2f} on training pairs"
    if training > 0.5 and held_out < 0.5 - SURE * error:
        what = "labels look swapped: the held-out pairs contradict what the training pairs teach"
        return Finding(what, numbers, "swapped")
    if held_out < 0.5 + LEARNT * error:
        what = "the held-out pairs are not told apart better than by a coin"
        return Finding(what, numbers, "not-told-apart")
    return None


RULES: tuple[Callable[[Run], Finding | None], ...] = (
    _not_finite, _still, _both_fall, _extension, _spent, _length, _held_out,
)  # fmt: skip


def findings(run: Run) -> list[Finding]:
    """Return what the metrics of a run show; of one that broke down, that alone."""
    broken = _not_finite(run)
    if broken is not None:
        return [broken]
    return [found for rule in RULES if (found := rule(run)) is not None]
