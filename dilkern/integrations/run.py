"""What a training run leaves beside the model: metrics files, the dynamics plot, whole checkpoints."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from dilkern.validation import reject


class MetricsFile(TrainerCallback):  # type: ignore[misc]
    """Append every log of the trainer to a JSON-lines file as it comes.

    Args:
        path: the file; a resumed run rewrites it from the history in the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            lines = [json.dumps(entry) + "\n" for entry in state.log_history]
            self.path.write_text("".join(lines), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.log_history:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


def write_csv(history: list[dict[str, Any]], path: Path) -> None:
    """Write the training steps of a log history as a table, one row per log."""
    rows = [entry for entry in history if "loss" in entry]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def plot_dynamics(history: list[dict[str, Any]], path: Path, title: str = "") -> None:
    """Draw chosen and rejected log-probs, reward margin and loss over the steps.

    Args:
        history: `trainer.state.log_history`.
        path: where the picture goes; the suffix chooses the format.
        title: heading.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)  # no display, and pyplot's global state is left alone
    panels = figure.subplots(1, 3)
    series = (
        ("logps/chosen_avg", 0, "chosen", "tab:blue"),
        ("logps/rejected_avg", 0, "rejected", "tab:red"),
        ("rewards/margins", 1, "margin", "tab:green"),
        ("loss", 2, "loss", "black"),
    )
    for name, panel, label, colour in series:
        for prefix, style in (("", "-"), ("eval_", "o--")):
            points = [(e["step"], e[prefix + name]) for e in history if prefix + name in e]
            if points:
                where = "held out" if prefix else "train"
                steps, values = zip(*points)
                panels[panel].plot(steps, values, style, label=f"{label}, {where}", color=colour)
    for panel, text in zip(panels, ("log-prob per token (nats)", "reward margin", "loss")):
        panel.set_xlabel("step")
        panel.set_ylabel(text)
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


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
    found = [
        (int(folder.name.removeprefix("checkpoint-")), folder)
        for folder in output_dir.glob("checkpoint-*")
        if folder.name.removeprefix("checkpoint-").isdigit()
    ]
    for _, folder in sorted(found, reverse=True):
        if _whole(folder):
            return folder
    reject(
        "--resume needs a complete checkpoint in the output directory",
        f"{len(found)} incomplete ones in {output_dir}" if found else f"none in {output_dir}",
        "Drop --resume to start anew.",
    )


def peak_memory_mib() -> float:
    """Peak memory of this process: of the GPU where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
