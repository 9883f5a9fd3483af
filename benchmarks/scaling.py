"""Cost against T, V, D and the workspace, with fitted exponents: `python -m benchmarks.scaling`.

One axis moves, the others stay. Time should follow the GEMM (exponent 1 in T, V, D and 0 in the
workspace); peak memory should be flat in V and grow with nothing but the results (T D) and the
workspace in use. `--device cuda` measures the triton backend at real sizes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import matplotlib
import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track

from benchmarks import environment
from benchmarks.cases import Case
from benchmarks.measure import Plan, TruthCache, measure_group
from benchmarks.peers import select
from benchmarks.plot import label_points
from benchmarks.run import append_rows, read_rows

matplotlib.use("Agg")

Axes = dict[str, tuple[float, ...]]


class Study(NamedTuple):
    """What stays where one axis moves, and what is measured."""

    base: Case
    axes: Axes
    peers: str


CPU_AXES: Axes = {
    "tokens": (256, 512, 1024, 2048),
    "vocab": (4096, 8192, 16384, 32768),
    "hidden": (128, 256, 512, 1024),
    "workspace_mib": (4, 16, 64, 256),
}
GPU_AXES: Axes = {
    "tokens": (1024, 2048, 4096, 8192, 16384, 32768),
    "vocab": (16384, 32768, 65536, 131072, 262144),
    "hidden": (512, 1024, 2048, 4096, 8192),
    "workspace_mib": (64, 128, 256, 512, 1024),
}
STUDIES = {
    "cpu": Study(Case("scaling", 1024, 16384, 256), CPU_AXES, "naive,dilkern-torch"),
    "cuda": Study(
        Case("scaling", 8192, 131072, 2048, "bfloat16"), GPU_AXES, "naive,dilkern-triton"
    ),
    "tiny": Study(
        Case("scaling", 16, 256, 16),
        {"tokens": (16, 32), "workspace_mib": (1, 4)},
        "naive,dilkern-torch",
    ),
}


def points(axis: str, study: Study) -> list[Case]:
    """The cases along one axis, named so that each has a key of its own."""
    return [
        replace(study.base, **{"head": f"{study.base.head}-{axis}-{value:g}", axis: value})
        for value in study.axes[axis]
    ]


def exponent(x: Iterable[float], y: Iterable[float]) -> float:
    """The slope of log y over log x by least squares; NaN if a value is not positive."""
    points = np.asarray([list(x), list(y)], dtype=float)
    if not (points > 0).all():
        return float("nan")
    slope, _ = np.polyfit(*np.log(points), 1)
    return float(slope)


def fit(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One exponent of time (minima) and of peak memory per axis and peer."""
    found = []
    for axis in CPU_AXES:
        mine = [r for r in rows if f"-{axis}-" in r["head"] and r["status"] == "ok"]
        for peer in dict.fromkeys(r["peer"] for r in mine):
            line = [r for r in mine if r["peer"] == peer]
            if len(line) < 2:
                continue
            x = [float(r[axis]) for r in line]
            gemm = [float(r["gemm_multiple_min"]) for r in line]
            found.append(
                {
                    "axis": axis,
                    "peer": peer,
                    "time_exponent": exponent(x, [float(r["total_ms_min"]) for r in line]),
                    "memory_exponent": exponent(x, [float(r["peak_mib"]) for r in line]),
                    "gemm_multiple_first": gemm[0],
                    "gemm_multiple_last": gemm[-1],
                }
            )
    return found


def markdown(fits: list[dict[str, Any]]) -> str:
    lines = [
        "| axis | peer | exponent of time | exponent of peak memory | x GEMM, smallest .. largest |",
        "|---|---|---|---|---|",
    ]
    for f in fits:
        lines.append(
            f"| {f['axis']} | {f['peer']} | {f['time_exponent']:.2f} | {f['memory_exponent']:.2f} "
            f"| {f['gemm_multiple_first']:.2f} .. {f['gemm_multiple_last']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def picture(rows: list[dict[str, Any]], fits: list[dict[str, Any]], path: Path) -> None:
    """Time and memory over each axis, the fitted exponents in the legend."""
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(f["axis"] for f in fits))
    shape = {"figsize": (4 * len(names), 7), "squeeze": False, "constrained_layout": True}
    figure, axes = plt.subplots(2, len(names), **shape)
    for column, axis in enumerate(names):
        for f in (f for f in fits if f["axis"] == axis):
            mine = [
                r
                for r in rows
                if r["peer"] == f["peer"] and f"-{axis}-" in r["head"] and r["status"] == "ok"
            ]
            x = [float(r[axis]) for r in mine]
            for place, value, name in ((0, "total_ms_min", "time"), (1, "peak_mib", "memory")):
                label = f"{f['peer']}: exponent {f[name + '_exponent']:.2f}"
                axes[place, column].loglog(x, [float(r[value]) for r in mine], "o-", label=label)
        for place, unit in ((0, "forward + backward, ms (min)"), (1, "peak above inputs, MiB")):
            axes[place, column].set(xlabel=axis, ylabel=unit)
            label_points(axes[place, column], x)
            axes[place, column].legend(fontsize=7)
            axes[place, column].grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    tiny: Annotated[bool, typer.Option(help="two small points per axis, in this process")] = False,
    rounds: Annotated[int, typer.Option(help="interleaved rounds per point")] = 5,
    out: Annotated[Path | None, typer.Option(help="result file without suffix")] = None,
) -> None:
    """Measure every axis (a repeated call continues), fit and draw."""
    where, study = torch.device(device), STUDIES["tiny" if tiny else device]
    stem = environment.default_stem(where)
    stem = out or stem.with_name(f"{stem.name}-scaling")
    table = stem.with_name(stem.name + ".csv")
    done = {row["case"] for row in read_rows(table)}
    every = [case for axis in study.axes for case in points(axis, study)]
    todo = [case for case in every if case.key not in done]
    if todo:
        environment.record(stem.with_name(stem.name + ".json"), where)
    truths, plan, peers = TruthCache(), Plan(1 if tiny else rounds, 10), select(study.peers)
    for case in track(todo, "scaling", console=Console(stderr=True)):
        remote = False if tiny else None
        append_rows(table, measure_group(case, peers, where, plan, truths, remote=remote))
    rows = read_rows(table)
    fits = fit(rows)
    stem.with_name(stem.name + ".md").write_text(markdown(fits))
    picture(rows, fits, stem.with_name(stem.name + ".png"))
    print(markdown(fits) + f"{table}")


if __name__ == "__main__":
    typer.run(main)
