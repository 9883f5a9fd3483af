"""The triton backend: the same pass over the vocabulary with the kernels of `dilkern.kernels`.

A block of P comes either from our own product (`logps_forward`: logits never in memory) or from a
library product and `chunk_softmax`; `configs.own_product` says which, never need_u. Equation
numbers refer to docs/math.md, the scheme of references to docs/kernels.md.
n tokens in work, N scored tokens, v words in work, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dilkern.backends.base import Blocks, Forward, HeadView, normalize, plan_blocks
from dilkern.backends.torch import (
    _add_matmul,
    _matmul,
    _row_blocks,
    _weight_block,
    _wide_products,
)
from dilkern.kernels import configs
from dilkern.kernels.chunk_dz import chunk_dz
from dilkern.kernels.chunk_softmax import chunk_softmax
from dilkern.kernels.dz_tile import dz_tile
from dilkern.kernels.fold_block import fold_block
from dilkern.kernels.logps_forward import logps_forward
from dilkern.kernels.operands import on_device
from dilkern.kernels.target_logit import target_logit

# ln 2 in two parts; the first has so few bits that its products with exponents are exact.
_LN2_HIGH, _LN2_LOW = 0.693138122558594, 9.0580006145e-06


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


def _tile_words(hidden: Tensor, own: bool) -> int:
    """Words per tile of the kernel that writes P and its partial sums."""
    device = hidden.device
    words: int = configs.tile(device, hidden.dtype).block_v if own else configs.chunk(device).block
    return words


def _plan(
    num_tokens: int,
    head: HeadView,
    hidden: Tensor,
    workspace_bytes: int,
    *,
    own: bool,
    head_gradient: bool = False,
) -> Blocks:
    """Choose how many tokens and words are in work at once; from shapes, dtype and head alone."""
    width, size = hidden.shape[1], hidden.dtype.itemsize
    # Rows of H and of W for the labels as given, padded and widened, U, the state.
    per_row = 16 * width + 128
    probe = head.block(0, 1, hidden.dtype) if head.vocab_size else hidden
    # A head that hands out views costs nothing per word, any other as much as plan_blocks says.
    view = probe.untyped_storage().nbytes() > probe.nbytes and probe.stride() == (width, 1)
    view = view and width * size % 16 == 0
    widens = size == 2 and not _wide_products(hidden)
    per_word = (0 if view else 12 * width) + (4 * width if widens else 0)
    per_word += 8 * width if head_gradient else 0
    # fp32 logits become P in place; 16-bit P is a second block, widened where the library must.
    # One byte for the partial sums of narrow tiles.
    per_cell = (0 if own and size == 2 else 4) + (size if size == 2 else 0) + 1
    per_cell += 4 if widens else 0
    # Long enough that U = P W fills a GPU (docs/kernels.md), short enough to leave room for words.
    wanted = min(4096, max(256, (1 << 22) // width))
    rows = max(1, min(num_tokens, wanted, workspace_bytes // (2 * per_row)))
    vocab = (workspace_bytes - rows * (per_row + 16)) // (per_word + rows * per_cell)
    if vocab < 16:
        return plan_blocks(
            num_tokens,
            head.vocab_size,
            width,
            hidden.dtype,
            workspace_bytes,
            max_rows=wanted,
            max_vocab=vocab if vocab > 0 else 1 << 30,
        )
    rows = math.ceil(num_tokens / math.ceil(num_tokens / rows)) if num_tokens else 1
    tile = _tile_words(hidden, own)
    unit = tile if vocab >= tile else 16
    vocab = min(vocab // unit * unit, 1 << 30)
    vocab = math.ceil(head.vocab_size / max(1, math.ceil(head.vocab_size / vocab)))
    return Blocks(rows, max(1, math.ceil(vocab / unit)) * unit)


def _target_logits(h: Tensor, w_y: Tensor, labels: Tensor, head: HeadView) -> Tensor:
    bias, z_y = head.bias(), h.new_empty(labels.numel(), dtype=torch.float32)
    b_y = None if bias is None else bias.index_select(0, labels)
    target_logit(h, w_y, z_y, bias=b_y, scale=head.scale, softcap=head.softcap)
    return z_y


class Pass(NamedTuple):
    """What one pass over the vocabulary leaves: sum over wrong words of exp(z) = total 2^top."""

    top: Tensor  # (n,) integer exponents of 2
    total: Tensor  # (n,)
    reference: Tensor  # (n,) integer exponents of 2
    mean_w: Tensor  # (n, D) sum over wrong words of exp(z) slope w / 2^reference, or (0, D)


def _pass_over_vocabulary(
    h: Tensor,  # (n, D)
    labels: Tensor,  # (n,)
    head: HeadView,
    block: int,  # words at once
    own: bool,
    need_u: bool,
) -> Pass:
    n, width = h.shape
    held = n if need_u else 0  # rows of P and U
    tile = _tile_words(h, own)
    top = h.new_full((n,), -torch.inf, dtype=torch.float32)
    reference, total = top.clone(), torch.zeros_like(top)
    mean_w = h.new_zeros(held, width, dtype=torch.float32)
    bias = head.bias()
    for start in range(0, head.vocab_size, block):
        end = min(start + block, head.vocab_size)
        weight = _weight_block(head, start, end, h.dtype)
        tiles = triton.cdiv(end - start, tile)
        exponents, sums = h.new_empty(2, n, tiles, dtype=torch.float32).unbind()
        b = None if bias is None else bias[start:end]
        if own:
            p = h.new_empty(held, block)[:, : end - start]
            logps_forward(
                h,
                weight,
                labels,
                reference,
                exponents,
                sums,
                p,
                start=start,
                bias=b,
                scale=head.scale,
                softcap=head.softcap,
            )
        else:
            z = _matmul(h, weight.t(), torch.float32)
            p = z[:held] if h.dtype is z.dtype else h.new_empty(held, z.shape[1])
            chunk_softmax(
                z,
                labels,
                reference,
                exponents,
                sums,
                p,
                start=start,
                bias=b,
                scale=head.scale,
                softcap=head.softcap,
            )
            del z
        fold_block(exponents, sums, top, total, reference, p, mean_w, tile=tile)
        if need_u:
            _add_matmul(mean_w, p, weight)
        del p, weight, exponents, sums
    return Pass(top, total, reference, mean_w)


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
    for part in _row_blocks(n_tokens, blocks.rows):
        with on_device(hidden):
            h, y = hidden.index_select(0, rows[part]), labels[part]
            w_y = head.gather(y, dtype)
            z_y = _target_logits(h, w_y, y, head)
            top, total, reference, mean_w = _pass_over_vocabulary(
                h, y, head, blocks.vocab, own, need_u
            )
        logps[part], share, lse[:, part] = normalize(z_y, total, top * _LN2_HIGH, top * _LN2_LOW)
        if need_u:
            # From `top` to the reference of U (6).
            share *= torch.where(top == reference, 1.0, torch.exp2(reference - top))
            miss = -torch.expm1(logps[part])
            if head.softcap:
                miss *= 1 - (z_y / head.softcap).square()
            mean_w.mul_(-share.unsqueeze(1)).addcmul_(w_y.float(), miss.unsqueeze(1))
            u[part] = mean_w.mul_(head.scale)
    return Forward(logps, lse, u)


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
    blocks = _plan(n_tokens, head, hidden, workspace_bytes, own=own, head_gradient=True)
    gradients, columns = head.new_gradients(needed), head.gradient_columns(needed)
    bias = head.bias()
    miss = -torch.expm1(logps)
    g = grad_logps.float() * head.scale
    if dtype is torch.float16 and n_tokens:
        # Small g p would vanish in fp16: the largest |g| becomes 1 here, and g again at the end.
        peak = g.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        g = g / peak
    for start in range(0, head.vocab_size, blocks.vocab):
        end = min(start + blocks.vocab, head.vocab_size)
        weight = _weight_block(head, start, end, dtype)
        d_weight = torch.zeros_like(weight[:, columns], dtype=torch.float32)
        d_bias = weight.new_zeros(end - start, dtype=torch.float32)
        settings = {
            "start": start,
            "bias": None if bias is None else bias[start:end],
            "scale": head.scale,
            "softcap": head.softcap,
        }
        for part in _row_blocks(n_tokens, blocks.rows):
            h, y = hidden.index_select(0, rows[part]), labels[part]
            per_row = (y, lse[:, part], miss[part], g[part])
            with on_device(hidden):
                if own:
                    dz = h.new_empty(y.numel(), blocks.vocab)[:, : end - start]
                    dz_tile(h, weight, *per_row, dz, **settings)
                else:
                    z = _matmul(h, weight.t(), torch.float32)
                    dz = z if dtype is z.dtype else h.new_empty(z.shape)
                    chunk_dz(z, *per_row, dz, **settings)
                    del z
            if bias is not None:
                d_bias += dz.sum(0, dtype=torch.float32)
            if d_weight.shape[1]:
                _add_matmul(d_weight, dz.t(), h[:, columns])
            del dz
        if dtype is torch.float16 and n_tokens:
            d_weight.mul_(peak)
            d_bias.mul_(peak)
        head.add_block_gradient(gradients, start, end, d_weight, d_bias)
    return gradients
