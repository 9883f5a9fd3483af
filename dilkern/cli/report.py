"""What a run shows and leaves beside the model: table, metrics files, plot, whole checkpoints."""

from __future__ import annotations

import csv
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from dilkern.validation import reject

# What transformers says of runs that are in order: TRL sets the model's special tokens by the
# tokenizer's, and cuts what is too long after it has counted.
_IN_ORDER = ("The tokenizer has new PAD/BOS/EOS tokens", "Token indices sequence length is longer")


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_IN_ORDER)


def calm_libraries(bars: bool) -> None:
    """Show or hide the progress bars of the libraries, and keep back what is no news."""
    import datasets
    from transformers.utils import logging as transformers_logging

    for library in (datasets, transformers_logging):
        (library.enable_progress_bar if bars else library.disable_progress_bar)()
    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(_is_news)


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


# Left to right in metrics.csv; a metric that is not named here follows, by its name.
_COLUMNS = (
    "step", "epoch", "loss", "learning_rate", "grad_norm", "rewards/chosen", "rewards/rejected",
    "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "logps/chosen_avg",
    "logps/rejected_avg",
)  # fmt: skip
# Of the table on the terminal: metric, heading, format.
_SHOWN = (
    ("loss", "loss", "9.4f"),
    ("rewards/margins", "margin", "+9.4f"),
    ("rewards/accuracies", "accuracy", "9.2f"),
    ("logps/chosen_avg", "chosen", "9.3f"),
    ("logps/rejected_avg", "rejected", "9.3f"),
)


class Bar(ProgressCallback):  # type: ignore[misc]
    """The trainer's bar, without the logs that it writes as dicts."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


class ProgressTable(TrainerCallback):  # type: ignore[misc]
    """One row per log: what a person follows a run by.

    Args:
        choose_steps: log about 20 times, but at least every 10 steps.
    """

    def __init__(self, choose_steps: bool = False) -> None:
        self.choose_steps = choose_steps
        self.started = self.seconds = 0.0
        self.tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.choose_steps:
            state.logging_steps = max(1, min(10, state.max_steps // 20))
        if state.is_world_process_zero:
            print("\nchosen, rejected: log-probs per token; margin: of beta x log-ratio")
            headings = "".join(f"{heading:>9}" for _, heading, _ in _SHOWN)
            print(f"{'step':>9}{headings}{'tokens/s':>9}{'MiB':>8}", flush=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self.started

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        prefix = "eval_" if "eval_loss" in logs else ""
        if not state.is_world_process_zero or prefix + "loss" not in logs:
            return
        cells = [
            f"{logs[prefix + name]:>{form}}" if prefix + name in logs else f"{'-':>9}"
            for name, _, form in _SHOWN
        ]
        if prefix:
            row = f"{'held out':>9}{''.join(cells)}"
        else:
            rate = (logs["num_tokens"] - self.tokens) / max(self.seconds, 1e-9)
            self.tokens, self.seconds = logs["num_tokens"], 0.0
            row = f"{state.global_step:>9}{''.join(cells)}{rate:>9.0f}{peak_memory_mib():>8.0f}"
        tqdm.write(row)
        sys.stdout.flush()


def write_csv(history: list[dict[str, Any]], path: Path) -> None:
    """Write the training steps of a log history as a table, one row per log."""
    rows = [entry for entry in history if "loss" in entry]
    found = {name for row in rows for name in row}
    columns = [name for name in _COLUMNS if name in found]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *sorted(found - {*columns})])
        writer.writeheader()
        writer.writerows(rows)


def plot_dynamics(
    history: list[dict[str, Any]], path: Path, title: str = "", *, reference: bool = True
) -> None:
    """Draw rewards of chosen and rejected, their margin, and the loss over the steps.

    Rewards are beta times the log-ratio to the reference, so 0 is where training starts: log-probs
    themselves move with the batch more than with the training.

    Args:
        history: `trainer.state.log_history`.
        path: where the picture goes; the suffix chooses the format.
        title: heading.
        reference: whether there is one; without it rewards are beta times log-probs.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)  # no display, and pyplot's global state is left alone
    panels = figure.subplots(1, 3)
    for name, panel, label, colour in (
        ("rewards/chosen", 0, "chosen", "tab:blue"),
        ("rewards/rejected", 0, "rejected", "tab:red"),
        ("rewards/margins", 1, "margin", "tab:green"),
        ("loss", 2, "loss", "black"),
    ):
        for prefix, style, where in (("", ".-", "train"), ("eval_", "o--", "held out")):
            points = [(e["step"], e[prefix + name]) for e in history if prefix + name in e]
            if points:
                steps, values = zip(*points)
                panels[panel].plot(steps, values, style, label=f"{label}, {where}", color=colour)
    rewards = "beta x log-ratio to the reference" if reference else "beta x log-prob"
    for panel, text in zip(panels, (rewards, "margin", "loss")):
        panel.set_xlabel("step")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_ylabel(text)
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend(fontsize=8)
    for panel in panels[0 if reference else 1 : 2]:
        panel.axhline(0, color="gray", linewidth=1)
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

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
