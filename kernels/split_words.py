"""Which words of a block are loud, their columns of P side by side, and the mean of the others.

The word filter (docs/math.md, docs/kernels.md), after `fold_block`: n rows, v words of the block, k of
them loud. Nothing comes to the host: how many words are loud, and whether the block is multiplied
whole, stands in `Split.bounds`, which the launches of `add_words` read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dilkern.kernels import configs
from dilkern.kernels.operands import dense
from dilkern.kernels.tile_math import LOG2E, State

# The mean word is left in so many sums over words: enough programs to read W at full bandwidth, and
# few enough for every program of `add_words` to add up.
CHUNKS = 16


class Outlook(NamedTuple):
    """What a row will have seen at the end of the pass, (n,) fp32 each."""

    peak: Any  # the largest logit of an expected word
    to_come: Any  # sum of exp(z - peak) over expected words after this block
    z_y: Any  # the label's logit


class Split(NamedTuple):
    """A block of words in two parts."""

    p: Tensor  # (n, width) columns of the k loud words, then zeros to a whole step of `add_words`
    words: Tensor  # (width,) int32, the first k: the loud words of the block, ascending
    bounds: Tensor  # (2,) int32: k and -1 or, for a block that is multiplied whole, -1 and v
    mass: Tensor  # (n,) sum of P over quiet words
    sums: Tensor  # (CHUNKS, D) fp32, sums of q w over quiet words
    shares: Tensor  # (CHUNKS,) fp32, of q alone


@triton.jit
def _row_weights(state, outlook, offs_t, mask_t):
    """What makes P a share of the row's wrong words, and of all its words; 0 for rows past n."""
    top = tl.load(state.top + offs_t, mask=mask_t, other=0.0)
    total = tl.load(state.total + offs_t, mask=mask_t, other=1.0)
    anchor = tl.load(state.anchor + offs_t, mask=mask_t, other=0.0)
    peak = tl.load(outlook.peak + offs_t, mask=mask_t, other=0.0)
    to_come = tl.load(outlook.to_come + offs_t, mask=mask_t, other=0.0)
    z_y = tl.load(outlook.z_y + offs_t, mask=mask_t, other=0.0)
    base = tl.where(anchor == -float("inf"), 0.0, anchor)
    wrong = total * tl.exp2(top - base) + to_come * tl.exp2(peak * LOG2E - base)
    every = wrong + tl.exp2(z_y * LOG2E - base)
    return tl.where(mask_t, 1.0 / wrong, 0.0), tl.where(mask_t, 1.0 / every, 0.0)


# Not `v`: a mask `offs_v < v` of unknown alignment costs every vector access.
@triton.jit(do_not_specialize=["n", "limit"])
def _word_mass_kernel(
    p_ptr,  # (n, v)
    stride_p,
    state,
    outlook,
    is_label_ptr,  # (v,)
    weights_ptr,  # (v,) out
    counts_ptr,  # (tiles,) out
    n,
    v,
    limit,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0)
    offs_v = tile * BLOCK + tl.arange(0, BLOCK)
    inside = offs_v < v
    of_wrong = tl.zeros((BLOCK_T, BLOCK), dtype=tl.float32)
    of_all = tl.zeros((BLOCK_T, BLOCK), dtype=tl.float32)
    for row in tl.range(0, n, BLOCK_T):
        offs_t = row + tl.arange(0, BLOCK_T)
        mask_t = offs_t < n
        a, c = _row_weights(state, outlook, offs_t, mask_t)
        ptrs = p_ptr + offs_t.to(tl.int64)[:, None] * stride_p + offs_v[None, :]
        p = tl.load(ptrs, mask=mask_t[:, None] & inside[None, :], other=0.0).to(tl.float32)
        of_wrong += p * a[:, None]
        of_all += p * c[:, None]
    is_label = tl.load(is_label_ptr + offs_v, mask=inside, other=0) != 0
    loud = inside & (is_label | (tl.sum(of_wrong, 0) > limit))
    tl.store(weights_ptr + offs_v, tl.where(loud, -1.0, tl.sum(of_all, 0)), mask=inside)
    tl.store(counts_ptr + tile, tl.sum(loud.to(tl.int32), 0))


@triton.jit(do_not_specialize=["v", "width"])
def _number_words_kernel(
    weights_ptr,  # (v,)
    counts_ptr,  # (tiles,)
    places_ptr,  # (v,) out, the column of a loud word, -1 for quiet ones
    words_ptr,  # (width,) out
    k_ptr,  # (1,) out
    v,
    width,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,  # a power of two, at least as many
):
    tile = tl.program_id(0)
    tiles = tl.arange(0, TILES)
    before = tl.sum(tl.load(counts_ptr + tiles, mask=tiles < tile, other=0), 0)
    offs_v = tile * BLOCK + tl.arange(0, BLOCK)
    loud = tl.load(weights_ptr + offs_v, mask=offs_v < v, other=0.0) < 0
    place = before + tl.cumsum(loud.to(tl.int32), 0) - 1
    tl.store(places_ptr + offs_v, tl.where(loud, place, -1), mask=offs_v < v)
    tl.store(words_ptr + place, offs_v, mask=loud & (place < width))
    if tile == tl.num_programs(0) - 1:
        tl.store(k_ptr, before + tl.sum(loud.to(tl.int32), 0))


@triton.jit(do_not_specialize=["n", "most"])
def _take_loud_kernel(
    p_ptr,  # (n, v)
    stride_p,
    places_ptr,  # (v,)
    k_ptr,  # (1,)
    state,
    outlook,
    loud_ptr,  # (n, width) out
    mass_ptr,  # (n,) out
    missing_ptr,  # (n,) out, the share of the row's wrong words that is quiet
    n,
    v,
    width,
    most,  # loud words of a block that is split
    STEP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < n
    rows = offs_t.to(tl.int64)[:, None]
    k = tl.load(k_ptr)
    if k <= most:
        quiet = tl.zeros((BLOCK_T, BLOCK), dtype=tl.float32)
        for word in tl.range(0, v, BLOCK):
            offs_v = word + tl.arange(0, BLOCK)
            inside = mask_t[:, None] & (offs_v < v)[None, :]
            place = tl.load(places_ptr + offs_v, mask=offs_v < v, other=-1)[None, :]
            p = tl.load(p_ptr + rows * stride_p + offs_v[None, :], mask=inside, other=0.0)
            quiet += tl.where(place < 0, p.to(tl.float32), 0.0)
            tl.store(loud_ptr + rows * width + place, p, mask=inside & (place >= 0))
        # `add_words` takes whole steps, and at least one.
        column = k + tl.arange(0, STEP)[None, :]
        last = tl.maximum(tl.cdiv(k, STEP), 1) * STEP
        zero = tl.zeros((BLOCK_T, STEP), dtype=p_ptr.dtype.element_ty)
        tl.store(loud_ptr + rows * width + column, zero, mask=mask_t[:, None] & (column < last))
        mass = tl.sum(quiet, 1)
        of_wrong, _ = _row_weights(state, outlook, offs_t, mask_t)
        tl.store(mass_ptr + offs_t, mass, mask=mask_t)
        tl.store(missing_ptr + offs_t, mass * of_wrong, mask=mask_t)


@triton.jit(do_not_specialize=["n", "most", "most_quiet"])
def _mean_word_kernel(
    w_ptr,  # (v, d)
    stride_w,
    weights_ptr,  # (v,)
    k_ptr,  # (1,)
    missing_ptr,  # (n,)
    sums_ptr,  # (CHUNKS, d) out
    shares_ptr,  # (CHUNKS,) out
    bounds_ptr,  # (2,) out
    n,
    v,
    d,
    most,
    most_quiet,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    offs_d = column * BLOCK + tl.arange(0, BLOCK)
    length = tl.cdiv(tl.cdiv(v, chunks), BLOCK_T) * BLOCK_T
    begin, end = chunk * length, tl.minimum((chunk + 1) * length, v)
    acc = tl.zeros((BLOCK_T, BLOCK), dtype=tl.float32)
    share = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for word in tl.range(begin, end, BLOCK_T):
        offs_v = word + tl.arange(0, BLOCK_T)
        q = tl.maximum(tl.load(weights_ptr + offs_v, mask=offs_v < end, other=0.0), 0.0)
        inside = (offs_v < end)[:, None] & (offs_d < d)[None, :]
        ptrs = w_ptr + offs_v.to(tl.int64)[:, None] * stride_w + offs_d[None, :]
        acc += q[:, None] * tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
        share += q
    tl.store(sums_ptr + chunk * d + offs_d, tl.sum(acc, 0), mask=offs_d < d)
    if column == 0:
        tl.store(shares_ptr + chunk, tl.sum(share, 0))
        if chunk == 0:
            # Too many loud words to pay, or too much in the quiet ones: the block is taken whole.
            k = tl.load(k_ptr)
            split = k <= most
            if split:
                over = tl.zeros((BLOCK_N,), dtype=tl.int32)
                for row in tl.range(0, n, BLOCK_N):
                    offs_t = row + tl.arange(0, BLOCK_N)
                    missing = tl.load(missing_ptr + offs_t, mask=offs_t < n, other=0.0)
                    over += tl.where(missing <= most_quiet, 0, 1)  # 1 also where it is NaN
                split = tl.sum(over, 0) == 0
            tl.store(bounds_ptr, tl.where(split, k, -1))
            tl.store(bounds_ptr + 1, tl.where(split, -1, v))


def split_words(
    p: Tensor,  # (n, v)
    weight: Tensor,  # (v, D)
    state: Tensor,  # (3, n) fp32, the fields of `State`, after this block
    outlook: Outlook,
    is_label: Tensor,  # (v,) bool, words that are loud in any case
    weights: Tensor,  # (v,) fp32, written: q of quiet words, -1 for loud ones
    mass: Tensor,  # (n,) fp32, written: `Split.mass`
    *,
    limit: float,  # the sum over rows of P's share of wrong words above which a word is loud
    most_loud: float,  # share of the words, beyond which the block is multiplied whole
    most_quiet: float,  # share of a row's wrong words, beyond which it is too
) -> Split:
    """Part the words of a block; if it is to be multiplied whole, `weights` and `mass` are void."""
    (n, v), d = p.shape, weight.shape[1]
    device, most = p.device, int(most_loud * v)
    assert p.stride(1) == weight.stride(1) == weights.stride(0) == mass.stride(0) == 1
    assert state.stride(1) == 1
    rows, moved, mean = (configs.rows(name, device) for name in ("mass", "take", "mean"))
    block_t = rows.block_t * 2 // p.element_size()  # as many bytes in flight of fp32 as of 16-bit P
    step = configs.product(device, p.dtype).block_v
    tiles, width = triton.cdiv(v, rows.block), triton.cdiv(max(most, 1), step) * step
    counts = p.new_empty(tiles + 1, dtype=torch.int32)
    places, words = (p.new_empty(size, dtype=torch.int32) for size in (v, width))
    k, row_state, ahead = counts[tiles:], State(*state), Outlook(*map(dense, outlook))
    _word_mass_kernel[(tiles,)](
        p_ptr=p,
        stride_p=p.stride(0),
        state=row_state,
        outlook=ahead,
        is_label_ptr=dense(is_label),
        weights_ptr=weights,
        counts_ptr=counts,
        n=n,
        v=v,
        limit=float(limit),
        BLOCK_T=block_t,
        BLOCK=rows.block,
        **rows.launch,
    )
    _number_words_kernel[(tiles,)](
        weights_ptr=weights,
        counts_ptr=counts,
        places_ptr=places,
        words_ptr=words,
        k_ptr=k,
        v=v,
        width=width,
        BLOCK=rows.block,
        TILES=triton.next_power_of_2(tiles),
        **rows.launch,
    )
    loud, missing = p.new_empty(n, width), mass.new_empty(n)
    _take_loud_kernel[(triton.cdiv(n, moved.block_t),)](
        p_ptr=p,
        stride_p=p.stride(0),
        places_ptr=places,
        k_ptr=k,
        state=row_state,
        outlook=ahead,
        loud_ptr=loud.view(-1),  # written word by word
        mass_ptr=mass,
        missing_ptr=missing,
        n=n,
        v=v,
        width=width,
        most=most,
        STEP=step,
        BLOCK_T=moved.block_t,
        BLOCK=moved.block,
        **moved.launch,
    )
    sums, shares = mass.new_empty(CHUNKS, d), mass.new_empty(CHUNKS)
    bounds = counts.new_empty(2)
    _mean_word_kernel[(triton.cdiv(d, mean.block), CHUNKS)](
        w_ptr=weight,
        stride_w=weight.stride(0),
        weights_ptr=weights,
        k_ptr=k,
        missing_ptr=missing,
        sums_ptr=sums,
        shares_ptr=shares,
        bounds_ptr=bounds,
        n=n,
        v=v,
        d=d,
        most=most,
        most_quiet=float(most_quiet),
        BLOCK_N=1024,
        BLOCK_T=mean.block_t,
        BLOCK=mean.block,
        **mean.launch,
    )
    return Split(loud, words, bounds, mass, sums, shares)
