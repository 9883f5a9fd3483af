"""The triton backend: the same pass over the vocabulary with the kernels of `dilkern.kernels`.

The products behind a block of P are our own (logits never in memory) or a library's;
`configs.own_product` says which, never need_u. Equation numbers refer to docs/math.md, the scheme of
exponents and anchors is in kernels/tile_math.py.
n tokens in work, N scored tokens, v words in work, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib import import_module

import torch
import triton
from torch import Tensor

from dilkern.backends import word_filter
from dilkern.backends.base import (
    Blocks,
    Bytes,
    Forward,
    HeadView,
    Quiet,
    add_matmul,
    hands_out_views,
    matmul,
    plan_blocks,
    row_blocks,
    states_of,
    weight_block,
    wide_products,
)
from dilkern.backends.word_filter import (
    Cut,
    QuietGradient,
    Sieve,
    joined,
    sieve_of,
    words_to_come,
)
from dilkern.kernels import configs
from dilkern.kernels.add_words import add_words
from dilkern.kernels.dz_tile import dz_tile
from dilkern.kernels.finish_rows import finish_rows
from dilkern.kernels.fold_block import fold_block
from dilkern.kernels.operands import aligned, on_device
from dilkern.kernels.softmax_tile import softmax_tile
from dilkern.kernels.split_words import Outlook, split_words


def _interprets_bf16() -> bool:
    """Whether somebody has mended the interpreter's bf16 products, as our tests do (3.6 to 3.9)."""
    builder = import_module("triton.runtime.interpreter").InterpreterBuilder
    return bool(builder.create_dot.__module__ != builder.__module__)


def why_not(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Return why the kernels cannot run on `device` with inputs of `dtype`, or None."""
    if dtype is torch.float64:
        return "the triton kernels compute in fp32, so float64 needs the torch backend"
    if device.type == "cpu":
        if triton.knobs.runtime.interpret:
            if dtype is torch.bfloat16 and not _interprets_bf16():
                return "Triton's interpreter multiplies the bit patterns of bfloat16"
            return None
        return "triton runs on GPUs (on CPU only if TRITON_INTERPRET=1 is set before the start)"
    if device.type not in ("cuda", "xpu"):
        return f"triton does not run on {device.type} devices"
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"the triton kernels need compute capability 8.0, this GPU has {major}.{minor}"
    return None


def plan(
    num_tokens: int,
    head: HeadView,
    hidden: Tensor,
    workspace_bytes: int,
    *,
    own: bool,
    gradient_columns: int | None = None,  # of the head, in its backward
    gathers: bool = False,  # words are copied one by one
) -> Blocks:
    """Choose how many tokens and words are in work at once; from shapes, dtype and head alone."""
    device, dtype, width = hidden.device, hidden.dtype, hidden.shape[1]
    size, backward = dtype.itemsize, gradient_columns is not None
    views = hands_out_views(head, dtype) and not (own and width % 16) and not gathers
    widened = 4 * width if size == 2 and not wide_products(hidden) else 0
    bytes_per = Bytes(
        # The state, and U where it is not summed up in the result.
        kept=0 if backward else 64 + (4 * width if dtype is torch.bfloat16 else 0),
        # H, and in forward an aligned copy of it, then the labels' words.
        row=64 + (1 if backward else 3) * size * width + widened,
        # A block as the head has it and as it is multiplied; its gradient and what becomes of that.
        # And what the word filter notes of a word.
        word=(0 if views else (4 + size) * width) + widened + 8 * (gradient_columns or 0) + 16,
        # fp32 logits become P in place; 16-bit P is a second block, widened where the library must.
        # One byte for the partial sums of narrow tiles; when they and 16-bit P's logits are gone,
        # the filter copies what is loud of P.
        cell=max(
            1 + (4 if size == 4 or not own else 0) + size % 4,
            size + math.ceil(word_filter.MOST_LOUD * size),
        )
        + (4 if widened else 0),
    )
    # Rows enough that U = P W fills a GPU (docs/kernels.md), few enough to leave room for words. A
    # row block of backward touches all of dW_block, so there as many as a long product needs.
    blocks = plan_blocks(
        num_tokens,
        head.vocab_size,
        width,
        bytes_per,
        workspace_bytes,
        max_rows=4096 if backward else min(4096, -(-(1 << 13) // width) * 512),
        unit=configs.tile(device, dtype).block_v if own else configs.WORDS,
        decodes=not (views or backward),
    )
    # All rows of the first block have their P moved to the first reference they find: a few words.
    first = configs.first_words(device)
    return blocks._replace(first=first) if blocks.vocab > 2 * first and not backward else blocks


def _rows_of(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A new (rows, columns) whose rows start aligned, as vector access needs."""
    return like.new_empty(rows, -(-columns // 16) * 16, dtype=dtype)[:, :columns]


def forward(
    hidden: Tensor,  # (R, D)
    rows: Tensor,  # (N,) which rows of `hidden` are scored
    labels: Tensor,  # (N,)
    head: HeadView,
    *,
    workspace_bytes: int,
    need_u: bool,
    filter_eps: float = 0.0,
    need_quiet: bool = False,
) -> Forward:
    """One pass over the vocabulary: log-probs and, if asked, the unscaled gradient u (4)-(6)."""
    n_tokens, width, dtype = rows.numel(), hidden.shape[1], hidden.dtype
    own = configs.own_product(hidden.device, dtype, width)
    blocks = plan(n_tokens, head, hidden, workspace_bytes, own=own)
    logps, lse = (hidden.new_empty(*k, n_tokens, dtype=torch.float32) for k in ((), (2,)))
    # fp16 cannot hold the small u of a confident token; its gradient is scaled later, by g.
    u_dtype = torch.float32 if dtype is torch.float16 else dtype
    u = hidden.new_empty(n_tokens if need_u else 0, width, dtype=u_dtype)
    filtered = filter_eps > 0 and (need_u or need_quiet)
    quiet: list[Quiet] = []
    with on_device(hidden):
        sieve = None
        if filtered:
            sieve = sieve_of(hidden, rows, labels, head, blocks, filter_eps, need_quiet)
        for kept in row_blocks(0, n_tokens, blocks.kept):
            quiet += _pass(
                hidden, rows[kept], labels[kept], head, blocks, own, sieve,
                logps[kept], lse[:, kept], u[kept],
            )  # fmt: skip
    return Forward(logps, lse, u, joined(quiet))


class _RowFilter:
    """The filter of one block of rows, through all blocks of words, without a sync."""

    def __init__(
        self, sieve: Sieve, h: Tensor, labels: Tensor, head: HeadView, blocks: Blocks
    ) -> None:
        self._sieve, n = sieve, labels.numel()
        w_y = head.gather(labels, h.dtype)
        of_labels = torch.linalg.vecdot(h.float(), w_y.float())
        self._z_y = _logits(of_labels, head, labels)
        w = head.gather(sieve.expected, h.dtype)
        z = _logits(matmul(h, w.t(), torch.float32), head, sieve.expected)
        self._peak, self._to_come = words_to_come(sieve, labels, z)
        self._is_label = torch.zeros(head.vocab_size, dtype=torch.bool, device=h.device)
        self._is_label.index_fill_(0, labels, True)
        self._weights = z.new_empty(head.vocab_size if sieve.keep else blocks.vocab)
        self._mass = z.new_empty(self._to_come.shape if sieve.keep else (1, n))
        self._anchors = torch.empty_like(self._mass)

    def add(
        self,
        sums: Tensor | None,  # (n, D) updated
        p: Tensor,  # (n, v)
        weight: Tensor,  # (v, D), or more columns, which do not count
        number: int,  # of the block
        start: int,
        state: Tensor,  # (3, n)
    ) -> None:
        """Add P W: loud words exactly, quiet ones by their mean."""
        v, keep = p.shape[1], self._sieve.keep
        words = slice(start, start + v)
        weights = self._weights[words] if keep else self._weights[:v]
        mass = self._mass[number if keep else 0]
        split = split_words(
            p, weight, state, Outlook(self._peak, self._to_come[number], self._z_y),
            self._is_label[words], weights, mass,
            limit=self._sieve.eps * p.shape[0],
            most_loud=word_filter.MOST_LOUD, most_quiet=word_filter.MOST_QUIET,
        )  # fmt: skip
        if sums is not None:
            add_words(sums, p, weight, split)
        if keep:
            whole = split.bounds[1] >= 0
            weights.masked_fill_(whole, -1)
            mass.masked_fill_(whole, 0)
            self._anchors[number] = state[2]

    def quiet(self, lse: Tensor) -> Quiet:  # (2, n)
        """Return what was left out: mass 2^anchor / e^lse."""
        high, low = lse.double()
        logs = (self._anchors.double() * math.log(2) - high) - low
        return Quiet(self._weights.unsqueeze(0), self._mass * logs.exp().float())


def _logits(raw: Tensor, head: HeadView, words: Tensor) -> Tensor:
    """Turn products (..., k) with these words, in place, into logits (2)."""
    bias = head.bias()
    if bias is not None:
        raw += bias.index_select(0, words).float()
    raw *= head.scale
    return raw.div_(head.softcap).tanh_().mul_(head.softcap) if head.softcap else raw


def _pass(
    hidden: Tensor,  # (R, D)
    rows: Tensor,  # (n,)
    labels: Tensor,  # (n,)
    head: HeadView,
    blocks: Blocks,
    own: bool,
    sieve: Sieve | None,
    logps: Tensor,  # (n,) written, as the next two
    lse: Tensor,  # (2, n)
    u: Tensor,  # (n, D), or (0, D) if not asked for
) -> list[Quiet]:
    """Take all words past the rows that are kept."""
    n, width, dtype, bias = rows.numel(), hidden.shape[1], hidden.dtype, head.bias()
    # The fields of tile_math.State, and the sum over wrong words of exp(z) slope w / 2^anchor.
    state = hidden.new_full((3, n), -torch.inf, dtype=torch.float32)
    state[1].zero_()
    anchor = state[2]
    need_u, need_p = u.shape[0] > 0, u.shape[0] > 0 or sieve is not None
    in_u = need_u and u.dtype is torch.float32
    # Zeros also where P alone is asked for: `fold_block` is the same with it.
    sums = u.zero_() if in_u else state.new_zeros(n if need_p else 0, width)
    config = configs.tile(hidden.device, dtype)
    tile = config.block_v if own else configs.rows("chunk", hidden.device).block
    parts = list(row_blocks(0, n, blocks.rows))
    states = states_of(hidden, rows, parts)
    filters: list[_RowFilter | None] = [None] * len(parts)
    if sieve is not None:
        filters = [_RowFilter(sieve, states(x), labels[x], head, blocks) for x in parts]
    transform = {"scale": head.scale, "softcap": head.softcap}
    for number, (start, end) in enumerate(blocks.words(head.vocab_size)):
        weight = weight_block(head, start, end, dtype)
        if own:
            weight = aligned(weight, config)
        settings = {"start": start, "bias": None if bias is None else bias[start:end], **transform}
        for part, row_filter in zip(parts, filters):
            h, y, count = states(part), labels[part], part.stop - part.start
            tiles = triton.cdiv(end - start, tile)
            partial = h.new_empty(2, count, tiles, dtype=torch.float32)
            held = count if need_p else 0  # rows of P
            a, w = (h, weight) if own else (matmul(h, weight.t(), torch.float32), None)
            in_place = a.dtype is dtype and not own
            p = a[:held] if in_place else _rows_of(h, held, end - start, dtype)
            softmax_tile(a, w, y, anchor[part], partial, p, **settings)
            del a
            fold_block(partial, state[:, part], p, sums[part], tile=tile)
            del h, w, partial
            if row_filter is not None:
                into = sums[part] if need_u else None
                row_filter.add(into, p, weight, number, start, state[:, part])
            elif need_u:
                add_matmul(sums[part], p, weight[:, :width])
            del p
        del weight
    for part in parts:
        w_y = head.gather(labels[part], dtype)
        finish_rows(
            states(part), w_y, labels[part], state[:, part], sums[part],
            logps[part], lse[:, part], u[part], bias=bias, **transform,
        )  # fmt: skip
    kept = filters if sieve is not None and sieve.keep else []
    return [x.quiet(lse[:, part]) for x, part in zip(kept, parts) if x is not None]


def _pieces(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    return ((a, min(a + size, end)) for a in range(start, end, size))


def _places(labels: Tensor, words: Tensor) -> Tensor:
    """Return where the labels (n,) stand among ascending words (k,); -1 for those that do not."""
    place = torch.searchsorted(words, labels).clamp_max_(words.numel() - 1)
    return torch.where(words.index_select(0, place) == labels, place, -1)


def head_backward(
    hidden: Tensor,
    rows: Tensor,
    labels: Tensor,
    head: HeadView,
    logps: Tensor,
    lse: Tensor,
    grad_logps: Tensor,
    quiet: Quiet | None = None,
    *,
    needed: Sequence[bool],
    workspace_bytes: int,
) -> list[Tensor | None]:
    """Recompute the logits block by block and hand each block's gradient to the head (8).

    Of a filtered pass those of the loud words; the quiet ones of a part have one gradient, in shares.
    """
    n_tokens, dtype, vocab_size = rows.numel(), hidden.dtype, head.vocab_size
    own = configs.own_product(hidden.device, dtype, hidden.shape[1])
    gradients, columns = head.new_gradients(needed), head.gradient_columns(needed)
    width = hidden[:0, columns].shape[1]
    blocks = plan(
        n_tokens, head, hidden, workspace_bytes,
        own=own, gradient_columns=width, gathers=quiet is not None,
    )  # fmt: skip
    words_of = list(blocks.words(vocab_size))
    config = configs.tile(hidden.device, dtype)
    bias = head.bias()
    miss = -torch.expm1(logps)
    g = grad_logps.float() * head.scale
    if dtype is torch.float16 and n_tokens:
        # Small g p would vanish in fp16: the largest |g| becomes 1 here, and g again at the end.
        peak = g.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        g = g / peak
    of_quiet = None
    if quiet is None:
        parts = list(row_blocks(0, n_tokens, blocks.rows))
    else:  # what is quiet in a pass belongs to its blocks
        of_pass = plan(n_tokens, head, hidden, workspace_bytes, own=own)
        parts = of_pass.parts(n_tokens)
        cuts = [
            Cut(number, *words)
            for number, block in enumerate(of_pass.words(vocab_size))
            for words in _pieces(*block, blocks.vocab)
        ]
        words_of = [(cut.start, cut.end) for cut in cuts]

        def rows_of(part: slice) -> Tensor:
            return hidden.index_select(0, rows[part])[:, columns].float()

        of_quiet = QuietGradient(quiet, parts, cuts, g, rows_of)
    states = states_of(hidden, rows, parts)
    for number, (start, end) in enumerate(words_of):
        whole = None
        loud: list[Tensor | None] = [None] * len(parts)
        if of_quiet is not None:
            d_weight, d_bias, loud = of_quiet.block(number)
        else:
            d_weight = hidden.new_zeros(end - start, width, dtype=torch.float32)
            d_bias = hidden.new_zeros(end - start, dtype=torch.float32)
        for part, words in zip(parts, loud):
            if words is not None and not words.numel():
                continue
            h, y, count = states(part), labels[part], end - start
            if words is None:
                if whole is None:
                    whole = weight_block(head, start, end, dtype)
                    whole = aligned(whole, config) if own else whole
                weight, first = whole, start
                bias_of = None if bias is None else bias[start:end]
            else:  # some words, and then the first of them again, to a number that 16 divides
                count, first = words.numel(), 0
                ids = start + torch.cat([words, words[:1].expand(-count % 16)])
                weight = head.gather(ids, dtype)
                bias_of = None if bias is None else bias.index_select(0, ids)
                y = _places(y - start, words)
            with on_device(hidden):
                a, w = (h, weight) if own else (matmul(h, weight.t(), torch.float32), None)
                in_place = a.dtype is dtype and not own
                dz = a if in_place else _rows_of(h, h.shape[0], weight.shape[0], dtype)
                dz_tile(
                    a, w, y, lse[:, part], miss[part], g[part], dz,
                    start=first, bias=bias_of, scale=head.scale, softcap=head.softcap,
                )  # fmt: skip
                del a, w
            dz = dz[:, :count]
            at = slice(None) if words is None else words
            if bias is not None:
                d_bias[at] += dz.sum(0, dtype=torch.float32)
            if width:
                of_words = d_weight[at]
                add_matmul(of_words, dz.t(), h[:, columns])
                if words is not None:  # a copy
                    d_weight[at] = of_words
                del of_words
            del dz, h, weight
        if dtype is torch.float16 and n_tokens:
            d_weight.mul_(peak)
            d_bias.mul_(peak)
        del whole
        head.add_block_gradient(gradients, start, end, d_weight, d_bias)
        del d_weight, d_bias
    return gradients
