"""Pictures and Markdown tables from result files: `python -m benchmarks.plot RESULT.csv`.

Everything is drawn from the files; refused, unsupported and out-of-memory rows stay in the tables with
their reason, and rows in which dilkern loses stay too. `--readme FILE` puts the table between the
markers `<!-- benchmarks:begin -->` and `<!-- benchmarks:end -->` of FILE.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

from benchmarks.run import read_rows

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
Row = dict[str, str]


def number(row: Row, name: str) -> float | None:
    text = row.get(name) or ""
    return float(text) if text else None


def measured(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["status"] == "ok"]


def groups(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by case, in the order of the file."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["case"], []).append(row)
    return found


def title(row: Row) -> str:
    cap = f", softcap {float(row['softcap']):g}" if float(row["softcap"] or 0) else ""
    kind = {"nf4": ", NF4 head", "lora": ", LoRA head"}.get(row.get("kind", ""), "")
    scaled = f" (V and D / {row['scaled']})" if row["scaled"] not in ("", "1") else ""
    return (
        f"{row['head']}{scaled}: T={row['tokens']} V={row['vocab']} D={row['hidden']} "
        f"{row['dtype']}, {row['mode']}{kind}{cap}"
    )


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def table(rows: list[Row]) -> str:
    """One Markdown table per case, fastest first, rows without figures last with their reason."""
    lines = []
    for rows_of_case in groups(rows).values():
        first = rows_of_case[0]
        lines += [f"**{title(first)}**", ""]
        if first.get("mean_entropy"):
            lines += [
                f"Bare GEMM (2TVD) {number(first, 'gemm_ms'):.4g} ms; labels: mean p "
                f"{number(first, 'mean_p_label'):.2f}, mean entropy "
                f"{number(first, 'mean_entropy'):.2f} nats.",
                "",
            ]
        lines += [
            "| | forward ms | forward + backward ms | p20 .. p80 | min | x GEMM | "
            "peak above inputs, MiB | log-prob error rms (max), nats | gradient error rms |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        ranked = sorted(measured(rows_of_case), key=lambda row: float(row["total_ms"]))
        for row in ranked:
            lines.append(_line(row))
        without: dict[str, list[str]] = {}
        for row in rows_of_case:
            if row["status"] != "ok":
                without.setdefault(f"{row['status']}: {row['reason']}", []).append(row["peer"])
        for reason, names in without.items():
            lines.append(f"| {', '.join(names)} | {reason} | | | | | | | |")
        lines.append("")
    return "\n".join(lines)


def _line(row: Row) -> str:
    other = "" if row["output"] == "token_logps" else f" ({row['output'].replace('_', ' ')})"
    rms, largest = number(row, "logp_err_rms"), number(row, "logp_err_max")
    loss = number(row, "loss_err")
    error = f"loss {loss:.1e}" if rms is None else f"{rms:.1e} ({largest:.1e})"
    return (
        f"| {row['peer']}{other} | {number(row, 'forward_ms'):.4g} | {number(row, 'total_ms'):.4g} "
        f"| {number(row, 'total_ms_p20'):.4g} .. {number(row, 'total_ms_p80'):.4g} "
        f"| {number(row, 'total_ms_min'):.4g} | {number(row, 'gemm_multiple'):.2f} "
        f"| {number(row, 'peak_mib'):.0f} | {error} "
        f"| {_cell(number(row, 'grad_err_rms'), '.1e')} |"
    )


def source_line(csv_path: Path) -> str:
    """Where the figures come from, from the JSON beside the file."""
    about = csv_path.with_suffix(".json")
    if not about.exists():
        return f"From `{csv_path.name}` (no environment file)."
    calls = json.loads(about.read_text())["calls"]
    first = calls[0]
    versions = first["versions"]
    named = ", ".join(f"{n} {versions[n]}" for n in ("torch", "trl", "liger-kernel", "triton"))
    where = first.get("gpu") or f"{first['cpu']}, {first['threads']} threads"
    dirty = " with local changes" if any(call["dirty"] for call in calls) else ""
    load = first["load_average"][0] if first["load_average"] else "unknown"
    return (
        f"From `{csv_path.name}`: {where}; {named}; commit {first['commit']}{dirty}; "
        f"{first['time'][:10]}; load average at the start {load}."
    )


def insert(text: str, block: str) -> str:
    """Put `block` between the markers of `text`.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the file needs one {BEGIN} and after it one {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{block.strip()}\n{END}{rest.split(END)[1]}"


def _colours(rows: list[Row]) -> dict[str, tuple[float, ...]]:
    names = list(dict.fromkeys(row["peer"] for row in rows))
    cycle = plt.get_cmap("tab20").colors
    return {name: cycle[i % len(cycle)] for i, name in enumerate(names)}


def bars(rows: list[Row], case: str, path: Path) -> None:
    """Time with its spread, peak memory, and the multiple of the bare GEMM for one case."""
    mine = sorted(measured(groups(rows)[case]), key=lambda row: -float(row["total_ms"]))
    names, colours = [row["peer"] for row in mine], _colours(rows)
    paint = [colours[name] for name in names]
    figure, axes = plt.subplots(
        1, 3, figsize=(14, 0.45 * len(mine) + 1.6), sharey=True, constrained_layout=True
    )
    middle = [float(row["total_ms"]) for row in mine]
    low = [m - float(row["total_ms_p20"]) for m, row in zip(middle, mine)]
    high = [float(row["total_ms_p80"]) - m for m, row in zip(middle, mine)]
    axes[0].barh(names, middle, xerr=[low, high], color=paint, capsize=3)
    axes[0].set_xlabel("time, ms (median, p20 .. p80)")
    axes[1].barh(names, [float(row["peak_mib"]) for row in mine], color=paint)
    axes[1].set_xlabel("peak memory above inputs, MiB")
    axes[2].barh(names, [float(row["gemm_multiple"]) for row in mine], color=paint)
    passes = {"frozen": 2, "trainable": 3, "score": 1, "step": 3}[mine[0]["mode"]]
    if mine[0].get("kind") == "lora" and mine[0]["mode"] == "trainable":
        passes = 2  # the products of A and B are small
    axes[2].axvline(passes, color="black", linestyle="--", label=f"{passes} GEMM passes")
    axes[2].set_xlabel("time / bare GEMM (2TVD)")
    axes[2].legend(fontsize=7)
    figure.suptitle(title(mine[0]))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def label_points(axis: Any, values: Iterable[float]) -> None:
    """Name the measured values, and no others, on a logarithmic x axis."""
    ticks = sorted(set(values))
    axis.set_xticks(ticks, [f"{value:g}" for value in ticks], rotation=30)
    axis.xaxis.set_minor_formatter(NullFormatter())


def over(rows: list[Row], axis: str, path: Path) -> bool:
    """Time and memory over `axis` ("tokens" of one head, "vocab" at one T and D), frozen dense heads.

    False if no peer has two points.
    """
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in measured(rows):
        if row["mode"] != "frozen":
            continue
        if row.get("kind", "dense") != "dense" or float(row["softcap"] or 0):
            continue
        head = row["head"] if row["scaled"] in ("", "1") else f"{row['head']} / {row['scaled']}"
        fixed = head if axis == "tokens" else f"T={row['tokens']} D={row['hidden']}"
        lines.setdefault((f"{fixed} {row['dtype']}", row["peer"]), []).append(row)
    panels = list(
        dict.fromkeys(key[0] for key, line in lines.items() if len({row[axis] for row in line}) > 1)
    )
    if not panels:
        return False
    colours = _colours(rows)
    shape = {"figsize": (5 * len(panels), 8), "squeeze": False, "constrained_layout": True}
    figure, axes = plt.subplots(2, len(panels), **shape)
    for column, panel in enumerate(panels):
        for (name, peer), line in lines.items():
            if name != panel:
                continue
            line = sorted(line, key=lambda row: float(row[axis]))
            x = [float(row[axis]) for row in line]
            middle = [float(row["total_ms"]) for row in line]
            low = [m - float(row["total_ms_p20"]) for m, row in zip(middle, line)]
            high = [float(row["total_ms_p80"]) - m for m, row in zip(middle, line)]
            style = {"label": peer, "color": colours[peer], "marker": "o"}
            axes[0, column].errorbar(x, middle, yerr=[low, high], capsize=3, **style)
            axes[1, column].plot(x, [float(row["peak_mib"]) for row in line], **style)
        for place, unit in ((0, "forward + backward, ms"), (1, "peak above inputs, MiB")):
            axes[place, column].set(xlabel=axis, ylabel=unit, xscale="log", yscale="log")
            axes[place, column].grid(alpha=0.3, which="both")
            points = [
                float(r[axis]) for (name, _), line in lines.items() if name == panel for r in line
            ]
            label_points(axes[place, column], points)
        axes[0, column].set_title(panel)
        axes[0, column].legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def accuracy(rows: list[Row], path: Path) -> None:
    """Error of the gradient over error of the token log-probs, refused rows marked by a cross."""
    colours = _colours(rows)
    figure, axis = plt.subplots(figsize=(7.5, 6), constrained_layout=True)
    seen = set()
    for row in rows:
        x, y = number(row, "logp_err_rms"), number(row, "grad_err_rms")
        if not x or not y:
            continue
        marker = "x" if row["status"] == "refused" else "o" if row["dtype"] == "float32" else "s"
        label = None if row["peer"] in seen else row["peer"]
        seen.add(row["peer"])
        axis.plot(x, y, marker, color=colours[row["peer"]], label=label, alpha=0.8)
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="rms error of token log-probs against fp64, nats",
        ylabel="relative rms error of the hidden-state gradient",
        title="circle fp32, square 16 bit, cross refused",
    )
    axis.grid(alpha=0.3)
    if seen:
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw(csv_path: Path, folder: Path) -> list[Path]:
    """Write every picture and the table of one result file into `folder`; return the paths."""
    rows = read_rows(csv_path)
    folder.mkdir(parents=True, exist_ok=True)
    stem = csv_path.stem
    made = [folder / f"{stem}.md"]
    made[0].write_text(f"{source_line(csv_path)}\n\n{table(rows)}")
    for case, mine in groups(rows).items():
        if measured(mine):
            made.append(folder / f"{stem}-{case.replace('/', '_')}.png")
            bars(rows, case, made[-1])
    for axis in ("tokens", "vocab"):
        path = folder / f"{stem}-{axis}.png"
        if over(rows, axis, path):
            made.append(path)
    made.append(folder / f"{stem}-accuracy.png")
    accuracy(rows, made[-1])
    return made


def main(
    results: Annotated[list[Path], typer.Argument(help="result files (.csv) of benchmarks.run")],
    out: Annotated[Path | None, typer.Option(help="folder; default: beside the file")] = None,
    readme: Annotated[Path | None, typer.Option(help="Markdown file with the two markers")] = None,
    cases: Annotated[str, typer.Option(help="for --readme: parts of case keys, by commas")] = "",
) -> None:
    """Draw result files and write their tables."""
    blocks = []
    for path in results:
        for made in draw(path, out or path.parent):
            print(made)
        wanted = [part for part in cases.split(",") if part]
        rows = [
            row
            for row in read_rows(path)
            if not wanted or any(part in row["case"] for part in wanted)
        ]
        blocks.append(f"{source_line(path)}\n\n{table(rows)}")
    if readme is not None:
        readme.write_text(insert(readme.read_text(), "\n".join(blocks)))
        print(readme)


if __name__ == "__main__":
    typer.run(main)
