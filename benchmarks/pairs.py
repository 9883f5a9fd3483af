"""Preference pairs per second: `python -m benchmarks.pairs` (issue: what a trainer does with its time).

A LoRA step of policy and reference (the adapter off) on real pairs, by trainers with the same options:

- trl: TRL's DPOTrainer as it comes, with its own fused head;
- trl-logits: the same with full logits, and for LSIF, which TRL has not, our formula on them;
- padded, padding-free, shared: DILTrainer; then with the word filter, and with the reference
  precomputed (its pass is then not part of the step).

A run is the same few batches over and over, each variant in a process of its own on a CPU, rounds
interleaved; a warm-up step comes first. What is timed is the trainer's training step with the update,
not loading and tokenising. Tokens are those that go through the embedding. The losses of the first
steps must be those of the first variant that has some. Batches hold whole pairs, drawn at random from
those that fit `max_length`, in the model's chat format where it has one. Models without weights at hand
get random ones of their shape, and SmolLM2's tokenizer. Rows that the result file has are not measured
again.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks import measure
from benchmarks.cases import SEED
from benchmarks.environment import append_rows, begin, beside, default_stem, read_rows
from benchmarks.real_models import HH, SOURCES, model_folder, read_pairs
from benchmarks.report import draw_file
from benchmarks.tables import pairs_table
from benchmarks.train_step import MODELS, config_of, quantise, random_model
from dilkern.integrations.data import IGNORE_INDEX
from dilkern.validation import reject

BETA = {"dpo": {"beta": 0.1}, "lsif": {}}
LOSS_BAND = {"float32": 1e-4, "bfloat16": 3e-2}  # of the loss of one step, nats
FILTERED_BAND = 1e-2
SHARE_BAND = 0.05


@dataclass(frozen=True)
class Setup:
    """A model, its data, and the step."""

    model: str = "smollm2"  # one of SOURCES, of MODELS, or a folder with a model and its tokenizer
    data: str = str(HH)
    loss: str = "dpo"
    pairs: int = 4  # per step
    steps: int = 3  # per round
    max_length: int = 1024
    device: str = "cpu"
    dtype: str = "float32"
    lora_r: int = 16
    prompt_share: float = 0  # of prompt + chosen + rejected, within SHARE_BAND; 0: any

    @property
    def folder(self) -> Path:
        """Of the tokenizer, and of the model if it is none of MODELS."""
        name = "smollm2" if self.model in MODELS else self.model
        return model_folder(name) if name in SOURCES else Path(name)

    @property
    def is_real(self) -> bool:
        """Whether there are weights: a machine without network may have the shape alone."""
        return self.model not in MODELS and any(self.folder.glob("*.safetensors"))

    @property
    def is_big(self) -> bool:
        """In 4 bit, with checkpointing."""
        return self.model.endswith("8b")

    @property
    def name(self) -> str:
        return f"{Path(self.model).name}{'' if self.is_real else ' (random weights)'}"


def make_model(setup: Setup) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, setup.dtype)
    if setup.is_real:
        return AutoModelForCausalLM.from_pretrained(setup.folder, dtype=dtype).to(setup.device)
    known = setup.model in MODELS
    config = config_of(setup.model) if known else AutoConfig.from_pretrained(setup.folder)
    model = random_model(config, setup.device, dtype)
    if setup.is_big:
        quantise(model, decoded=False)
    return model


def full_logits() -> Any:
    """TRL's trainer with the model's own logits, and any of our losses on them."""
    from trl import DPOTrainer
    from trl.trainer.utils import selective_log_softmax, use_adapter

    from dilkern import preference_loss

    class FullLogits(DPOTrainer):  # type: ignore[misc]
        def logps(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            return selective_log_softmax(logits, ids[:, 1:]) * inputs["completion_mask"][:, 1:]

        def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
            plain = use_adapter(self.accelerator.unwrap_model(self.model), None)
            with torch.no_grad(), plain, self.accelerator.autocast():
                ref = self.logps(model, inputs).sum(1)
            logps, lengths = self.logps(model, inputs).sum(1), inputs["completion_mask"].sum(1)
            how: Any = {"loss": self.asked, **BETA[self.asked]}
            return preference_loss(logps, lengths, log_ratios=logps - ref, **how).loss

    return FullLogits


# Options of DILConfig; those of TRL are the common ones.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "trl": None,
    "trl-logits": None,
    "padded": {},
    "padding-free": {"padding_free": True},
    "shared": {"shared_prompts": True},
    "shared+filter": {"shared_prompts": True, "filter_eps": "auto"},
    "shared+precomputed": {"shared_prompts": True, "precompute_ref_log_probs": True},
}


def make_trainer(variant: str, setup: Setup, pairs: list[dict[str, Any]], out: str) -> Any:
    """The trainer of a variant around a model with an untrained adapter on all linear layers."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    ours = VARIANTS[variant]
    common: dict[str, Any] = {
        "output_dir": out,
        "use_cpu": setup.device == "cpu",
        "bf16": setup.dtype == "bfloat16",
        "per_device_train_batch_size": setup.pairs,
        "max_length": setup.max_length,
        "learning_rate": 1e-4,
        "gradient_checkpointing": setup.is_big,
        "report_to": "none",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    common |= BETA[setup.loss]
    if ours is not None:
        from dilkern.integrations.trl import DILConfig, DILTrainer

        kind, args = DILTrainer, DILConfig(loss_type=setup.loss, **common, **ours)
    else:
        kind = DPOTrainer if variant == "trl" else full_logits()
        args = DPOConfig(**common)
    trainer = kind(
        model=make_model(setup),
        args=args,
        processing_class=AutoTokenizer.from_pretrained(setup.folder),
        train_dataset=Dataset.from_list(pairs),
        peft_config=LoraConfig(r=setup.lora_r, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.asked = setup.loss
    if setup.is_big:  # which trainers of transformers do in `train`
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        assert trainer.model.is_gradient_checkpointing
    rng = torch.Generator().manual_seed(SEED)
    with torch.no_grad():  # the same for all, whatever was drawn before
        for name, parameter in trainer.model.named_parameters():
            if "lora_A" in name:
                drawn = torch.randn(parameter.shape, generator=rng) / parameter.shape[1] ** 0.5
                parameter.copy_(drawn)
    return trainer


class PairsTask:
    """A trainer and its batches; the interface of `measure.Task`."""

    def __init__(
        self, setup: Setup, threads: int, variant: str, pairs: list[dict[str, Any]]
    ) -> None:
        torch.set_num_threads(threads)
        self.setup = setup
        self.out = tempfile.TemporaryDirectory(prefix="dilkern-bench-")
        self.trainer = trainer = make_trainer(variant, setup, pairs, self.out.name)
        if len(trainer.train_dataset) != len(pairs):
            raise RuntimeError("the trainer left pairs out")
        trainer.create_optimizer()
        prepared = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        self.model, self.optimizer = prepared
        trainer.model_wrapped, trainer.current_gradient_accumulation_steps = self.model, 1
        rows, n = [trainer.train_dataset[i] for i in range(len(pairs))], setup.pairs
        self.batches = [trainer.data_collator(rows[a : a + n]) for a in range(0, len(rows), n)]
        self.losses: list[float] = []
        self.tokens = 0
        embedding = trainer.model.get_base_model().get_input_embeddings()
        embedding.register_forward_pre_hook(self._count)

    def _count(self, module: Any, inputs: tuple[Tensor, ...]) -> None:
        self.tokens += inputs[0].numel()

    def step(self, batch: dict[str, Any]) -> None:
        loss = self.trainer.training_step(self.model, dict(batch))
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if len(self.losses) < len(self.batches):
            self.losses.append(loss.item())

    def round(self) -> None:
        for batch in self.batches[1:]:
            self.step(batch)

    def first(self) -> dict[str, float]:
        """Warm up on the first batch, then watch one round."""
        self.step(self.batches[0])
        self.tokens = 0
        peak = measure.peak_mib(self.round, torch.device(self.setup.device))
        measure.trim_heap()  # the others of the contest wait with theirs
        return {"peak_mib": peak, "tokens": self.tokens}

    def check(self, truth: Any) -> dict[str, float]:
        return {f"loss_{number}": loss for number, loss in enumerate(self.losses)}

    def run(self) -> measure.Timing:
        timing = measure.timed(torch.device(self.setup.device), self.round)
        measure.trim_heap()
        return timing

    def close(self) -> None:
        self.optimizer.zero_grad()
        self.out.cleanup()


def draw_pairs(setup: Setup) -> list[dict[str, Any]]:
    """So many pairs as the batches of a run have, the first for the warm-up: seeded, whole ones."""
    from transformers import AutoTokenizer

    from dilkern.integrations.collators import PreferenceCollator

    collator = PreferenceCollator(AutoTokenizer.from_pretrained(setup.folder), None)
    rows, found = read_pairs(Path(setup.data)), []
    random.Random(SEED).shuffle(rows)
    for row in rows:
        if collator.tokenizer.chat_template is None:
            prompt = "".join(f"{turn['role']}: {turn['content']}\n\n" for turn in row["prompt"])
            row = {side: f" {row[side][0]['content']}" for side in ("chosen", "rejected")}
            row["prompt"] = f"{prompt}assistant:"
        labels = [collator.encode(row["prompt"], row[side])[1] for side in ("chosen", "rejected")]
        prompt, total = labels[0].count(IGNORE_INDEX), sum(map(len, labels))
        share = prompt / (total - prompt)
        fits = not setup.prompt_share or abs(share - setup.prompt_share) <= SHARE_BAND
        if fits and max(map(len, labels)) <= setup.max_length:
            found.append({side: row[side] for side in ("prompt", "chosen", "rejected")})
        if len(found) == (wanted := setup.pairs * (setup.steps + 1)):
            return found
    which = f" and a prompt share near {setup.prompt_share:g}" if setup.prompt_share else ""
    reject(
        f"'{Path(setup.data).name}' must have {wanted} pairs of {setup.max_length} tokens at most"
        f"{which}",
        f"{len(found)}",
        "Pass --max-length, or fewer --pairs or --steps.",
    )


def difference(found: dict[str, float], want: dict[str, float]) -> float:
    return max(abs(found[name] - want[name]) for name in want if name.startswith("loss_"))


def measure_setup(
    setup: Setup, variants: list[str], plan: measure.Plan, remote: bool | None = None
) -> list[dict[str, Any]]:
    """One row per variant, refused and failed ones too; `remote` as in `measure_group`."""
    remote = setup.device == "cpu" if remote is None else remote
    start = partial(measure.Worker if remote else measure.Local, PairsTask, setup)
    pairs, threads = draw_pairs(setup), torch.get_num_threads()
    able = [v for v in variants if v != "trl" or setup.loss != "lsif"]
    tasks = {variant: start(threads, variant, pairs) for variant in able}
    want: dict[str, float] = {}

    def refuse(variant: str, found: dict[str, float]) -> str | None:
        want.update(want or found)
        band = FILTERED_BAND if "filter" in variant else LOSS_BAND[setup.dtype]
        error = difference(found, want)
        return None if error <= band else f"losses differ by {error:.3g} > {band:.3g}"

    rows, times = measure.contest(tasks, None, refuse, plan)
    for variant in variants:
        row = {"variant": variant} | asdict(setup) | {"data": Path(setup.data).stem}
        row |= {"model": setup.name}
        if variant not in rows:
            row |= {"status": "unsupported", "reason": "TRL has no LSIF"}
        rows[variant] = row | rows.get(variant, {})
        if rows[variant]["status"] == "ok":
            row = rows[variant]
            row |= measure.spread([t.total for t in times[variant]], "round")
            row["loss_err"] = difference(row, want)
            row["pairs_per_s"] = 1000 * setup.pairs * setup.steps / row["round_ms_min"]
    return [rows[variant] for variant in variants]


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    models: Annotated[
        str, typer.Option(help=f"of {', '.join((*SOURCES, *MODELS))}, or folders")
    ] = "smollm2",
    data: Annotated[str, typer.Option(help="files of preference pairs, by commas")] = str(HH),
    losses: Annotated[str, typer.Option(help=f"of {', '.join(BETA)}")] = "lsif,dpo",
    pairs: Annotated[str, typer.Option(help="pairs per step, by commas")] = "4,8",
    variants: Annotated[str, typer.Option(help=f"of {', '.join(VARIANTS)}")] = ",".join(VARIANTS),
    steps: Annotated[int, typer.Option(help="batches of a round")] = 3,
    rounds: Annotated[int, typer.Option(help="interleaved rounds")] = 3,
    max_length: Annotated[int, typer.Option(help="longest sequence drawn")] = 1024,
    dtype: Annotated[str, typer.Option(help="default: bfloat16 on a GPU, else float32")] = "",
    prompt_shares: Annotated[
        str, typer.Option(help="only pairs whose prompt has about this share, by commas; 0: any")
    ] = "0",
    processes: Annotated[
        bool | None, typer.Option(help="one process per variant; default: on a CPU")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="result file without suffix")] = None,
) -> None:
    """Measure training steps on preference pairs, by trainer and batch layout."""
    where = torch.device(device)
    stem = out or default_stem(where, "pairs")
    table = beside(stem, ".csv")
    names = variants.split(",")
    known = ("model", "data", "loss", "pairs", "prompt_share", "variant")
    done = {tuple(row.get(name, 0) for name in known) for row in read_rows(table)}
    begun, kind = False, dtype or ("bfloat16" if device == "cuda" else "float32")
    shape = {"steps": steps, "max_length": max_length, "device": device, "dtype": kind}
    every = product(*(x.split(",") for x in (models, data, losses, pairs, prompt_shares)))
    for model, file, loss, count, share in every:
        setup = Setup(model, file, loss, int(count), prompt_share=float(share), **shape)
        key = (setup.name, Path(file).stem, loss, setup.pairs, setup.prompt_share)
        todo = [variant for variant in names if (*key, variant) not in done]
        if not todo:
            continue
        if not begun:
            begin(stem, where)
            begun = True
        print(setup, flush=True)
        append_rows(table, measure_setup(setup, todo, measure.Plan(rounds), processes))
        print(pairs_table(read_rows(table)), flush=True)
    print(*draw_file(table), sep="\n")


if __name__ == "__main__":
    typer.run(main)
