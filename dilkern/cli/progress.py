"""What follows a run while it trains: the table and bar on the terminal, metrics as they come."""

from __future__ import annotations

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


def _shown(reference: bool) -> tuple[tuple[str, str, str], ...]:
    """Return the columns of the table on the terminal: metric, heading, format."""
    side = ("log_ratio/{}_avg", "+9.4f") if reference else ("logps/{}_avg", "9.3f")
    return (
        ("loss", "loss", "9.4f"),
        ("rewards/margins", "margin", "+9.4f"),
        ("rewards/accuracies", "accuracy", "9.2f"),
        *((side[0].format(name), name, side[1]) for name in ("chosen", "rejected")),
    )


class Bar(ProgressCallback):  # type: ignore[misc]
    """The trainer's bar, without the logs that it writes as dicts."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


class ProgressTable(TrainerCallback):  # type: ignore[misc]
    """One row per log: what a person follows a run by.

    Args:
        choose_steps: log 20 times or more, which takes 20 steps, and at least every 10 steps.
        reference: show log-ratios to it; without one, log-probs.
    """

    def __init__(self, choose_steps: bool, reference: bool) -> None:
        self.choose_steps, self.reference = choose_steps, reference
        self.shown = _shown(reference)
        self.started = self.seconds = 0.0
        self.tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.choose_steps:
            state.logging_steps = max(1, min(10, state.max_steps // 20))
        if state.is_world_process_zero:
            what = "log-ratios to the reference" if self.reference else "log-probs"
            print(f"\nchosen, rejected: {what} per token, nats\nmargin: as the loss sees it")
            headings = "".join(f"{heading:>9}" for _, heading, _ in self.shown)
            print(f"{'step':>9}{headings}{'tokens/s':>9}{'MiB':>8}", flush=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self.started

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        prefix = "eval_" if "eval_loss" in logs else ""
        if not state.is_world_process_zero or prefix + "loss" not in logs:
            return
        known = {name for name, *_ in self.shown if prefix + name in logs}
        if logs.get(f"{prefix}rewards/margins") == 0:  # policy and reference are one
            known.discard("rewards/accuracies")
        cells = [
            f"{logs[prefix + name]:>{form}}" if name in known else f"{'-':>9}"
            for name, _, form in self.shown
        ]
        if prefix:
            row = f"{'held out':>9}{''.join(cells)}"
        else:
            rate = (logs["num_tokens"] - self.tokens) / max(self.seconds, 1e-9)
            self.tokens, self.seconds = logs["num_tokens"], 0.0
            row = f"{state.global_step:>9}{''.join(cells)}{rate:>9.0f}{peak_memory_mib():>8.0f}"
        tqdm.write(row)
        sys.stdout.flush()


def peak_memory_mib() -> float:
    """Peak memory of this process: of the GPU where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
