"""The project's goals against result files: met, missed or not measured, and nothing left out.

On a GPU bf16, T = 8192, forward and backward, as multiples of the bare GEMM (2TVD) of the same rounds,
and relations to rivals in the same group; pairs per second and the longest sequence against TRL; on a
CPU the claim of the README.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from benchmarks.environment import Row, markdown
from benchmarks.real_models import SOURCES
from benchmarks.tables import best_of_trl, groups, is_dense, measured, of_pairs

MIB = 2**20
OURS, OURS_CPU = "dilkern-triton", "dilkern-torch"
WIDTHS = (4096, 2048, 1024)
MULTIPLES = {  # by mode and D; the floor of "frozen" is 2
    ("frozen", "frozen head, forward + backward"): (2.3, 2.5, 2.8),
    ("score", "log-probs alone"): (1.12, 1.12, 1.12),
    ("trainable", "trainable head"): (4.4, 4.4, 4.4),
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


# The filter on real models. In fp32, on a CPU: the best row whose gradient is good enough, by minima;
# in 16 bits, on a GPU: as it comes, its errors no larger than those of full logits.
FILTER_GOALS = (
    *(("gemma3-270m", "frozen", 2048, 1.2), ("smollm2", "frozen", 4096, 1.4)),
    ("gemma3-270m", "trainable", 2048, 1.6),
)
FILTER_ERRORS = (("u_err_rms", 4e-3), ("u_err_mean", 1e-3))
FILTER_MULTIPLES = {"frozen": 1.35, "trainable": 2.2}
# Over the better of TRL's two, by device and data; and over TRL.
PAIRS_GOALS = {
    "cpu": {"hh_harmless_1799": 2.5, "preferences_en_300": 2.0},
    "cuda": {"hh_harmless_1799": 1.5, "preferences_en_300": 1.5},
}
LENGTH_GOAL = 2


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


def judge_filter_16(rows: Sequence[Row]) -> Iterator[Verdict]:
    for mode, limit in FILTER_MULTIPLES.items():
        goal = f"word filter, {mode} head, errors of full logits at most"
        for head in SOURCES:
            wanted = {"head": head, "mode": mode, "tokens": 8192, "dtype": "bfloat16"}
            mine = {r["peer"]: r for r in measured(rows) if wanted.items() <= r.items()}
            auto, naive = mine.get("filter-auto"), mine.get("naive")
            if auto is None or naive is None:
                yield Verdict(goal, f"{head}@8192", f"{limit} x GEMM")
                continue
            exact = all(auto[name] <= naive[name] for name, _ in FILTER_ERRORS)
            found = f"{auto['gemm_multiple']:.2f}{'' if exact else ', less exact'}"
            met = exact and auto["gemm_multiple"] <= limit
            yield Verdict(goal, auto["case"], f"{limit} x GEMM", found, met)


def judge_longest(rows: Sequence[Row]) -> Iterator[Verdict]:
    for model, mine in groups(rows, "model").items():
        length = {row["method"]: row["length"] for row in measured(mine)}
        case = f"{model}, {mine[0]['cap_gib']:g} GiB"
        goal, least = "longest sequence over TRL's", f"least {LENGTH_GOAL} x"
        if not length.get("trl") or "dilkern" not in length:
            yield Verdict(goal, case, least)
            continue
        found = length["dilkern"] / length["trl"]
        yield Verdict(goal, case, least, f"{found:.2f}", found >= LENGTH_GOAL)


def judge_pairs(rows: Sequence[Row]) -> Iterator[Verdict]:
    for name, mine in of_pairs(rows).items():
        best, least = best_of_trl(mine), PAIRS_GOALS[mine[0]["device"]].get(mine[0]["data"])
        shared = [row for row in measured(mine) if row["variant"] == "shared"]
        if best is None or least is None or not shared:
            continue
        speed = shared[0]["pairs_per_s"] / best["pairs_per_s"]
        share = shared[0]["peak_mib"] / best["peak_mib"]
        goal = "shared prompts over the better of TRL"
        yield Verdict(f"{goal}: pairs/s", name, f"least {least} x", f"{speed:.2f}", speed >= least)
        yield Verdict(f"{goal}: memory", name, "0.5 x", f"{share:.2f}", share <= 0.5)


def judge(rows: Iterable[Row]) -> Iterator[Verdict]:
    """The goals of whatever kinds of files the rows come from."""
    every = list(rows)
    yield from judge_pairs([row for row in every if "variant" in row])
    yield from judge_longest([row for row in every if "cap_gib" in row])
    rows = [row for row in every if "peer" in row]
    if every and not rows:
        return
    if any(row["peer"].startswith("filter") for row in rows):
        yield from judge_filter(rows)
        yield from judge_filter_16(rows)
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
