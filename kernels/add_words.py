"""U += P W over the loud words of a block and the mean of its quiet ones, or over all its words.

How many words there are is read from memory: the host does not know (kernels/split_words.py).
n rows, v words of the block, k loud ones, D hidden size.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dilkern.kernels import configs
from dilkern.kernels.operands import is_aligned
from dilkern.kernels.split_words import CHUNKS, Split
from dilkern.kernels.tile_math import Mean


@triton.jit
def _add_tile(acc, row, column, mean, u_ptr, stride_u, n, d, d_words, CHUNKS: tl.constexpr):
    """U += acc and what the rows have of the mean word, from this row and column on."""
    offs_t = row + tl.arange(0, acc.shape[0])
    offs_d = column + tl.arange(0, acc.shape[1])
    mask_t, mask_d = (offs_t < n)[:, None], (offs_d < d)[None, :]
    if mean is not None:
        mu = tl.zeros((acc.shape[1],), dtype=tl.float32)
        share = 1.2e-38  # not 0, where no word is quiet
        for chunk in tl.range(0, CHUNKS):
            mu += tl.load(mean.sums + chunk * d_words + offs_d, mask=offs_d < d, other=0.0)
            share += tl.load(mean.shares + chunk)
        mu = mu / share
        acc += tl.load(mean.mass + offs_t[:, None], mask=mask_t, other=0.0) * mu[None, :]
    u_ptrs = u_ptr + offs_t.to(tl.int64)[:, None] * stride_u + offs_d[None, :]
    tl.store(u_ptrs, tl.load(u_ptrs, mask=mask_t & mask_d, other=0.0) + acc, mask=mask_t & mask_d)


# Not `v`, `width` and `d`: masks of unknown alignment cost every vector access.
@triton.jit(do_not_specialize=["n"])
def _add_words_kernel(
    p,  # (n, width), pointer or descriptor
    stride_p,
    words,  # (v, d_words), pointer or descriptor
    stride_w,
    index_ptr,  # (k,) which words; None for all of them
    bound_ptr,  # (1,) how many; -1: nothing is to be done
    mean,  # of the quiet words; None beside all words
    u_ptr,  # (n, d) in and out
    stride_u,
    n,
    v,
    width,
    d,
    d_words,  # d, or more where rows are padded to be aligned
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,  # `words` is a descriptor too
    EVEN_V: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    bound = tl.load(bound_ptr)
    if bound >= 0:
        # Rows vary fastest: programs in flight share the words, which are read in shreds.
        tiles_t = tl.cdiv(n, BLOCK_T)
        row = tl.program_id(0) % tiles_t * BLOCK_T
        column = tl.program_id(0) // tiles_t * BLOCK_D
        # The last row stands in for rows past the end.
        offs_t = tl.minimum(row + tl.arange(0, BLOCK_T), n - 1).to(tl.int64)
        offs_d = column + tl.arange(0, BLOCK_D)
        offs_k = tl.arange(0, BLOCK_V)
        acc = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
        # At least one step: see `tile_products`. Where there is no word its P is 0.
        end = tl.maximum(bound, 1)
        tl.assume(end > 0)
        for k in tl.range(0, end, BLOCK_V):
            if DESCRIPTORS:
                left = p.load([row, k])
            else:
                p_ptrs = p + offs_t[:, None] * stride_p + (k + offs_k)[None, :]
                if EVEN_V:
                    left = tl.load(p_ptrs)
                else:
                    left = tl.load(p_ptrs, mask=(k + offs_k)[None, :] < width, other=0.0)
            if WHOLE_ROWS:
                right = words.load([k, column])
            else:
                if index_ptr is None:
                    word = tl.minimum(k + offs_k, v - 1)
                else:
                    word = tl.load(index_ptr + k + offs_k, mask=k + offs_k < bound, other=0)
                w_ptrs = words + word.to(tl.int64)[:, None] * stride_w + offs_d[None, :]
                if EVEN_D:
                    right = tl.load(w_ptrs)
                else:
                    right = tl.load(w_ptrs, mask=offs_d[None, :] < d_words, other=0.0)
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
        # In two halves: U and its addresses beside the whole tile would not fit the registers.
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_T, 2, BLOCK_D // 2)), (0, 2, 1)))
        _add_tile(left, row, column, mean, u_ptr, stride_u, n, d, d_words, CHUNKS)
        column += BLOCK_D // 2
        _add_tile(right, row, column, mean, u_ptr, stride_u, n, d, d_words, CHUNKS)


def add_words(
    u: Tensor,  # (n, D) fp32, updated
    p: Tensor,  # (n, v)
    weight: Tensor,  # (v, D), or more columns, which do not count
    split: Split,
) -> None:
    """Add what the words of a block come to: of two launches one finds that there is nothing to do."""
    mean = Mean(split.sums.view(-1), split.shares, split.mass)
    _launch(u, split.p, weight, split.words, split.bounds[:1], mean)
    _launch(u, p, weight, None, split.bounds[1:], None)


def _launch(
    u: Tensor, p: Tensor, weight: Tensor, index: Tensor | None, bound: Tensor, mean: Mean | None
) -> None:
    (n, d), width = u.shape, p.shape[1]
    assert u.stride(1) == p.stride(1) == weight.stride(1) == 1
    config = configs.product(u.device, p.dtype)
    tma = config.descriptors and is_aligned(p, config)
    whole_rows = tma and index is None and is_aligned(weight, config)
    left: Any = _descriptor(p, config.block_t, config.block_v) if tma else p
    right: Any = _descriptor(weight, config.block_v, config.block_d) if whole_rows else weight
    _add_words_kernel[(triton.cdiv(n, config.block_t) * triton.cdiv(d, config.block_d),)](
        p=left,
        stride_p=p.stride(0),
        words=right,
        stride_w=weight.stride(0),
        index_ptr=index,
        bound_ptr=bound,
        mean=mean,
        u_ptr=u,
        stride_u=u.stride(0),
        n=n,
        v=weight.shape[0],
        width=width,
        d=d,
        d_words=weight.shape[1],
        BLOCK_T=config.block_t,
        BLOCK_V=config.block_v,
        BLOCK_D=config.block_d,
        CHUNKS=CHUNKS,
        DESCRIPTORS=tma,
        WHOLE_ROWS=whole_rows,
        EVEN_V=width % config.block_v == 0,
        EVEN_D=weight.shape[1] % config.block_d == 0,
        PRECISION=configs.input_precision(p.dtype),
        **config.launch(0.0),
    )


def _descriptor(matrix: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], list(block))
