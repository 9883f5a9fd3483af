"""The triton backend: the same pass over the vocabulary with the kernels of `dilkern.kernels`.

The products behind a block of P are our own (logits never in memory) or a library's;
`configs.own_product` says which, never need_u. Equation numbers refer to docs/math.md, the scheme of
exponents and anchors is in kernels/tile_math.py.
n tokens in work, N scored tokens, v words in work, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import torch
import triton
from torch import Tensor

from dilkern.backends.base import (
    Blocks,
    Bytes,
    Forward,
    HeadView,
    add_matmul,
    hands_out_views,
    matmul,
    plan_blocks,
    row_blocks,
    states_of,
    weight_block,
    wide_products,
)
from dilkern.kernels import configs
from dilkern.kernels.dz_tile import dz_tile
from dilkern.kernels.finish_rows import finish_rows
from dilkern.kernels.fold_block import fold_block
from dilkern.kernels.operands import aligned, on_device
from dilkern.kernels.softmax_tile import softmax_tile


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


def _plan(
    num_tokens: int,
    head: HeadView,
    hidden: Tensor,
    workspace_bytes: int,
    *,
    own: bool,
    gradient_columns: int | None = None,  # of the head, in its backward
) -> Blocks:
    """Choose how many tokens and words are in work at once; from shapes, dtype and head alone."""
    device, dtype, width = hidden.device, hidden.dtype, hidden.shape[1]
    size, backward = dtype.itemsize, gradient_columns is not None
    views = hands_out_views(head, dtype) and not (own and width % 16)
    widened = 4 * width if size == 2 and not wide_products(hidden) else 0
    bytes_per = Bytes(
        # The state, and U where it is not summed up in the result.
        kept=0 if backward else 64 + (4 * width if dtype is torch.bfloat16 else 0),
        # H, and in forward an aligned copy of it, then the labels' words.
        row=64 + (1 if backward else 3) * size * width + widened,
        # A block as the head has it and as it is multiplied; its gradient and what becomes of that.
        word=(0 if views else (4 + size) * width) + widened + 8 * (gradient_columns or 0),
        # fp32 logits become P in place; 16-bit P is a second block, widened where the library must.
        # One byte for the partial sums of narrow tiles.
        cell=1 + (4 if size == 4 or not own else 0) + (size % 4) + (4 if widened else 0),
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
) -> Forward:
    """One pass over the vocabulary: log-probs and, if asked, the unscaled gradient u (4)-(6)."""
    n_tokens, width, dtype = rows.numel(), hidden.shape[1], hidden.dtype
    own = configs.own_product(hidden.device, dtype, width)
    blocks = _plan(n_tokens, head, hidden, workspace_bytes, own=own)
    logps, lse = (hidden.new_empty(*k, n_tokens, dtype=torch.float32) for k in ((), (2,)))
    # fp16 cannot hold the small u of a confident token; its gradient is scaled later, by g.
    u_dtype = torch.float32 if dtype is torch.float16 else dtype
    u = hidden.new_empty(n_tokens if need_u else 0, width, dtype=u_dtype)
    with on_device(hidden):
        for kept in row_blocks(0, n_tokens, blocks.kept):
            _pass(
                hidden, rows[kept], labels[kept], head, blocks, own, need_u,
                logps[kept], lse[:, kept], u[kept],
            )  # fmt: skip
    return Forward(logps, lse, u)


def _pass(
    hidden: Tensor,  # (R, D)
    rows: Tensor,  # (n,)
    labels: Tensor,  # (n,)
    head: HeadView,
    blocks: Blocks,
    own: bool,
    need_u: bool,
    logps: Tensor,  # (n,) written, as the next two
    lse: Tensor,  # (2, n)
    u: Tensor,  # (n, D), or (0, D) if not asked for
) -> None:
    """Take all words past the rows that are kept."""
    n, width, dtype, bias = rows.numel(), hidden.shape[1], hidden.dtype, head.bias()
    # The fields of tile_math.State, and the sum over wrong words of exp(z) slope w / 2^anchor.
    state = hidden.new_full((3, n), -torch.inf, dtype=torch.float32)
    state[1].zero_()
    anchor = state[2]
    sums = u.zero_() if u.dtype is torch.float32 else torch.zeros_like(u, dtype=torch.float32)
    config = configs.tile(hidden.device, dtype)
    tile = config.block_v if own else configs.chunk(hidden.device).block
    parts = list(row_blocks(0, n, blocks.rows))
    states = states_of(hidden, rows, parts)
    transform = {"scale": head.scale, "softcap": head.softcap}
    for start, end in blocks.words(head.vocab_size):
        weight = weight_block(head, start, end, dtype)
        if own:
            weight = aligned(weight, config)
        settings = {"start": start, "bias": None if bias is None else bias[start:end], **transform}
        for part in parts:
            h, y, count = states(part), labels[part], part.stop - part.start
            tiles = triton.cdiv(end - start, tile)
            partial = h.new_empty(2, count, tiles, dtype=torch.float32)
            held = count if need_u else 0  # rows of P
            a, w = (h, weight) if own else (matmul(h, weight.t(), torch.float32), None)
            in_place = a.dtype is dtype and not own
            p = a[:held] if in_place else _rows_of(h, held, end - start, dtype)
            softmax_tile(a, w, y, anchor[part], partial, p, **settings)
            del a
            fold_block(partial, state[:, part], p, sums[part], tile=tile)
            if need_u:
                add_matmul(sums[part], p, weight[:, :width])
            del h, w, p, partial
        del weight
    for part in parts:
        w_y = head.gather(labels[part], dtype)
        finish_rows(
            states(part), w_y, labels[part], state[:, part], sums[part],
            logps[part], lse[:, part], u[part], bias=bias, **transform,
        )  # fmt: skip


def head_backward(
    hidden: Tensor,
    rows: Tensor,
    labels: Tensor,
    head: HeadView,
    logps: Tensor,
    lse: Tensor,
    grad_logps: Tensor,
    *,
    needed: Sequence[bool],
    workspace_bytes: int,
) -> list[Tensor | None]:
    """Recompute the logits block by block and hand each block's gradient to the head (8)."""
    n_tokens, dtype = rows.numel(), hidden.dtype
    own = configs.own_product(hidden.device, dtype, hidden.shape[1])
    gradients, columns = head.new_gradients(needed), head.gradient_columns(needed)
    blocks = _plan(
        n_tokens, head, hidden, workspace_bytes,
        own=own, gradient_columns=len(range(*columns.indices(hidden.shape[1]))),
    )  # fmt: skip
    config = configs.tile(hidden.device, dtype)
    bias = head.bias()
    miss = -torch.expm1(logps)
    g = grad_logps.float() * head.scale
    if dtype is torch.float16 and n_tokens:
        # Small g p would vanish in fp16: the largest |g| becomes 1 here, and g again at the end.
        peak = g.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        g = g / peak
    parts = list(row_blocks(0, n_tokens, blocks.rows))
    states = states_of(hidden, rows, parts)
    for start, end in blocks.words(head.vocab_size):
        weight = weight_block(head, start, end, dtype)
        d_weight = torch.zeros_like(weight[:, columns], dtype=torch.float32)
        d_bias = weight.new_zeros(end - start, dtype=torch.float32)
        if own:
            weight = aligned(weight, config)
        settings = {
            "start": start,
            "bias": None if bias is None else bias[start:end],
            "scale": head.scale,
            "softcap": head.softcap,
        }
        for part in parts:
            h = states(part)
            per_row = (labels[part], lse[:, part], miss[part], g[part])
            with on_device(hidden):
                a, w = (h, weight) if own else (matmul(h, weight.t(), torch.float32), None)
                in_place = a.dtype is dtype and not own
                dz = a if in_place else _rows_of(h, h.shape[0], end - start, dtype)
                dz_tile(a, w, *per_row, dz, **settings)
                del a, w
            if bias is not None:
                d_bias += dz.sum(0, dtype=torch.float32)
            if d_weight.shape[1]:
                add_matmul(d_weight, dz.t(), h[:, columns])
            del dz, h
        if dtype is torch.float16 and n_tokens:
            d_weight.mul_(peak)
            d_bias.mul_(peak)
        head.add_block_gradient(gradients, start, end, d_weight, d_bias)
    return gradients
