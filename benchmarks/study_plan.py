"""What a study does: its methods and their settings, its files, and the figures of a run.

A run is one small file, written when it is finished; what is there is not done again. Several
processes may work on one study: a run that another one has in hand is left to it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.real_models import HH, INSTRUCTIONS, appearing, cache
from dilkern.losses import LOSSES
from dilkern.objective import Objective
from dilkern.validation import reject

RATES = (2e-4, 5e-4, 1e-3, 2e-3)
TWO_RATES = (2e-4, 1e-3)


@dataclass(frozen=True)
class Method:
    """A loss of the registry as it is compared, and the settings to choose from.

    Args:
        title: its name in tables.
        loss: its name in `dilkern.LOSSES`.
        knob: what is chosen beside the learning rate: "beta", or a parameter of the loss; or "".
        values: of the knob, two for as many runs as a method without one has.
        options: of the loss, fixed.
    """

    title: str
    loss: str
    knob: str = ""
    values: tuple[float, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def points(self) -> list[dict[str, Any]]:
        """The grid: options of `DILConfig`."""
        if not self.knob:
            return [{"learning_rate": rate, **self.options} for rate in RATES]
        found = []
        for rate in TWO_RATES:
            for value in self.values:
                knob = {"beta": value} if self.knob == "beta" else {}
                params = {} if knob else {self.knob: value}
                params |= self.options.get("loss_params", {})
                more = {"loss_params": params} if params else {}
                found.append({"learning_rate": rate, **self.options, **knob, **more})
        return found

    @property
    def per_token(self) -> bool:
        return self.options.get("length_normalize", LOSSES[self.loss].length_normalize)


# In the order in which they run: what the paper's claim is about comes first.
METHODS = {
    "lsif": Method("DIL, LSIF", "lsif"),
    "dpo": Method("DPO", "dpo", "beta", (0.1, 0.3)),
    "simpo": Method("SimPO", "simpo", "beta", (2.0, 10.0)),
    "sft": Method("SFT", "sft"),
    "ukl": Method("DIL, UKL", "ukl"),
    "bce": Method("DIL, BCE", "bce"),
    "bpo": Method(
        "BPO, power -1/2",
        "power",
        "beta",
        (0.1, 0.3),
        {"pairing": "pairwise", "length_normalize": False, "loss_params": {"lam": -0.5}},
    ),
    "ipo": Method("IPO", "ipo", "tau", (0.1, 0.5)),
    "kto": Method("KTO", "kto", "beta", (0.1, 0.3)),
    "cpo": Method("CPO", "cpo", "beta", (0.1, 0.3)),
    "slic": Method("SLiC-HF", "slic", "delta", (1.0, 10.0)),
    "fdpo": Method("f-DPO, JSD", "fdpo_jsd", "beta", (0.1, 0.3)),
    # Not of the paper: what taking f as a sum, or per token, does to one loss of either kind.
    "lsif_sum": Method("LSIF, sums", "lsif", "beta", (0.1, 1.0), {"length_normalize": False}),
    "dpo_norm": Method("DPO, per token", "dpo_norm", "beta", (2.0, 10.0)),
}
DIL = ("lsif", "ukl", "bce")


@dataclass(frozen=True)
class Setup:
    """All that the runs of a study have in common."""

    model: str = "smollm2"  # or a folder with a model and its tokenizer
    data: str = str(HH)
    other: str = str(INSTRUCTIONS)
    pairs: int = 256  # to train on, one epoch
    batch: int = 4  # pairs per step
    validation: int = 104
    test: int = 192
    max_length: int = 128  # of a sequence drawn from `data`, tokens
    texts: int = 16  # of the other kind
    text_length: int = 256
    prompts: int = 24  # to sample answers to
    answer: int = 128  # tokens of a sampled answer
    lora_r: int = 16
    lora_layers: int = 10  # the last ones: backward stops there; 0: all
    device: str = "cpu"
    dtype: str = "bfloat16"

    @property
    def key(self) -> str:
        """A digest of everything but where files lie."""
        told = asdict(self) | {"data": Path(self.data).name, "other": Path(self.other).name}
        told["model"] = Path(self.model).name
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:8]


class Run(NamedTuple):
    """One training: a point of a method's grid, or its chosen point with a seed of its own."""

    method: str
    kind: str  # grid or final
    number: int  # of the point, or the seed

    @property
    def name(self) -> str:
        return f"{self.method}-{self.kind}-{self.number}"

    @property
    def seed(self) -> int:
        return self.number if self.kind == "final" else 0


class Study:
    """The files of a study, and what there is to do."""

    def __init__(self, setup: Setup, folder: Path, methods: list[str], seeds: int) -> None:
        self.setup, self.folder, self.methods, self.seeds = setup, folder, methods, seeds
        self.drawn: str | None = None  # digest of the pairs of all its runs
        about = folder / "setup.json"
        told = asdict(setup) | {"data": Path(setup.data).name, "other": Path(setup.other).name}
        if not about.exists():
            with appearing(about) as file:
                file.write_text(json.dumps(told, indent=1) + "\n")
        elif json.loads(about.read_text()) != json.loads(json.dumps(told)):
            reject(f"{folder} must be of this setup", "another one", "Pass another --out.")

    def runs(self) -> list[Run]:
        """All runs, method by method, so that what is finished can be compared."""
        return [
            run
            for method in self.methods
            for run in (
                *(Run(method, "grid", n) for n in range(len(METHODS[method].points()))),
                *(Run(method, "final", seed) for seed in range(1, self.seeds + 1)),
            )
        ]

    def path(self, run: Run) -> Path:
        return self.folder / f"{run.name}.json"

    def read(self, run: Run) -> dict[str, Any] | None:
        """What is known of a run; None if it is not finished.

        Raises:
            ValueError: a file of other settings than this code has.
        """
        path = self.path(run)
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text())
        points = json.loads(json.dumps(METHODS[run.method].points()))
        if found["loss"] != METHODS[run.method].loss or found["options"] not in points:
            reject(f"{path} must be of the grid of {run.method}", "other settings", "Remove it.")
        self.check_drawn(found["drawn"])
        return found

    def check_drawn(self, digest: str) -> None:
        """All runs of a study have the same pairs, however they are drawn by now.

        Raises:
            ValueError: other ones than the runs before.
        """
        self.drawn = self.drawn or digest
        if digest != self.drawn:
            rule, remedy = (
                f"all runs of {self.folder} must have the same pairs",
                "Pass another --out.",
            )
            reject(rule, f"those of digest {digest} and of {self.drawn}", remedy)

    def grid(self, method: str) -> list[dict[str, Any]]:
        found = [self.read(run) for run in self.runs() if run[:2] == (method, "grid")]
        return [run for run in found if run is not None]

    def finals(self, method: str) -> list[dict[str, Any]]:
        found = [self.read(run) for run in self.runs() if run[:2] == (method, "final")]
        return [run for run in found if run is not None]

    def chosen(self, method: str) -> dict[str, Any] | None:
        """The grid's run with the least criterion, once all are there."""
        grid = self.grid(method)
        if len(grid) < len(METHODS[method].points()):
            return None
        return min(grid, key=lambda run: criterion(method, run))

    def options(self, run: Run) -> dict[str, Any] | None:
        """The settings of a run; None for a final one whose grid is not finished."""
        if run.kind == "grid":
            return METHODS[run.method].points()[run.number]
        best = self.chosen(run.method)
        return None if best is None else best["options"]

    def work(self, do: Callable[[Study, Run, dict[str, Any]], dict[str, Any]]) -> list[Run]:
        """Do what is missing and not in other hands; return what is still missing."""
        for run in self.runs():
            self.read(run)
        moved = True
        while moved:
            moved = False
            for run in self.runs():
                options = None if self.path(run).exists() else self.options(run)
                if options is None:
                    continue
                with claimed(f"{self.folder.name}-{run.name}") as mine:
                    if not mine or self.path(run).exists():
                        continue
                    found = do(self, run, options)
                    with appearing(self.path(run)) as file:
                        file.write_text(json.dumps(found) + "\n")
                    moved = True
        return [run for run in self.runs() if not self.path(run).exists()]


@contextmanager
def claimed(name: str, wait: bool = False) -> Iterator[bool]:
    """Hold a lock against other processes; it goes with the process, however that ends."""
    path = cache() / "study-locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


# What is seen in a run


def columns(run: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen, rejected, of_chosen, of_rejected = torch.tensor(run["change"]).double().unbind(1)
    return chosen, rejected, of_chosen, of_rejected


def log_loss(margins: Tensor) -> float:
    """Mean of -log s(a m) over pairs at its best scale a >= 0: log 2 if margins say nothing."""
    scales = torch.logspace(-4, 3, 701, dtype=torch.float64) / margins.abs().mean().clamp(min=1e-12)
    losses = F.softplus(-scales.unsqueeze(1) * margins).mean(1)
    return min(math.log(2), float(losses.min()))


def figures(method: str, run: dict[str, Any]) -> dict[str, float]:
    """Figures of a run from its pairs; "own": log-ratios as the method's loss takes them."""
    chosen, rejected, of_chosen, of_rejected = columns(run)
    margins = {False: chosen - rejected, True: chosen / of_chosen - rejected / of_rejected}
    per_token = METHODS[method].per_token
    entry = LOSSES[METHODS[method].loss]
    beta = run["options"].get("beta") or Objective(entry).beta
    f = torch.cat([chosen, rejected]) / (torch.cat([of_chosen, of_rejected]) if per_token else 1)
    accuracy = {key: float((m > 0).double().mean()) for key, m in margins.items()}
    found = {
        "accuracy": accuracy[per_token],
        "accuracy_sum": accuracy[False],
        "accuracy_per_token": accuracy[True],
        "log_loss": log_loss(margins[per_token]),
        "margin": float(margins[True].mean()),
        "chosen": float((chosen / of_chosen).mean()),
        "rejected": float((rejected / of_rejected).mean()),
        "nll": run["nll"],
    }
    if entry.reference:
        found["largest"] = float((beta * f).abs().max())
    if "kl" in run:
        found |= {
            "kl": run["kl"],
            "perplexity": run["perplexity"],
            "forgotten": math.log(run["perplexity"] / run["perplexity_before"]),
            "length": mean(run["lengths"]),
        }
    return found


def criterion(method: str, run: dict[str, Any]) -> float:
    """What a setting is chosen by, on validation pairs: less is better."""
    found = figures(method, run)
    return found["nll" if LOSSES[METHODS[method].loss].pairing == "none" else "log_loss"]
