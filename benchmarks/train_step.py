"""One whole training step, policy and reference, LoRA: `python -m benchmarks.train_step`.

The model is a real architecture with random weights. A step is: reference log-probs (adapter off, no
gradient), policy log-probs, DPO loss on their sums over the completion, backward, AdamW on the
adapter. Three ways to the log-probs, everything else the same:

- naive: the model's full logits, log_softmax, gather;
- trl: TRL's `add_fused_lm_head`, installed and called as its DPOTrainer does, but asked for log-probs
  alone (its trainer also logs entropy and more). Without Triton on the device it scores prompt
  positions too: that is its own choice, kept;
- dilkern: the backbone's hidden states and `linear_logps`.

The first step's loss and adapter gradient must agree with an fp64 copy of the model (of a 4-bit one,
of its decoded weights) within twice the error of naive; of a model with `checked_pairs` that is judged
on the first pairs of the batch. `--cap-gib 24` asks another question: the longest sequence whose step
fits, found by bisection, one pair per step. What the result file has is not measured again.
"""

from __future__ import annotations

import bisect
import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks import measure
from benchmarks.cases import SEED, build_layer, label_logps
from benchmarks.environment import append_rows, begin, beside, default_stem, read_rows
from benchmarks.tables import steps_table
from benchmarks.truth import BETA, FP32, refusal, relative

METHODS = ("naive", "trl", "dilkern")


@dataclass(frozen=True)
class Setup:
    """A model and a batch."""

    model: str
    pairs: int = 4
    length: int = 256
    prompt: int = 64
    device: str = "cpu"
    dtype: str = "float32"
    lora_r: int = 16
    four_bit: bool = False  # NF4 but for the lm_head, as bitsandbytes in transformers has it
    checkpoint: bool = False  # gradient checkpointing
    checked_pairs: int = 0  # judged on so many pairs; 0: all

    @property
    def tokens(self) -> int:
        return 2 * self.pairs * self.length


SHAPE = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
)
MODELS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    # No smaller: bitsandbytes 0.50 decodes wrongly on a CPU where D is no multiple of its block of 64.
    "micro": ("Llama", (512, 64, 128, 1, 2, 2), {}),
    "tiny-llama-32k": ("Llama", (32768, 256, 688, 4, 4, 2), {}),
    "llama-3.2-1b": ("Llama", (128256, 2048, 8192, 16, 32, 8), {}),
    "qwen3-0.6b": ("Qwen3", (151936, 1024, 3072, 28, 16, 8), {"head_dim": 128}),
    "qwen3-8b": (
        *("Qwen3", (151936, 4096, 12288, 36, 32, 8)),
        {"head_dim": 128, "tie_word_embeddings": False},
    ),
}


def config_of(name: str) -> Any:
    import transformers

    kind, shape, more = MODELS[name]
    shared = {"max_position_embeddings": 1 << 20, "tie_word_embeddings": True}
    return getattr(transformers, f"{kind}Config")(**(shared | dict(zip(SHAPE, shape)) | more))


def random_model(config: Any, device: str, dtype: torch.dtype) -> Any:
    """A causal LM of that shape, the same weights at every call."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(SEED)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def build_model(setup: Setup, dtype: torch.dtype, fused: bool) -> Any:
    """The model with its adapter; LoRA's B is drawn too, so that policy and reference differ."""
    from peft import LoraConfig, get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    # Made in the measured dtype: an fp64 copy is the truth of the same weights.
    dense = getattr(torch, setup.dtype)
    base = random_model(config_of(setup.model), setup.device, dense)
    if setup.four_bit:
        quantise(base, decoded=dtype is torch.float64)
    if dtype is torch.float64:
        base = base.double()
    if fused:
        add_fused_lm_head(base)
    if setup.checkpoint:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    targets = ["q_proj", "v_proj"]
    model = get_peft_model(base, LoraConfig(r=setup.lora_r, target_modules=targets)).train()
    rng = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                drawn = 0.05 * torch.randn(parameter.shape, generator=rng)
                parameter.copy_(drawn.to(dense))
                assert "lora" in name
    return model


def quantise(model: Any, decoded: bool) -> None:
    """Put NF4 layers in the place of every linear layer but the lm_head, or their decoded weights."""
    import bitsandbytes as bnb

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not torch.nn.Linear or child is model.get_output_embeddings():
                continue
            layer = build_layer("nf4", child.weight)
            assert child.bias is None and isinstance(layer, bnb.nn.Linear4bit)
            if decoded:
                packed = layer.weight
                weight = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
                child.weight = torch.nn.Parameter(weight, requires_grad=False)
            else:
                setattr(parent, name, layer)


def make_batch(setup: Setup) -> tuple[Tensor, Tensor]:
    """Token ids from a Zipf law, (2 * pairs, length), and labels with the prompt ignored."""
    rng, (vocab, *_) = torch.Generator().manual_seed(SEED), MODELS[setup.model][1]
    zipf = (torch.arange(vocab, dtype=torch.float32) + 2.7).reciprocal()
    shape = (2 * setup.pairs, setup.length)
    ids = torch.multinomial(zipf, setup.tokens, replacement=True, generator=rng).view(shape)
    labels = ids.clone()
    labels[:, : setup.prompt] = -100
    return ids.to(setup.device), labels.to(setup.device)


def naive_logps(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    logits = logits if logits.dtype is torch.float64 else logits.float()
    return (label_logps(logits, labels[:, 1:].clamp(min=0)) * (labels[:, 1:] != -100)).sum(1)


def trl_logps(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    return model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs.sum(1)


def dilkern_logps(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    from dilkern import linear_logps

    inner = model.get_base_model()
    hidden = inner.model(input_ids=ids, use_cache=False).last_hidden_state
    return linear_logps(hidden, inner.lm_head.weight, labels, shift=True).sum(1)


LOGPS = {"naive": naive_logps, "trl": trl_logps, "dilkern": dilkern_logps}


class StepTask:
    """A model, a batch, and one way to its log-probs; the interface of `measure.Task`."""

    def __init__(self, setup: Setup, threads: int, method: str, exact: bool = False) -> None:
        torch.set_num_threads(threads)
        self.setup, self.logps = setup, LOGPS[method]
        dtype = torch.float64 if exact else getattr(torch, setup.dtype)
        self.model = build_model(setup, dtype, fused=method == "trl")
        self.ids, self.labels = make_batch(setup)
        self.parameters = [p for n, p in self.model.named_parameters() if "lora" in n]
        self.found: tuple[float, Tensor] | None = None
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad(), self.model.disable_adapter():
            reference = self.logps(self.model, ids, labels)
        ratios = self.logps(self.model, ids, labels) - reference
        chosen, rejected = ratios.chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    def gradients(self) -> tuple[float, Tensor]:
        """Loss and adapter gradient of the first step, without the step."""
        pairs, checked = self.setup.pairs, self.setup.checked_pairs or self.setup.pairs
        rows = [*range(checked), *range(pairs, pairs + checked)]  # chosen first
        loss = self.loss(self.ids[rows], self.labels[rows])
        loss.backward()
        found = torch.cat([p.grad.flatten().double().cpu() for p in self.parameters])
        self.optimizer.zero_grad()
        return loss.item(), found

    def check(self, truth: tuple[float, Tensor]) -> dict[str, float]:
        loss, gradient = self.found or self.gradients()
        return {"loss_err": abs(loss - truth[0]), "grad_err": relative(gradient, truth[1])[1]}

    def first(self) -> dict[str, float]:
        """Keep what will be checked, which warms up as well, then watch the memory of one step."""
        self.found = self.gradients()
        return {"peak_mib": measure.peak_mib(self.step, torch.device(self.setup.device))}

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss(self.ids, self.labels).backward()
        self.optimizer.step()

    def run(self) -> measure.Timing:
        return measure.timed(torch.device(self.setup.device), self.step)

    def fits(self, length: int) -> bool:
        """Whether a step on sequences of `length` ends without running out of memory."""
        print(f"a step on sequences of {length}", flush=True)
        self.ids, self.labels = make_batch(replace(self.setup, length=length, prompt=length // 4))
        fitted = True
        try:
            self.run()
        except RuntimeError as error:
            if not measure.is_out_of_memory(str(error)):
                raise
            fitted = False
        # Outside the except block: the traceback holds the tensors of the failed step.
        self.close()
        return fitted

    def close(self) -> None:
        self.optimizer.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()


def step_band(name: str, dtype: torch.dtype) -> float:
    """16 units of the dtype; for the loss in fp32 256, as for every scalar loss: it is made of sums
    of hundreds of nats, where naive's own error is a matter of luck.
    """
    own = torch.finfo(dtype).eps
    return 256 * FP32 if name == "loss_err" and dtype is torch.float32 else 16 * own


def steps(setup: Setup, rounds: int, remote: bool | None = None) -> list[dict[str, Any]]:
    """One row per method, refused and failed ones too; `remote` as in `measure_group`."""
    remote = setup.device == "cpu" if remote is None else remote
    place = measure.Worker if remote else measure.Local
    start = partial(place, StepTask, setup, torch.get_num_threads())

    def ask(exact: bool, question: str, *values: Any) -> Any:
        """Of naive, in a task of its own, which is gone before the next comes."""
        task = start("naive", exact)
        try:
            return task.call(question, *values)
        finally:
            task.close()

    try:
        truth = ask(True, "gradients")
        budget = ask(False, "check", truth)
    except measure.WorkerFailed as failed:  # nobody can be judged
        return [{"method": name} | asdict(setup) | measure.failure(failed) for name in METHODS]

    def refuse(method: str, found: dict[str, float]) -> str | None:
        return refusal(found, budget, getattr(torch, setup.dtype), step_band)

    tasks = {method: start(method) for method in METHODS}
    rows, times = measure.contest(tasks, truth, refuse, measure.Plan(rounds))
    for method in METHODS:
        row = rows[method] = {"method": method} | asdict(setup) | rows[method]
        if row["status"] == "ok":
            row |= measure.spread([t.total for t in times[method]], "step")
            row["tokens_per_s"] = 1000 * setup.tokens / row["step_ms"]
            row["tokens_per_s_max"] = 1000 * setup.tokens / row["step_ms_min"]
    return list(rows.values())


def longest(trial: Callable[[int], bool], unit: int, most: int) -> int:
    """The largest multiple of `unit` up to `most` that passes, by bisection; 0 for none."""
    lengths = range(unit, most + 1, unit)
    return unit * bisect.bisect(lengths, False, key=lambda length: not trial(length))


def longest_under(
    setup: Setup, method: str, cap_gib: float, unit: int, most: int
) -> list[dict[str, Any]]:
    """The row of a method: the longest sequence whose step fits under `cap_gib` of GPU memory."""
    if setup.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * 2**30 / total))
    task = measure.Local(StepTask, setup, torch.get_num_threads(), method)
    row = {"method": method} | asdict(setup) | {"cap_gib": cap_gib, "status": "ok"}
    try:
        row["length"] = longest(partial(task.call, "fits"), unit, most)
    except measure.WorkerFailed as failed:
        row |= measure.failure(failed)
    task.close()
    return [row]


def setups(device: str, names: list[str]) -> list[Setup]:
    """The batch that each model is measured with: 8192 tokens on a GPU, 8B models in 4 bit."""
    if device != "cuda":
        return [Setup(name) for name in names]
    batch: dict[str, Any] = {"pairs": 4, "length": 1024, "prompt": 256, "device": device}
    batch["checked_pairs"] = 1  # the fp64 copy's activations of all would hardly fit
    big = {"four_bit": True, "checkpoint": True}
    return [
        Setup(name, dtype="bfloat16", **batch, **(big if name.endswith("8b") else {}))
        for name in names
    ]


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    models: Annotated[str, typer.Option(help=f"of {', '.join(MODELS)}")] = "",
    rounds: Annotated[int, typer.Option(help="interleaved steps")] = 5,
    processes: Annotated[
        bool | None, typer.Option(help="one process per method; default: on a CPU")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="result file without suffix")] = None,
    cap_gib: Annotated[
        float, typer.Option(help="0, or: the longest sequence under so much GPU memory")
    ] = 0,
    unit: Annotated[int, typer.Option(help="lengths tried are multiples of this")] = 512,
    most: Annotated[int, typer.Option(help="the longest length tried")] = 1 << 17,
) -> None:
    """Measure one training step per model and method, or the longest sequence that fits."""
    where = torch.device(device)
    names = models or ("llama-3.2-1b,qwen3-8b" if device == "cuda" else "tiny-llama-32k")
    stem = out or default_stem(where, "longest" if cap_gib else "steps")
    table = beside(stem, ".csv")
    done = {(row["model"], row["method"]) for row in read_rows(table)}
    missing = {
        setup: [method for method in METHODS if (setup.model, method) not in done]
        for setup in setups(device, names.split(","))
    }
    todo: list[Callable[[], list[dict[str, Any]]]] = []
    for setup, methods in missing.items():
        if not cap_gib and methods:
            todo.append(partial(steps, setup, rounds, processes))
            continue
        one = replace(setup, pairs=1, checkpoint=True)
        todo += [partial(longest_under, one, method, cap_gib, unit, most) for method in methods]
    if todo:
        begin(stem, where)
    for measure_next in todo:
        append_rows(table, measure_next())  # a call that is cut off leaves what is done
        beside(stem, ".md").write_text(steps_table(read_rows(table)))
    print(f"{steps_table(read_rows(table))}{table}")


if __name__ == "__main__":
    typer.run(main)
