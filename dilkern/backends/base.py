"""The backends behind the heavy op: one file each, one line each in `BACKENDS`.

A backend gets the scored rows already found and a head to ask for blocks; it returns numbers and
knows nothing of losses. N scored tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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


class Quiet(NamedTuple):
    """What the word filter left out of a pass, as the gradient of the head needs it."""

    weights: Tensor  # (parts, V) how a part's rows weigh its quiet words, -1 for loud ones
    mass: Tensor  # (blocks, N) probability of each row's quiet words, times their slopes


class Forward(NamedTuple):
    logps: Tensor  # (N,) log p(label), accumulation dtype
    lse: Tensor  # (2, N) log-sum-exp, accumulation dtype, as peak + log of the sum of exp(z - peak)
    u: Tensor  # (N, D) d logp / d hidden, or (0, D) if not asked for
    quiet: Quiet | None = None  # where the filter is on and the head needs a gradient


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
        filter_eps: float = 0.0,
        need_quiet: bool = False,
    ) -> Forward:
        """Score hidden[rows] (N, D) against labels (N,).

        filter_eps: mean probability below which the word filter takes a word for quiet; 0.0: none.
        """

    def head_backward(
        self,
        hidden: Tensor,
        rows: Tensor,
        labels: Tensor,
        head: HeadView,
        logps: Tensor,  # (N,)
        lse: Tensor,  # (2, N), as forward gave it
        grad_logps: Tensor,  # (N,)
        quiet: Quiet | None = None,  # as forward gave it
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


def wide_products(tensor: Tensor) -> bool:
    """Whether the library multiplies 16-bit matrices into fp32 here (CUDA); else we widen first.

    Not fp16 under `allow_fp16_accumulation`: torch then refuses fp32 results, and sums in fp16 are
    not ours to give. The plans count what widening takes.
    """
    narrow = tensor.dtype is torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation
    return (
        tensor.is_cuda and tensor.dtype.itemsize == 2 and torch.version.hip is None and not narrow
    )


def matmul(a: Tensor, b: Tensor, acc: torch.dtype) -> Tensor:
    """a @ b with the result in `acc`, never rounded to 16 bits on the way."""
    if wide_products(a):
        return torch.mm(a, b, out_dtype=acc)
    return torch.mm(a.to(acc), b.to(acc))


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in the dtype of `total`, the product never rounded to 16 bits on the way."""
    if wide_products(b):
        torch.addmm(total, a.to(b.dtype), b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def weight_block(head: HeadView, start: int, end: int, dtype: torch.dtype) -> Tensor:
    """Return rows [start, end) of the weight, row-major.

    A library sums in another order over a transposed operand, and the same block shall give the
    same bits however the weight lies. The copy is of one block; the plans count it, so in a tight
    workspace blocks are smaller, and bits may differ, for a weight that must be copied.
    """
    return head.block(start, end, dtype).contiguous()


def hands_out_views(head: HeadView, dtype: torch.dtype) -> bool:
    """Whether `weight_block` is a part of the head's storage; else each one is decoded or copied."""
    none = head.block(0, 0, dtype)
    return none.untyped_storage().nbytes() > 0 and none.stride() == (none.shape[1], 1)


def row_blocks(begin: int, end: int, size: int) -> Iterator[slice]:
    """Cut [begin, end) into blocks of `size` rows."""
    return (slice(a, min(a + size, end)) for a in range(begin, end, size))


def states_of(hidden: Tensor, rows: Tensor, parts: list[slice]) -> Callable[[slice], Tensor]:
    """Return how to get the hidden states of a part of `rows`: gathered once if one part holds all."""
    if len(parts) == 1:
        states = hidden.index_select(0, rows)
        return lambda part: states
    return lambda part: hidden.index_select(0, rows[part])


class Bytes(NamedTuple):
    """What a pass holds in its workspace."""

    kept: int  # per row that is kept through all words: its state and its part of U
    row: int  # per row in work
    word: int  # per word in work
    cell: int  # per row and word in work


class Blocks(NamedTuple):
    """How a pass is cut: the kept rows see every word once, in parts of `rows` rows."""

    kept: int
    rows: int
    vocab: int
    first: int = 0  # words of the first block, if it is another size

    def words(self, vocab_size: int) -> Iterator[tuple[int, int]]:
        """The bounds of the vocabulary blocks."""
        start, end = 0, self.first or self.vocab
        while start < vocab_size:
            yield start, min(end, vocab_size)
            start, end = end, end + self.vocab

    def parts(self, num_tokens: int) -> list[slice]:
        """All blocks of rows, in the order of a pass."""
        return [
            part
            for kept in row_blocks(0, num_tokens, self.kept)
            for part in row_blocks(kept.start, kept.stop, self.rows)
        ]


def _even(total: int, most: int, unit: int) -> int:
    """Cut `total` into equal pieces of at most `most`, of whole units if that holds one."""
    unit = unit if most >= unit else 1
    pieces = max(1, math.ceil(total / (most // unit * unit)))
    return max(1, math.ceil(math.ceil(total / pieces) / unit)) * unit


def plan_blocks(
    num_tokens: int,
    vocab_size: int,
    hidden_size: int,
    bytes_per: Bytes,
    workspace_bytes: int,
    *,
    max_rows: int,
    max_vocab: int = 1 << 30,
    unit: int = 1,  # of words
    decodes: bool = False,
) -> Blocks:
    """Choose how many tokens and words are in work at once within `workspace_bytes`.

    The plan depends on shapes, dtype and head alone and counts what a pass with gradient holds, so
    that a policy with gradient and its reference without one are cut alike and give the same bits.
    Where the head decodes its words, as many rows as half the workspace takes are kept through one
    pass over the vocabulary; other heads pass once per block of rows.

    Raises:
        ValueError: the workspace is too small for one token and one word.
    """
    per = bytes_per
    # Whole sixteens of rows, so that what belongs to a block of them starts aligned.
    rows = _even(
        num_tokens, max(1, min(max_rows, workspace_bytes // (3 * (per.row + per.kept)))), 16
    )
    kept = rows
    if decodes:
        kept = max(rows, _even(num_tokens, max(1, workspace_bytes * 5 // (8 * per.kept)), 16))
    while True:
        free = workspace_bytes - kept * per.kept - rows * per.row
        vocab = free // (per.word + rows * per.cell)
        if vocab >= min(16, vocab_size) or rows == 1:
            break
        kept, rows = max(1, kept // 2), max(1, rows // 2)
    if vocab < 1:
        reject(
            f"`workspace_mib` must be at least {sum(per) / 2**20:.3g} for a hidden size of "
            f"{hidden_size}",
            f"{workspace_bytes / 2**20:.3g}",
            "Raise workspace_mib (256 is the default).",
        )
    return Blocks(
        kept, rows, _even(vocab_size, min(vocab, max_vocab), unit if vocab >= unit else 16)
    )
