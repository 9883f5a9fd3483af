"""Rows of a bitsandbytes 4-bit weight, decoded: NF4 or FP4, any blocksize, absmax nested or not.

The weight is packed row-major over its flat index i: byte i // 2, the even i in the high half, and
block i // blocksize, so blocks may cross rows. w_i = code[nibble] * absmax[block], in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dilkern.kernels import configs
from dilkern.kernels.operands import dense, on_device


@triton.jit(do_not_specialize=["n", "start"])
def _nf4_dequant_kernel(
    packed_ptr,  # (ceil(numel / 2),) uint8
    code_ptr,  # (16,) fp32
    absmax_ptr,  # (blocks,) fp32, or uint8 if nested
    nested_code_ptr,  # (256,) fp32
    nested_absmax_ptr,  # (nested blocks,) fp32
    offset_ptr,  # () fp32
    ids_ptr,  # (n,) rows to decode, or None: the rows from `start` on
    out_ptr,  # (n, d) out
    n,
    d,
    start,
    stride_out,
    BLOCKSIZE: tl.constexpr,  # a constant: dividing 64-bit numbers at run time is slow
    NESTED_BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    PAIRS: tl.constexpr,  # d is even: a byte never crosses rows
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.cdiv(d, BLOCK)
    offs_t = tl.program_id(0) // columns * BLOCK_T + tl.arange(0, BLOCK_T)
    first = tl.program_id(0) % columns * BLOCK
    mask_t = offs_t < n
    if ids_ptr is not None:
        row = tl.load(ids_ptr + offs_t, mask=mask_t, other=0).to(tl.int64)
    else:
        row = start + offs_t.to(tl.int64)
    step: tl.constexpr = 2 if PAIRS else 1
    offs = first + step * tl.arange(0, BLOCK // step)
    inside = mask_t[:, None] & (offs[None, :] < d)
    flat = row[:, None] * d + offs[None, :]
    if PAIRS:
        # Not flat // 2, in which the compiler does not see neighbours.
        pair, pairs = first // 2 + tl.arange(0, BLOCK // 2)[None, :], d // 2
        byte_ptrs = packed_ptr + row[:, None] * pairs + pair
        byte = tl.load(byte_ptrs, mask=mask_t[:, None] & (pair < pairs), other=0).to(tl.int32)
    else:
        byte = tl.load(packed_ptr + flat // 2, mask=inside, other=0).to(tl.int32)
    # Both halves of a byte lie in one block: a blocksize is a power of two from 32 on.
    block = flat // BLOCKSIZE
    if NESTED:
        index = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
        outer = tl.load(nested_absmax_ptr + block // NESTED_BLOCKSIZE, mask=inside, other=0.0)
        inner = tl.load(nested_code_ptr + index, mask=inside, other=0.0)
        # Compiled without contraction to FMA: bit-equal to the decode in two rounded steps.
        absmax = inner * outer + tl.load(offset_ptr)
    else:
        absmax = tl.load(absmax_ptr + block, mask=inside, other=0.0)
    if PAIRS:
        high = tl.load(code_ptr + (byte >> 4)) * absmax
        low = tl.load(code_ptr + (byte & 15)) * absmax
        weight = tl.interleave(high, low)
    else:
        nibble = tl.where(flat % 2 == 0, byte >> 4, byte & 15)
        weight = tl.load(code_ptr + nibble) * absmax
    offs_d = first + tl.arange(0, BLOCK)
    ptrs = out_ptr + offs_t.to(tl.int64)[:, None] * stride_out + offs_d[None, :]
    keep = mask_t[:, None] & (offs_d[None, :] < d)
    tl.store(ptrs, weight.to(out_ptr.dtype.element_ty), mask=keep)


class Packed4bit(NamedTuple):
    """The tensors of a bitsandbytes `Params4bit` and its quant_state."""

    packed: Tensor  # uint8 view of the storage, flat
    code: Tensor  # (16,) fp32
    absmax: Tensor  # (blocks,) fp32, or uint8 if nested
    blocksize: int
    hidden_size: int  # D: the weight is (V, D)
    nested_code: Tensor | None = None  # (256,) fp32
    nested_absmax: Tensor | None = None  # fp32
    nested_blocksize: int = 256
    offset: Tensor | None = None  # () fp32


def nf4_dequant(
    weight: Packed4bit,
    dtype: torch.dtype,
    *,
    start: int = 0,
    end: int | None = None,
    ids: Tensor | None = None,
) -> Tensor:
    """Decode rows [start, end), or the rows `ids` (n,), to (n, D) in `dtype`.

    Bit-equal to code[nibble] * absmax in fp32, rounded once to `dtype`.
    """
    if ids is None:
        assert end is not None
        n = end - start
    else:
        n = ids.numel()
    d = weight.hidden_size
    out = weight.code.new_empty(n, d, dtype=dtype)
    config = configs.rows("decode", out.device)
    grid = triton.cdiv(n, config.block_t) * triton.cdiv(d, config.block)
    if grid:
        with on_device(out):
            _nf4_dequant_kernel[(grid,)](
                dense(weight.packed),
                dense(weight.code),
                dense(weight.absmax),
                dense(weight.nested_code),
                dense(weight.nested_absmax),
                weight.offset,
                dense(ids),
                out,
                n,
                d,
                start,
                out.stride(0),
                BLOCKSIZE=weight.blocksize,
                NESTED_BLOCKSIZE=weight.nested_blocksize,
                NESTED=weight.nested_code is not None,
                PAIRS=d % 2 == 0,
                BLOCK_T=config.block_t,
                BLOCK=config.block,
                num_warps=config.warps,
                enable_fp_fusion=False,
            )
    return out
