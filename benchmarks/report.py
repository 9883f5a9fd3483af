"""Tables, pictures and goals from result files: `python -m benchmarks.report draw FILE.csv`.

Everything is drawn from the files; refused, unsupported and out-of-memory rows stay in the tables with
their reason, and rows in which dilkern loses stay too. `goals FILE.csv` says of each of the project's
goals: met, missed, or not measured; nothing is left out.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.environment import read_rows
from benchmarks.goals import goals_table, judge
from benchmarks.pictures import pictures
from benchmarks.tables import text_of

app = typer.Typer(add_completion=False, help="Tables, pictures and goals from result files.")


def draw_file(path: Path) -> list[Path]:
    """Write the tables and every picture of one result file beside it; return the paths."""
    rows = read_rows(path)
    made = [path.with_name(f"{path.stem}.md")]
    made[0].write_text(text_of(path, rows))
    for name, figure in pictures(rows):
        made.append(path.with_name(f"{path.stem}{name}.png"))
        figure.savefig(made[-1], dpi=130)
    return made


Results = Annotated[list[Path], typer.Argument(help="result files (.csv)")]


@app.command()
def draw(results: Results) -> None:
    """Draw result files and write their tables, beside them."""
    for path in results:
        print(*draw_file(path), sep="\n")


@app.command()
def goals(
    results: Results,
    out: Annotated[Path | None, typer.Option(help="Markdown file to write")] = None,
    strict: Annotated[bool, typer.Option(help="exit status 1 if a goal is missed")] = False,
) -> None:
    """Judge the rows and print the table."""
    verdicts = list(judge([row for path in results for row in read_rows(path)]))
    text = goals_table(verdicts)
    if out is not None:
        out.write_text(text)
    print(text)
    sys.exit(strict and any(v.met is False for v in verdicts))


if __name__ == "__main__":
    app()
