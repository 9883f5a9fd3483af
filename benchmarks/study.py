"""The paper's comparison in small: `python -m benchmarks.study run`, then `... draw`.

One model, one set of human preference pairs, LoRA, every method of the paper's tables. Each method
has the same number of settings; the one that is best on validation pairs is trained anew with other
seeds and looked at on test pairs. docs/study.md says what is measured and how settings are chosen.

benchmarks/study_plan.py says what is done and keeps its files; benchmarks/study_report.py draws what
these files hold, and says which are missing. Here is one run, and the commands. The reference's
log-probs are computed once, kept in the cache ($DILKERN_CACHE), and given to every run as columns of
its data.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks import pairs as drawing
from benchmarks.environment import RESULTS, describe, insert
from benchmarks.real_models import SOURCES, appearing, cache
from benchmarks.study_plan import METHODS, Run, Setup, Study, claimed, figures
from benchmarks.study_report import draw_all, report
from dilkern.losses import LOSSES

app = typer.Typer(add_completion=False, help="The paper's comparison in small.")

MARKERS = ("<!-- study:begin -->", "<!-- study:end -->")
# What peft's "all-linear" finds in Llama and its like; of some layers it wants them by name.
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
UNFINISHED = 75  # exit status: runs are left, in the hands of other processes

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
    depth = model.config.num_hidden_layers
    first = max(0, depth - setup.lora_layers) if setup.lora_layers else 0
    trainer = DILTrainer(
        model=model.to(setup.device),
        args=args,
        processing_class=AutoTokenizer.from_pretrained(folder),
        train_dataset=Dataset.from_list(splits["train"]),
        eval_dataset={name: Dataset.from_list(splits[name]) for name in evals},
        peft_config=LoraConfig(
            r=setup.lora_r,
            target_modules=list(LINEAR),
            layers_to_transform=list(range(first, depth)),
            task_type="CAUSAL_LM",
        ),
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
    lora_layers: Annotated[int, typer.Option(help="the last ones; 0: all")] = Setup.lora_layers,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = Setup.device,
    dtype: Annotated[str, typer.Option(help="of the model")] = Setup.dtype,
    out: Annotated[Path | None, typer.Option(help="folder of the result files")] = None,
) -> None:
    """Do the runs that are missing, then draw. Exit status 75: others have the rest in hand."""
    given = locals()
    setup = Setup(**{f.name: given[f.name] for f in fields(Setup) if f.name in given})
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
