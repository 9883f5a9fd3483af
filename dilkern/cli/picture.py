"""The picture of one run, or of several over each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dilkern.cli.run_folder import Run

_CHOSEN, _REJECTED, _BOTH = "tab:blue", "tab:red", "0.15"
_HELD_OUT = "held-out pairs"


class _Line(NamedTuple):
    """A metric of a panel, in the colour that it has where one run is drawn."""

    metric: str
    colour: str
    style: str = "-"
    spread: str | None = None


class _Panel(NamedTuple):
    place: str
    title: str
    lines: Sequence[_Line]
    level: float | None = None  # a line to compare with


def _panels(reference: bool) -> tuple[_Panel, ...]:
    per_token = "log_ratio/{}_avg" if reference else "logps/{}_avg"
    sides = (("chosen", _CHOSEN, "-"), ("rejected", _REJECTED, "--"))
    spread = "log_ratio/{}_std" if reference else None
    return (
        _Panel(
            "A",
            "log-ratio to the reference, nats per token"
            if reference
            else "log-prob, nats per token (no reference: it moves with the batch)",
            [
                _Line(per_token.format(side), colour, style, spread and spread.format(side))
                for side, colour, style in sides
            ],
            0.0 if reference else None,
        ),
        _Panel("B", "margin, as the loss sees it", [_Line("rewards/margins", _BOTH)], 0.0),
        _Panel("C", "accuracy: chosen above rejected", [_Line("rewards/accuracies", _BOTH)], 0.5),
        _Panel("D", "loss", [_Line("loss", _BOTH)]),
        _Panel(
            "E",
            "share on the linear extension",
            [_Line(f"clip_frac/{side}", colour, style) for side, colour, style in sides],
        ),
    )


def _finite(run: Run, metric: str) -> tuple[list[int], list[float]]:
    """Return the points of a metric that can be drawn."""
    equal: set[int] = set()
    if metric.endswith("rewards/accuracies"):
        # Of answers that nothing tells apart yet, policy and reference being one, there is none.
        margins = zip(*run.points(metric.replace("accuracies", "margins")))
        equal = {step for step, margin in margins if margin == 0}
    points = zip(*run.points(metric))
    kept = [(step, y) for step, y in points if math.isfinite(y) and step not in equal]
    return [step for step, _ in kept], [y for _, y in kept]


def _draw_line(axis: Any, run: Run, line: _Line, colour: str, bands: bool) -> None:
    steps, values = _finite(run, line.metric)
    axis.plot(steps, values, line.style, marker=".", markersize=5, linewidth=1.3, color=colour)
    if bands and line.spread is not None:
        spreads = dict(zip(*_finite(run, line.spread)))
        known = [(s, v, spreads[s]) for s, v in zip(steps, values) if s in spreads]
        low, high = [v - d for _, v, d in known], [v + d for _, v, d in known]
        axis.fill_between([s for s, _, _ in known], low, high, color=colour, alpha=0.13, lw=0)
    steps, values = _finite(run, "eval_" + line.metric)
    axis.plot(
        steps, values, line.style, marker="o", markersize=7, linewidth=2.2, color=colour,
        markerfacecolor="white", markeredgewidth=1.8,
    )  # fmt: skip


def _handles(runs: Sequence[Run], colours: Sequence[str], spread: bool) -> Iterator[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if len(runs) == 1:
        yield Line2D([], [], color=_CHOSEN, marker=".", label="chosen")
        yield Line2D([], [], color=_REJECTED, linestyle="--", marker=".", label="rejected")
    else:
        for run, colour in zip(runs, colours):
            yield Line2D([], [], color=colour, marker=".", label=run.name)
        yield Line2D([], [], color="0.4", label="chosen")
        yield Line2D([], [], color="0.4", linestyle="--", label="rejected")
    if any(name.startswith("eval_") for run in runs for entry in run.history for name in entry):
        yield Line2D(
            [], [], color="0.4", marker="o", markersize=7, linewidth=2.2, markerfacecolor="white",
            markeredgewidth=1.8, label=_HELD_OUT,
        )  # fmt: skip
    if spread:
        yield Patch(color=_CHOSEN, alpha=0.2, label="1 standard deviation over the sequences")


def draw(runs: Sequence[Run], path: Path, title: str = "") -> None:
    """Draw log-ratios, margin, accuracy, loss and share on the linear extension over the steps.

    The log-ratios of chosen and rejected answers are per token, whatever the loss makes of them, so
    0 is where training starts and runs of different losses compare. Held-out pairs are the same at
    every point; training points differ also by the batch.

    Args:
        runs: one, with the spread over its sequences, or several, each in a colour of its own.
        path: where the picture goes; the suffix chooses the format.
        title: heading.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 5.6), layout="constrained")
    FigureCanvasAgg(figure)  # no display, and pyplot's global state is left alone
    axes = figure.subplot_mosaic("AABC;AADE", sharex=True)
    one = len(runs) == 1
    cycle = itertools.cycle(f"C{i}" for i in range(10))
    colours = [colour for _, colour in zip(runs, cycle)]
    # Log-ratios where every run has them, else what all have.
    reference = all(run.points("log_ratio/chosen_avg")[0] for run in runs)
    for panel in _panels(reference):
        axis = axes[panel.place]
        if panel.level is not None:
            axis.axhline(panel.level, color="0.5", linewidth=1, zorder=1)
        for run, colour in zip(runs, colours):
            for line in panel.lines:
                _draw_line(axis, run, line, line.colour if one else colour, bands=one)
        axis.set_title(panel.title, loc="left", fontsize=10)
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if panel.place in "ADE":
            axis.set_xlabel("step")
        axis.tick_params(labelbottom=True)
    axes["C"].set_ylim(-0.04, 1.04)
    axes["E"].set_ylim(-0.01, max(0.1, 1.08 * axes["E"].get_ylim()[1]))
    handles = list(_handles(runs, colours, spread=one and reference))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5))
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
