"""The command: `python -m tools.dry_run`."""

from __future__ import annotations

import sys
from typing import Annotated

import triton
import typer

from tools.dry_run import judge
from tools.dry_run.capture import ARCHITECTURES, capture
from tools.dry_run.cases import cases
from tools.dry_run.judge import DOCS, Row, docs_with_tables
from tools.dry_run.read import compile_all


def dry_run(arch: str, *, quick: bool = False, kernel: str = "") -> tuple[list[Row], list[str]]:
    """Capture, compile and judge for one architecture; one kernel with all details."""
    seen, wrong = capture(arch, [case for case in cases() if case.quick or not quick])
    seen = [one for one in seen if kernel in one.launch.function.__name__]
    compiled = compile_all(one.launch for one in seen)
    found = sorted(zip(seen, compiled), key=lambda pair: pair[0].launch.function.__name__)
    for one, result in found:
        title = f"{arch} {one.launch.function.__name__}, {len(one.cases)} cases, as {one.cases[0]}"
        complaints = judge.judge(one, result)
        wrong += [f"{title}: {complaint}" for complaint in complaints]
        if kernel:
            print(title, result, sep="\n")
    return judge.tabulate(found), wrong


def main(
    arch: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(ARCHITECTURES)}")] = None,
    kernel: Annotated[str, typer.Option(help="only kernels so called, with all details")] = "",
    write: Annotated[bool, typer.Option(help="write the tables, compare nothing")] = False,
    docs: Annotated[bool, typer.Option(help="only put the tables in docs/kernels.md")] = False,
) -> None:
    """Capture, compile and judge every launch; exit status 1 if anything is wrong."""
    if docs:
        DOCS.write_text(docs_with_tables())
        return
    if unknown := set(arch or ()) - ARCHITECTURES.keys():
        raise typer.BadParameter(f"no architecture is called {', '.join(sorted(unknown))}")
    if write and kernel:
        raise typer.BadParameter("--write needs every kernel: leave out --kernel")
    path, total = judge.table_path(), 0
    if not write and not path.exists():
        print(f"no {path.name}: programs per SM are compared with nothing")
    for one in arch or ARCHITECTURES:
        rows, wrong = dry_run(one, kernel=kernel)
        if write:
            judge.write_table(rows, path)
        elif path.exists():
            wrong += judge.compare(rows, judge.read_table(path), complete=not kernel)
        for complaint in wrong:
            print(f"WRONG {complaint}")
        what = f"{one}, Triton {triton.__version__}"
        print(f"{what}: {len(rows)} rows, {len(wrong)} complaints", flush=True)
        total += len(wrong)
    if write:
        DOCS.write_text(docs_with_tables())
    sys.exit(total > 0)


if __name__ == "__main__":
    typer.run(main)
