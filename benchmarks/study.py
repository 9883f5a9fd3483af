"""The paper's comparison in small: `python -m benchmarks.study run`, then `... draw`.

One model, one set of human preference pairs, LoRA, every method of the paper's tables. Each method
has the same number of settings; the one that is best on validation pairs is trained anew with other
seeds and looked at on test pairs. docs/study.md says what is measured and how settings are chosen.

A run is one small file, written when it is finished; what is there is not done again. Several
processes may work on one study: a run that another one has in hand is left to it. Whatever is drawn
is drawn from the files, and says which are missing. The reference's log-probs are computed once, kept
in the cache ($DILKERN_CACHE), and given to every run as columns of its data.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks import pairs as drawing
from benchmarks.environment import RESULTS, describe, markdown
from benchmarks.real_models import HH, SOURCES, appearing, cache
from benchmarks.report import GREY, insert, on_any_page, panels
from dilkern.losses import LOSSES
from dilkern.validation import reject

app = typer.Typer(add_completion=False, help="The paper's comparison in small.")

MARKERS = ("<!-- study:begin -->", "<!-- study:end -->")
UNFINISHED = 75  # exit status: runs are left, in the hands of other processes
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
}
DIL = ("lsif", "ukl", "bce")


@dataclass(frozen=True)
class Setup:
    """All that the runs of a study have in common."""

    model: str = "smollm2"  # or a folder with a model and its tokenizer
    data: str = str(HH)
    other: str = str(HH.with_name("preferences_en_300.jsonl"))
    pairs: int = 128  # to train on, one epoch
    batch: int = 4  # pairs per step
    validation: int = 96
    test: int = 192
    max_length: int = 128  # of a sequence drawn from `data`, tokens
    texts: int = 16  # of the other kind
    text_length: int = 256
    prompts: int = 24  # to sample answers to
    answer: int = 128  # tokens of a sampled answer
    lora_r: int = 16
    device: str = "cpu"
    dtype: str = "float32"

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


# Data and reference

Pairs = list[dict[str, Any]]


def draw_data(setup: Setup) -> dict[str, Pairs]:
    """Test, validation and training pairs, and texts of another kind: seeded, whole ones.

    More training pairs leave test and validation as they are.
    """

    def draw(data: str, count: int, longest: int) -> Pairs:
        return drawing.draw_pairs(
            drawing.Setup(setup.model, data, pairs=count, steps=0, max_length=longest)
        )

    splits, start = {"other": draw(setup.other, setup.texts, setup.text_length)}, 0
    sizes = {"test": setup.test, "validation": setup.validation, "train": setup.pairs}
    found = draw(setup.data, sum(sizes.values()), setup.max_length)
    for name, size in sizes.items():
        splits[name] = found[start : start + size]
        start += size
    return splits


def make_trainer(
    setup: Setup, splits: dict[str, Pairs], evals: tuple[str, ...], out: str, **options: Any
) -> Any:
    """Our trainer around the model with an untrained adapter on all linear layers."""
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed

    from dilkern.integrations.trl import DILConfig, DILTrainer

    disable_progress_bars()
    steps = math.ceil(setup.pairs / setup.batch)
    args = DILConfig(
        out,
        use_cpu=setup.device == "cpu",
        bf16=setup.dtype == "bfloat16",
        shared_prompts=True,
        per_device_train_batch_size=setup.batch,
        per_device_eval_batch_size=8,
        max_length=None,
        num_train_epochs=1,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **options,
    )
    set_seed(args.seed)  # the adapter's weights
    folder = drawing.Setup(setup.model).folder
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, setup.dtype))
    trainer = DILTrainer(
        model=model.to(setup.device),
        args=args,
        processing_class=AutoTokenizer.from_pretrained(folder),
        train_dataset=Dataset.from_list(splits["train"]),
        eval_dataset={name: Dataset.from_list(splits[name]) for name in evals},
        peft_config=LoraConfig(r=setup.lora_r, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.remove_callback(PrinterCallback)
    for name, data in [("train", trainer.train_dataset), *trainer.eval_dataset.items()]:
        if len(data) != len(splits[name]):
            raise RuntimeError(f"the trainer left rows of {name} out")
    return trainer


@torch.no_grad()
def score(trainer: Any, name: str, sides: int = 2) -> list[Tensor]:
    """Summed log-probs and lengths, (P, 4): chosen, rejected, tokens of either; or of chosen (P, 2)."""
    from dilkern.integrations.transformers import compute_loss

    trainer.model.eval()
    parts = []
    for batch in trainer.get_eval_dataloader(name):
        columns = ("input_ids", "attention_mask", "completion_mask")
        inputs = {column: batch[column] for column in columns}
        counts = None
        if sides == 1:
            inputs = {column: value.chunk(2)[0] for column, value in inputs.items()}
            count = len(inputs["input_ids"])
            inputs["is_chosen"] = torch.ones(count, dtype=torch.bool, device=trainer.args.device)
            counts = (float(count), 1.0)  # none is rejected
        with trainer.compute_loss_context_manager():
            o = compute_loss(trainer.model, inputs, loss="sft", counts=counts, answers=sides)
        found = [o.chosen_logps, o.rejected_logps, o.chosen_lengths, o.rejected_lengths]
        parts.append(torch.stack(found[:: 3 - sides], 1).double().cpu())
    return torch.cat(parts)


def digest_of(splits: dict[str, Pairs]) -> str:
    return hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()[:12]


def references(setup: Setup, splits: dict[str, Pairs]) -> dict[str, Tensor]:
    """What `score` gives of the untrained model, by split: from the cache if it is there."""
    where = f"{Path(setup.model).name}-{setup.device}-{setup.dtype}-{digest_of(splits)}"
    kept = cache() / f"study-references-{where}.pt"
    with claimed(kept.name, wait=True):
        if not kept.exists():
            names = tuple(splits)
            with tempfile.TemporaryDirectory() as out:
                trainer = make_trainer(setup, splits, names, out, loss_type="simpo")
                with trainer.model.disable_adapter():
                    found = {name: score(trainer, name) for name in names}
            with appearing(kept) as file:
                torch.save(found, file)
    return torch.load(kept)


# One run


@torch.no_grad()
def sample(trainer: Any, setup: Setup, rows: Pairs) -> dict[str, Any]:
    """Answers drawn from the policy: their lengths, and its divergence from the reference on them.

    KL(policy | reference) is summed over the vocabulary at each drawn position, hence exact but for
    the drawing of the answers: its mean per token.
    """
    model, tokenizer = trainer.model.eval(), trainer.processing_class
    prompts = [
        row["prompt"]
        if isinstance(row["prompt"], str)
        else tokenizer.apply_chat_template(
            row["prompt"], tokenize=False, add_generation_prompt=True
        )
        for row in rows[: setup.prompts]
    ]
    torch.manual_seed(0)  # the same draws for all methods
    divergence, lengths = 0.0, []
    for start in range(0, len(prompts), 32):
        part = prompts[start : start + 32]
        batch = tokenizer(part, return_tensors="pt", padding=True, padding_side="left")
        batch = {name: batch[name].to(setup.device) for name in ("input_ids", "attention_mask")}
        with trainer.compute_loss_context_manager():
            drawn = model.generate(
                **batch,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=setup.answer,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        width = batch["input_ids"].shape[1]
        for row, mask in zip(drawn, batch["attention_mask"]):
            ended = (row[width:] == tokenizer.eos_token_id).nonzero()
            length = int(ended[0, 0]) + 1 if len(ended) else len(row) - width
            ids = row[width - int(mask.sum()) : width + length].unsqueeze(0)

            def logps(ids: Tensor = ids, length: int = length) -> Tensor:
                with trainer.compute_loss_context_manager():
                    logits = model(input_ids=ids, logits_to_keep=length + 1).logits
                return F.log_softmax(logits[0, :-1].float(), -1)

            policy = logps()
            with model.disable_adapter():
                divergence += float((policy.exp() * (policy - logps())).sum())
            lengths.append(length)
    return {"lengths": lengths, "kl": divergence / sum(lengths)}


def rounded(values: Any, digits: int = 4) -> Any:
    if isinstance(values, float):
        return round(values, digits)
    return [rounded(value, digits) for value in values] if isinstance(values, list) else values


def train(study: Study, run: Run, options: dict[str, Any]) -> dict[str, Any]:
    """Train once and look: on validation pairs for a point of the grid, on test ones at the end."""
    setup, entry = study.setup, LOSSES[METHODS[run.method].loss]
    splits = draw_data(setup)
    digest, known = digest_of(splits), references(setup, splits)
    study.check_drawn(digest)
    if not entry.baseline:  # KTO scores mismatched pairs, whose reference nobody knows beforehand
        for name, rows in splits.items():
            for row, (chosen, rejected, *_) in zip(rows, known[name].tolist()):
                row |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    evals = ("validation",) if run.kind == "grid" else ("test", "other")
    with tempfile.TemporaryDirectory() as out:
        trainer = make_trainer(
            setup, splits, evals, out, loss_type=entry.name, seed=run.seed, **options
        )
        wall, cpu = time.monotonic(), time.process_time()
        trainer.train()
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        found: dict[str, Any] = {
            "loss": entry.name,
            "options": options,
            "seed": run.seed,
            "setup": setup.key,
            "drawn": digest,
            "seconds": round(wall, 3),
            "cpu_seconds": round(cpu, 3),
            "curve": {
                column: rounded([float(step[column]) for step in steps], 5)
                for column in ("loss", "grad_norm")
            },
        }
        pairs = score(trainer, evals[0])
        # Per pair: change of chosen and of rejected log-probs, nats; tokens of either.
        change = torch.cat([pairs[:, :2] - known[evals[0]][:, :2], pairs[:, 2:]], 1)
        found["change"] = [[*rounded(c[:2]), *map(int, c[2:])] for c in change.tolist()]
        found["nll"] = float(-pairs[:, 0].sum() / pairs[:, 2].sum())
        if run.kind == "final":
            other, before = score(trainer, "other", sides=1).sum(0), known["other"].sum(0)
            found["perplexity"] = math.exp(-other[0] / other[1])
            found["perplexity_before"] = math.exp(-before[0] / before[2])
            found |= sample(trainer, setup, splits["test"])
    say = figures(run.method, found)
    told = ", ".join(f"{name} {value:.4g}" for name, value in say.items())
    print(f"{run.name} {options}: {wall:.0f} s ({cpu:.0f} s CPU); {told}", flush=True)
    return found


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


# Drawing


def settings(method: str, run: dict[str, Any]) -> str:
    """Learning rate and knob of a run, as tables show them."""
    options, knob = run["options"], METHODS[method].knob
    told = f"{options['learning_rate']:g}"
    if knob:
        told += f", {knob} {(options | options.get('loss_params', {}))[knob]:g}"
    return told


def spread(values: list[float], digits: int) -> str:
    """Mean and, over several seeds, half of the distance between the outermost."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"


FIGURES = {  # column of the table: (figure, digits)
    "accuracy": ("accuracy", 3),
    "of sums / per token": ("", 0),
    "margin per token": ("margin", 3),
    "change of chosen per token": ("chosen", 3),
    "of rejected": ("rejected", 3),
    "KL to reference per token": ("kl", 3),
    "perplexity of other text": ("perplexity", 2),
    "length of answers": ("length", 1),
}


def finals_table(study: Study) -> str:
    lines = []
    for method in study.methods:
        runs = study.finals(method)
        if not runs:
            continue
        seen = [figures(method, run) for run in runs]
        cells = [METHODS[method].title, settings(method, runs[0]), str(len(runs))]
        for name, digits in FIGURES.values():
            if name:
                cells.append(spread([found[name] for found in seen], digits))
            else:
                both = ("accuracy_sum", "accuracy_per_token")
                cells.append(" / ".join(f"{mean(f[key] for f in seen):.3f}" for key in both))
        clock = "cpu_seconds" if study.setup.device == "cpu" else "seconds"
        cells.append(f"{mean(study.setup.pairs / run[clock] for run in runs):.2f}")
        lines.append(cells)
    speed = "pairs per CPU second" if study.setup.device == "cpu" else "pairs/s"
    return markdown("|".join(("|learning rate, knob|seeds", *FIGURES, speed)), lines)


def grid_table(study: Study) -> str:
    lines = []
    for method in study.methods:
        best = study.chosen(method)
        for run in study.grid(method):
            found = figures(method, run)
            mark = "chosen" if best is not None and run["options"] == best["options"] else ""
            numbers = [f"{found[name]:.4f}" for name in ("log_loss", "nll")]
            numbers += [
                f"{found[name]:.3f}" for name in ("accuracy", "margin", "chosen", "rejected")
            ]
            norms = run["curve"]["grad_norm"]
            numbers += [f"{norms[0]:.2g} .. {max(norms):.2g}"]
            lines.append([METHODS[method].title, settings(method, run), *numbers, mark])
    header = "|learning rate, knob|log-loss|NLL of chosen|accuracy|margin per token"
    return markdown(
        f"{header}|change of chosen|of rejected|gradient norm, first .. largest|", lines
    )


def claims_table(study: Study) -> str:
    """The paper's figure as differences: chosen log-probs per token under DIL less those under others.

    Per test pair the mean over seeds of either side; the error is that of the mean over pairs.
    """
    means = {}
    for method in study.methods:
        runs = study.finals(method)
        if len(runs) == study.seeds:
            ratios = [columns(run)[0] / columns(run)[2] for run in runs]
            means[method] = torch.stack(ratios).mean(0)
    lines = []
    for rival in (method for method in means if method not in DIL):
        cells = [METHODS[rival].title]
        for ours in DIL:
            if ours not in means:
                cells.append("")
                continue
            apart = means[ours] - means[rival]
            size, error = float(apart.mean()), float(apart.std() / len(apart) ** 0.5)
            word = (
                "undecided" if abs(size) < 2 * error else "less lost" if size > 0 else "more lost"
            )
            cells.append(f"{size:+.3f} ± {error:.3f}: {word}")
        lines.append(cells)
    return markdown("|" + "|".join(METHODS[ours].title for ours in DIL), lines)


def report(study: Study) -> str:
    """Everything that the files show, as Markdown."""
    runs = study.runs()
    done = [run for run in runs if study.path(run).exists()]
    missing = [run for run in runs if run not in done]
    text = [f"**{len(done)} of {len(runs)} runs are finished**"]
    if missing:
        names = dict.fromkeys(METHODS[run.method].title for run in missing)
        text[0] += f"; runs are missing of: {'; '.join(names)}. No conclusion before they are there"
    text[0] += "."
    if not done:
        return text[0] + "\n"
    where = next(found for run in runs if (found := study.read(run)))["environment"]
    setup = study.setup
    text.append(
        f"{where['cpu'] if setup.device == 'cpu' else where['gpu']}, {setup.dtype}; torch "
        f"{where['versions']['torch']}; first run {where['time'][:10]} at commit {where['commit']}. "
        f"{setup.pairs} training pairs in steps of {setup.batch}, {setup.validation} validation "
        f"pairs, {setup.test} test pairs of at most {setup.max_length} tokens."
    )
    if any(study.finals(method) for method in study.methods):
        shown = next(found for m in study.methods for found in study.finals(m))
        _, _, of_chosen, of_rejected = columns(shown)
        shorter = float((of_chosen < of_rejected).double().mean())
        n = setup.test
        text += [
            f"Test pairs, chosen settings, mean and half range over seeds. The standard error of an "
            f"accuracy of 0.6 on {n} pairs is {(0.24 / n) ** 0.5:.3f}; in {shorter:.3f} of them the "
            f"chosen answer is the shorter one. Perplexity of other text before training: "
            f"{shown['perplexity_before']:.2f}.",
            finals_table(study),
            "Change of chosen log-probs per token under DIL less that under each other method: "
            "above 0 DIL loses less, as the paper has it against SimPO and DPO. Mean over pairs ± its "
            "standard error, seeds averaged; undecided: within two of them.",
            claims_table(study),
        ]
    text += ["Validation pairs, all settings:", grid_table(study)]
    return "\n\n".join(part.strip() for part in text) + "\n"


def style(method: str) -> dict[str, Any]:
    """Of a method's points in all pictures: squares and solid lines are DIL's."""
    from matplotlib import colormaps

    others = [name for name in METHODS if name not in DIL]
    ours = ("#d62728", "#ff7f0e", "#8c1a4b")
    given = {"label": METHODS[method].title, "markersize": 6}
    if method in DIL:
        return given | {"color": ours[DIL.index(method)], "marker": "s", "linestyle": "-"}
    colours = colormaps["viridis"].resampled(len(others) + 1)
    number = others.index(method)
    return given | {"color": colours(number), "marker": "o^vD<>P*X"[number], "linestyle": ":"}


def draw_change(study: Study, path: Path) -> None:
    """Left: what final runs did to chosen and rejected. Right: the same of every setting, by margin."""
    seen = {
        method: [figures(method, run) for run in runs]
        for method in study.methods
        if (runs := study.finals(method))
    }
    order = sorted(seen, key=lambda method: mean(f["chosen"] for f in seen[method]))
    figure, ((bars, trade),) = panels(1, 2, 14, 6)
    for place, method in enumerate(order):
        for side, offset, colour in (("chosen", 0.2, "#1b9e77"), ("rejected", -0.2, "#d95f02")):
            values = [f[side] for f in seen[method]]
            label = side if place == 0 else None
            bars.barh(place + offset, mean(values), 0.36, color=colour, label=label, alpha=0.7)
            bars.plot(values, [place + offset] * len(values), "o", color=GREY, markersize=4)
    bars.set_yticks(range(len(order)), [METHODS[method].title for method in order])
    bars.axvline(0, color=GREY, linewidth=1)
    bars.set_xlabel("change of log-prob per token, nats (test; dots: seeds)")
    bars.set_title("final runs, by change of chosen", fontsize=10)
    if order:
        bars.legend(fontsize=8)
    for method in study.methods:
        points = sorted(
            (found["margin"], found["chosen"])
            for found in (figures(method, run) for run in study.grid(method))
        )
        if points:
            trade.plot(*zip(*points), **style(method))
    trade.axhline(0, color=GREY, linewidth=1)
    trade.set(xlabel="margin per token, nats (validation)")
    trade.set_ylabel("change of chosen log-prob per token, nats")
    trade.set_title("every setting, seed 0", fontsize=10)
    if trade.has_data():
        trade.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    on_any_page(figure).savefig(path, dpi=130)


def draw_price(study: Study, path: Path) -> None:
    """Accuracy over what it costs: divergence from the reference, and what is forgotten."""
    figure, (line,) = panels(1, 2, 14, 5.5, sharey=True)
    asked = (
        ("kl", "KL to the reference per token, nats (sampled answers)"),
        ("forgotten", "rise of the log-perplexity of other text, nats"),
    )
    for axis, (name, label) in zip(line, asked):
        for method in study.methods:
            seen = [figures(method, run) for run in study.finals(method)]
            if seen:
                axis.plot([f[name] for f in seen], [f["accuracy"] for f in seen], **style(method))
        axis.axhline(0.5, color=GREY, linestyle="--", linewidth=1)
        axis.set_xlabel(label)
    line[0].set_ylabel("accuracy of the implicit reward (test; a line joins seeds)")
    if any(study.finals(method) for method in study.methods):
        line[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    on_any_page(figure).savefig(path, dpi=130)


# The command line


def parse_methods(text: str) -> list[str]:
    found = text.split(",")
    for name in found:
        if name not in METHODS:
            raise typer.BadParameter(f"no method {name!r}; known: {', '.join(METHODS)}")
    return found


@app.command(name="run")
def run_missing(
    model: Annotated[str, typer.Option(help=f"of {', '.join(SOURCES)}, or a folder")] = "smollm2",
    data: Annotated[str, typer.Option(help="file of preference pairs")] = Setup.data,
    other: Annotated[str, typer.Option(help="file of pairs of another kind")] = Setup.other,
    methods: Annotated[str, typer.Option(help="by commas")] = ",".join(METHODS),
    seeds: Annotated[int, typer.Option(help="final runs of a method")] = 2,
    pairs: Annotated[int, typer.Option(help="to train on")] = Setup.pairs,
    batch: Annotated[int, typer.Option(help="pairs per step")] = Setup.batch,
    validation: Annotated[int, typer.Option(help="pairs")] = Setup.validation,
    test: Annotated[int, typer.Option(help="pairs")] = Setup.test,
    max_length: Annotated[int, typer.Option(help="longest sequence drawn")] = Setup.max_length,
    texts: Annotated[int, typer.Option(help="of the other kind")] = Setup.texts,
    text_length: Annotated[int, typer.Option(help="longest of them")] = Setup.text_length,
    prompts: Annotated[int, typer.Option(help="to sample answers to")] = Setup.prompts,
    answer: Annotated[int, typer.Option(help="tokens of a sampled answer")] = Setup.answer,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="of the model")] = "float32",
    out: Annotated[Path | None, typer.Option(help="folder of the result files")] = None,
) -> None:
    """Do the runs that are missing, then draw. Exit status 75: others have the rest in hand."""
    given = locals()
    setup = Setup(
        lora_r=Setup.lora_r, **{f.name: given[f.name] for f in fields(Setup) if f.name in given}
    )
    folder = out or RESULTS / "study" / f"{Path(model).name}-{device}-{setup.key}"
    study = Study(setup, folder, parse_methods(methods), seeds)
    where = describe(torch.device(device))  # now: the checkout may change under a long call

    def do(study: Study, run: Run, options: dict[str, Any]) -> dict[str, Any]:
        return train(study, run, options) | {"environment": where}

    left = study.work(do)
    print(folder)
    draw_all(study)
    if left:
        print(f"{len(left)} runs are in other hands: {', '.join(run.name for run in left)}")
        sys.exit(UNFINISHED)


def draw_all(study: Study) -> None:
    (study.folder / "study.md").write_text(report(study))
    draw_change(study, study.folder / "change.png")
    draw_price(study, study.folder / "price.png")


@app.command()
def draw(
    folder: Annotated[Path, typer.Argument(help="of the result files")],
    methods: Annotated[str, typer.Option(help="by commas")] = ",".join(METHODS),
    seeds: Annotated[int, typer.Option(help="final runs that a method should have")] = 2,
    page: Annotated[
        Path | None, typer.Option(help="put the tables between its study markers")
    ] = None,
) -> None:
    """Tables and pictures of what is there."""
    setup = Setup(**json.loads((folder / "setup.json").read_text()))
    study = Study(setup, folder, parse_methods(methods), seeds)
    draw_all(study)
    if page is not None:
        there = Path(os.path.relpath(folder.resolve(), page.resolve().parent)).as_posix()
        pictures = f"![change]({there}/change.png)\n\n![price]({there}/price.png)"
        page.write_text(insert(page.read_text(), f"{pictures}\n\n{report(study)}", MARKERS))
    print(report(study))


if __name__ == "__main__":
    app()
