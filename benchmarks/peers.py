"""Every rival in one file: what is called, with which settings, and where it cannot run.

A peer maps `Inputs` to token log-probs (T,) that take an arbitrary upstream gradient g, or, where it
cannot give those, to the comparable scalar loss named by `output`:

- "token_logps": log p(label) per token; backward receives g (T,);
- "mean_nll": the mean of -log p(label);
- "dpo_loss": DPO (beta 0.1, mean log-probs, first half of the sequences chosen) of the sequences.

`Inputs.layer` is the head where it is not a dense weight; a peer that takes such layers says so
(`layers`), the others refuse the case. Settings are the documented defaults of each package unless a
note says otherwise. Packages are imported inside the calls: a peer that is not installed costs its
own row only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, Inputs, label_logps, logits_of
from benchmarks.truth import BETA


@dataclass(frozen=True)
class Peer:
    """One way to compute the same thing."""

    name: str
    package: str  # the distribution whose version is recorded
    call: Callable[[Inputs], Tensor]
    output: str = "token_logps"
    note: str = ""
    compiles: bool = False  # the first call compiles; its memory and time are kept apart
    compiles_on_gpus: bool = False
    cuda_only: bool = False
    softcap: bool = True
    layers: bool = False  # takes NF4 and LoRA layers
    refuses: str = "takes a dense weight only"  # the reason where it does not
    backend: str = ""  # of dilkern
    filtered: bool = False  # its gradient is approximate by design: its errors are told, not judged
    about: Callable[[Inputs], dict[str, float]] | None = None  # further columns of its row
    named: bool = False  # measured only where it is asked for by name

    def why_not(self, case: Case, device: torch.device) -> str | None:
        """Return why this peer cannot take the case, None if it can."""
        module = self.package.replace("-", "_")
        if find_spec(module) is None:
            return f"{self.package} is not installed"
        if self.cuda_only and device.type != "cuda":
            return "its kernels need a GPU"
        if case.softcap and not self.softcap:
            return "no softcap"
        if case.kind != "dense":
            if not self.layers:
                return self.refuses
            package = {"nf4": "bitsandbytes", "lora": "peft"}[case.kind]
            if find_spec(package) is None:
                return f"{package} is not installed"
        if self.output != "token_logps" and case.mode == "score":
            return "gives a loss, not token log-probs"
        if case.mode == "step" and self.output == "mean_nll":
            return "no reference model in this loss"
        if self.backend:
            from dilkern.backends.base import why_not

            return why_not(self.backend, device)
        if self.name.startswith("torch-lce") and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            return "needs torch 2.13"
        return None


def _naive_logps(
    hidden: Tensor, head: Tensor | torch.nn.Module, labels: Tensor, softcap: float
) -> Tensor:
    return label_logps(logits_of(hidden, head, softcap), labels)


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_naive_logps, dynamic=False)


def naive(x: Inputs, compiled: bool = False) -> Tensor:
    call = _compiled() if compiled else _naive_logps
    return call(x.hidden, x.head, x.labels, x.case.softcap)


def naive_cross_entropy(x: Inputs) -> Tensor:
    logits = logits_of(x.hidden, x.head, x.case.softcap)
    return -F.cross_entropy(logits, x.labels, reduction="none")


def torch_lce(x: Inputs, **how: Any) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(**how)
    return -F.linear_cross_entropy(
        x.hidden, x.weight, x.labels, reduction="none", options=options
    ).float()


def trl(x: Inputs) -> Tensor:
    """The function behind TRL 1.16's fused head, with the arguments its DPO trainer's head passes."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(
        x.hidden, x.weight, None, x.labels, 1.0, 32768, x.case.softcap or None, 1.0, ("log_probs",)
    )[0]


def liger_selective(x: Inputs) -> Tensor:
    """The chunked log-probs under Liger's GRPO loss, with its own vocabulary chunk."""
    from liger_kernel.chunked_loss import fused_linear_ppo as ppo

    return ppo._ChunkedSelectiveLogProbFunction.apply(
        x.hidden, x.weight, x.labels, None, 1.0, ppo._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
    )


def liger_dpo(x: Inputs) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    reference = x.case.mode == "step"
    loss = LigerFusedLinearDPOLoss(
        beta=BETA, compiled=x.device.type == "cuda", use_ref_model=reference, average_log_prob=True
    )
    shape = (x.case.sequences, x.case.tokens // x.case.sequences)
    hidden = x.hidden.view(*shape, -1)
    ref = {"ref_input": hidden.detach(), "ref_weight": x.weight.detach()} if reference else {}
    return loss(x.weight, hidden, x.labels.view(shape), **ref)[0]


def liger_flce(x: Inputs, reduction: str = "none") -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss as FusedLoss

    loss = FusedLoss(reduction=reduction, softcap=x.case.softcap or None)
    found = loss(x.weight, x.hidden, x.labels)
    return -found if reduction == "none" else found


def cut_cross_entropy(x: Inputs, **options: Any) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    options |= {"softcap": x.case.softcap or None, "reduction": "none"}
    return -linear_cross_entropy(x.hidden, x.weight, x.labels, **options)


class DropFilter(torch.autograd.Function):
    """Cut-cross-entropy's rule by library products: log p (T,), and in backward what is recomputed of
    |p - onehot| < eps is left out. Where its kernel skips tiles of sorted words, here a word is left
    out of a block of rows if all of them are below eps.
    """

    ROWS, WORDS = 1024, 8192  # per block: 32 MiB

    @classmethod
    def blocks(cls, hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        buffer = hidden.new_empty(cls.ROWS * cls.WORDS)
        for row in range(0, len(hidden), cls.ROWS):
            rows = slice(row, row + cls.ROWS)
            for word in range(0, len(weight), cls.WORDS):
                words = slice(word, word + cls.WORDS)
                shape = len(hidden[rows]), len(weight[words])
                z = buffer[: math.prod(shape)].view(shape)
                yield rows, words, torch.mm(hidden[rows], weight[words].T, out=z)

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, eps: float) -> Tensor:
        lse = torch.full(labels.shape, -torch.inf, device=hidden.device)
        for rows, _, z in DropFilter.blocks(hidden, weight):
            lse[rows] = torch.logaddexp(lse[rows], z.float().logsumexp(1))
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.eps = eps
        return (hidden.float() * weight[labels].float()).sum(1) - lse

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, lse = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        trained = ctx.needs_input_grad[1]
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if trained else None
        loud = 0
        for rows, words, z in DropFilter.blocks(hidden, weight):
            dz = z.float().sub_(lse[rows].unsqueeze(1)).exp_().neg_()  # onehot - p
            here = (labels[rows] >= words.start) & (labels[rows] < words.stop)
            dz[here, labels[rows][here] - words.start] += 1
            low, high = torch.aminmax(dz, dim=0)
            kept = (torch.maximum(-low, high) >= ctx.eps).nonzero().squeeze(1)
            loud += len(kept)
            dz = dz.index_select(1, kept).mul_(g[rows].unsqueeze(1)).to(hidden.dtype)
            grad_hidden[rows] += dz @ weight[words].index_select(0, kept)
            if grad_weight is not None:
                grad_weight[words].index_add_(0, kept, (dz.T @ hidden[rows]).float())
        DropFilter.loud = loud / (len(weight) * -(-len(hidden) // DropFilter.ROWS))
        grads = grad_hidden.to(hidden.dtype), None if grad_weight is None else grad_weight
        return *grads, None, None


def drop(x: Inputs, eps: float) -> Tensor:
    return DropFilter.apply(x.hidden, x.weight, x.labels, eps)


def dilkern(x: Inputs, backend: str, **options: Any) -> Tensor:
    from dilkern import linear_logps
    from dilkern.lm_head import as_head

    head, space = as_head(x.head, softcap=x.case.softcap), x.case.workspace_mib
    options |= {"backend": backend, "workspace_mib": space}
    return linear_logps(x.hidden, head, x.labels, **options)


def filter_report(x: Inputs, filter_eps: float | str) -> dict[str, float]:
    """What the library says of its own filter; the bound is on the error under g = 1."""
    from dilkern import filter_report
    from dilkern.lm_head import as_head

    head, space = as_head(x.head, softcap=x.case.softcap), x.case.workspace_mib
    options = {"filter_eps": filter_eps, "workspace_mib": space}
    found = filter_report(x.hidden.detach(), head, x.labels, **options)
    return {
        "loud": found.loud,
        "whole": found.whole,
        "quiet_mass": found.quiet_mass.mean().item(),
        "error_bound": (found.error_bound.norm() / found.gradient_norm.norm()).item(),
    }


_naive = partial(Peer, package="torch", layers=True)
_lce = partial(Peer, package="torch", softcap=False)
_liger = partial(Peer, package="liger-kernel", softcap=False)
_flce = partial(Peer, package="liger-kernel", cuda_only=True)
_cce = partial(Peer, package="cut-cross-entropy", cuda_only=True)
_ours = partial(Peer, package="dilkern", layers=True)
_word = partial(Peer, package="dilkern", filtered=True, named=True)
_drop = partial(Peer, package="torch", softcap=False, filtered=True, named=True)
_LIST = (
    _naive("naive", call=naive, note="full logits, log_softmax, gather"),
    _naive("naive-ce", call=naive_cross_entropy, note="full logits, cross_entropy"),
    _naive(
        "compile", call=partial(naive, compiled=True), note="torch.compile of naive", compiles=True
    ),
    _lce("torch-lce", call=torch_lce, note="options auto, reduction none"),
    _lce(
        "torch-lce-1024",
        call=partial(torch_lce, chunking_method=None, batch_chunk_size=1024),
        note="1024 rows per chunk, reduction none",
    ),
    Peer(
        "trl",
        "trl",
        trl,
        note="ChunkedLogProbFunction, vocabulary chunk 32768",
        refuses="reads lm_head.weight (packed bytes of an NF4 head) and refuses LoRA on the lm_head",
    ),
    _liger("liger-selective", call=liger_selective, note="private function under its GRPO loss"),
    _liger(
        "liger-dpo",
        call=liger_dpo,
        output="dpo_loss",
        compiles_on_gpus=True,
        note="LigerFusedLinearDPOLoss, one pair per chunk; compiled on GPUs only",
    ),
    _flce("liger-flce", call=liger_flce, note="reduction none"),
    _flce(
        "liger-flce-mean",
        call=partial(liger_flce, reduction="mean"),
        output="mean_nll",
        note="one scalar: no per-token gradient",
    ),
    _cce("cce", call=cut_cross_entropy, note="gradient filter on (its default)", filtered=True),
    _cce(
        "cce-unfiltered",
        call=partial(cut_cross_entropy, filter_eps=None),
        note="gradient filter off",
    ),
    _ours("dilkern-torch", call=partial(dilkern, backend="torch"), backend="torch"),
    _ours("dilkern-triton", call=partial(dilkern, backend="triton"), backend="triton"),
    Peer(
        "cce-compile",
        "cut-cross-entropy",
        partial(cut_cross_entropy, impl="torch_compile"),
        note="its own torch implementation: full logits, compiled",
        compiles=True,
        named=True,
    ),
    *(
        _word(
            f"filter-{eps}",
            call=partial(dilkern, backend="auto", filter_eps=value),
            about=partial(filter_report, filter_eps=value),
            note=f"dilkern, filter_eps {'auto' if eps == 'auto' else f'2^-{eps}'}",
        )
        for eps, value in {**{n: 2.0**-n for n in (10, 12, 14, 16, 18, 20)}, "auto": "auto"}.items()
    ),
    *(
        _drop(
            f"drop-{n}",
            call=partial(drop, eps=2.0**-n),
            about=lambda x: {"loud": DropFilter.loud},
            note=f"cut-cross-entropy's filter by library products, eps 2^-{n}",
        )
        for n in (12, 14, 16)
    ),
)
PEERS = {peer.name: peer for peer in _LIST}


def select(names: str) -> list[Peer]:
    """Parse a comma-separated list of names, or "all".

    Raises:
        ValueError: an unknown name (lists the known).
    """
    if names == "all":
        return [peer for peer in PEERS.values() if not peer.named]
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in PEERS:
            raise ValueError(f"unknown peer {name!r}; known: {', '.join(PEERS)}")
    return [PEERS[name] for name in wanted]
