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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.cases import CASE_SETS, Case
from benchmarks.environment import append_rows, begin, beside, default_stem, read_rows
from benchmarks.measure import DeviceLost, Plan, failure, measure_group, problem
from benchmarks.peers import Peer, select
from benchmarks.tables import table

UNFINISHED = 75


def select_cases(names: str) -> list[Case]:
    """Parse names of case sets, or parts of case keys, separated by commas.

    Raises:
        ValueError: nothing has that name (lists the sets).
    """
    every = [case for part in CASE_SETS.values() for case in part.cases]
    found: list[Case] = []
    for name in (part.strip() for part in names.split(",")):
        own = CASE_SETS[name].cases if name in CASE_SETS else []
        matching = own or [case for case in every if name in case.key]
        if not matching:
            known = ", ".join(CASE_SETS)
            raise ValueError(f"no case set or case is called {name!r}; sets: {known}")
        found += matching
    return list(dict.fromkeys(found))


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
    end, longest, file = time.monotonic() + budget, 0.0, beside(stem, ".csv")
    done = {(row["case"], row["peer"]) for row in read_rows(file)}
    missing = [(case, [p for p in peers if (case.key, p.name) not in done]) for case in cases]
    todo = [(case, mine) for case, mine in missing if mine]
    if todo:
        begin(stem, device)
    for number, (case, mine) in enumerate(todo, 1):
        began = time.monotonic()
        if end - began < longest:
            print(f"{end - began:.0f} s of the budget are left: stopping before {case.key}")
            return False
        print(f"{number} of {len(todo)}: {case.key}", flush=True)
        lost = False
        try:
            rows = measure_group(case, mine, device, replace(plan, deadline=end), remote)
        except (RuntimeError, MemoryError) as error:
            traceback.print_exc()
            lost = isinstance(error, DeviceLost)
            # Without the truth or the bare GEMM no peer can be judged; a lost device has one at fault.
            at_fault = [peer for peer in mine if lost and peer.name == error.task] or mine
            failed = failure(f"{'' if lost else 'harness: '}{type(error).__name__}: {error}")
            shared = {"case": case.key} | asdict(case) | failed
            rows = [shared | {"peer": peer.name, "output": peer.output} for peer in at_fault]
            problem.cache_clear()
        append_rows(file, rows)
        if lost:
            print(table(rows), "The others are left to another process.", flush=True)
            return False
        torch.cuda.empty_cache()
        print(table(rows), flush=True)
        longest = max(longest, time.monotonic() - began)
    return True


def main(
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto")] = "auto",
    cases: Annotated[str, typer.Option(help=f"{', '.join(CASE_SETS)}, or parts of keys")] = "",
    peers: Annotated[str, typer.Option(help="names by commas, or all; default: the set's")] = "",
    rounds: Annotated[int, typer.Option(help="interleaved rounds per case")] = 7,
    budget: Annotated[float, typer.Option(help="wall-clock seconds for this call")] = math.inf,
    group_seconds: Annotated[float, typer.Option(help="most seconds of rounds per case")] = 60,
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
        chosen, rivals = select_cases(cases), select(peers or own)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    stem = out or default_stem(where, "" if own == "all" else cases)
    plan = Plan(rounds, group_seconds)
    finished = run(chosen, rivals, where, stem, plan, budget, processes)
    print(f"{'complete' if finished else 'unfinished'}: {beside(stem, '.csv')}")
    sys.exit(0 if finished else UNFINISHED)


if __name__ == "__main__":
    typer.run(main)
