"""One whole training step, policy and reference, LoRA: `python -m benchmarks.end_to_end`.

The model is a real architecture with random weights. A step is: reference log-probs (adapter off, no
gradient), policy log-probs, DPO loss on their sums over the completion, backward, AdamW on the
adapter. Three ways to the log-probs, everything else the same:

- naive: the model's full logits, log_softmax, gather;
- trl: TRL's `add_fused_lm_head`, installed and called as its DPOTrainer does, but asked for log-probs
  alone (its trainer also logs entropy and more). Without Triton on the device it scores prompt
  positions too: that is its own choice, kept;
- dilkern: the backbone's hidden states and `linear_logps`.

The first step's loss and adapter gradient must agree with an fp64 copy of the model (of a 4-bit one,
of its decoded weights) within twice the error of naive before a row is written; of a model with
`checked_pairs` that is done on the first pairs of the batch. `--cap-gib 24` asks another question: the
longest sequence whose step fits, found by bisection, one pair per step.
"""

from __future__ import annotations

import csv
import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor

from benchmarks import environment
from benchmarks.cases import SEED, build_layer
from benchmarks.measure import (
    Clock,
    Local,
    PeakMemory,
    Timing,
    Worker,
    WorkerFailed,
    is_out_of_memory,
    spread,
)

METHODS = ("naive", "trl", "dilkern")
BETA = 0.1


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


def _llama(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        tie_word_embeddings=True,
        max_position_embeddings=1 << 20,
    )


def _qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
        max_position_embeddings=1 << 20,
    )


MODELS = {
    # No smaller: bitsandbytes 0.50 decodes wrongly on a CPU where D is no multiple of its block of 64.
    "micro": lambda: _llama(512, 64, 128, 1, 2, 2),
    "tiny-llama-32k": lambda: _llama(32768, 256, 688, 4, 4, 2),
    "llama-3.2-1b": lambda: _llama(128256, 2048, 8192, 16, 32, 8),
    "qwen3-0.6b": lambda: _qwen3(1024, 3072, 28, 16, True),
    "qwen3-8b": lambda: _qwen3(4096, 12288, 36, 32, False),
}


def build_model(setup: Setup, dtype: torch.dtype, fused: bool) -> Any:
    """The model with its adapter; LoRA's B is drawn too, so that policy and reference differ."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(SEED)
    # Made in the measured dtype: an fp64 copy is the truth of the same weights.
    with torch.device(setup.device):
        base = AutoModelForCausalLM.from_config(
            MODELS[setup.model](), dtype=getattr(torch, setup.dtype)
        )
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
                parameter.copy_(drawn.to(getattr(torch, setup.dtype)))
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
    vocab = MODELS[setup.model]().vocab_size
    rng = torch.Generator().manual_seed(SEED)
    zipf = (torch.arange(vocab, dtype=torch.float32) + 2.7).reciprocal()
    shape = (2 * setup.pairs, setup.length)
    ids = torch.multinomial(zipf, setup.tokens, replacement=True, generator=rng).view(shape)
    labels = ids.clone()
    labels[:, : setup.prompt] = -100
    return ids.to(setup.device), labels.to(setup.device)


def naive_logps(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    logits = logits if logits.dtype is torch.float64 else logits.float()
    mask, wanted = labels[:, 1:] != -100, labels[:, 1:].clamp(min=0)
    picked = logits.log_softmax(-1).gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
    return (picked * mask).sum(1)


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

    def __init__(self, setup: Setup, method: str, threads: int, exact: bool = False) -> None:
        torch.set_num_threads(threads)
        self.setup, self.logps = setup, LOGPS[method]
        dtype = torch.float64 if exact else getattr(torch, setup.dtype)
        self.model = build_model(setup, dtype, fused=method == "trl")
        self.ids, self.labels = make_batch(setup)
        self.parameters = [p for n, p in self.model.named_parameters() if "lora" in n]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad(), self.model.disable_adapter():
            reference = self.logps(self.model, ids, labels)
        ratios = self.logps(self.model, ids, labels) - reference
        chosen, rejected = ratios.chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    def gradients(self) -> tuple[float, Tensor]:
        """Loss and adapter gradient of the first step, without the step."""
        self.optimizer.zero_grad()
        pairs, checked = self.setup.pairs, self.setup.checked_pairs or self.setup.pairs
        rows = [*range(checked), *range(pairs, pairs + checked)]  # chosen first
        loss = self.loss(self.ids[rows], self.labels[rows])
        loss.backward()
        found = torch.cat([p.grad.flatten().double().cpu() for p in self.parameters])
        self.optimizer.zero_grad()
        return loss.item(), found

    def first(self) -> dict[str, float]:
        """Warm up on a short batch, then watch the memory of one step."""
        cut = self.setup.prompt + 2
        self.loss(self.ids[:, :cut], self.labels[:, :cut]).backward()
        self.optimizer.zero_grad()
        with PeakMemory(torch.device(self.setup.device)) as peak:
            self.run()
        return {"peak_mib": peak.mib}

    def run(self) -> Timing:
        clock = Clock(torch.device(self.setup.device))
        self.optimizer.zero_grad()
        self.loss(self.ids, self.labels).backward()
        self.optimizer.step()
        clock.mark()
        return Timing(*clock.seconds() * 2)

    def fits(self, length: int) -> bool:
        """Whether a step on sequences of `length` ends without running out of memory."""
        self.ids, self.labels = make_batch(replace(self.setup, length=length, prompt=length // 4))
        try:
            self.run()
        except RuntimeError as error:
            if not is_out_of_memory(str(error)):
                raise
            fitted = False
        else:
            fitted = True
        # Outside the except block: the traceback holds the tensors of the failed step.
        self.optimizer.zero_grad()
        gc.collect()
        if self.setup.device == "cuda":
            torch.cuda.empty_cache()
        return fitted


def errors(found: tuple[float, Tensor], truth: tuple[float, Tensor]) -> dict[str, float]:
    gap = (found[1] - truth[1]).norm() / truth[1].norm()
    return {"loss_err": abs(found[0] - truth[0]), "grad_err": gap.item()}


def refusal(found: dict[str, float], naive: dict[str, float], dtype: torch.dtype) -> str | None:
    """None if within twice naive's error plus a band of roundings.

    16 units of the dtype; for the loss in fp32 256, as in `truth.refusal`: one scalar, made of sums
    of hundreds of nats, where naive's own error is a matter of luck.
    """
    for name, value in found.items():
        units = 256 if name == "loss_err" and dtype is torch.float32 else 16
        limit = 2 * naive[name] + units * torch.finfo(dtype).eps
        if not value <= limit:
            return f"{name} {value:.3g} > {limit:.3g}"
    return None


def measure(
    setup: Setup, rounds: int, tick: Any = lambda text: None, remote: bool | None = None
) -> list[dict[str, Any]]:
    """One row per method, refused and failed ones too; `remote` as in `measure_group`."""
    threads = torch.get_num_threads()
    remote = setup.device == "cpu" if remote is None else remote

    def start(method: str, exact: bool = False) -> Worker | Local:
        if remote:
            return Worker(StepTask, setup, method, threads, exact)
        return Local(lambda: StepTask(setup, method, threads, exact))

    tick("fp64")
    judge = start("naive", exact=True)
    try:
        truth = judge.call("gradients")
    finally:
        if isinstance(judge, Local):
            judge.task = None  # the fp64 copy goes before the models come
        judge.close()
    rows: dict[str, dict[str, Any]] = {}
    workers: dict[str, Worker | Local] = {}
    budget: dict[str, float] = {}
    try:
        for method in METHODS:
            tick(method)
            rows[method] = {"method": method} | asdict(setup)
            worker = start(method)
            try:
                found = errors(worker.call("gradients"), truth)
                budget = found if method == "naive" else budget
                rows[method] |= found
                reason = refusal(found, budget or found, getattr(torch, setup.dtype))
                if reason is not None:
                    rows[method] |= {"status": "refused", "reason": reason}
                    worker.close()
                    continue
                if remote:  # a process in which nothing of this size has run yet
                    worker.close()
                    worker = start(method)
                rows[method] |= worker.call("first")
                workers[method] = worker
            except WorkerFailed as failed:
                status = "OOM" if is_out_of_memory(str(failed)) else "error"
                rows[method] |= {"status": status, "reason": str(failed)[:300]}
                worker.close()
        times: dict[str, list[float]] = {method: [] for method in workers}
        for number in range(-1, rounds):
            tick(f"round {number + 1} of {rounds}")
            names = list(workers)
            turn = (number + 1) % max(1, len(names))
            for name in names[turn:] + names[:turn]:
                seconds = workers[name].call("run").total
                if number >= 0:
                    times[name].append(seconds)
    finally:
        for worker in workers.values():
            worker.close()
    for name, seconds in times.items():
        rows[name] |= spread(seconds, "step") | {"status": "ok", "rounds": rounds}
        rows[name]["tokens_per_s"] = 1000 * setup.tokens / rows[name]["step_ms"]
        rows[name]["tokens_per_s_max"] = 1000 * setup.tokens / rows[name]["step_ms_min"]
    return list(rows.values())


def longest(trial: Callable[[int], bool], unit: int, most: int) -> int:
    """The largest multiple of `unit` up to `most` that passes, by doubling and bisection; 0 for none.

    It stops where the bracket is narrower than a sixteenth.
    """
    good, bad = 0, unit
    while bad <= most and trial(bad):
        good, bad = bad, 2 * bad
    if bad > most:
        return good
    while bad - good > max(unit, good // 16):
        middle = (good + bad) // 2 // unit * unit
        good, bad = (middle, bad) if trial(middle) else (good, middle)
    return good


def longest_under(
    setup: Setup, cap_gib: float, unit: int, most: int, tick: Any = lambda text: None
) -> list[dict[str, Any]]:
    """One row per method: the longest sequence whose step fits under `cap_gib` of GPU memory."""
    if setup.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * 2**30 / total))
    rows = []
    for method in METHODS:
        worker = Local(lambda m=method: StepTask(setup, m, torch.get_num_threads()))

        def trial(length: int, worker: Local = worker, method: str = method) -> bool:
            tick(f"{method}: {length}")
            return worker.call("fits", length)

        row: dict[str, Any] = {"method": method} | asdict(setup)
        row |= {"cap_gib": cap_gib, "status": "ok"}
        try:
            row["length"] = longest(trial, unit, most)
        except WorkerFailed as failed:
            row |= {"status": "error", "reason": str(failed)[:300]}
        worker.task = None
        worker.close()
        rows.append(row)
    return rows


FIELDS = (
    *("model", "method", "device", "dtype", "pairs", "length", "prompt", "lora_r", "status"),
    *("four_bit", "checkpoint", "checked_pairs", "cap_gib"),
    *("reason", "rounds", "step_ms", "step_ms_p20", "step_ms_p80", "step_ms_min"),
    *("tokens_per_s", "tokens_per_s_max", "peak_mib", "loss_err", "grad_err"),
)


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | log-probs by | tokens/s (median) | step ms (min) | peak above model, MiB | "
        "relative error of the adapter gradient |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["status"] != "ok":
            lines.append(
                f"| {row['model']} | {row['method']} | {row['status']}: {row['reason']} | | | |"
            )
            continue
        if row.get("cap_gib"):
            lines.append(
                f"| {row['model']} | {row['method']} | longest sequence under "
                f"{row['cap_gib']:g} GiB: {row['length']} | | | |"
            )
            continue
        lines.append(
            f"| {row['model']} | {row['method']} | {float(row['tokens_per_s']):.0f} "
            f"| {float(row['step_ms']):.0f} ({float(row['step_ms_min']):.0f}) "
            f"| {float(row['peak_mib']):.0f} | {float(row['grad_err']):.1e} |"
        )
    return "\n".join(lines) + "\n"


def setups(device: str, names: list[str]) -> list[Setup]:
    """The batch that each model is measured with: 8192 tokens on a GPU, 8B models in 4 bit."""
    if device != "cuda":
        return [Setup(name) for name in names]
    batch: dict[str, Any] = {"pairs": 4, "length": 1024, "prompt": 256, "device": device}
    big = {"four_bit": True, "checkpoint": True, "checked_pairs": 1}
    return [
        Setup(name, dtype="bfloat16", **batch, **(big if name.endswith("8b") else {}))
        for name in names
    ]


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    models: Annotated[str, typer.Option(help=f"of {', '.join(MODELS)}")] = "",
    rounds: Annotated[int, typer.Option(help="interleaved steps")] = 5,
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
    stem = environment.default_stem(where)
    stem = out or stem.with_name(f"{stem.name}-{'longest' if cap_gib else 'steps'}")
    environment.record(stem.with_name(stem.name + ".json"), where)
    rows: list[dict[str, Any]] = []
    console = Console(stderr=True)
    for setup in setups(device, names.split(",")):
        with console.status(setup.model) as status:

            def tick(text: str, name: str = setup.model, status: Any = status) -> None:
                status.update(f"{name}: {text}")

            if cap_gib:
                one = replace(setup, pairs=1, checkpoint=True)
                rows += longest_under(one, cap_gib, unit, most, tick)
            else:
                rows += measure(setup, rounds, tick)
        # After each model, so that a call that is cut off leaves its rows.
        with stem.with_name(stem.name + ".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
        stem.with_name(stem.name + ".md").write_text(markdown(rows))
    print(markdown(rows) + str(stem.with_name(stem.name + ".csv")))


if __name__ == "__main__":
    typer.run(main)
