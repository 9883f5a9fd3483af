"""The word filter: improbable words enter the gradient by their mean (docs/math.md, 15 to 19).

For a block of rows and a block of words most words are improbable in every row. These are *quiet*,
the others *loud*. Loud words are multiplied exactly, quiet ones as one mean word:

    sum_v p_iv w_v  ~  sum_loud p_iv w_v + d_i mu,   d_i = sum_quiet p_iv,
    mu = sum_quiet q_v w_v / sum_quiet q_v,          q_v = sum_i c_i p_iv.

With c_i = 1 / (sum of all words) the error sums to zero over the rows. That sum is known only after
the last block, so until then it is the sum of the words seen and of the *expected* words to come.

N scored tokens, n rows in work, V vocabulary, v words in work, k loud or expected ones, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dilkern.backends.base import (
    Blocks,
    HeadView,
    Quiet,
    hands_out_views,
    matmul,
    weight_block,
)
from dilkern.validation import is_number, reject

# A block is multiplied whole where a larger share of its words is loud, which would not pay, or of a
# row's wrong words quiet.
MOST_LOUD = 0.75
MOST_QUIET = 0.5

# What "auto" means: errors on two real models below those that bf16 logits bring (1.2e-2) where the
# inputs are 16-bit, and below a quarter of that for fp32 (docs/filter.md).
AUTO = {torch.float32: 2.0**-21, torch.float64: 2.0**-21}
AUTO_16 = 2.0**-19

_Factors = tuple[Tensor, Tensor]  # of a product


def threshold(filter_eps: float | str | None, dtype: torch.dtype) -> float:
    """Return the mean probability below which a word is quiet; 0.0 for no filter.

    Raises:
        ValueError: neither None, "auto" nor a number in (0, 1].
    """
    if filter_eps is None:
        return 0.0
    if filter_eps == "auto":
        return AUTO.get(dtype, AUTO_16)
    if not is_number(filter_eps) or not 0 < float(filter_eps) <= 1:
        reject(
            "`filter_eps` must be None, 'auto' or a number in (0, 1]",
            repr(filter_eps),
            "Pass None for exact gradients, or 'auto'.",
        )
    return float(filter_eps)


def expected_words(
    hidden: Tensor,  # (R, D)
    rows: Tensor,  # (N,)
    labels: Tensor,  # (N,)
    head: HeadView,
    blocks: Blocks,
) -> Tensor:
    """Return words that are likely to hold much of the probability, ascending.

    The labels of the batch, and what the mean hidden state scores highest; not the latter where the
    head would have to be decoded or fetched once more for it. At most as many as a block has words.
    """
    found, counts = labels.unique(return_counts=True)
    most = min(head.vocab_size // 128, blocks.vocab // 2)
    if found.numel() > most:
        found = found[counts.argsort(descending=True, stable=True)[:most]]
    liked = min(head.vocab_size // 128, blocks.vocab // 2)
    if liked and hands_out_views(head, hidden.dtype):
        acc = torch.promote_types(hidden.dtype, torch.float32)
        mean = hidden.new_zeros(1, hidden.shape[1], dtype=acc)
        for part in blocks.parts(rows.numel()):  # not a copy of all rows
            mean += hidden.index_select(0, rows[part]).sum(0, dtype=acc)
        mean = mean.div_(max(1, rows.numel())).to(hidden.dtype)
        score, bias = mean.new_empty(head.vocab_size, dtype=acc), head.bias()
        # Results of one tensor each would hold up the heap between widened blocks.
        for start, end in blocks.words(head.vocab_size):
            weight = weight_block(head, start, end, hidden.dtype)
            score[start:end] = matmul(mean, weight.t(), acc).squeeze(0)
        if bias is not None:
            score += bias.to(acc)
        found = torch.cat([found, score.topk(liked).indices]).unique()
    ascending: Tensor = found.sort().values
    return ascending


class Sieve(NamedTuple):
    """What the filter of every block of rows is told."""

    eps: float  # mean probability over the rows below which a word is quiet
    expected: Tensor  # (k,) ascending words
    ends: Tensor  # (blocks,) of the blocks of words
    keep: bool  # whether the head will ask for `Quiet`


def sieve_of(
    hidden: Tensor,  # (R, D)
    rows: Tensor,  # (N,)
    labels: Tensor,  # (N,)
    head: HeadView,
    blocks: Blocks,
    eps: float,
    keep: bool,
) -> Sieve:
    """Look at the whole batch, once for a pass: the device is waited for here, and not after it."""
    expected = expected_words(hidden, rows, labels, head, blocks)
    ends = [end for _, end in blocks.words(head.vocab_size)]
    return Sieve(eps, expected, torch.tensor(ends, device=hidden.device), keep)


def words_to_come(
    sieve: Sieve,
    labels: Tensor,  # (n,)
    z: Tensor,  # (n, k) logits of the expected words, overwritten
) -> tuple[Tensor, Tensor]:
    """Return the peak (n,) of the expected wrong words, and (blocks, n) what is yet to come.

    That is the sum of exp(z - peak) over those after each block.
    """
    z.masked_fill_(sieve.expected == labels.unsqueeze(1), -torch.inf)
    peak = z.new_full((z.shape[0],), torch.finfo(z.dtype).min)
    if z.shape[1]:
        peak = torch.maximum(peak, z.amax(1))
    # Not by a running sum, of which CUDA has no deterministic one.
    later = (sieve.expected >= sieve.ends.unsqueeze(1)).to(z.dtype)
    return peak, later @ z.sub_(peak.unsqueeze(1)).exp_().t()


class RowFilter:
    """The filter of one block of rows, through all blocks of words.

    Args:
        sieve: what it is told.
        labels: (n,); these words are loud.
        z_y: (n,) their logits.
        z: (n, k) logits of the expected words, overwritten.
        vocab_size: V.
    """

    def __init__(
        self,
        sieve: Sieve,
        labels: Tensor,
        z_y: Tensor,
        z: Tensor,
        vocab_size: int,
    ) -> None:
        self._eps, self._z_y, self.keep = sieve.eps, z_y, sieve.keep
        self._is_label = torch.zeros(vocab_size, dtype=torch.bool, device=z.device)
        self._is_label.index_fill_(0, labels, True)
        self._peak, self._to_come = words_to_come(sieve, labels, z)
        self._weights = z.new_full((vocab_size if sieve.keep else 0,), -1)
        self._mass = torch.zeros_like(self._to_come[: None if sieve.keep else 0])

    def split(
        self,
        p: Tensor,  # (n, v) exp(z - anchor), 0 for labels, times the slope
        row_sums: Tensor,  # (n,) of p
        weight: Tensor,  # (v, D)
        number: int,  # of the block
        start: int,
        anchor: Tensor,  # (n,)
        total: Tensor,  # (n,) of this block and those before
        decay: Tensor,  # (n,) from the last anchor to this
    ) -> tuple[_Factors, _Factors | None]:
        """Return what to multiply in place of P W, and (d, mu) of the quiet words, to be added.

        P and W themselves, and None, where the filter would not pay or leave out too much.
        """
        n, v = p.shape
        self._mass[:number].mul_(decay)
        wrong = total + self._to_come[number] * (self._peak - anchor).exp_()
        # Who is quiet is judged against a row's wrong words, so that a confident row keeps its digits.
        row_weights = torch.stack((wrong, wrong + (self._z_y - anchor).exp_())).reciprocal_()
        q_wrong, q = row_weights @ p
        loud = self._is_label[start : start + v] | (q_wrong > self._eps * n)
        words = loud.nonzero().squeeze(1)
        if words.numel() > MOST_LOUD * v:
            return (p, weight), None
        p_loud = p.gather(1, words.expand(n, -1))  # faster than index_select, which goes by columns
        d = (row_sums - p_loud.sum(1)).clamp_min_(0)
        if not (row_weights[0] * d).max() <= MOST_QUIET:  # nor where it is NaN
            return (p, weight), None
        q.masked_fill_(loud, 0)
        # Relative to the largest: fp16 holds nothing below 6e-8, as all of a confident row's q may be.
        least = torch.finfo(q.dtype).tiny
        shares = q / q.amax().clamp_min_(least)
        mu = matmul(shares.unsqueeze(0).to(weight.dtype), weight, q.dtype).squeeze(0)
        mu /= shares.sum().clamp_min_(least)
        if self._mass.shape[0]:
            self._weights[start : start + v] = q.masked_fill_(loud, -1)
            self._mass[number] = d
        # Not as one more column: the sum d may be more than 16 bits hold.
        return (p_loud, weight.index_select(0, words)), (d, mu)

    def quiet(self, share: Tensor) -> Quiet:
        """Return what was left out; share (n,) makes exp(z - anchor) a probability."""
        return Quiet(self._weights.unsqueeze(0), self._mass.mul_(share))


def joined(quiet: list[Quiet]) -> Quiet | None:
    """Return the parts of a pass as one; None of none."""
    if not quiet:
        return None
    return Quiet(torch.cat([q.weights for q in quiet]), torch.cat([q.mass for q in quiet], 1))


class Cut(NamedTuple):
    """Words [start, end) of the head, all in one block of the pass."""

    number: int  # of that block
    start: int
    end: int


class QuietGradient:
    """The gradient of the quiet words' part of the head: of each part one vector, in shares.

    Which words are loud comes to the host here, once for all cuts.

    Args:
        quiet: of the pass.
        parts: its blocks of rows.
        cuts: of its words, ascending, all of them.
        g: (N,) factor of each row.
        states: gives the hidden states (n, D) of a part, in the dtype of `quiet`.
    """

    def __init__(
        self,
        quiet: Quiet,
        parts: list[slice],
        cuts: list[Cut],
        g: Tensor,
        states: Callable[[slice], Tensor],
    ) -> None:
        self._quiet, self._parts, self._cuts = quiet, parts, cuts
        self._g, self._states = g, states
        self._bias = torch.stack(
            [quiet.mass[:, part] @ g[part] for part in parts]
        )  # (parts, blocks)
        self._sums = torch.zeros_like(self._bias)
        for cut in cuts:
            self._sums[:, cut.number] += self._q(cut).sum(1)
        self._sums.clamp_min_(torch.finfo(self._sums.dtype).tiny)
        self._loud = [(row < 0).nonzero().squeeze(1) for row in quiet.weights]
        edges = torch.tensor([cut.start for cut in cuts] + [cuts[-1].end], device=g.device)
        self._bounds = torch.stack([torch.searchsorted(x, edges) for x in self._loud]).tolist()
        self._vectors: tuple[int, Tensor] | None = None

    def _q(self, cut: Cut) -> Tensor:
        """Return (parts, words) of a cut, 0 for loud words."""
        return self._quiet.weights[:, cut.start : cut.end].clamp_min(0)

    def _weight(self, number: int) -> Tensor:
        """Return what the words of a block share, (parts, D): of one block at a time, to be small."""
        if self._vectors is None or self._vectors[0] != number:
            mass = self._quiet.mass[number]
            found = [(mass[part] * self._g[part]) @ self._states(part) for part in self._parts]
            self._vectors = number, torch.stack(found)
        return self._vectors[1]

    def block(self, i: int) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Return d_weight (v, D), d_bias (v,), and the loud words of each part; None if all are."""
        number, start, end = self._cuts[i]
        shares = -(self._q(self._cuts[i]) / self._sums[:, number].unsqueeze(1)).t()
        words: list[Tensor | None] = []
        for (a, b), found in zip((x[i : i + 2] for x in self._bounds), self._loud):
            words.append(found[a:b] - start if b - a < end - start else None)
        return shares @ self._weight(number), shares @ self._bias[:, number], words
