"""The torch backend: vocabulary streaming with library matrix products, on any device.

Equation numbers refer to docs/math.md. N scored tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dilkern.backends.base import (
    Blocks,
    Bytes,
    Forward,
    HeadView,
    Quiet,
    accumulation_dtype,
    add_matmul,
    hands_out_views,
    matmul,
    plan_blocks,
    row_blocks,
    states_of,
    weight_block,
)
from dilkern.backends.word_filter import (
    Cut,
    QuietGradient,
    RowFilter,
    Sieve,
    joined,
    sieve_of,
)

# A row's anchor is moved when a logit passes it by more than this: exp stays in range in every
# dtype that holds P (fp16: e^8 = 2981), and U is rescaled only rarely.
ANCHOR_SLACK = 8.0


def why_not(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    return None


def plan(
    num_tokens: int,
    head: HeadView,
    hidden: Tensor,
    workspace_bytes: int,
    *,
    head_gradient: bool = False,
) -> Blocks:
    """Choose how rows and words are cut: see `plan_blocks`."""
    # CPU: 1024 x 4096 fp32 logits (16 MiB) stay near the cache; larger blocks gained nothing
    # (docs/dev/log.md). GPU: long products, bounded by the workspace alone.
    cap = (1024, 4096) if hidden.device.type == "cpu" else (4096, 1 << 30)
    width, size = hidden.shape[1], accumulation_dtype(hidden.dtype).itemsize
    bytes_per = Bytes(
        # The state, and U where it is not summed up in the result.
        kept=64 + (size * width if hidden.dtype is torch.bfloat16 else 0),
        row=3 * size * width,  # hidden rows as given and widened, target rows of W
        word=3 * size * width,  # a block of W as given, decoded and widened
        cell=3 * size,  # logits, probabilities, mask
    )
    return plan_blocks(
        num_tokens,
        head.vocab_size,
        width,
        bytes_per,
        workspace_bytes,
        max_rows=cap[0],
        max_vocab=cap[1],
        decodes=not head_gradient and not hands_out_views(head, hidden.dtype),
    )


class Logits(NamedTuple):
    z: Tensor  # (n, v) logits after scale and softcap, accumulation dtype
    slope: Tensor | None  # (n, v) d z / d (scaled raw logit) = 1 - (z / softcap)^2, None for 1


def _transform(raw: Tensor, head: HeadView, need_slope: bool) -> Logits:
    """Apply scale and softcap in place (2)."""
    if head.scale != 1.0:
        raw.mul_(head.scale)
    if not head.softcap:
        return Logits(raw, None)
    tanh = raw.div_(head.softcap).tanh_()
    slope = tanh.square().neg_().add_(1) if need_slope else None
    return Logits(tanh.mul_(head.softcap), slope)


def _block_logits(
    h: Tensor,
    weight: Tensor,  # (v, D) of the words
    head: HeadView,
    words: slice | Tensor,
    acc: torch.dtype,
    need_slope: bool,
) -> Logits:
    raw = matmul(h, weight.t(), acc)
    bias = head.bias()
    if bias is not None:
        raw.add_(bias[words].to(acc))
    return _transform(raw, head, need_slope)


def _target_logits(
    h: Tensor, w_y: Tensor, labels: Tensor, head: HeadView, acc: torch.dtype
) -> Logits:
    raw = torch.linalg.vecdot(h.to(acc), w_y.to(acc))
    bias = head.bias()
    if bias is not None:
        raw = raw + bias.index_select(0, labels).to(acc)
    return _transform(raw, head, True)


def _replace_targets(
    block: Tensor,  # (n, v) or, of some of its words, (n, k)
    labels: Tensor,
    start: int,
    values: Tensor | float,
    words: Tensor | None = None,  # (k,) ascending, those of the block that the columns belong to
) -> None:
    """Write `values` into the column of word labels[i] in row i where there is one."""
    local = labels - start
    if words is not None:
        column = torch.searchsorted(words, local)
        found = torch.cat([words, words.new_full((1,), -1)]).index_select(0, column) == local
        local = torch.where(found, column, -1)
    inside = (local >= 0) & (local < block.shape[1])
    column = torch.where(inside, local, 0).unsqueeze(1)
    old = block.gather(1, column).squeeze(1)
    block.scatter_(1, column, torch.where(inside, values, old).unsqueeze(1))


class Normalized(NamedTuple):
    """What the sums of one pass come to, per row."""

    logps: Tensor  # (n,) log p(label) (5)
    share: Tensor  # (n,) the factor that makes exp(z - anchor) p
    miss: Tensor  # (n,) 1 - p(label)
    lse: Tensor  # (2, n)


def normalize(
    z_y: Tensor,  # (n,) logits of the labels
    total: Tensor,  # (n,) sum over wrong words of exp(z - anchor)
    anchor: Tensor,  # (n,)
) -> Normalized:
    """Turn the sums of a pass into log-probs, without overflow or cancellation (5).

    The log-sum-exp stays a pair, peak and log-sum: exp(z - lse) in backward has the error of lse, and
    a large lse rounded once is off by more than the logits are.
    """
    lead = z_y - anchor
    ahead = lead > 0
    small = (-lead.abs()).exp()
    over, rest = torch.log1p(total * small), torch.log(total + small)
    share = torch.where(ahead, small / (1 + total * small), 1 / (total + small))
    lse = torch.stack((torch.where(ahead, z_y, anchor), torch.where(ahead, over, rest)))
    return Normalized(torch.where(ahead, -over, lead - rest), share, total * share, lse)


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
    acc = accumulation_dtype(hidden.dtype)
    n_tokens, width = rows.numel(), hidden.shape[1]
    blocks = plan(n_tokens, head, hidden, workspace_bytes)
    filtered = filter_eps > 0 and (need_u or need_quiet)
    logps, lse = hidden.new_empty(n_tokens, dtype=acc), hidden.new_empty(2, n_tokens, dtype=acc)
    # fp16 cannot hold the small u of a confident token; its gradient is scaled later, by g.
    u_dtype = acc if hidden.dtype is torch.float16 else hidden.dtype
    u = hidden.new_empty(n_tokens if need_u else 0, width, dtype=u_dtype)
    sieve = None
    if filtered:
        sieve = sieve_of(hidden, rows, labels, head, blocks, filter_eps, need_quiet)
    quiet: list[Quiet] = []
    for kept in row_blocks(0, n_tokens, blocks.kept):
        quiet += _pass(
            hidden, rows[kept], labels[kept], head, blocks, sieve,
            logps[kept], lse[:, kept], u[kept],
        )  # fmt: skip
    return Forward(logps, lse, u, joined(quiet))


def _pass(
    hidden: Tensor,  # (R, D)
    rows: Tensor,  # (n,)
    labels: Tensor,  # (n,)
    head: HeadView,
    blocks: Blocks,
    sieve: Sieve | None,
    logps: Tensor,  # (n,) written, as the next two
    lse: Tensor,  # (2, n)
    u: Tensor,  # (n, D), or (0, D) if not asked for
) -> list[Quiet]:
    """Take all words past the rows that are kept."""
    dtype, acc = hidden.dtype, logps.dtype
    need_u, need_p = u.shape[0] > 0, u.shape[0] > 0 or sieve is not None
    anchor = torch.full_like(logps, -torch.inf)  # near the largest wrong logit
    total = torch.zeros_like(logps)  # sum over wrong words of exp(z - anchor)
    # The same sum of p * w.
    mean_w = u.zero_() if u.dtype is acc else torch.zeros_like(u, dtype=acc)
    parts = list(row_blocks(0, rows.numel(), blocks.rows))
    states = states_of(hidden, rows, parts)
    filters: list[RowFilter | None] = [None] * len(parts)
    if sieve is not None:
        w_expected = head.gather(sieve.expected, dtype)
        for i, part in enumerate(parts):
            h, y = states(part), labels[part]
            filters[i] = RowFilter(
                sieve, y, _target_logits(h, head.gather(y, dtype), y, head, acc).z,
                _block_logits(h, w_expected, head, sieve.expected, acc, False).z,
                head.vocab_size,
            )  # fmt: skip
        del w_expected
    for number, (start, end) in enumerate(blocks.words(head.vocab_size)):
        weight = weight_block(head, start, end, dtype)
        for part, row_filter in zip(parts, filters):
            h = states(part)
            z, slope = _block_logits(h, weight, head, slice(start, end), acc, need_p)
            _replace_targets(z, labels[part], start, -torch.inf)
            top = z.amax(1).clamp_min_(torch.finfo(acc).min)
            old = anchor[part]
            moved = torch.where(top > old + ANCHOR_SLACK, top, old)
            decay = (old - moved).exp_()
            old.copy_(moved)
            p = z.sub_(moved.unsqueeze(1)).exp_()
            row_sums = p.sum(1)
            total[part].mul_(decay).add_(row_sums)
            if need_p and slope is not None:
                row_sums = p.mul_(slope).sum(1)
            operands, quiet = (p, weight), None
            if row_filter is not None:
                operands, quiet = row_filter.split(
                    p, row_sums, weight, number, start, moved, total[part], decay
                )
            if need_u:
                add_matmul(mean_w[part].mul_(decay.unsqueeze(1)), *operands)
                if quiet is not None:
                    mean_w[part].addr_(*quiet)
            del z, p, slope, operands, quiet
        del weight
    quiet_parts: list[Quiet] = []
    for part, row_filter in zip(parts, filters):
        w_y = head.gather(labels[part], dtype)
        z_y, slope_y = _target_logits(states(part), w_y, labels[part], head, acc)
        logps[part], share, miss, lse[:, part] = normalize(z_y, total[part], anchor[part])
        if need_u:
            if slope_y is not None:
                miss = miss * slope_y
            sums = mean_w[part].mul_(-share.unsqueeze(1))
            sums.addcmul_(w_y.to(acc), miss.unsqueeze(1))
            u[part] = sums.mul_(head.scale)
        if row_filter is not None and row_filter.keep:
            quiet_parts.append(row_filter.quiet(share))
    return quiet_parts


def head_backward(
    hidden: Tensor,
    rows: Tensor,
    labels: Tensor,
    head: HeadView,
    logps: Tensor,
    lse: Tensor,  # (2, N)
    grad_logps: Tensor,
    quiet: Quiet | None = None,
    *,
    needed: Sequence[bool],
    workspace_bytes: int,
) -> list[Tensor | None]:
    """Recompute the logits block by block and hand each block's gradient to the head (8).

    Of a filtered pass those of the loud words; the quiet ones of a part have one gradient, in shares.
    """
    acc = accumulation_dtype(hidden.dtype)
    n_tokens, dtype = rows.numel(), hidden.dtype
    blocks = plan(n_tokens, head, hidden, workspace_bytes, head_gradient=quiet is None)
    parts = blocks.parts(n_tokens)
    gradients, columns = head.new_gradients(needed), head.gradient_columns(needed)
    width, bias = hidden[:0, columns].shape[1], head.bias()
    g = grad_logps * head.scale
    of_quiet, words_of = None, list(blocks.words(head.vocab_size))
    if quiet is not None:

        def states(part: slice) -> Tensor:
            return hidden.index_select(0, rows[part])[:, columns].to(acc)

        cuts = [Cut(number, *words) for number, words in enumerate(words_of)]
        of_quiet = QuietGradient(quiet, parts, cuts, g, states)
    # exp(z - lse) is exp(z - lse[0]) but for this factor, which g takes in.
    correction = torch.exp(-lse[1])
    miss = -torch.expm1(logps) / correction
    g = g * correction
    for number, (start, end) in enumerate(words_of):
        whole = None
        loud: list[Tensor | None] = [None] * len(parts)
        if of_quiet is not None:
            d_weight, d_bias, loud = of_quiet.block(number)
        else:
            d_weight = hidden.new_zeros(end - start, width, dtype=acc)
            d_bias = hidden.new_zeros(end - start, dtype=acc)
        for part, words in zip(parts, loud):
            if words is not None and not words.numel():
                continue
            h, y = hidden.index_select(0, rows[part]), labels[part]
            ids: slice | Tensor = slice(start, end)
            if words is not None:
                ids = start + words
                weight = head.gather(ids, dtype)
            else:
                weight = whole = weight_block(head, start, end, dtype) if whole is None else whole
            z, slope = _block_logits(h, weight, head, ids, acc, True)
            del weight
            dz = z.sub_(lse[0, part].unsqueeze(1)).exp_().neg_()
            _replace_targets(dz, y, start, miss[part], words)
            dz.mul_(g[part].unsqueeze(1))
            if slope is not None:
                dz.mul_(slope)
            if bias is not None:
                d_bias[slice(None) if words is None else words] += dz.sum(0)
            if width and words is None:
                add_matmul(d_weight, dz.t(), h[:, columns])
            elif width:  # into words that are all different
                of_loud = d_weight[words]
                add_matmul(of_loud, dz.t(), h[:, columns])
                d_weight[words] = of_loud
                del of_loud
            del z, dz, slope
        del whole
        head.add_block_gradient(gradients, start, end, d_weight, d_bias)
        del d_weight, d_bias
    return gradients
