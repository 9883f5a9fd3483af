"""`dilkern report`: what runs show, in words and in a picture."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import NoReturn

from dilkern.cli.findings import findings, last
from dilkern.cli.picture import draw
from dilkern.cli.run_folder import Run, read_run
from dilkern.validation import reject

_GUIDE = "docs/guide.md"
_FIGURES = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "log_ratio/chosen_avg": "log-ratio per token of chosen",
    "log_ratio/rejected_avg": "of rejected",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        reject("`dilkern report` cannot read its options", message, "See dilkern report --help.")


def _setting(run: Run) -> str:
    rates = run.points("learning_rate")[1]
    words = [f"{name} {run.summary[name]}" for name in ("loss", "model") if name in run.summary]
    rate = f"learning rate up to {max(rates):.3g}" if rates else "learning rate not logged"
    return ", ".join([*words, f"{run.steps} steps", rate])


def _figures(run: Run, prefix: str) -> str:
    ends = {text: last(run, prefix + name) for name, text in _FIGURES.items()}
    return ", ".join(f"{text} {value:.3g}" for text, value in ends.items() if value is not None)


def _lines(run: Run) -> list[str]:
    """Return what is said of a run."""
    lines = [f"  {_setting(run)}", f"  at the end: {_figures(run, '')}"]
    if run.points("eval_loss")[0]:
        lines.append(f"  held out: {_figures(run, 'eval_')}")
    found = findings(run)
    lines += [f"- {f.what}: {f.numbers}. Read {_GUIDE}#{f.anchor}" for f in found]
    return lines if found else [*lines, "- nothing looks wrong"]


def run(words: list[str]) -> None:
    """Print what runs show, then draw them over each other."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--output", type=Path, default=Path("report.png"))
    asked = parser.parse_args(words)
    runs = [read_run(folder) for folder in asked.runs]
    for each in runs:
        print(each.name)
        for line in _lines(each):
            print(textwrap.fill(line, 88, subsequent_indent="  ", break_long_words=False))
        print()
    try:
        draw(runs, asked.output, runs[0].name if len(runs) == 1 else "")
    except (OSError, ValueError) as error:
        reject("--output must be a picture file that can be written", str(error), "Name a .png.")
    print(f"picture: {asked.output}")
