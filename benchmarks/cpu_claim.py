"""The claim of the README on a CPU: `python -m benchmarks.cpu_claim`.

T=2048, V=32768, D=512, fp32, frozen head, forward + backward; dilkern, naive full logits and TRL each
in a process of its own, in interleaved rounds. Prints one line and writes a result file. Time is the
ratio of minima of 7 rounds; memory is the peak above the inputs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import environment
from benchmarks.cases import Case, case_of
from benchmarks.measure import Plan, measure_group
from benchmarks.peers import select

OURS = "dilkern-torch"
# What issue 7 asks for: dilkern's share of the other's figure, at most.
TARGETS = {"time_vs_naive": 0.8, "peak_memory_vs_naive": 0.10, "time_vs_trl": 0.8}


def compare(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the three ratios.

    Raises:
        RuntimeError: a peer has no row, with its reason.
    """
    found = {row["peer"]: row for row in rows}
    for row in rows:
        if row["status"] != "ok":
            raise RuntimeError(f"{row['peer']}: {row['status']}: {row.get('reason', '')}")
    ours, naive, trl = found[OURS], found["naive"], found["trl"]
    return {
        "time_vs_naive": ours["total_ms_min"] / naive["total_ms_min"],
        "peak_memory_vs_naive": ours["peak_mib"] / naive["peak_mib"],
        "time_vs_trl": ours["total_ms_min"] / trl["total_ms_min"],
    }


def line(rows: list[dict[str, Any]], ratios: dict[str, float]) -> str:
    """One line for the README and the terminal."""
    found = {row["peer"]: row for row in rows}
    ours, naive, trl = found[OURS], found["naive"], found["trl"]
    missed = [name for name, limit in TARGETS.items() if not ratios[name] <= limit]
    verdict = f"MISSED: {', '.join(missed)}" if missed else "all targets met"
    return (
        f"T={ours['tokens']} V={ours['vocab']} D={ours['hidden']} {ours['dtype']} frozen head, "
        f"forward+backward: {ours['total_ms_min']:.0f} ms = {ratios['time_vs_naive']:.2f} x naive "
        f"({naive['total_ms_min']:.0f} ms) = {ratios['time_vs_trl']:.2f} x TRL "
        f"({trl['total_ms_min']:.0f} ms); peak memory above inputs {ours['peak_mib']:.0f} MiB = "
        f"{ratios['peak_memory_vs_naive']:.3f} x naive ({naive['peak_mib']:.0f} MiB); {verdict}"
    )


def claim(case: Case, plan: Plan) -> tuple[list[dict[str, Any]], dict[str, float]]:
    peers = select(f"naive,trl,{OURS}")
    rows = measure_group(case, peers, torch.device("cpu"), plan)
    return rows, compare(rows)


def main(
    rounds: Annotated[int, typer.Option(help="interleaved rounds")] = 7,
    out: Annotated[Path | None, typer.Option(help="result file")] = None,
) -> None:
    """Measure the CPU claim; exit status 1 if a target is missed."""
    stem = environment.default_stem(torch.device("cpu"))
    path = out or stem.with_name(f"{stem.name}-claim.json")
    rows, ratios = claim(case_of("claim", 2048), Plan(rounds=rounds, seconds=600))
    about = environment.describe(torch.device("cpu"))
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"ratios": ratios, "targets": TARGETS, "rows": rows, "environment": about}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(line(rows, ratios))
    print(path)
    sys.exit(int(any(not ratios[name] <= limit for name, limit in TARGETS.items())))


if __name__ == "__main__":
    typer.run(main)
