"""The full comparison: `python -m benchmarks.run --cases cpu`.

Writes one CSV row per (case, peer) and a JSON with versions and hardware beside it. A run that is
repeated with the same output continues where it stopped; `--budget` ends it in time. Exit status 0:
every case is in the file; 75: the budget ended first, run again.
"""

from __future__ import annotations

import csv
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import environment
from benchmarks.cases import CASE_SETS, Case
from benchmarks.measure import Plan, TruthCache, is_out_of_memory, measure_group
from benchmarks.peers import select
from benchmarks.truth import sharpness_line

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


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a result file, none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows in one write, with the header if the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def select_cases(names: str) -> list[Case]:
    """Parse names of case sets, or parts of case keys, separated by commas.

    Raises:
        ValueError: nothing has that name (lists the sets).
    """
    every = {case.key: case for make in CASE_SETS.values() for case in make()}
    found: dict[str, Case] = {}
    for name in (part.strip() for part in names.split(",")):
        if name in CASE_SETS:
            found |= {case.key: case for case in CASE_SETS[name]()}
            continue
        matching = {key: case for key, case in every.items() if name in key}
        if not matching:
            raise ValueError(
                f"no case set or case is called {name!r}; sets: {', '.join(CASE_SETS)}"
            )
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
    peer_names: str,
    device: torch.device,
    stem: Path,
    plan: Plan,
    budget: float | None = None,
    console: Console | None = None,
) -> bool:
    """Measure what is not yet in `stem`.csv; return whether every case is there now."""
    begin = time.monotonic()
    console = console or Console()
    table, about = stem.with_name(stem.name + ".csv"), stem.with_name(stem.name + ".json")
    done = {(row["case"], row["peer"]) for row in read_rows(table)}
    if all((case.key, peer.name) in done for case in cases for peer in select(peer_names)):
        return True
    environment.record(about, device)
    if budget is not None:
        plan = replace(plan, deadline=begin + budget)
    truths, longest = TruthCache(), 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("", total=len(cases))
        for case in cases:
            peers = [p for p in select(peer_names) if (case.key, p.name) not in done]
            left = None if budget is None else budget - (time.monotonic() - begin)
            if peers and left is not None and left < longest:
                console.print(f"{left:.0f} s of the budget are left: stopping before {case.key}")
                return False
            if peers:
                start = time.monotonic()

                def tick(text: str, case: Case = case) -> None:
                    progress.update(bar, description=f"{case.key}: {text}")

                rows = _group(case, peers, device, plan, truths, tick)
                append_rows(table, rows)
                longest = max(longest, time.monotonic() - start)
                _report(rows, console)
            progress.advance(bar)
    return True


def _group(
    case: Case, peers: list[Any], device: torch.device, plan: Plan, truths: TruthCache, tick: Any
) -> list[dict[str, Any]]:
    try:
        return measure_group(case, peers, device, plan, truths, tick)
    except (RuntimeError, MemoryError) as error:
        # The truth or the bare GEMM did not fit or failed: no peer can be judged.
        text = f"{type(error).__name__}: {error}"
        status = "OOM" if is_out_of_memory(text) else "error"
        traceback.print_exc()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    shared = {"case": case.key, "status": status, "reason": f"harness: {text[:300]}"} | case.row()
    return [shared | {"peer": peer.name, "output": peer.output} for peer in peers]


def _report(rows: list[dict[str, Any]], console: Console) -> None:
    if "mean_entropy" in rows[0]:
        line = f"bare GEMM {rows[0]['gemm_ms']:.1f} ms; {sharpness_line(rows[0])}"
        console.print(f"[bold]{rows[0]['case']}[/bold]: {line}")
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
    peers: Annotated[str, typer.Option(help="names separated by commas, or all")] = "all",
    rounds: Annotated[int, typer.Option(help="interleaved rounds per case")] = 7,
    budget: Annotated[float | None, typer.Option(help="wall-clock seconds for this call")] = None,
    group_seconds: Annotated[float, typer.Option(help="most seconds of rounds per case")] = 60,
    threads: Annotated[int, typer.Option(help="CPU threads per process, 0: torch's choice")] = 0,
    slice_: Annotated[str, typer.Option("--slice", help="i/n: every n-th case only")] = "1/1",
    out: Annotated[Path | None, typer.Option(help="result file without suffix")] = None,
) -> None:
    """Compare dilkern with every rival on the same tensors."""
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    where = torch.device(kind)
    try:
        chosen = take_slice(select_cases(cases or {"cuda": "gpu"}.get(kind, "cpu")), slice_)
        select(peers)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    stem = out or environment.default_stem(where)
    finished = run(chosen, peers, where, stem, Plan(rounds, group_seconds, threads), budget)
    print(f"{'complete' if finished else 'unfinished'}: {stem}.csv")
    sys.exit(0 if finished else UNFINISHED)


if __name__ == "__main__":
    typer.run(main)
