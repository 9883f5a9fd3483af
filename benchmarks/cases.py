"""What is measured: real heads by tokens, scaled-down heads for the CPU, and the tensors of a case.

The tensors imitate a trained language model, because speed and error depend on how peaked the
softmax is (gradient filtering skips tiny probabilities, rounding hurts large logits):

- unigram bias: one coordinate of every hidden state is constant and the head's entry of word v in
  that coordinate is log of a Zipf law, p_v ~ 1 / (v + 2.7); word ids are frequency ranks, as in BPE
  vocabularies roughly;
- every other coordinate of the head is Gaussian with rows of unit norm, so each token's logits
  scatter by `NOISE` nats around the bias;
- each token's hidden state is aligned with one word drawn from the Zipf law, which lifts the logit of
  that word by m ~ Normal(`LIFT_MEAN`, `LIFT_STD`) nats: some tokens are certain, some are open;
- labels are drawn from the model's own softmax (Gumbel trick over vocabulary blocks), so the mean of
  -log p(label) equals the mean entropy, as in a calibrated model.

Every result row carries the mean p(label), the mean log p(label) and the mean entropy
(`truth.Truth.sharpness`). The upstream gradient g has both signs and varies per token, like the slope
of a preference loss with length normalisation: the first half of the sequences is chosen, the second
rejected.

A head is dense, or a layer as users have it: `nf4` is a bitsandbytes Linear4bit made of the dense
weight, `lora` a PEFT layer around it whose B is drawn too. Labels come from the layer's own softmax.

Heads named as in `real_models` are the real thing: trained weights, hidden states and labels of real
dialogues.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import real_models

NOISE = 2.0
LIFT_MEAN = 14.0
LIFT_STD = 5.0
ZIPF_OFFSET = 2.7
SEED = 20260


class HeadShape(NamedTuple):
    vocab: int
    hidden: int
    softcap: float = 0.0


# Shapes from the models' config.json. Gemma 3 4B has 262208 rows (64 more than its text-only
# siblings).
HEADS = {
    "llama-3-8b": HeadShape(128256, 4096),
    "llama-3.2-1b": HeadShape(128256, 2048),
    "qwen3-0.6b": HeadShape(151936, 1024),
    "qwen3-8b": HeadShape(151936, 4096),
    "gemma-3-270m": HeadShape(262144, 640),
    "gemma-3-4b": HeadShape(262208, 2560),
    "gemma-2-2b": HeadShape(256000, 2304, softcap=30.0),
    "mistral-7b-v0.3": HeadShape(32768, 4096),
    "claim": HeadShape(32768, 512),
    "packed": HeadShape(128256, 1024),
    "scaling": HeadShape(16384, 256),
    "scaling-gpu": HeadShape(131072, 2048),
    "tiny": HeadShape(300, 64),
    # Real weights and hidden states (`real_models`).
    "smollm2": HeadShape(49152, 576),
    "gemma3-270m": HeadShape(262144, 640),
}

# frozen: gradient of the hidden states. trainable: also of the head (lora: of A and B). score: forward
# without gradients (a reference model). step: score, then frozen (what a preference step does).
MODES = ("frozen", "trainable", "score", "step")
LORA_RANK, LORA_SCALING, LORA_B_STD = 16, 2, 0.05


@dataclass(frozen=True)
class Case:
    """One problem: a head, a number of scored tokens, a dtype and what is asked for."""

    head: str
    tokens: int
    vocab: int
    hidden: int
    dtype: str = "float32"
    mode: str = "frozen"
    kind: str = "dense"  # or "nf4", "lora"
    softcap: float = 0.0
    scaled: int = 1  # both V and D of the named head were divided by this
    sequences: int = 8
    workspace_mib: float = 256

    @property
    def key(self) -> str:
        scaled = f"/{self.scaled}" if self.scaled > 1 else ""
        kind = "" if self.kind == "dense" else f"+{self.kind}"
        space = "" if self.workspace_mib == 256 else f"-{self.workspace_mib:g}MiB"
        return f"{self.head}{scaled}{kind}@{self.tokens}-{self.dtype}-{self.mode}{space}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def case_of(head: str, tokens: int, *, scaled: int = 1, **options: Any) -> Case:
    vocab, hidden, softcap = HEADS[head]
    shape = {"vocab": vocab // scaled, "hidden": hidden // scaled, "softcap": softcap}
    return Case(head, tokens, scaled=scaled, **(shape | options))


class CaseSet(NamedTuple):
    """Most telling first, so that a run that is cut off still gives a table."""

    cases: list[Case]
    peers: str = "all"  # a set with peers of its own has a result file of its own


def _scaling(base: Case, backend: str, **axes: Iterable[int]) -> CaseSet:
    """One axis moves, the others stay; the head's name tells the points."""
    points = [(axis, value) for axis, values in axes.items() for value in values]
    cases = [replace(base, **{"head": f"scaling-{a}-{v}", a: v}) for a, v in points]
    return CaseSet(cases, f"naive,dilkern-{backend}")


def _powers(first: int, last: int) -> list[int]:
    return [1 << n for n in range(first, last + 1)]


BY_WIDTH = ("llama-3-8b", "llama-3.2-1b", "qwen3-0.6b")  # D = 4096, 2048, 1024
FILTER_PEERS = (
    "naive,compile,cce-compile,trl,liger-selective,liger-dpo,"
    "filter-10,filter-12,filter-14,filter-16,filter-18,filter-20,filter-auto"
)
_tiny = partial(case_of, "tiny", 64, sequences=4)
_half = partial(case_of, "claim", 1024)
_gemma, _smol = partial(case_of, "gemma3-270m"), partial(case_of, "smollm2")
_bf16 = partial(case_of, tokens=8192, dtype="bfloat16")
CASE_SETS = {
    "tiny": CaseSet(
        [
            *(_tiny(mode=mode) for mode in ("frozen", "trainable", "score")),
            *(_tiny(kind="nf4"), _tiny(kind="lora", mode="trainable")),
        ]
    ),
    "claim": CaseSet([case_of("claim", 2048)], "naive,trl,dilkern-torch"),
    "cpu": CaseSet(  # under seven minutes on two quiet cores
        [
            case_of("claim", 2048),
            *(_half(mode=mode) for mode in MODES),
            *(_half(kind="nf4"), _half(kind="lora", mode="trainable"), _half(dtype="bfloat16")),
            case_of("claim", 512),
            case_of("gemma-2-2b", 512, scaled=4),
            *(case_of(h, 512, scaled=4) for h in ("llama-3-8b", "qwen3-8b", "mistral-7b-v0.3")),
            *(case_of(h, 512, scaled=2) for h in ("qwen3-0.6b", "gemma-3-270m")),
        ]
    ),
    "cpu-real": CaseSet([case_of(head, 512) for head in ("qwen3-0.6b", "gemma-3-270m")]),
    "packed": CaseSet(  # where the dtype is 16 bits, a 4-bit head's blocks are widened on a CPU
        [
            case_of("packed", 512, kind="nf4", dtype=dtype, workspace_mib=mib)
            for dtype in ("float32", "bfloat16")
            for mib in (32, 64, 256)
        ],
        "naive,dilkern-torch",
    ),
    "filter": CaseSet(  # the word filter on real models
        [
            *(_gemma(2048), _smol(4096)),
            *(_gemma(2048, mode="trainable"), _smol(4096, mode="trainable")),
            *(_gemma(1024), _smol(2048), _smol(1024)),
            # What full logits in 16 bits err by, which "auto" is measured against.
            *(_gemma(256, dtype="bfloat16"), _smol(512, dtype="bfloat16")),
        ],
        f"{FILTER_PEERS},dilkern-torch,drop-12,drop-14,drop-16",
    ),
    "filter-gpu": CaseSet(
        [
            head(8192, dtype="bfloat16", mode=mode)
            for mode in ("frozen", "trainable")
            for head in (_gemma, _smol)
        ],
        f"{FILTER_PEERS},dilkern-triton,cce,cce-unfiltered",
    ),
    "gpu": CaseSet(  # the sizes of the goals, other heads, other numbers of tokens
        [
            *(_bf16(h, mode=mode) for mode in ("frozen", "score", "trainable") for h in BY_WIDTH),
            *(_bf16(h, tokens=512) for h in BY_WIDTH),
            *map(
                _bf16, ("gemma-3-4b", "gemma-3-270m", "gemma-2-2b", "qwen3-8b", "mistral-7b-v0.3")
            ),
            *(_bf16("llama-3-8b", kind="nf4"), _bf16("llama-3-8b", kind="lora", mode="trainable")),
            _bf16("llama-3-8b", mode="step"),
            *(
                _bf16(h, tokens=tokens)
                for tokens in (2048, 32768, 65536)
                for h in ("llama-3-8b", "qwen3-0.6b", "gemma-3-4b")
            ),
            *(_bf16("qwen3-0.6b", dtype=dtype) for dtype in ("float32", "float16")),
        ]
    ),
    "scaling": _scaling(
        case_of("scaling", 1024),
        "torch",
        tokens=_powers(8, 11),
        vocab=_powers(12, 18),
        hidden=_powers(7, 10),
        workspace_mib=(4, 16, 64, 256),
    ),
    "scaling-gpu": _scaling(
        _bf16("scaling-gpu"),
        "triton",
        tokens=_powers(10, 15),
        vocab=_powers(14, 18),
        hidden=_powers(9, 13),
        workspace_mib=_powers(6, 10),
    ),
    "scaling-tiny": _scaling(case_of("tiny", 16), "torch", tokens=(16, 32), workspace_mib=(1, 4)),
}


def label_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """log p(label) (...) from full logits (..., V): what everybody writes first."""
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def logits_of(hidden: Tensor, head: Tensor | nn.Module, softcap: float) -> Tensor:
    """Full logits in fp32, by the head's own forward."""
    raw = F.linear(hidden, head) if isinstance(head, Tensor) else head(hidden)
    return softcapped(raw.float(), softcap)


def build_layer(kind: str, weight: Tensor) -> nn.Module | None:
    """The layer of a head that is not dense, around `weight` (V, D); None for a dense one."""
    if kind == "dense":
        return None
    vocab, width = weight.shape
    if kind == "nf4":
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(
            width, vocab, bias=False, compute_dtype=weight.dtype, device="meta"
        )
        layer.weight = bnb.nn.Params4bit(
            weight.detach().clone(), requires_grad=False, quant_type="nf4", module=layer
        )
        # Left in training mode: on some CPUs bitsandbytes repacks the weight in eval mode.
        return layer.to(weight.device)
    from peft import LoraConfig, inject_adapter_in_model

    base = nn.Linear(width, vocab, bias=False, device="meta")
    base.weight = nn.Parameter(weight.detach(), requires_grad=False)
    alpha = LORA_SCALING * LORA_RANK
    config = LoraConfig(r=LORA_RANK, lora_alpha=alpha, target_modules=["lm_head"])
    layer = inject_adapter_in_model(config, nn.ModuleDict({"lm_head": base}))["lm_head"]
    rng = torch.Generator(weight.device).manual_seed(SEED)
    for part, std in ((layer.lora_A, width**-0.5), (layer.lora_B, LORA_B_STD)):
        part.float()  # as get_peft_model keeps adapters over a 16-bit base
        part["default"].weight.data.normal_(0, std, generator=rng)
    return layer


@dataclass
class Inputs:
    """The tensors of a case, the same for every peer."""

    case: Case
    hidden: Tensor  # (T, D)
    weight: Tensor  # (V, D); of an NF4 head what was quantised, of a LoRA head the base
    labels: Tensor  # (T,)
    grad: Tensor  # (T,) upstream gradient g of the token log-probs, fp32

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @cached_property
    def layer(self) -> nn.Module | None:
        """The head as users have it, to the same bits wherever it is built; None: `weight` is it."""
        return build_layer(self.case.kind, self.weight)

    @property
    def trained(self) -> list[Tensor]:
        """What mode "trainable" trains: the weight, or A and B."""
        if self.layer is None:
            return [self.weight]
        return [p for name, p in self.layer.named_parameters() if "lora" in name]

    @property
    def head(self) -> Tensor | nn.Module:
        return self.weight if self.layer is None else self.layer

    def effective_weight(self, dtype: torch.dtype) -> Tensor:
        """The dense weight (V, D) that the head stands for."""
        if self.case.kind == "nf4":
            from bitsandbytes.functional import dequantize_4bit

            packed = self.layer.weight
            return dequantize_4bit(packed.data, packed.quant_state).to(dtype)
        if self.case.kind == "lora":
            a, b = (p.detach().to(dtype) for p in self.trained)
            return torch.addmm(self.weight.detach().to(dtype), b, a, alpha=LORA_SCALING)
        return self.weight.detach().to(dtype)

    def head_gradients(self, d_weight: Tensor) -> list[Tensor]:
        """From the gradient of the effective weight (V, D) to those of `trained`."""
        if self.case.kind != "lora":
            return [d_weight]
        a, b = (p.detach().to(d_weight.dtype) for p in self.trained)
        return [LORA_SCALING * (b.T @ d_weight), LORA_SCALING * (d_weight @ a.T)]

    def require_grads(self) -> Inputs:
        """Mark what this mode differentiates."""
        self.hidden.requires_grad_(self.case.mode != "score")
        for tensor in self.trained:
            tensor.requires_grad_(self.case.mode == "trainable")
        return self

    def clear_grads(self) -> None:
        for tensor in (self.hidden, *self.trained):
            tensor.grad = None

    def detached(self) -> Inputs:
        """The same bits in tensors, and in a layer, of its own."""
        return replace(self, hidden=self.hidden.detach(), weight=self.weight.detach())


def softcapped(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def make_inputs(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """Build the tensors of a case; the same device gives the same bits."""
    device = torch.device(device)
    rng = torch.Generator(device).manual_seed(SEED)
    options = {"generator": rng, "device": device, "dtype": torch.float32}
    tokens, vocab, width = case.tokens, case.vocab, case.hidden
    slope = partial(_slope, case, options)
    if case.head in real_models.SOURCES:
        seen = real_models.hidden_states(case.head, tokens)
        hidden, weight = (x.to(device, case.torch_dtype) for x in (seen.hidden, seen.weight))
        return Inputs(case, hidden, weight, seen.labels.to(device), slope())
    zipf = (torch.arange(vocab, device=device, dtype=torch.float32) + ZIPF_OFFSET).reciprocal()
    weight = torch.randn(vocab, width, **options).div_(width**0.5)
    weight[:, 0] = zipf.log() / 8  # with the constant coordinate 8 below: a bias of log zipf
    words = torch.multinomial(zipf, tokens, replacement=True, generator=rng)
    lift = LIFT_MEAN + LIFT_STD * torch.randn(tokens, **options)
    hidden = NOISE * torch.randn(tokens, width, **options) + lift.unsqueeze(1) * weight[words]
    hidden[:, 0] = 8
    hidden, weight = hidden.to(case.torch_dtype), weight.to(case.torch_dtype)
    found = Inputs(case, hidden, weight, words, lift)

    best = torch.full((tokens,), -torch.inf, device=device)
    labels = torch.zeros(tokens, dtype=torch.int64, device=device)
    size = max(1, 2**25 // tokens)
    for number, part in enumerate(found.effective_weight(torch.float32).split(size)):
        logits = softcapped(hidden.float() @ part.T, case.softcap)
        gumbel = torch.rand(logits.shape, **options).clamp_(1e-20).log_().neg_().log_().neg_()
        top, where = (logits + gumbel).max(1)
        labels = torch.where(top > best, where + number * size, labels)
        best = torch.maximum(best, top)

    found.labels, found.grad = labels, slope()
    return found


def _slope(case: Case, options: dict[str, Any]) -> Tensor:
    """The upstream gradient (T,)."""
    slope = (0.5 + torch.rand(case.tokens, **options)) / (case.tokens / case.sequences)
    slope[: case.tokens // 2] *= -1
    return slope
