"""What a run leaves in its folder, written and read: history, table, summary, checkpoints."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

from dilkern.validation import reject

History = list[dict[str, Any]]

_SIDES = ("chosen", "rejected")
# Of metrics.csv, left to right, in every run and also after a resume. metrics.jsonl holds whatever else
# was logged: times, and num_tokens, which TRL counts anew after a resume. `split` is train or eval.
COLUMNS = (
    "step", "split", "epoch", "loss", "learning_rate", "grad_norm",
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
    *(f"log_ratio/{side}_{figure}" for side in _SIDES for figure in ("avg", "std")),
    *(f"logps/{side}{figure}" for side in _SIDES for figure in ("", "_avg")),
    *(f"length/{side}" for side in _SIDES), "length/margin_slope", "length/margin_corr",
    *(f"clip_frac/{side}" for side in _SIDES), "loss/chosen", "loss/rejected", "loss/pair",
    "kl", "aux_loss",
)  # fmt: skip


def split_of(entry: dict[str, Any]) -> str | None:
    """Return whether an entry of a history is of training or of held-out pairs; None for neither."""
    return "train" if "loss" in entry else "eval" if "eval_loss" in entry else None


def write_csv(history: History, path: Path) -> None:
    """Write a history as a table of fixed columns, one row per log of training or evaluation."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for entry in history:
            if split := split_of(entry):
                row = {name.removeprefix("eval_"): value for name, value in entry.items()}
                writer.writerow({**row, "split": split})


def _numbers(entry: dict[str, Any]) -> dict[str, Any]:
    """Return what an entry has to be drawn, with its step; other trainers log words too."""
    numbers = {name: value for name, value in entry.items() if isinstance(value, (int, float))}
    if split_of(numbers) != split_of(entry):
        raise TypeError(f"a loss that is no number: {entry}")
    return {**numbers, "step": int(entry["step"])}


def _read_csv(path: Path) -> History:
    history = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            prefix = "eval_" if row.pop("split", "train") == "eval" else ""
            values = {name: float(text) for name, text in row.items() if text}
            entry = {
                name if name in ("step", "epoch") else prefix + name: value
                for name, value in values.items()
            }
            history.append({**entry, "step": int(entry["step"])})
    return history


def _read_jsonl(path: Path) -> History:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _read_state(path: Path) -> History:
    history: History = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    return history


def _numbered(folder: Path) -> list[Path]:
    """Return the checkpoint-* folders, the newest first."""
    found = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    ]
    return [path for _, path in sorted(found, reverse=True)]


class Run(NamedTuple):
    """A run as its folder tells it."""

    name: str
    history: History
    summary: dict[str, Any]  # of `dilkern train`; empty for a trainer of one's own

    def points(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps and values of a metric; held-out ones begin with eval_."""
        found = [(entry["step"], entry[name]) for entry in self.history if name in entry]
        return [step for step, _ in found], [value for _, value in found]

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        return max(int(entry["step"]) for entry in self.history)


def read_run(folder: Path) -> Run:
    """Read the metrics of a run: of `dilkern train`, or of any trainer that saved its state.

    Raises:
        ValueError: the folder holds none, or what it holds cannot be read.
    """
    files = [(folder / "metrics.jsonl", _read_jsonl), (folder / "trainer_state.json", _read_state)]
    files += [(path / "trainer_state.json", _read_state) for path in _numbered(folder)]
    files += [(folder / "metrics.csv", _read_csv)]
    there = [(path, read) for path, read in files if path.is_file()]
    if not there:
        reject(
            "RUN must be the output folder of a training run",
            f"{folder}, "
            + (
                "without metrics.jsonl, metrics.csv or trainer_state.json"
                if folder.is_dir()
                else "which is no folder"
            ),
            "Name the --output-dir of `dilkern train`; a trainer of your own writes its history by "
            "trainer.save_state().",
        )
    path, read = there[0]
    try:
        history = [_numbers(entry) for entry in read(path) if split_of(entry)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reject(f"{path} must be a history of metrics", repr(error), "Write it anew by --resume.")
    if not any(split_of(entry) == "train" for entry in history):
        reject("a run must have logged a step", f"{path} without one", "Lower --logging-steps.")
    return Run(str(folder), history, _summary(folder / "summary.json"))


def _summary(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        reject(f"{path} must be a JSON object", repr(error), "Delete it, or write it anew.")


def _whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete: the trainer writes its state last."""
    from safetensors import SafetensorError, safe_open

    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        weights = list(checkpoint.glob("*.safetensors"))
        for file in weights:
            with safe_open(file, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return bool(weights)


def latest_checkpoint(output_dir: Path) -> Path:
    """Return the newest complete checkpoint-* folder; half-written ones are passed over.

    Raises:
        ValueError: there is none.
    """
    found = _numbered(output_dir)
    for folder in found:
        if _whole(folder):
            return folder
    reject(
        "--resume needs a complete checkpoint in the output directory",
        f"{len(found)} incomplete ones in {output_dir}" if found else f"none in {output_dir}",
        "Drop --resume to start anew.",
    )
