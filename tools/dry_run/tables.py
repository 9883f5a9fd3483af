"""The worst of every kernel in a table, compared with the committed one and shown in the docs."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import triton

from benchmarks.environment import RESULTS, ROOT, markdown, read_rows, write_rows
from tools.dry_run.capture import ARCHITECTURES, Seen
from tools.dry_run.judge import programs_per_sm
from tools.dry_run.read import Compiled

DOCS = ROOT / "docs" / "kernels.md"
NOTABLE = ("HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "UTMALDG", "v_mfma")


class Row(NamedTuple):
    """The worst of a kernel's specialisations in one dtype and variant."""

    arch: str
    kernel: str
    dtype: str
    variant: str
    rows: str  # even: all matrices have rows of a multiple of 16 elements; else ragged
    specialisations: int
    registers: int
    spills: int
    shared: int
    programs: int  # per SM; 0 for AMD
    instructions: int
    notable: str = ""  # which of NOTABLE every one has

    @property
    def identity(self) -> tuple[str, ...]:
        return self[:5]


def tabulate(found: Iterable[tuple[Seen, Compiled | str]]) -> list[Row]:
    groups: dict[tuple[str, ...], dict[str, Compiled]] = collections.defaultdict(dict)
    for seen, compiled in found:
        if isinstance(compiled, str):
            continue
        launch = seen.launch
        kernel = launch.function.__name__.strip("_").removesuffix("_kernel")
        if "w" in launch.source[0]:  # a tile kernel: whose products it takes
            kernel += " (library)" if launch.source[0]["w"] == "constexpr" else " (own)"
        rows = "even" if seen.matrices <= seen.wide.keys() else "ragged"
        for case in seen.cases:
            variant = "256 words" if case.kind == "tile" else case.variant
            key = (launch.arch, kernel, case.dtype, variant, rows)
            groups[key][launch.key] = compiled
    table = []
    for key, group in groups.items():
        all_of_it = group.values()
        programs = [
            programs_per_sm(key[0], x.registers, x.warps, x.shared)
            for x in all_of_it
            if ARCHITECTURES[key[0]].warps
        ]
        row = Row(
            *key,
            len(group),
            max(x.registers for x in all_of_it),
            max(x.spills for x in all_of_it),
            max(x.shared for x in all_of_it),
            min(programs, default=0),
            max(sum(x.operations.values()) for x in all_of_it),
            " ".join(op for op in NOTABLE if all(x.operations.get(op) for x in all_of_it)),
        )
        table.append(row)
    order = list(ARCHITECTURES)
    return sorted(table, key=lambda row: (order.index(row.arch), row.identity))


def compare(rows: list[Row], table: Iterable[Row], *, complete: bool) -> list[str]:
    """What fell behind the committed table; `complete`: every case of these architectures was run."""
    arches, now = {row.arch for row in rows}, {row.identity for row in rows}
    before = {row.identity: row for row in table if row.arch in arches}
    wrong = []
    for row in rows:
        old, name = before.get(row.identity), " ".join(row.identity)
        if old is None:
            wrong.append(f"{name}: not in the table (make dry-run WRITE=1)")
        elif row.programs < old.programs:
            fall = f"{old.programs} to {row.programs}"
            wrong.append(f"{name}: from {fall} programs per SM ({row.registers} registers)")
    for identity in before if complete else ():
        if identity not in now:
            wrong.append(f"{' '.join(identity)}: in the table, and no longer launched")
    return wrong


def table_path(version: str = triton.__version__) -> Path:
    return RESULTS / f"dry_run-triton{version}.csv"


def read_table(path: Path) -> list[Row]:
    return [Row(**row) for row in read_rows(path)]


def write_table(rows: list[Row], path: Path) -> None:
    """Write the rows of the architectures that were run, and keep those of the others."""
    run, order = {row.arch for row in rows}, list(ARCHITECTURES)
    kept = [row for row in read_table(path) if row.arch not in run]
    ranked = sorted([*kept, *rows], key=lambda row: order.index(row.arch))
    write_rows(path, [row._asdict() for row in ranked])


def docs_table(version: str, rows: list[Row]) -> str:
    """One line per kernel, dtype and variant, one column per architecture."""
    variants = ("plain", "all", "nested", "lsif")
    shown = [row for row in rows if row.rows == "even" and row.variant in variants]
    shown = [row for row in shown if row.dtype != "float16"]  # the same code as bfloat16
    arches = [arch for arch in ARCHITECTURES if any(row.arch == arch for row in shown)]
    cells = {row.identity: row for row in shown}
    lines = []
    for key in dict.fromkeys(row.identity[1:] for row in shown):
        text = []
        for arch in arches:
            row = cells.get((arch, *key))
            programs = f" / {row.programs}" if row and row.programs else ""
            text.append(f"{row.registers} / {row.shared / 1024:.3g}{programs}" if row else "")
        lines.append([*key[:3], *text])
    return (
        f"Triton {version}:\n\n{markdown('|'.join(['kernel', 'dtype', 'variant', *arches]), lines)}"
    )


def docs_with_tables() -> str:
    """docs/kernels.md with the tables of the oldest and of the newest Triton between its markers."""
    found = {
        path.stem.partition("-triton")[2]: path for path in RESULTS.glob("dry_run-triton*.csv")
    }
    versions = sorted(found, key=lambda x: [int(n) for n in x.split(".")])
    tables = [
        docs_table(x, read_table(found[x])) for x in dict.fromkeys((versions[0], versions[-1]))
    ]
    head, begin, rest = DOCS.read_text().partition("<!-- resources: begin -->\n")
    _, end, tail = rest.partition("\n<!-- resources: end -->")
    return head + begin + "\n".join(tables).rstrip() + end + tail
