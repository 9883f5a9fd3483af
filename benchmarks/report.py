"""Tables, pictures and goals from result files: `python -m benchmarks.report draw FILE.csv`.

Everything is drawn from the files; refused, unsupported and out-of-memory rows stay in the tables with
their reason, and rows in which dilkern loses stay too. `goals FILE.csv` says of each of the project's
goals: met, missed, or not measured; nothing is left out.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import linear_regression
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from benchmarks.environment import Row, markdown, read_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

app = typer.Typer(add_completion=False, help="Tables, pictures and goals from result files.")

MIB = 2**20


def measured(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["status"] == "ok"]


def groups(rows: Iterable[Row], column: str = "case") -> dict[str, list[Row]]:
    """Rows by case, in the order of the file."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row[column], []).append(row)
    return found


def is_dense(row: Row) -> bool:
    return row.get("kind", "dense") == "dense"  # the oldest files have no such column


# Tables


def name_of(row: Row) -> str:
    return row["head"] if row["scaled"] == 1 else f"{row['head']} (V and D / {row['scaled']})"


def title(row: Row) -> str:
    what = [row["dtype"], row["mode"]]
    if not is_dense(row):
        what.append({"nf4": "NF4 head", "lora": "LoRA head"}[row["kind"]])
    if row["softcap"]:
        what.append(f"softcap {row['softcap']:g}")
    if row["workspace_mib"] != 256:
        what.append(f"workspace {row['workspace_mib']:g} MiB")
    sizes = f"T={row['tokens']} V={row['vocab']} D={row['hidden']}"
    return f"{name_of(row)}: {sizes} {', '.join(what)}"


def table(rows: Sequence[Row]) -> str:
    """One Markdown table per case, fastest first, rows without figures last with their reason."""
    parts = []
    for mine in groups(rows).values():
        first = mine[0]
        parts.append(f"**{title(first)}**\n")
        if "mean_entropy" in first:
            parts.append(
                f"Bare GEMM (2TVD) {first['gemm_ms']:.4g} ms; labels: mean p "
                f"{first['mean_p_label']:.2f}, mean entropy {first['mean_entropy']:.2f} nats.\n"
            )
        filters = has_filters(mine)
        lines = [
            [*_line(row), *(_filter_cells(row) if filters else [])]
            for row in sorted(measured(mine), key=lambda row: row["total_ms"])
        ]
        without: dict[str, list[str]] = {}
        for row in mine:
            if row["status"] != "ok":
                without.setdefault(f"{row['status']}: {row['reason']}", []).append(row["peer"])
        lines += [[", ".join(names), reason] for reason, names in without.items()]
        header = (
            "|forward ms|forward + backward ms|p20 .. p80|min|x GEMM|peak above inputs, MiB|"
            "log-prob error rms (max), nats|gradient error rms"
        )
        if filters:
            header += "|with g = 1|of the sum over rows|largest row's|loud words"
        parts.append(markdown(header, lines))
    return "\n".join(parts)


def _line(row: Row) -> list[str]:
    if "logp_err_rms" in row:
        error = f"{row['logp_err_rms']:.1e} ({row['logp_err_max']:.1e})"
    else:
        error = f"loss {row['loss_err']:.1e}"
    other = "" if row["output"] == "token_logps" else f" ({row['output'].replace('_', ' ')})"
    return [
        row["peer"] + other,
        f"{row['forward_ms']:.4g}",
        f"{row['total_ms']:.4g}",
        f"{row['total_ms_p20']:.4g} .. {row['total_ms_p80']:.4g}",
        f"{row['total_ms_min']:.4g}",
        f"{row['gemm_multiple']:.2f}",
        f"{row['peak_mib']:.0f}",
        error,
        f"{row['grad_err_rms']:.1e}" if "grad_err_rms" in row else "",
    ]


def has_filters(rows: Iterable[Row]) -> bool:
    return any(row.get("filtered") for row in rows)


def _filter_cells(row: Row) -> list[str]:
    """Errors of the gradient under g = 1, and the share of words that a filter multiplies exactly."""
    errors = [f"{row[f'u_err_{what}']:.1e}" for what in ("rms", "mean", "row")]
    return [*errors, f"{row['loud']:.1%}" if "loud" in row else ""]


def steps_table(rows: Iterable[Row]) -> str:
    """Training steps, or the longest sequences that fit."""
    lines = []
    for row in rows:
        if row["status"] != "ok":
            cells = [f"{row['status']}: {row['reason']}"]
        elif "cap_gib" in row:
            cells = [f"longest sequence under {row['cap_gib']:g} GiB: {row['length']}"]
        else:
            ms = f"{row['step_ms']:.0f} ({row['step_ms_min']:.0f})"
            cells = [f"{row['tokens_per_s']:.0f}", ms]
            cells += [f"{row['peak_mib']:.0f}", f"{row['grad_err']:.1e}"]
        lines.append([row["model"], row["method"], *cells])
    header = (
        "model|log-probs by|tokens/s (median)|step ms (min)|peak above model, MiB|"
        "relative error of the adapter gradient"
    )
    return markdown(header, lines)


def of_pairs(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of `benchmarks.pairs` by what was trained on what."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        name = "{model}, {data}, {loss}, {pairs} pairs per step, {dtype}".format(**row)
        if row.get("prompt_share"):
            name += ", prompts of {prompt_share:.0%}".format(**row)
        found.setdefault(name, []).append(row)
    return found


def best_of_trl(rows: Iterable[Row]) -> Row | None:
    theirs = [row for row in measured(rows) if row["variant"].startswith("trl")]
    return max(theirs, key=lambda row: row["pairs_per_s"], default=None)


def pairs_table(rows: Iterable[Row]) -> str:
    """Pairs per second by variant, beside the better of TRL's two."""
    parts = []
    for name, mine in of_pairs(rows).items():
        best, lines = best_of_trl(mine), []
        for row in mine:
            if row["status"] != "ok":
                lines.append([row["variant"], f"{row['status']}: {row['reason']}"])
                continue
            columns = ("pairs_per_s", "tokens", "peak_mib")
            times = [f" ({row[c] / best[c]:.2f} x)" if best else "" for c in columns]
            seconds = [row[f"round_ms{part}"] / 1000 / row["steps"] for part in ("", "_min")]
            figures = (f"{row['pairs_per_s']:.3g}", f"{row['tokens']}", f"{row['peak_mib']:.0f}")
            cells = [row["variant"], *map("{}{}".format, figures, times)]
            cells.append("{:.3g} ({:.3g})".format(*seconds))
            lines.append([*cells, f"{row['loss_err']:.1e}"])
        header = (
            "|pairs/s (x the better of TRL)|tokens per round|peak above model, MiB|"
            "s per step, median (min)|largest difference of a loss"
        )
        parts.append(f"**{name}**\n\n{markdown(header, lines)}")
    return "\n".join(parts)


class Fit(NamedTuple):
    axis: str
    peer: str
    rows: list[Row]
    time: float  # exponent, of the minima
    memory: float


def exponent(x: list[float], y: list[float]) -> float:
    """The slope of log y over log x by least squares; NaN if a value is not positive."""
    if min(*x, *y) <= 0:
        return math.nan
    return linear_regression([*map(math.log, x)], [*map(math.log, y)]).slope


def fits(rows: Iterable[Row]) -> list[Fit]:
    """Time should follow the GEMM (exponent 1 in T, V, D and 0 in the workspace), peak memory be flat
    in V and grow with nothing but the results (T D) and the workspace in use.
    """
    found = []
    for axis in ("tokens", "vocab", "hidden", "workspace_mib"):
        along = measured(row for row in rows if row["head"].startswith(f"scaling-{axis}-"))
        for peer, line in groups(along, "peer").items():
            if len(line) > 1:
                x, time, memory = (
                    [row[name] for row in line] for name in (axis, "total_ms_min", "peak_mib")
                )
                found.append(Fit(axis, peer, line, exponent(x, time), exponent(x, memory)))
    return found


def source_line(path: Path) -> str:
    """Where the figures come from, from the JSON beside the file."""
    about = path.with_suffix(".json")
    found = json.loads(about.read_text()) if about.exists() else {}
    calls = found.get("calls") or [found.get("environment")]
    if calls == [None]:
        return f"From `{path.name}` (no environment file)."
    first, versions = calls[0], calls[0]["versions"]
    named = ", ".join(f"{n} {versions[n]}" for n in ("torch", "trl", "liger-kernel", "triton"))
    where = first.get("gpu") or f"{first['cpu']}, {first['threads']} threads"
    dirty = " with local changes" if any(call["dirty"] for call in calls) else ""
    load = first["load_average"][0] if first["load_average"] else "unknown"
    return (
        f"From `{path.name}`: {where}; {named}; commit {first['commit']}{dirty}; "
        f"{first['time'][:10]}; load average at the start {load}."
    )


def text_of(path: Path, rows: Sequence[Row]) -> str:
    """The tables of one result file, whatever it measured."""
    if "method" in rows[0]:
        return steps_table(rows)
    if "variant" in rows[0]:
        return f"{source_line(path)}\n\n{pairs_table(rows)}"
    if found := fits(rows):
        header = "axis|peer|exponent of time|exponent of peak memory|x GEMM, smallest .. largest"
        lines = []
        for fit in found:
            ends = " .. ".join(f"{fit.rows[i]['gemm_multiple_min']:.2f}" for i in (0, -1))
            lines.append([fit.axis, fit.peer, f"{fit.time:.2f}", f"{fit.memory:.2f}", ends])
        return markdown(header, lines)
    return f"{source_line(path)}\n\n{table(rows)}"


def insert(text: str, block: str, markers: tuple[str, str]) -> str:
    """Put `block` between the markers of `text`.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    begin, end = markers
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    if text.count(begin) != 1 or text.count(end) != 1 or end in before:
        raise ValueError(f"the file needs one {begin} and after it one {end}")
    return f"{before}{begin}\n{block.strip()}\n{end}{after}"


# Goals: on a GPU bf16, T = 8192, forward and backward, as multiples of the bare GEMM (2TVD) of the same
# rounds, and relations to rivals in the same group; on a CPU the claim of the README.

OURS, OURS_CPU = "dilkern-triton", "dilkern-torch"
WIDTHS = (4096, 2048, 1024)
MULTIPLES = {  # by mode and D; the floor of "frozen" is 2
    ("frozen", "frozen head, forward + backward"): (2.3, 2.5, 2.8),
    ("score", "log-probs alone"): (1.15, 1.15, 1.15),
    ("trainable", "trainable head"): (4.6, 4.6, 4.6),
}
RIVALS = ("trl", "liger-selective", "liger-dpo", "liger-flce", "liger-flce-mean", "cce-unfiltered")
CLAIM = (("naive", "total_ms_min", 0.8), ("naive", "peak_mib", 0.1), ("trl", "total_ms_min", 0.8))


class Verdict(NamedTuple):
    goal: str
    case: str
    limit: str
    found: str = ""
    met: bool | None = None  # None: not measured


def memory_bound(row: Row) -> float:
    """MiB: the workspace, and beside it u, the gradient and their product in fp32 (12 bytes per token
    and D; the torch backend holds the rows and their fp32 copies too: 24), and the gradient of a dense
    head.
    """
    cells = row["tokens"] * row["hidden"]
    bound = row["workspace_mib"] * MIB
    if row["mode"] != "score":
        bound += (12 if row["peer"] == OURS else 24) * cells
    if row["mode"] == "trainable" and is_dense(row):
        bound += row["vocab"] * row["hidden"] * (4 if row["dtype"] == "float32" else 2)
    return bound / MIB


# The filter on real models, fp32 on a CPU: the best row whose gradient is good enough, by minima; and
# pairs per second over the better of TRL's two, with its share of their memory.
FILTER_GOALS = (
    *(("gemma3-270m", "frozen", 2048, 1.2), ("smollm2", "frozen", 4096, 1.4)),
    ("gemma3-270m", "trainable", 2048, 1.6),
)
FILTER_ERRORS = (("u_err_rms", 4e-3), ("u_err_mean", 1e-3))
PAIRS_GOALS = {"hh_harmless_1799": 2.5, "preferences_en_300": 2.0}


def judge_filter(rows: Sequence[Row]) -> Iterator[Verdict]:
    for head, mode, tokens, limit in FILTER_GOALS:
        wanted = {"head": head, "mode": mode, "tokens": tokens, "dtype": "float32"}
        goal = f"word filter, {mode} head, gradient error 4e-3, mean gradient 1e-3"
        good = [
            row
            for row in measured(rows)
            if row["peer"].startswith("filter") and wanted.items() <= row.items()
            if all(row[name] <= most for name, most in FILTER_ERRORS)
        ]
        best = min(good, key=lambda row: row["gemm_multiple_min"], default=None)
        case = f"{head}@{tokens}"
        if best is None:
            there = any(wanted.items() <= row.items() for row in rows)
            found = ("no row is that exact", False) if there else ("", None)
            yield Verdict(goal, case, f"{limit} x GEMM", *found)
            continue
        found = best["gemm_multiple_min"]
        text = f"{found:.2f} ({best['peer']})"
        yield Verdict(goal, case, f"{limit} x GEMM", text, found <= limit)


def judge_pairs(rows: Sequence[Row]) -> Iterator[Verdict]:
    for name, mine in of_pairs(rows).items():
        best, least = best_of_trl(mine), PAIRS_GOALS.get(mine[0]["data"])
        shared = [row for row in measured(mine) if row["variant"] == "shared"]
        if best is None or least is None or not shared:
            continue
        speed = shared[0]["pairs_per_s"] / best["pairs_per_s"]
        share = shared[0]["peak_mib"] / best["peak_mib"]
        goal = "shared prompts over the better of TRL"
        yield Verdict(f"{goal}: pairs/s", name, f"least {least} x", f"{speed:.2f}", speed >= least)
        yield Verdict(f"{goal}: memory", name, "0.5 x", f"{share:.2f}", share <= 0.5)


def judge(rows: Iterable[Row]) -> Iterator[Verdict]:
    rows = list(rows)
    yield from judge_pairs([row for row in rows if "variant" in row])
    rows = [row for row in rows if "variant" not in row]
    if has_filters(rows):
        yield from judge_filter(rows)
    cases = {case: {r["peer"]: r for r in mine} for case, mine in groups(rows).items()}

    def rows_of(peer: str, **wanted: object) -> list[Row]:
        ours = measured(found[peer] for found in cases.values() if peer in found)
        return [row for row in ours if wanted.items() <= row.items()]

    def against(
        goal: str, ours: list[Row], rival: str, column: str = "total_ms", share: float = 1.0
    ) -> Iterator[Verdict]:
        unit = "MiB" if "mib" in column else "ms"
        for row in ours:
            other = cases[row["case"]].get(rival, {"status": "no row"})
            if other["status"] != "ok":
                yield Verdict(goal, row["case"], other["status"])
                continue
            limit, found = share * other[column], row[column]
            figures = (f"{limit:.3g} {unit}", f"{found:.3g} {unit}")
            yield Verdict(goal, row["case"], *figures, found <= limit)

    for (mode, goal), limits in MULTIPLES.items():
        for width, limit in zip(WIDTHS, limits):
            size = {"tokens": 8192, "dtype": "bfloat16", "mode": mode, "hidden": width}
            mine = [row for row in rows_of(OURS, **size) if is_dense(row)]
            for row in mine:
                found = row["gemm_multiple"]
                yield Verdict(goal, row["case"], f"{limit} x GEMM", f"{found:.2f}", found <= limit)
            if not mine:
                yield Verdict(goal, f"D={width}", f"{limit} x GEMM")
    for row in [*rows_of(OURS), *rows_of(OURS_CPU, head="packed")]:
        peak, bound = row["peak_mib"], memory_bound(row)
        limit = f"{bound:.0f} MiB"
        yield Verdict("memory within its bound", row["case"], limit, f"{peak:.0f}", peak <= bound)
    for rival in RIVALS:
        yield from against(f"not slower than {rival}", rows_of(OURS), rival)
    goal, short = "T=512 not slower than naive", rows_of(OURS, tokens=512)
    yield from against(goal, short, "naive") if short else [Verdict(goal, "T=512", "")]
    claim = rows_of(OURS_CPU, case="claim@2048-float32-frozen")
    for rival, column, share in CLAIM:
        what = "memory" if "mib" in column else "time (min)"
        goal = f"on a CPU, {share:g} times {rival}'s {what}"
        none = [Verdict(goal, "claim", "")]
        yield from against(goal, claim, rival, column, share) if claim else none


def goals_table(verdicts: Sequence[Verdict]) -> str:
    words = {False: "**missed**", True: "met", None: "not measured"}
    count = {met: sum(v.met is met for v in verdicts) for met in words}
    ranked = sorted(verdicts, key=lambda v: list(words).index(v.met))
    lines = markdown("goal|case|at most|found|", [(*v[:4], words[v.met]) for v in ranked])
    return f"{count[True]} met, {count[False]} missed, {count[None]} not measured.\n\n{lines}"


# Pictures


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


def draw_file(path: Path) -> list[Path]:
    """Write the tables and every picture of one result file beside it; return the paths."""
    rows = read_rows(path)
    made = [path.with_name(f"{path.stem}.md")]
    made[0].write_text(text_of(path, rows))
    for name, figure in pictures(rows):
        made.append(path.with_name(f"{path.stem}{name}.png"))
        figure.savefig(made[-1], dpi=130)
    return made


Results = Annotated[list[Path], typer.Argument(help="result files (.csv)")]


@app.command()
def draw(results: Results) -> None:
    """Draw result files and write their tables, beside them."""
    for path in results:
        print(*draw_file(path), sep="\n")


@app.command()
def goals(
    results: Results,
    out: Annotated[Path | None, typer.Option(help="Markdown file to write")] = None,
    strict: Annotated[bool, typer.Option(help="exit status 1 if a goal is missed")] = False,
) -> None:
    """Judge the rows and print the table."""
    verdicts = list(judge([row for path in results for row in read_rows(path)]))
    text = goals_table(verdicts)
    if out is not None:
        out.write_text(text)
    print(text)
    sys.exit(strict and any(v.met is False for v in verdicts))


if __name__ == "__main__":
    app()
