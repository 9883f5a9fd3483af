"""The torch backend: vocabulary streaming with library matrix products, on any device.

Equation numbers refer to docs/math.md. N scored tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dilkern.backends.base import (
    Blocks,
    Forward,
    HeadView,
    accumulation_dtype,
    normalize,
    plan_blocks,
)

# A row's reference is moved when a logit passes it by more than this: exp stays in range in every
# dtype that holds P (fp16: e^8 = 2981), and U is rescaled only rarely.
REFERENCE_SLACK = 8.0


def why_not(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    return None


def _plan(num_tokens: int, head: HeadView, hidden: Tensor, workspace_bytes: int) -> Blocks:
    # CPU: 1024 x 4096 fp32 logits (16 MiB) stay near the cache; larger blocks gained nothing
    # (docs/log.md). GPU: long products, bounded by the workspace alone.
    cap = (1024, 4096) if hidden.device.type == "cpu" else (4096, 1 << 30)
    return plan_blocks(
        num_tokens,
        head.vocab_size,
        hidden.shape[1],
        hidden.dtype,
        workspace_bytes,
        max_rows=cap[0],
        max_vocab=cap[1],
    )


def _wide_products(tensor: Tensor) -> bool:
    """Whether the library multiplies 16-bit matrices into fp32 here (CUDA); else we widen first.

    Not fp16 under `allow_fp16_accumulation`: torch then refuses fp32 results, and sums in fp16 are
    not ours to give. The plans count what widening takes.
    """
    narrow = tensor.dtype is torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation
    return (
        tensor.is_cuda and tensor.dtype.itemsize == 2 and torch.version.hip is None and not narrow
    )


def _matmul(a: Tensor, b: Tensor, acc: torch.dtype) -> Tensor:
    """a @ b with the result in `acc`, never rounded to 16 bits on the way."""
    if _wide_products(a):
        return torch.mm(a, b, out_dtype=acc)
    return torch.mm(a.to(acc), b.to(acc))


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in the dtype of `total`, the product never rounded to 16 bits on the way."""
    if _wide_products(b):
        torch.addmm(total, a.to(b.dtype), b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _weight_block(head: HeadView, start: int, end: int, dtype: torch.dtype) -> Tensor:
    """Return rows [start, end) of the weight, row-major.

    A library sums in another order over a transposed operand, and the same weight shall give the
    same bits however it lies. The copy is of one block, which the plans count.
    """
    return head.block(start, end, dtype).contiguous()


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
    weight: Tensor,
    head: HeadView,
    start: int,
    end: int,
    acc: torch.dtype,
    need_slope: bool,
) -> Logits:
    raw = _matmul(h, weight.t(), acc)
    bias = head.bias()
    if bias is not None:
        raw.add_(bias[start:end].to(acc))
    return _transform(raw, head, need_slope)


def _target_logits(
    h: Tensor, w_y: Tensor, labels: Tensor, head: HeadView, acc: torch.dtype
) -> Logits:
    raw = torch.linalg.vecdot(h.to(acc), w_y.to(acc))
    bias = head.bias()
    if bias is not None:
        raw = raw + bias.index_select(0, labels).to(acc)
    return _transform(raw, head, True)


def _replace_targets(block: Tensor, labels: Tensor, start: int, values: Tensor | float) -> None:
    """Write `values` into column labels[i] of row i where that column lies in the block."""
    local = labels - start
    inside = (local >= 0) & (local < block.shape[1])
    column = torch.where(inside, local, 0).unsqueeze(1)
    old = block.gather(1, column).squeeze(1)
    block.scatter_(1, column, torch.where(inside, values, old).unsqueeze(1))


def _row_blocks(num_tokens: int, size: int) -> Iterator[slice]:
    return (slice(a, min(a + size, num_tokens)) for a in range(0, num_tokens, size))


def forward(
    hidden: Tensor,  # (R, D)
    rows: Tensor,  # (N,) which rows of `hidden` are scored
    labels: Tensor,  # (N,)
    head: HeadView,
    *,
    workspace_bytes: int,
    need_u: bool,
) -> Forward:
    """One pass over the vocabulary: log-probs and, if asked, the unscaled gradient u (4)-(6)."""
    acc = accumulation_dtype(hidden.dtype)
    n_tokens, width = rows.numel(), hidden.shape[1]
    blocks = _plan(n_tokens, head, hidden, workspace_bytes)
    logps, lse = hidden.new_empty(n_tokens, dtype=acc), hidden.new_empty(2, n_tokens, dtype=acc)
    # fp16 cannot hold the small u of a confident token; its gradient is scaled later, by g.
    u_dtype = acc if hidden.dtype is torch.float16 else hidden.dtype
    u = hidden.new_empty(n_tokens if need_u else 0, width, dtype=u_dtype)
    for part in _row_blocks(n_tokens, blocks.rows):
        h, y = hidden.index_select(0, rows[part]), labels[part]
        w_y = head.gather(y, hidden.dtype)
        z_y, slope_y = _target_logits(h, w_y, y, head, acc)
        reference = torch.full_like(z_y, -torch.inf)  # near the largest logit of a wrong word
        total = torch.zeros_like(z_y)  # sum over wrong words of exp(z - reference)
        mean_w = h.new_zeros(h.shape, dtype=acc) if need_u else None  # the same sum of p * w
        for start in range(0, head.vocab_size, blocks.vocab):
            end = min(start + blocks.vocab, head.vocab_size)
            weight = _weight_block(head, start, end, hidden.dtype)
            z, slope = _block_logits(h, weight, head, start, end, acc, need_u)
            _replace_targets(z, y, start, -torch.inf)
            top = z.amax(1).clamp_min_(torch.finfo(acc).min)
            moved = torch.where(top > reference + REFERENCE_SLACK, top, reference)
            decay, reference = (reference - moved).exp_(), moved
            p = z.sub_(reference.unsqueeze(1)).exp_()
            total = total.mul_(decay).add_(p.sum(1))
            if mean_w is not None:
                if slope is not None:
                    p.mul_(slope)
                _add_matmul(mean_w.mul_(decay.unsqueeze(1)), p, weight)
            del z, p, slope, weight
        logps[part], share, lse[:, part] = normalize(z_y, total, reference)
        if mean_w is not None:
            miss = -torch.expm1(logps[part])
            if slope_y is not None:
                miss = miss * slope_y
            mean_w.mul_(-share.unsqueeze(1)).addcmul_(w_y.to(acc), miss.unsqueeze(1))
            u[part] = mean_w.mul_(head.scale)
    return Forward(logps, lse, u)


def head_backward(
    hidden: Tensor,
    rows: Tensor,
    labels: Tensor,
    head: HeadView,
    logps: Tensor,
    lse: Tensor,  # (2, N)
    grad_logps: Tensor,
    *,
    needed: Sequence[bool],
    workspace_bytes: int,
) -> list[Tensor | None]:
    """Recompute the logits block by block and hand each block's gradient to the head (8)."""
    acc = accumulation_dtype(hidden.dtype)
    n_tokens = rows.numel()
    blocks = _plan(n_tokens, head, hidden, workspace_bytes)
    gradients, columns = head.new_gradients(needed), head.gradient_columns(needed)
    bias = head.bias()
    # exp(z - lse) is exp(z - lse[0]) but for this factor, which g takes in.
    correction = torch.exp(-lse[1])
    miss = -torch.expm1(logps) / correction
    g = grad_logps * head.scale * correction
    for start in range(0, head.vocab_size, blocks.vocab):
        end = min(start + blocks.vocab, head.vocab_size)
        weight = _weight_block(head, start, end, hidden.dtype)
        d_weight = torch.zeros_like(weight[:, columns], dtype=acc)
        d_bias = weight.new_zeros(end - start, dtype=acc)
        for part in _row_blocks(n_tokens, blocks.rows):
            h, y = hidden.index_select(0, rows[part]), labels[part]
            z, slope = _block_logits(h, weight, head, start, end, acc, True)
            dz = z.sub_(lse[0, part].unsqueeze(1)).exp_().neg_()
            _replace_targets(dz, y, start, miss[part])
            dz.mul_(g[part].unsqueeze(1))
            if slope is not None:
                dz.mul_(slope)
            if bias is not None:
                d_bias += dz.sum(0)
            if d_weight.shape[1]:
                _add_matmul(d_weight, dz.t(), h[:, columns])
            del z, dz, slope
        head.add_block_gradient(gradients, start, end, d_weight, d_bias)
    return gradients
