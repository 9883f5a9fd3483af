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

`describe` returns the mean p(label), the mean log p(label) and the mean entropy; every result row
carries them. The upstream gradient g has both signs and varies per token, like the slope of a
preference loss with length normalisation: the first half of the sequences is chosen, the second
rejected.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

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
    "qwen3-0.6b": HeadShape(151936, 1024),
    "qwen3-8b": HeadShape(151936, 4096),
    "gemma-3-270m": HeadShape(262144, 640),
    "gemma-3-4b": HeadShape(262208, 2560),
    "gemma-2-2b": HeadShape(256000, 2304, softcap=30.0),
    "mistral-7b-v0.3": HeadShape(32768, 4096),
    "claim": HeadShape(32768, 512),
}

# frozen: gradient of the hidden states. trainable: also of the head. score: forward without
# gradients (a reference model). step: score, then frozen (what a preference step does).
MODES = ("frozen", "trainable", "score", "step")


@dataclass(frozen=True)
class Case:
    """One problem: a head, a number of scored tokens, a dtype and what is asked for."""

    head: str
    tokens: int
    vocab: int
    hidden: int
    dtype: str = "float32"
    mode: str = "frozen"
    softcap: float = 0.0
    scaled: int = 1  # both V and D of the named head were divided by this
    sequences: int = 8
    workspace_mib: float = 256

    @property
    def key(self) -> str:
        scaled = f"/{self.scaled}" if self.scaled > 1 else ""
        return f"{self.head}{scaled}@{self.tokens}-{self.dtype}-{self.mode}"

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
    claim = case_of("claim", 2048)
    return [
        *(claim.with_mode(mode) for mode in MODES),
        case_of("claim", 2048, dtype="bfloat16"),
        case_of("llama-3-8b", 1024, scaled=4),
        case_of("qwen3-0.6b", 1024, scaled=2),
        case_of("gemma-3-270m", 1024, scaled=2),
        case_of("gemma-2-2b", 512, scaled=4),
        case_of("mistral-7b-v0.3", 1024, scaled=4),
        *(case_of("claim", tokens) for tokens in (512, 1024, 4096)),
    ]


def _gpu() -> list[Case]:
    """Most telling first, so that a short lease still gives a table."""
    bf16 = {"dtype": "bfloat16"}
    first = [
        case_of(head, 8192, mode=mode, **bf16)
        for mode in ("frozen", "step", "trainable")
        for head in ("llama-3-8b", "qwen3-0.6b", "gemma-3-270m")
    ]
    heads = ("qwen3-8b", "gemma-3-4b", "gemma-2-2b", "mistral-7b-v0.3")
    second = [case_of(head, 8192, **bf16) for head in heads]
    third = [
        case_of(head, tokens, **bf16)
        for tokens in (512, 2048, 32768, 65536)
        for head in ("llama-3-8b", "qwen3-0.6b", "gemma-3-4b")
    ]
    fourth = [case_of("qwen3-0.6b", 8192), case_of("qwen3-0.6b", 8192, dtype="float16")]
    return first + second + third + fourth


# The sets that `run.py --cases` knows.
CASE_SETS = {
    "tiny": lambda: [
        Case("tiny", 64, 300, 16, mode=mode, sequences=4) for mode in ("frozen", "trainable")
    ],
    "claim": lambda: [case_of("claim", 2048)],
    "cpu": _cpu,
    "cpu-real": lambda: [case_of("qwen3-0.6b", 512), case_of("gemma-3-270m", 512)],
    "gpu": _gpu,
}


@dataclass
class Inputs:
    """The tensors of a case, the same for every peer."""

    case: Case
    hidden: Tensor  # (T, D)
    weight: Tensor  # (V, D)
    labels: Tensor  # (T,)
    grad: Tensor  # (T,) upstream gradient g of the token log-probs, fp32

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def wants_grad(self) -> bool:
        return self.case.mode != "score"

    def require_grads(self) -> Inputs:
        """Mark what this mode differentiates."""
        self.hidden.requires_grad_(self.wants_grad)
        self.weight.requires_grad_(self.case.mode == "trainable")
        return self

    def clear_grads(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def detached(self) -> Inputs:
        return replace(self, hidden=self.hidden.detach(), weight=self.weight.detach())

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("hidden", "weight", "labels", "grad")}


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

    best = torch.full((tokens,), -torch.inf, device=device)
    labels = torch.zeros(tokens, dtype=torch.int64, device=device)
    for part in vocab_blocks(vocab, max(1, 2**25 // tokens)):
        logits = softcapped(hidden.float() @ weight[part].float().T, case.softcap)
        gumbel = torch.rand(logits.shape, **options).clamp_(1e-20).log_().neg_().log_().neg_()
        top, where = (logits + gumbel).max(1)
        labels = torch.where(top > best, where + part.start, labels)
        best = torch.maximum(best, top)

    length = tokens / case.sequences
    size = (0.5 + torch.rand(tokens, **options)) / length
    chosen = torch.arange(tokens, device=device) < tokens // 2
    return Inputs(case, hidden, weight, labels, torch.where(chosen, -size, size))
