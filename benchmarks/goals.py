"""The project's goals for a GPU against the rows of the suite: `python -m benchmarks.goals FILE.csv`.

bf16, T = 8192, frozen head, forward and backward, as multiples of the bare GEMM (2TVD) of the same
rounds; the other goals are relations to rivals in the same group. Each line says met, missed, or not
measured; nothing is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from benchmarks.plot import Row, groups, number
from benchmarks.run import read_rows

OURS = "dilkern-triton"
MIB = 2**20
FROZEN = {4096: 2.3, 2048: 2.5, 1024: 2.8}  # by D; the floor is 2
LOGPS_ALONE, TRAINABLE = 1.15, 4.6
RIVALS = ("trl", "liger-selective", "liger-dpo", "liger-flce", "liger-flce-mean", "cce-unfiltered")


class Verdict(NamedTuple):
    goal: str
    case: str
    limit: str
    found: str
    met: bool | None  # None: not measured

    def line(self) -> str:
        word = {True: "met", False: "**missed**", None: "not measured"}[self.met]
        return f"| {self.goal} | {self.case} | {self.limit} | {self.found} | {word} |"


def memory_bound(row: Row) -> float:
    """MiB: the workspace, and beside it u, the gradient and their product in fp32 (12 bytes per token
    and D), and the gradient of a dense head.
    """
    cells = int(row["tokens"]) * int(row["hidden"])
    bound = float(row["workspace_mib"]) * MIB
    if row["mode"] != "score":
        bound += 12 * cells
    if row["mode"] == "trainable" and row.get("kind", "dense") == "dense":
        bound += int(row["vocab"]) * int(row["hidden"]) * (4 if row["dtype"] == "float32" else 2)
    return bound / MIB


def judge(rows: list[Row]) -> Iterator[Verdict]:
    cases = {case: {r["peer"]: r for r in mine} for case, mine in groups(rows).items()}
    ours = {
        case: found[OURS]
        for case, found in cases.items()
        if OURS in found and found[OURS]["status"] == "ok"
    }

    def at_goal_size(row: Row, mode: str) -> bool:
        dense = row.get("kind", "dense") == "dense"
        return dense and (row["tokens"], row["dtype"], row["mode"]) == ("8192", "bfloat16", mode)

    def multiples(
        goal: str, mode: str, limit_of: Callable[[int], float | None]
    ) -> Iterator[Verdict]:
        for width in FROZEN:
            limit = limit_of(width)
            mine = [
                row
                for row in ours.values()
                if at_goal_size(row, mode) and int(row["hidden"]) == width
            ]
            if not mine:
                yield Verdict(goal, f"D={width}", f"{limit} x GEMM", "", None)
            for row in mine:
                found = number(row, "gemm_multiple")
                yield Verdict(goal, row["case"], f"{limit} x GEMM", f"{found:.2f}", found <= limit)

    yield from multiples("frozen head, forward + backward", "frozen", FROZEN.get)
    yield from multiples("log-probs alone", "score", lambda width: LOGPS_ALONE)
    yield from multiples("trainable head", "trainable", lambda width: TRAINABLE)
    for case, row in ours.items():
        peak, bound = number(row, "peak_mib"), memory_bound(row)
        yield Verdict(
            "memory within its bound", case, f"{bound:.0f} MiB", f"{peak:.0f}", peak <= bound
        )
    for case, row in ours.items():
        for rival in RIVALS:
            other = cases[case].get(rival)
            goal = f"not slower than {rival}"
            if other is None or other["status"] != "ok":
                why = "no row" if other is None else other["status"]
                yield Verdict(goal, case, why, "", None)
                continue
            limit, found = number(other, "total_ms"), number(row, "total_ms")
            yield Verdict(goal, case, f"{limit:.3g} ms", f"{found:.3g} ms", found <= limit)
    short = [(case, row) for case, row in ours.items() if row["tokens"] == "512"]
    for case, row in short:
        other = cases[case].get("naive")
        if other is None or other["status"] != "ok":
            yield Verdict("T=512 not slower than naive", case, "no row", "", None)
            continue
        limit, found = number(other, "total_ms"), number(row, "total_ms")
        yield Verdict(
            "T=512 not slower than naive",
            case,
            f"{limit:.3g} ms",
            f"{found:.3g} ms",
            found <= limit,
        )
    if not short:
        yield Verdict("T=512 not slower than naive", "T=512", "", "", None)


def markdown(verdicts: list[Verdict]) -> str:
    count = {met: sum(v.met is met for v in verdicts) for met in (True, False, None)}
    lines = [
        f"{count[True]} met, {count[False]} missed, {count[None]} not measured.",
        "",
        "| goal | case | at most | found | |",
        "|---|---|---|---|---|",
    ]
    ranked = sorted(verdicts, key=lambda v: {False: 0, True: 1, None: 2}[v.met])
    return "\n".join([*lines, *(v.line() for v in ranked)]) + "\n"


def main(
    results: Annotated[list[Path], typer.Argument(help="result files (.csv) of benchmarks.run")],
    out: Annotated[Path | None, typer.Option(help="Markdown file to write")] = None,
) -> None:
    """Judge the rows and print the table."""
    text = markdown(list(judge([row for path in results for row in read_rows(path)])))
    if out is not None:
        out.write_text(text)
    print(text)


if __name__ == "__main__":
    typer.run(main)
