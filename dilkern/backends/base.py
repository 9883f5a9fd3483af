"""The backends behind the heavy op: one file each, one line each in `BACKENDS`.

A backend gets the scored rows already found and a head to ask for blocks; it returns numbers and
knows nothing of losses. N scored tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from dilkern.validation import reject


class HeadView(Protocol):
    """What a backend needs of a head; `dilkern.lm_head.Head` has it."""

    vocab_size: int
    hidden_size: int
    scale: float
    softcap: float

    def block(self, start: int, end: int, dtype: torch.dtype) -> Tensor: ...
    def gather(self, ids: Tensor, dtype: torch.dtype) -> Tensor: ...
    def bias(self) -> Tensor | None: ...
    def new_gradients(self, needed: Sequence[bool]) -> list[Tensor | None]: ...
    def gradient_columns(self, needed: Sequence[bool]) -> slice: ...
    def add_block_gradient(
        self, gradients: list[Tensor | None], start: int, end: int, d_weight: Tensor, d_bias: Tensor
    ) -> None: ...


class Forward(NamedTuple):
    logps: Tensor  # (N,) log p(label), accumulation dtype
    lse: Tensor  # (2, N) log-sum-exp of the logits, accumulation dtype: rounded, and what that lost
    u: Tensor  # (N, D) d logp / d hidden, or (0, D) if not asked for


class Backend(Protocol):
    """One way to compute the op."""

    def why_not(self, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
        """Return None if the backend can run on `device` with inputs of `dtype`, else why not."""

    def forward(
        self,
        hidden: Tensor,
        rows: Tensor,
        labels: Tensor,
        head: HeadView,
        *,
        workspace_bytes: int,
        need_u: bool,
    ) -> Forward:
        """Score hidden[rows] (N, D) against labels (N,)."""

    def head_backward(
        self,
        hidden: Tensor,
        rows: Tensor,
        labels: Tensor,
        head: HeadView,
        logps: Tensor,  # (N,)
        lse: Tensor,  # (2, N)
        grad_logps: Tensor,  # (N,)
        *,
        needed: Sequence[bool],
        workspace_bytes: int,
    ) -> list[Tensor | None]:
        """Return d sum(grad_logps * logps) / d tensor for the head's tensors that need it."""


# Name -> module, in the order in which "auto" tries them.
BACKENDS = {"triton": "dilkern.backends.triton", "torch": "dilkern.backends.torch"}


def load(name: str) -> Backend:
    return cast(Backend, import_module(BACKENDS[name]))


def why_not(name: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Return None if backend `name` can run on `device`, else the reason in one sentence."""
    try:
        backend = load(name)
    except ImportError as error:
        return f"{error}"
    return backend.why_not(device, dtype)


def resolve(name: str, device: torch.device, dtype: torch.dtype | None = None) -> Backend:
    """Return the backend that serves `device`: the named one or, for "auto", the first that can.

    On CPU "auto" is the torch backend: Triton's interpreter serves only those who ask for it.

    Raises:
        ValueError: unknown name, or an explicit backend that cannot run here (with the reason).
    """
    if name == "auto":
        order = ["torch"] if device.type == "cpu" else list(BACKENDS)
        return load(next(known for known in order if why_not(known, device, dtype) is None))
    if name not in BACKENDS:
        reject(
            f"`backend` must be 'auto' or one of: {', '.join(BACKENDS)}", repr(name), "Use 'auto'."
        )
    reason = why_not(name, device, dtype)
    if reason is not None:
        reject(f"backend={name!r} must be able to run on {device}", reason, "Use backend='auto'.")
    return load(name)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are fp32, and fp64 for fp64 inputs."""
    return torch.float64 if dtype is torch.float64 else torch.float32


class Normalized(NamedTuple):
    """What the sums of one pass come to, per row."""

    logps: Tensor  # (n,) log p(label) (5)
    share: Tensor  # (n,) exp(reference - log-sum-exp): the factor that makes exp(z - reference) p
    lse: Tensor  # (2, n)


def normalize(
    z_y: Tensor,  # (n,) logits of the labels
    total: Tensor,  # (n,) sum over wrong words of exp(z - reference)
    reference: Tensor,  # (n,)
    reference_low: Tensor | float = 0.0,  # digits that `reference` does not hold
) -> Normalized:
    """Turn the sums of a pass into log-probs, without overflow or cancellation (5).

    The log-sum-exp comes in two parts, because exp(z - lse) in backward has the error of lse, and a
    large lse rounded once is off by more than the logits are.
    """
    lead = (z_y - reference) - reference_low
    ahead = lead > 0
    small = (-lead.abs()).exp()
    over, rest = torch.log1p(total * small), torch.log(total + small)
    share = torch.where(ahead, small / (1 + total * small), 1 / (total + small))
    base = torch.where(ahead, z_y, reference)
    added = torch.where(ahead, over, rest + reference_low)
    lse = base + added
    rounded = lse - base
    lost = (base - (lse - rounded)) + (added - rounded)  # exact, whichever is larger (Knuth)
    return Normalized(torch.where(ahead, -over, lead - rest), share, torch.stack((lse, lost)))


class Blocks(NamedTuple):
    rows: int
    vocab: int


def plan_blocks(
    num_tokens: int,
    vocab_size: int,
    hidden_size: int,
    dtype: torch.dtype,
    workspace_bytes: int,
    *,
    max_rows: int,
    max_vocab: int,
) -> Blocks:
    """Choose how many tokens and words are in work at once within `workspace_bytes`.

    The plan counts the worst case (16-bit inputs that must be widened, gradient wanted, softcap) and
    depends on shapes alone, so that a policy with gradient and its reference without one are cut
    alike and give the same bits.

    Raises:
        ValueError: the workspace is too small for one token and one word.
    """
    size = accumulation_dtype(dtype).itemsize
    per_row = 4 * size * hidden_size  # hidden rows as given and widened, target rows of W, U
    per_word = 3 * size * hidden_size  # a block of W as given, decoded and widened
    per_cell = 3 * size  # logits, probabilities, mask
    rows = max(1, min(num_tokens, max_rows, workspace_bytes // (3 * per_row)))
    vocab = (workspace_bytes - rows * per_row) // (per_word + rows * per_cell)
    if vocab < 1:
        least = (per_row + per_word + per_cell) / 2**20
        reject(
            f"`workspace_mib` must be at least {least:.3g} for a hidden size of {hidden_size}",
            f"{workspace_bytes / 2**20:.3g}",
            "Raise workspace_mib (256 is the default).",
        )
    rows = math.ceil(num_tokens / math.ceil(num_tokens / rows)) if num_tokens else 1
    vocab = min(vocab, max_vocab)
    vocab = math.ceil(vocab_size / math.ceil(vocab_size / vocab))
    return Blocks(rows, vocab)
