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
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
}

# frozen: gradient of the hidden states. trainable: also of the head (lora: of A and B). score: forward
# without gradients (a reference model). step: score, then frozen (what a preference step does).
MODES = ("frozen", "trainable", "score", "step")
LORA_RANK, LORA_ALPHA, LORA_B_STD = 16, 32, 0.05


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
        return f"{self.head}{scaled}{kind}@{self.tokens}-{self.dtype}-{self.mode}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def gemm_flops(self) -> int:
        """One pass over the head: 2 T V D."""
        return 2 * self.tokens * self.vocab * self.hidden

    def row(self) -> dict[str, object]:
        return asdict(self)

    def with_mode(self, mode: str) -> Case:
        return replace(self, mode=mode)


def case_of(head: str, tokens: int, *, scaled: int = 1, **options: object) -> Case:
    shape = HEADS[head]
    return Case(
        head,
        tokens,
        shape.vocab // scaled,
        shape.hidden // scaled,
        softcap=shape.softcap,
        scaled=scaled,
        **options,  # type: ignore[arg-type]
    )


def _cpu() -> list[Case]:
    """Most telling first; all of them are meant to take under seven minutes on two quiet cores."""
    half = case_of("claim", 1024)
    return [
        case_of("claim", 2048),
        *(half.with_mode(mode) for mode in MODES),
        case_of("claim", 1024, kind="nf4"),
        case_of("claim", 1024, kind="lora", mode="trainable"),
        case_of("claim", 1024, dtype="bfloat16"),
        case_of("claim", 512),
        case_of("gemma-2-2b", 512, scaled=4),
        *(case_of(h, 512, scaled=4) for h in ("llama-3-8b", "qwen3-8b", "mistral-7b-v0.3")),
        *(case_of(h, 512, scaled=2) for h in ("qwen3-0.6b", "gemma-3-270m")),
    ]


def _gpu() -> list[Case]:
    """Most telling first, so that a short lease still gives a table: the sizes of the goals, other
    heads, other numbers of tokens.
    """
    bf16 = {"dtype": "bfloat16"}
    by_width = ("llama-3-8b", "llama-3.2-1b", "qwen3-0.6b")  # D = 4096, 2048, 1024
    goals = [
        case_of(head, 8192, mode=mode, **bf16)
        for mode in ("frozen", "score", "trainable")
        for head in by_width
    ]
    few = [case_of(head, 512, **bf16) for head in by_width]
    heads = ("gemma-3-4b", "gemma-3-270m", "gemma-2-2b", "qwen3-8b", "mistral-7b-v0.3")
    others = [
        *(case_of(head, 8192, **bf16) for head in heads),
        case_of("llama-3-8b", 8192, kind="nf4", **bf16),
        case_of("llama-3-8b", 8192, kind="lora", mode="trainable", **bf16),
        case_of("llama-3-8b", 8192, mode="step", **bf16),
    ]
    tokens = [
        case_of(head, tokens, **bf16)
        for tokens in (2048, 32768, 65536)
        for head in ("llama-3-8b", "qwen3-0.6b", "gemma-3-4b")
    ]
    dtypes = [case_of("qwen3-0.6b", 8192), case_of("qwen3-0.6b", 8192, dtype="float16")]
    return goals + few + others + tokens + dtypes


# The sets that `run.py --cases` knows.
CASE_SETS = {
    "tiny": lambda: [
        Case("tiny", 64, 300, 64, mode=mode, kind=kind, sequences=4)
        for mode, kind in (
            *((mode, "dense") for mode in ("frozen", "trainable", "score")),
            *(("frozen", "nf4"), ("trainable", "lora")),
        )
    ],
    "claim": lambda: [case_of("claim", 2048)],
    "cpu": _cpu,
    "cpu-real": lambda: [case_of("qwen3-0.6b", 512), case_of("gemma-3-270m", 512)],
    "gpu": _gpu,
}


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

        layer = bnb.nn.Linear4bit(1, 1, bias=False, compute_dtype=weight.dtype)
        layer.in_features, layer.out_features = width, vocab
        layer.weight = bnb.nn.Params4bit(
            weight.detach().clone(), requires_grad=False, quant_type="nf4", module=layer
        )
        # Left in training mode: on some CPUs bitsandbytes repacks the weight in eval mode.
        return layer.to(weight.device)
    from peft import LoraConfig, inject_adapter_in_model

    base = nn.Linear(1, 1, bias=False)
    base.weight = nn.Parameter(weight.detach(), requires_grad=False)
    base.in_features, base.out_features = width, vocab
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=["lm_head"])
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
    layer: nn.Module | None = None  # the head as users have it; None: `weight` is the head

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def wants_grad(self) -> bool:
        return self.case.mode != "score"

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
            scaling = LORA_ALPHA / LORA_RANK
            return torch.addmm(self.weight.detach().to(dtype), b, a, alpha=scaling)
        return self.weight.detach().to(dtype)

    def head_gradients(self, d_weight: Tensor) -> list[Tensor]:
        """From the gradient of the effective weight (V, D) to those of `trained`."""
        if self.case.kind != "lora":
            return [d_weight]
        a, b = (p.detach().to(d_weight.dtype) for p in self.trained)
        scaling = LORA_ALPHA / LORA_RANK
        return [scaling * (b.T @ d_weight), scaling * (d_weight @ a.T)]

    def require_grads(self) -> Inputs:
        """Mark what this mode differentiates."""
        self.hidden.requires_grad_(self.wants_grad)
        for tensor in self.trained:
            tensor.requires_grad_(self.case.mode == "trainable")
        return self

    def clear_grads(self) -> None:
        for tensor in (self.hidden, *self.trained):
            tensor.grad = None

    def detached(self) -> Inputs:
        """The same bits in tensors of its own; a layer is shared."""
        return replace(self, hidden=self.hidden.detach(), weight=self.weight.detach())

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("hidden", "weight", "labels", "grad")}


def load_inputs(case: Case, tensors: dict[str, Tensor]) -> Inputs:
    """From `Inputs.tensors()`, in another process: the layer is built again, to the same bits."""
    return Inputs(case, **tensors, layer=build_layer(case.kind, tensors["weight"]))


def vocab_blocks(vocab: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, vocab)) for start in range(0, vocab, size)]


def softcapped(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def make_inputs(case: Case, device: torch.device | str = "cpu", seed: int = SEED) -> Inputs:
    """Build the tensors of a case; the same seed and device give the same bits."""
    device = torch.device(device)
    rng = torch.Generator(device).manual_seed(seed)
    options = {"generator": rng, "device": device, "dtype": torch.float32}
    tokens, vocab, width = case.tokens, case.vocab, case.hidden
    zipf = (torch.arange(vocab, device=device, dtype=torch.float32) + ZIPF_OFFSET).reciprocal()
    weight = torch.randn(vocab, width, **options).div_(width**0.5)
    weight[:, 0] = zipf.log() / 8  # with the constant coordinate 8 below: a bias of log zipf
    words = torch.multinomial(zipf, tokens, replacement=True, generator=rng)
    lift = LIFT_MEAN + LIFT_STD * torch.randn(tokens, **options)
    hidden = NOISE * torch.randn(tokens, width, **options) + lift.unsqueeze(1) * weight[words]
    hidden[:, 0] = 8
    hidden, weight = hidden.to(case.torch_dtype), weight.to(case.torch_dtype)
    found = Inputs(case, hidden, weight, words, lift, build_layer(case.kind, weight))
    weight = found.effective_weight(torch.float32)

    best = torch.full((tokens,), -torch.inf, device=device)
    labels = torch.zeros(tokens, dtype=torch.int64, device=device)
    for part in vocab_blocks(vocab, max(1, 2**25 // tokens)):
        logits = softcapped(hidden.float() @ weight[part].T, case.softcap)
        gumbel = torch.rand(logits.shape, **options).clamp_(1e-20).log_().neg_().log_().neg_()
        top, where = (logits + gumbel).max(1)
        labels = torch.where(top > best, where + part.start, labels)
        best = torch.maximum(best, top)

    length = tokens / case.sequences
    size = (0.5 + torch.rand(tokens, **options)) / length
    chosen = torch.arange(tokens, device=device) < tokens // 2
    return replace(found, labels=labels, grad=torch.where(chosen, -size, size))
