"""Result rows as Markdown: what was measured, the fastest first, and what was not with its reason."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import linear_regression
from typing import NamedTuple

from benchmarks.environment import Row, markdown


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
