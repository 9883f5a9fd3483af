"""Pictures of result rows: one case, curves over a size, what a filter or shared prompts gain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.environment import Row
from benchmarks.tables import (
    best_of_trl,
    fits,
    groups,
    has_filters,
    is_dense,
    measured,
    name_of,
    of_pairs,
    title,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def panels(rows: int, columns: int, width: float, height: float, **more: Any) -> Any:
    """A figure and its axes (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


def _colours(rows: Iterable[Row]) -> dict[str, Any]:
    from matplotlib import colormaps

    return dict(zip(groups(rows, "peer"), colormaps["tab20"].colors))


def _whiskers(rows: Iterable[Row]) -> list[list[float]]:
    """Below and above the median, to p20 and p80."""
    ms = [[row[f"total_ms{part}"] for part in ("", "_p20", "_p80")] for row in rows]
    return [[m - low for m, low, _ in ms], [high - m for m, _, high in ms]]


def bars(rows: Sequence[Row], mine: Sequence[Row]) -> Figure:
    """Time with its spread, peak memory, and the multiple of the bare GEMM for one case."""
    mine = sorted(measured(mine), key=lambda row: -row["total_ms"])
    colours, names = _colours(rows), [row["peer"] for row in mine]
    figure, ((time, memory, gemm),) = panels(1, 3, 14, 0.45 * len(mine) + 1.6, sharey=True)
    for axis, column, label in (
        (time, "total_ms", "time, ms (median, p20 .. p80)"),
        (memory, "peak_mib", "peak memory above inputs, MiB"),
        (gemm, "gemm_multiple", "time / bare GEMM (2TVD)"),
    ):
        axis.barh(names, [row[column] for row in mine], color=[colours[name] for name in names])
        axis.set_xlabel(label)
    time.errorbar(
        [row["total_ms"] for row in mine], names, xerr=_whiskers(mine), fmt="k,", capsize=3
    )
    passes = {"frozen": 2, "trainable": 3, "score": 1, "step": 3}[mine[0]["mode"]]
    if mine[0].get("kind") == "lora" and mine[0]["mode"] == "trainable":
        passes = 2  # the products of A and B are small
    gemm.axvline(passes, color="black", linestyle="--", label=f"{passes} GEMM passes")
    gemm.legend(fontsize=7)
    figure.suptitle(title(mine[0]))
    return figure


GREY = "#808080"  # to be read on a page of either colour


def on_any_page(figure: Figure) -> Figure:
    figure.patch.set_alpha(0)
    for axis in figure.axes:
        axis.patch.set_alpha(0)
        axis.tick_params(colors=GREY, which="both")
        axis.grid(alpha=0.3)
        for text in (axis.title, axis.xaxis.label, axis.yaxis.label):
            text.set_color(GREY)
        for spine in axis.spines.values():
            spine.set_color(GREY)
    return figure


def trade(mine: Sequence[Row]) -> Figure:
    """What a filter buys: time over the error of the gradient under g = 1, one point per row."""
    figure, ((axis,),) = panels(1, 1, 8, 5.5)
    colours = {"filter": "#d95f02", "drop": "#7570b3", "dilkern": "#1b9e77"}
    for row in measured(mine):
        colour = colours.get(row["peer"].partition("-")[0], GREY)
        x, y = row["u_err_rms"], row["gemm_multiple_min"]
        axis.plot(x, y, "o" if row.get("filtered") else "s", color=colour)
        style = {"textcoords": "offset points", "fontsize": 8, "color": colour}
        axis.annotate(row["peer"], (x, y), (5, 4), **style)
    axis.axhline(1, color=GREY, linestyle="--")
    axis.set(xscale="log", ylim=(0, None), ylabel="time / bare product, minima")
    axis.set_xlabel("relative error of the hidden-state gradient, g = 1")
    axis.set_title(title(mine[0]), fontsize=10)
    return on_any_page(figure)


NAMES = {
    "trl": "TRL",
    "trl-logits": "TRL, full logits",
    "padded": "dilkern, padded",
    "padding-free": "dilkern, padding-free",
    "shared": "dilkern, shared prompts",
    "shared+filter": "... and the word filter",
    "shared+precomputed": "... and a known reference",
    "naive": "full logits",
    "dilkern-torch": "dilkern",
    "dilkern-triton": "dilkern",
}


def pairs_picture(rows: Sequence[Row]) -> Figure:
    """Pairs per second, one panel per model, data, loss and batch."""
    found = {name: measured(mine)[::-1] for name, mine in of_pairs(rows).items() if measured(mine)}
    columns = min(2, len(found))
    lines = -(-len(found) // columns)
    figure, axes = panels(lines, columns, 6 * columns, 2.8 * lines)
    for axis, (name, mine) in zip(axes.flat, found.items()):
        colours = [GREY if row["variant"].startswith("trl") else "#1b9e77" for row in mine]
        values = [row["pairs_per_s"] for row in mine]
        bars = axis.barh([NAMES.get(v := row["variant"], v) for row in mine], values, color=colours)
        said = ["{pairs_per_s:.3g} ({peak_mib:.0f} MiB)".format(**row) for row in mine]
        axis.bar_label(bars, said, padding=3, color=GREY)
        axis.margins(x=0.6)
        axis.set_title(name.replace(", ", "\n", 2).replace("\n", ", ", 1), fontsize=9)
        axis.set_xlabel("pairs per second (peak memory above the model)")
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    return on_any_page(figure)


def sharing_picture(rows: Sequence[Row]) -> Figure | None:
    """What shared prompts gain over the prompt's share of the tokens, one point per panel above."""
    figure, ((axis,),) = panels(1, 1, 7.5, 4.5)
    found: dict[str, list[tuple[float, float]]] = {}
    for mine in of_pairs(rows).values():
        by = {row["variant"]: row for row in measured(mine)}
        if not {"shared", "padding-free"} <= by.keys():
            continue
        share = by["padding-free"]["tokens"] / by["shared"]["tokens"] - 1
        others = {"padding-free": by["padding-free"], "padded": by.get("padded")}
        others["the better of TRL"] = best_of_trl(mine)
        for name, other in others.items():
            if other:
                gain = by["shared"]["pairs_per_s"] / other["pairs_per_s"]
                found.setdefault(name, []).append((share, gain))
    if not found:
        return None
    for (name, points), colour in zip(found.items(), ("#1b9e77", "#d95f02", "#7570b3")):
        axis.plot(*zip(*sorted(points)), "o-", color=colour, label=f"over {name}")
    axis.plot([0, 1], [1, 2], "--", color=GREY, label="fewer tokens than padding-free: 1 + share")
    axis.set(xlim=(0, 1), ylim=(0, None), ylabel="pairs per second, times")
    axis.set_xlabel("share of the prompt in prompt + chosen + rejected")
    axis.set_title("What shared prompts gain", fontsize=10)
    axis.legend(fontsize=8)
    return on_any_page(figure)


def vocabulary(rows: Sequence[Row]) -> Figure:
    """Peak memory and time over the vocabulary, a line per peer, for those who take one look."""
    figure, (axes,) = panels(1, 2, 10, 3.8)
    along = [row for row in measured(rows) if row["head"].startswith("scaling-vocab-")]
    colours = dict(zip(("dilkern", "full logits"), ("#1b9e77", "#d95f02")))
    for axis, column, unit in zip(axes, ("peak_mib", "total_ms"), (1024, 1000)):
        for peer, mine in groups(along, "peer").items():
            name, mine = NAMES.get(peer, peer), sorted(mine, key=lambda row: row["vocab"])
            x, y = [row["vocab"] for row in mine], [row[column] / unit for row in mine]
            colour = colours.get(name, GREY)
            axis.plot(x, y, "o-", color=colour, linewidth=3 if name == "dilkern" else 1.5)
            note = {"textcoords": "offset points", "va": "center", "color": colour}
            axis.annotate(name, (x[-1], y[-1]), (8, 0), **note)
        words = sorted({row["vocab"] for row in along})[-3:]
        axis.set_xticks([0, *words], ["0", *(f"{v:,}" for v in words)])
        axis.margins(y=0.06)
        axis.set(xlim=(0, 1.25 * words[-1]), xlabel="words in the vocabulary")
    axes[0].set_title("peak memory above the inputs, GiB", fontsize=10)
    axes[1].set_title("forward and backward, seconds", fontsize=10)
    return on_any_page(figure)


Curve = tuple[str, str, str, list[Row]]  # panel, axis, label, rows


def curves(rows: Sequence[Row], found: Sequence[Curve]) -> Figure:
    """Time above and peak memory below, one panel per column, logarithmic."""
    from matplotlib.ticker import NullFormatter

    colours, titles = _colours(rows), list(dict.fromkeys(curve[0] for curve in found))
    figure, axes = panels(2, len(titles), 5 * len(titles), 8)
    for (time, memory), panel in zip(axes.T, titles):
        ticks: set[float] = set()
        for _, axis, label, line in (curve for curve in found if curve[0] == panel):
            line = sorted(line, key=lambda row: row[axis])
            x, ms, mib = ([row[name] for row in line] for name in (axis, "total_ms", "peak_mib"))
            ticks |= set(x)
            style = {"label": label, "color": colours[line[0]["peer"]], "marker": "o"}
            time.errorbar(x, ms, yerr=_whiskers(line), capsize=3, **style)
            memory.plot(x, mib, **style)
        for place, unit in ((time, "forward + backward, ms"), (memory, "peak above inputs, MiB")):
            place.set(xlabel=axis, ylabel=unit, xscale="log", yscale="log")
            place.grid(alpha=0.3, which="both")
            # The measured values have names, and no others.
            place.set_xticks(sorted(ticks), [f"{v:g}" for v in sorted(ticks)], rotation=30)
            place.xaxis.set_minor_formatter(NullFormatter())
        time.set_title(panel)
        time.legend(fontsize=7)
    return figure


def over(rows: Iterable[Row], axis: str) -> list[Curve]:
    """Frozen dense heads over "tokens" of one head or over "vocab" at one T and D, where a peer has
    two points.
    """
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in measured(rows):
        if row["mode"] == "frozen" and is_dense(row) and not row["softcap"]:
            fixed = name_of(row) if axis == "tokens" else f"T={row['tokens']} D={row['hidden']}"
            lines.setdefault((f"{fixed} {row['dtype']}", row["peer"]), []).append(row)
    wide = {panel for (panel, _), line in lines.items() if len({row[axis] for row in line}) > 1}
    return [(panel, axis, peer, line) for (panel, peer), line in lines.items() if panel in wide]


def accuracy(rows: Sequence[Row]) -> Figure:
    """Error of the gradient over error of the token log-probs, refused rows marked by a cross."""
    colours, (figure, ((axis,),)) = _colours(rows), panels(1, 1, 7.5, 6)
    judged = [row for row in rows if row.get("logp_err_rms") and row.get("grad_err_rms")]
    for peer, mine in groups(judged, "peer").items():
        for number, row in enumerate(mine):
            marker = "o" if row["dtype"] == "float32" else "s"
            style = {"marker": "x" if row["status"] == "refused" else marker, "alpha": 0.8}
            style |= {"color": colours[peer], "label": None if number else peer}
            axis.plot(row["logp_err_rms"], row["grad_err_rms"], **style)
    axis.set(xscale="log", yscale="log", title="circle fp32, square 16 bit, cross refused")
    axis.set_xlabel("rms error of token log-probs against fp64, nats")
    axis.set_ylabel("relative rms error of the hidden-state gradient")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return figure


def pictures(rows: Sequence[Row]) -> Iterator[tuple[str, Figure]]:
    """Every picture of one result file and the end of its name."""
    if "method" in rows[0]:
        return
    if "variant" in rows[0]:
        if measured(rows):
            yield "", pairs_picture(rows)
            if picture := sharing_picture(rows):
                yield "-sharing", picture
        return
    if found := fits(rows):
        label = "{0.peer}: exponents {0.time:.2f}, {0.memory:.2f}"
        yield "", curves(rows, [(f.axis, f.axis, label.format(f), f.rows) for f in found])
        if any(f.axis == "vocab" for f in found):
            yield "-vocabulary", vocabulary(rows)
        return
    for case, mine in groups(rows).items():
        if measured(mine):
            yield f"-{case.replace('/', '_')}", bars(rows, mine)
            if has_filters(mine) and mine[0]["mode"] != "score":
                yield f"-{case.replace('/', '_')}-trade", trade(mine)
    for axis in ("tokens", "vocab"):
        if lines := over(rows, axis):
            yield f"-{axis}", curves(rows, lines)
    yield "-accuracy", accuracy(rows)
