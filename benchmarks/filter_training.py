"""Does training notice the filter? `python -m benchmarks.filter_training`.

LoRA training of a real model on real pairs, three times from the same seeds: exact gradients, dilkern's
word filter ("auto"), and a filter that only drops, by cut-cross-entropy's rule with the threshold that
it has for bf16 (2^-12). Of every step loss, gradient norm and margin are kept, and of pairs held out
the same every few steps. One JSON per run: a call that is cut off goes on with the runs that are
missing, and draws what is there. The reference's log-probs are computed once and kept in the cache.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.cases import SEED
from benchmarks.environment import beside, default_stem, describe, markdown
from benchmarks.peers import DropFilter
from benchmarks.pictures import on_any_page, panels
from benchmarks.real_models import HH, SOURCES, appearing, cache, model_folder, read_pairs
from dilkern import LOSSES, linear_logps, preference_loss, preference_metrics
from dilkern.validation import reject

DROP_EPS = 2.0**-12
Logps = Callable[[Tensor, Tensor, Tensor], Tensor]  # rows (N, D), weight (V, D), labels -> (N,)
WAYS: dict[str, Logps] = {
    "exact": linear_logps,
    "filter": partial(linear_logps, filter_eps="auto"),
    "drop": lambda rows, weight, labels: DropFilter.apply(rows, weight, labels, DROP_EPS),
}


@dataclass(frozen=True)
class Setup:
    """A run but for its loss and its way."""

    model: str = "smollm2"  # or a folder with a model and its tokenizer
    data: str = str(HH)
    steps: int = 60
    pairs: int = 4  # per step
    longest: int = 160  # tokens of a sequence
    held_out: int = 64
    every: int = 15  # steps between looks at the held-out pairs
    lora_r: int = 16
    lr: float = 1e-4
    device: str = "cpu"
    dtype: str = "float32"


@dataclass
class Sequence:
    ids: list[int]
    prompt: int  # tokens of it


Pair = tuple[Sequence, Sequence]  # chosen, rejected


def draw_pairs(setup: Setup, tokenizer: Any) -> list[Pair]:
    """First the held-out pairs, then those of the steps: seeded, none longer than allowed."""
    rows, found = read_pairs(Path(setup.data)), []
    random.Random(SEED).shuffle(rows)
    wanted = setup.held_out + setup.steps * setup.pairs
    for row in rows:
        prompt = tokenizer.apply_chat_template(
            row["prompt"], tokenize=False, add_generation_prompt=True
        )
        ids, sides = tokenizer(prompt).input_ids, []
        for side in ("chosen", "rejected"):
            text = tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
            answer = tokenizer(text.removeprefix(prompt), add_special_tokens=False).input_ids
            sides.append(Sequence(ids + answer, len(ids)))
        if max(len(side.ids) for side in sides) <= setup.longest:
            found.append((sides[0], sides[1]))
        if len(found) == wanted:
            return found
    reject(
        f"the data must have {wanted} pairs of {setup.longest} tokens at most",
        f"{len(found)} in {setup.data}",
        "Pass a larger --longest, or fewer --steps or --pairs.",
    )


class Policy:
    """A model with an adapter on all linear layers, and its log-probs by any way."""

    def __init__(self, setup: Setup) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.setup = setup
        folder = model_folder(setup.model) if setup.model in SOURCES else setup.model
        dtype = getattr(torch, setup.dtype)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(setup.device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        torch.manual_seed(SEED)
        config = LoraConfig(r=setup.lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(base, config)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def logps(self, pairs: list[Pair], way: Logps) -> tuple[Tensor, Tensor]:
        """Summed log-probs (2 P,) of all chosen, then all rejected answers, and their lengths."""
        sequences = [pair[side] for side in (0, 1) for pair in pairs]
        length = max(len(s.ids) for s in sequences)
        ids = torch.zeros(len(sequences), length, dtype=torch.int64)
        real, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, s in enumerate(sequences):
            ids[row, : len(s.ids)] = torch.tensor(s.ids)
            real[row, : len(s.ids)] = 1
            scored[row, s.prompt : len(s.ids)] = True
        ids, real, scored = (x.to(self.setup.device) for x in (ids, real, scored))
        causal = self.model.get_base_model()
        states = causal.get_decoder()(input_ids=ids, attention_mask=real, use_cache=False)
        rows = states.last_hidden_state[:, :-1][scored[:, 1:]]
        found = way(rows, causal.get_output_embeddings().weight, ids[scored])
        lengths = scored.sum(1)
        owner = torch.arange(len(sequences), device=ids.device).repeat_interleave(lengths)
        return found.new_zeros(len(sequences)).index_add(0, owner, found), lengths

    @torch.no_grad()
    def references(self, pairs: list[Pair]) -> Tensor:
        """(P, 2) of chosen and rejected, from the cache if they are there."""
        told = json.dumps([asdict(self.setup), [[s.ids for s in pair] for pair in pairs]])
        kept = cache() / f"references-{hashlib.sha256(told.encode()).hexdigest()[:12]}.pt"
        if not kept.exists():
            with self.model.disable_adapter():
                parts = [pairs[a : a + 8] for a in range(0, len(pairs), 8)]
                found = [self.logps(part, WAYS["exact"])[0] for part in parts]
            with appearing(kept) as file:
                torch.save(torch.cat([part.view(2, -1).T for part in found]).cpu(), file)
        return torch.load(kept).to(self.setup.device)

    def loss(self, pairs: list[Pair], references: Tensor, name: str, way: Logps) -> Any:
        logps, lengths = self.logps(pairs, way)
        ratios = logps - references.T.flatten()
        return preference_loss(logps, lengths, log_ratios=ratios, loss=name)


def figures(output: Any) -> dict[str, float]:
    metrics = preference_metrics(output)
    names = {"margin": "rewards/margins", "accuracy": "rewards/accuracies"}
    found = {"loss": output.loss.item()}
    return found | {name: metrics[theirs].item() for name, theirs in names.items()}


def train(setup: Setup, name: str, way: str, say: Callable[[str], None] = print) -> dict[str, Any]:
    """One run: its steps and its looks at the held-out pairs."""
    policy = Policy(setup)
    pairs = draw_pairs(setup, policy.tokenizer)
    references = policy.references(pairs)
    apart = setup.held_out
    optimizer = torch.optim.AdamW(policy.parameters, lr=setup.lr)

    def batches(first: int, last: int, size: int) -> Iterator[tuple[list[Pair], Tensor]]:
        for start in range(first, last, size):
            part = slice(start, min(start + size, last))
            yield pairs[part], references[part]

    @torch.no_grad()
    def look(step: int) -> dict[str, float]:
        parts = [
            figures(policy.loss(*part, name, WAYS["exact"])) | {"pairs": len(part[0])}
            for part in batches(0, apart, 8)
        ]
        mean = {k: sum(p[k] * p["pairs"] for p in parts) / apart for k in parts[0]}
        return mean | {"step": step}

    began = time.monotonic()
    seen, steps = [look(0)], []
    looked = time.monotonic() - began
    for number, part in enumerate(batches(apart, len(pairs), setup.pairs), 1):
        began = time.monotonic()
        output = policy.loss(*part, name, WAYS[way])
        optimizer.zero_grad()
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters, 1.0)
        optimizer.step()
        steps.append(figures(output) | {"grad_norm": norm.item()})
        if number == 2:  # the first one warms up
            step, looks = time.monotonic() - began, setup.steps // setup.every
            minutes = (step * (setup.steps - 2) + looked * looks) / 60
            say(f"{name} {way}: {step:.1f} s per step, {looked:.0f} s per look, {minutes:.0f} min")
        if number % setup.every == 0:
            seen.append(look(number))
            say(f"{name} {way}: step {number}, held-out loss {seen[-1]['loss']:.5f}")
    return {"loss": name, "way": way, "setup": asdict(setup), "steps": steps, "held_out": seen}


def table(runs: list[dict[str, Any]]) -> str:
    """How far each run is from the exact one."""
    lines, exact = [], {run["loss"]: run for run in runs if run["way"] == "exact"}
    for run in runs:
        last, other = run["held_out"][-1], exact.get(run["loss"], run)
        apart = [
            f"{max(abs(a[c] - b[c]) for a, b in zip(run[part], other[part])):.1e}"
            for part, c in (("steps", "loss"), ("steps", "grad_norm"), ("held_out", "loss"))
        ]
        held = [f"{last['loss']:.5f}", f"{last['margin']:.4f}", f"{last['accuracy']:.1%}"]
        first = f"{run['held_out'][0]['loss']:.5f}"
        lines.append([run["loss"], run["way"], first, *held, *apart])
    header = (
        "loss|gradient|held-out loss before|after|margin|accuracy|"
        "largest difference to exact: loss of a step|gradient norm|held-out loss"
    )
    return markdown(header, lines)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """A row of panels per loss: loss of the steps, gradient norm, margin, held-out loss."""
    losses = list(dict.fromkeys(run["loss"] for run in runs))
    figure, axes = panels(len(losses), 4, 16, 3.2 * len(losses))
    styles = dict(zip(WAYS, (("#1b9e77", "-"), ("#d95f02", "--"), ("#7570b3", ":"))))
    for line, name in zip(axes, losses):
        for run in (run for run in runs if run["loss"] == name):
            colour, dash = styles[run["way"]]
            style = {"color": colour, "linestyle": dash, "label": run["way"]}
            for axis, column in zip(line, ("loss", "grad_norm", "margin")):
                axis.plot([step[column] for step in run["steps"]], **style)
                axis.set(title=f"{name}: {column.replace('_', ' ')}", xlabel="step")
            looks = run["held_out"]
            style["marker"] = "o"
            line[3].plot([x["step"] for x in looks], [x["loss"] for x in looks], **style)
        line[3].set(title=f"{name}: held-out loss", xlabel="step")
        line[3].legend(fontsize=8)
    on_any_page(figure).savefig(path, dpi=130)


def main(
    model: Annotated[str, typer.Option(help=f"of {', '.join(SOURCES)}, or a folder")] = "smollm2",
    data: Annotated[str, typer.Option(help="file of preference pairs")] = str(HH),
    losses: Annotated[str, typer.Option(help="by commas")] = "lsif,dpo",
    ways: Annotated[str, typer.Option(help=f"of {', '.join(WAYS)}")] = ",".join(WAYS),
    steps: Annotated[int, typer.Option(help="of a run")] = 60,
    pairs: Annotated[int, typer.Option(help="per step")] = 4,
    longest: Annotated[int, typer.Option(help="tokens of a sequence")] = 160,
    held_out: Annotated[int, typer.Option(help="pairs")] = 64,
    every: Annotated[int, typer.Option(help="steps between looks at the held-out pairs")] = 15,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="of the model")] = "float32",
    out: Annotated[Path | None, typer.Option(help="result files without suffix")] = None,
) -> None:
    """Train what is missing of (loss, way), then draw all runs of the result."""
    shape = {"steps": steps, "pairs": pairs, "longest": longest, "held_out": held_out}
    setup = Setup(model, data, every=every, device=device, dtype=dtype, **shape)
    stem, where = out or default_stem(torch.device(device), "filter-training"), torch.device(device)
    for name, way in product(losses.split(","), ways.split(",")):
        if name not in LOSSES or way not in WAYS:
            raise typer.BadParameter(f"no {name} {way}")
        file = beside(stem, f"-{name}-{way}.json")
        if file.exists():
            continue
        run = train(setup, name, way) | {"environment": describe(where)}
        with appearing(file) as unfinished:
            unfinished.write_text(json.dumps(run) + "\n")
    files = [beside(stem, f"-{name}-{way}.json") for name, way in product(LOSSES, WAYS)]
    runs = [json.loads(file.read_text()) for file in files if file.exists()]
    text = table(runs)
    beside(stem, ".md").write_text(text)
    draw(runs, beside(stem, ".png"))
    print(f"{text}{beside(stem, '.md')}\n{beside(stem, '.png')}")


if __name__ == "__main__":
    typer.run(main)
