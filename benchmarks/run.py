"""The full comparison: `python -m benchmarks.run --cases cpu`.

Writes one CSV row per (case, peer) and a JSON with versions and hardware beside it. A run that is
repeated with the same output continues where it stopped; `--budget` ends it in time. Exit status 0:
every case is in the file; 75: the budget ended first, run again.
"""

from __future__ import annotations

import math
import sys
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.cases import CASE_SETS, Case
from benchmarks.environment import append_rows, begin, beside, default_stem, read_rows
from benchmarks.measure import Plan, Tick, failure, measure_group, problem
from benchmarks.peers import Peer, select

UNFINISHED = 75
FIELDS = (
    *("case", "head", "tokens", "vocab", "hidden", "dtype", "mode", "kind", "softcap", "scaled"),
    *("sequences", "workspace_mib", "peer", "output", "status", "reason", "note", "rounds"),
    *("forward_ms", "forward_ms_p20", "forward_ms_p80", "forward_ms_min"),
    *("total_ms", "total_ms_p20", "total_ms_p80", "total_ms_min"),
    *("gemm_ms", "gemm_ms_p20", "gemm_ms_p80", "gemm_ms_min"),
    *("gemm_multiple", "gemm_multiple_min", "peak_mib", "compile_s"),
    *("logp_err_max", "logp_err_rms", "loss_err", "grad_err_max", "grad_err_rms"),
    *("head_grad_err_max", "head_grad_err_rms"),
    *("budget_logp_err_max", "budget_logp_err_rms", "budget_grad_err_max", "budget_grad_err_rms"),
    *("budget_head_grad_err_max", "budget_head_grad_err_rms"),
    *("mean_p_label", "mean_logp_label", "mean_entropy"),
)


def select_cases(names: str) -> list[Case]:
    """Parse names of case sets, or parts of case keys, separated by commas.

    Raises:
        ValueError: nothing has that name (lists the sets).
    """
    every = {case.key: case for part in CASE_SETS.values() for case in part.cases()}
    found: dict[str, Case] = {}
    for name in (part.strip() for part in names.split(",")):
        if name in CASE_SETS:
            matching = {case.key: case for case in CASE_SETS[name].cases()}
        else:
            matching = {key: case for key, case in every.items() if name in key}
        if not matching:
            known = ", ".join(CASE_SETS)
            raise ValueError(f"no case set or case is called {name!r}; sets: {known}")
        found |= matching
    return list(found.values())


def take_slice(cases: list[Case], text: str) -> list[Case]:
    """Every n-th case for "i/n"."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise ValueError(f"--slice must be i/n with 1 <= i <= n, got {text!r}")
    return cases[int(number) - 1 :: int(count)]


def run(
    cases: list[Case],
    peers: list[Peer],
    device: torch.device,
    stem: Path,
    plan: Plan,
    budget: float = math.inf,
    remote: bool | None = None,
) -> bool:
    """Measure what is not yet in `stem`.csv; return whether every case is there now."""
    start = time.monotonic()
    console, table = Console(), beside(stem, ".csv")
    done = {(row["case"], row["peer"]) for row in read_rows(table)}
    todo = [(case, [p for p in peers if (case.key, p.name) not in done]) for case in cases]
    if not any(mine for _, mine in todo):
        return True
    begin(stem, device)
    plan, longest = replace(plan, deadline=start + budget), 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("", total=len(cases))
        for case, mine in todo:
            began = time.monotonic()
            left = start + budget - began
            if mine and left < longest:
                console.print(f"{left:.0f} s of the budget are left: stopping before {case.key}")
                return False
            if mine:

                def tick(text: str, case: Case = case) -> None:
                    progress.update(bar, description=f"{case.key}: {text}")

                rows = _group(case, mine, partial(measure_group, remote=remote), device, plan, tick)
                append_rows(table, rows, FIELDS)
                longest = max(longest, time.monotonic() - began)
                _show(rows, console)
            progress.advance(bar)
    return True


def _group(
    case: Case, peers: list[Peer], measure: Any, device: torch.device, plan: Plan, tick: Tick
) -> list[dict[str, Any]]:
    try:
        return measure(case, peers, device, plan, tick)
    except (RuntimeError, MemoryError) as error:
        # The truth or the bare GEMM did not fit or failed: no peer can be judged.
        row = failure(f"harness: {type(error).__name__}: {error}")
        traceback.print_exc()
    problem.cache_clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    shared = {"case": case.key} | row | case.row()
    return [shared | {"peer": peer.name, "output": peer.output} for peer in peers]


def _show(rows: list[dict[str, Any]], console: Console) -> None:
    first = rows[0]
    if "mean_entropy" in first:
        console.print(
            f"[bold]{first['case']}[/bold]: bare GEMM {first['gemm_ms']:.1f} ms; mean p(label) "
            f"{first['mean_p_label']:.3f}, mean log p(label) {first['mean_logp_label']:.3f}, "
            f"mean entropy {first['mean_entropy']:.3f} nats"
        )
    for row in rows:
        if row["status"] == "ok":
            console.print(
                f"  {row['peer']:16} {row['total_ms']:9.1f} ms (min {row['total_ms_min']:.1f}, "
                f"{row['gemm_multiple']:.2f} x GEMM), +{row['peak_mib']:.0f} MiB"
            )
        else:
            console.print(f"  {row['peer']:16} {row['status']}: {row['reason']}", markup=False)


def main(
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto")] = "auto",
    cases: Annotated[str, typer.Option(help=f"{', '.join(CASE_SETS)}, or parts of keys")] = "",
    peers: Annotated[str, typer.Option(help="names by commas, or all; default: the set's")] = "",
    rounds: Annotated[int, typer.Option(help="interleaved rounds per case")] = 7,
    budget: Annotated[float, typer.Option(help="wall-clock seconds for this call")] = math.inf,
    group_seconds: Annotated[float, typer.Option(help="most seconds of rounds per case")] = 60,
    threads: Annotated[int, typer.Option(help="CPU threads per process, 0: torch's choice")] = 0,
    slice_: Annotated[str, typer.Option("--slice", help="i/n: every n-th case only")] = "1/1",
    processes: Annotated[
        bool | None, typer.Option(help="one process per peer; default: on a CPU")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="result file without suffix")] = None,
) -> None:
    """Compare dilkern with every rival on the same tensors."""
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    where = torch.device(kind)
    cases = cases or {"cuda": "gpu"}.get(kind, "cpu")
    own = CASE_SETS[cases].peers if cases in CASE_SETS else "all"
    try:
        chosen, rivals = take_slice(select_cases(cases), slice_), select(peers or own)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    stem = out or default_stem(where, "" if own == "all" else cases)
    plan = Plan(rounds, group_seconds, threads)
    finished = run(chosen, rivals, where, stem, plan, budget, processes)
    print(f"{'complete' if finished else 'unfinished'}: {beside(stem, '.csv')}")
    sys.exit(0 if finished else UNFINISHED)


if __name__ == "__main__":
    typer.run(main)
