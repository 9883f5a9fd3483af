"""What is wrong with a compiled launch, and what fell behind the committed table of all of them."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import triton

from benchmarks.environment import RESULTS, insert, markdown, read_rows, write_rows
from benchmarks.real_models import ROOT
from tools.dry_run.capture import ARCHITECTURES, Seen
from tools.dry_run.read import Compiled

DOCS = ROOT / "docs" / "kernels.md"
MARKERS = ("<!-- resources: begin -->", "<!-- resources: end -->")
NOTABLE = ("HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "UTMALDG", "v_mfma")


def programs_per_sm(arch: str, compiled: Compiled) -> int:
    """How many programs of a kernel share one SM; 0 if not even one fits, and for AMD."""
    limit, warps = ARCHITECTURES[arch], compiled.warps
    per_warp = -(-compiled.registers * 32 // 256) * 256  # registers are handed out in 256 per warp
    by_registers = 16384 // per_warp * 4 // warps  # by each of the SM's four parts
    per_program = -(-(compiled.shared + 1024) // 128) * 128
    by_shared = (limit.shared_kib << 10) // per_program
    return min(limit.programs, limit.warps // warps, by_registers, by_shared)


def judge(seen: Seen, compiled: Compiled | str) -> list[str]:
    """What is wrong with one specialisation."""
    if isinstance(compiled, str):
        return [compiled]
    arch = seen.launch.arch
    nvidia = ARCHITECTURES[arch].target.backend == "cuda"
    wrong = [f"ptxas: {line}" for line in compiled.warnings]
    if compiled.spills:
        wrong.append(f"{compiled.spills} bytes of spills")
    if nvidia and not programs_per_sm(arch, compiled):
        wrong.append(f"{compiled.shared} bytes of shared memory do not fit")
    if compiled.product in ("bf16", "f16"):
        missing = sorted(
            x for x in ARCHITECTURES[arch].instructions if not compiled.operations.get(x)
        )
        wrong += [f"its matrix product has no {x}" for x in missing]
    if nvidia:
        for name in sorted(seen.wide):
            element = 4 if seen.launch.pointers[name] == "fp32" else 2
            for access, count in sorted(compiled.accesses.get(name, {}).items()):
                if access.bytes <= element:
                    what = f"{name}: {count} x {access.kind} of {access.bytes} bytes"
                    wrong.append(f"{what}, with even rows in {seen.wide[name]}")
        if "?" in compiled.accesses:
            wrong.append(f"addresses of unknown origin: {compiled.accesses['?']}")
    return wrong


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
        every = group.values()
        row = Row(
            *key,
            specialisations=len(every),
            registers=max(x.registers for x in every),
            spills=max(x.spills for x in every),
            shared=max(x.shared for x in every),
            programs=min(programs_per_sm(key[0], x) for x in every),
            instructions=max(sum(x.operations.values()) for x in every),
            notable=" ".join(op for op in NOTABLE if all(x.operations.get(op) for x in every)),
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
    table = markdown("|".join(["kernel", "dtype", "variant", *arches]), lines)
    return f"Triton {version}:\n\n{table}"


def docs_with_tables() -> str:
    """docs/kernels.md with the tables of the oldest and of the newest Triton between its markers."""
    found = {
        path.stem.partition("-triton")[2]: path for path in RESULTS.glob("dry_run-triton*.csv")
    }
    oldest, *_, newest = sorted(found, key=lambda x: [int(n) for n in x.split(".")]) * 2
    tables = [docs_table(x, read_table(found[x])) for x in dict.fromkeys((oldest, newest))]
    return insert(DOCS.read_text(), "\n".join(tables), MARKERS)
