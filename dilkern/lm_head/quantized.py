"""bitsandbytes weights, decoded one vocabulary block at a time and never whole.

The 4-bit layout (bitsandbytes 0.50): the weight is flat and row-major; byte i // 2 holds element i,
the even one in the high nibble; element i belongs to quantisation block i // blocksize, which may
cross rows. element = code[nibble] * absmax[block], in fp32, then rounded to the weight's own dtype.
Under double quantisation absmax is 8-bit too: code2[absmax[b]] * absmax2[b // blocksize2] + offset.
bitsandbytes' own CPU dequantisation is not used: 0.50.2 is wrong where D is a multiple of 32 but
not of the blocksize.

V vocabulary size, D hidden size, N rows asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dilkern.backends.base import why_not
from dilkern.lm_head.base import WeightHead
from dilkern.lm_head.sharded import full_tensor
from dilkern.validation import FLOAT_DTYPES, name_of, reject

_DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES}
# A block is decoded in quarters, so that the temporaries (some 10 bytes per element) stay within
# the 12 bytes per element that the torch backend counts; pieces under this size are not worth cutting.
_LEAST_PIECE = 1 << 16


class FourBit(NamedTuple):
    """The tensors and numbers of one 4-bit weight."""

    packed: Tensor  # (ceil(V * D / 2),) uint8
    code: Tensor  # (16,) fp32
    absmax: Tensor  # (blocks,) fp32, or uint8 when nested
    nested: Sequence[Tensor]  # (): absmax is fp32; else code2 (256,), absmax2, offset ()
    blocksize: int
    nested_blocksize: int
    dtype: torch.dtype  # what bitsandbytes rounds the decoded weight to

    def scales(self, blocks: Tensor) -> Tensor:
        """Return the fp32 absmax of the quantisation blocks `blocks` (n,), int64."""
        # index_select and not advanced indexing: decoding takes a third of the time on the CPU.
        absmax = self.absmax.index_select(0, blocks)
        if not self.nested:
            return absmax
        code2, absmax2, offset = self.nested
        outer = absmax2.index_select(0, blocks // self.nested_blocksize)
        return code2.index_select(0, absmax.int()).mul_(outer).add_(offset)


def decode_range(
    weight: FourBit,
    first: int,
    count: int,
    out: Tensor,  # (count,), any float dtype
) -> None:
    """Decode the flat elements [first, first + count) into `out` with torch."""
    # Two elements per look-up: a byte selects a pair of fp32, moved as one int64.
    byte = torch.arange(256, device=out.device)
    pairs = torch.stack((weight.code[byte >> 4], weight.code[byte & 15]), 1).view(torch.int64)[:, 0]
    size, end = weight.blocksize, first + count
    piece = max(count // 4, _LEAST_PIECE)
    for start in range(first, end, piece):
        stop = min(start + piece, end)
        low_block, high_block = start // size, -(-stop // size)
        # From block to block; the last block of the weight may be short.
        raw = weight.packed[low_block * size // 2 : high_block * size // 2].int()
        values = pairs.index_select(0, raw).view(torch.float32)
        scales = weight.scales(torch.arange(low_block, high_block, device=out.device))
        whole = values.numel() // size
        values[: whole * size].view(whole, size).mul_(scales[:whole, None])
        if whole < scales.numel():
            values[whole * size :].mul_(scales[whole])
        offset = low_block * size
        out[start - first : stop - first] = values[start - offset : stop - offset].to(weight.dtype)


def decode_rows(weight: FourBit, ids: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Decode the rows `ids` (N,) of a (V, width) weight, (N, width) in `dtype`."""
    out = torch.empty(ids.numel(), width, dtype=dtype, device=ids.device)
    column = torch.arange(width, device=ids.device)
    # An eighth of the rows at a time: the int64 indices alone take 16 bytes per element.
    rows = max(1, ids.numel() // 8, _LEAST_PIECE // (4 * width))
    for start in range(0, ids.numel(), rows):
        flat = (ids[start : start + rows].long().unsqueeze(1) * width + column).view(-1)
        byte = weight.packed.index_select(0, flat >> 1).int()
        nibble = torch.where((flat & 1).bool(), byte & 15, byte >> 4)
        value = weight.code.index_select(0, nibble).mul_(weight.scales(flat // weight.blocksize))
        out[start : start + rows] = value.to(weight.dtype).view(-1, width)
    return out


def decode_with_kernel(
    weight: FourBit,
    width: int,
    *,
    start: int = 0,
    end: int | None = None,
    ids: Tensor | None = None,
) -> Tensor | None:
    """Decode rows [start, end) or `ids` with the Triton kernel, bit-equal to the torch decoders.

    None where the triton backend cannot run.
    """
    if why_not("triton", weight.packed.device) is not None:
        return None
    kernel = import_module("dilkern.kernels.nf4_dequant")
    packed = kernel.Packed4bit(
        weight.packed, weight.code, weight.absmax, weight.blocksize, width, *weight.nested[:2],
        **({"nested_blocksize": weight.nested_blocksize, "offset": weight.nested[2]}
           if weight.nested else {}),
    )  # fmt: skip
    decoded: Tensor = kernel.nf4_dequant(packed, weight.dtype, start=start, end=end, ids=ids)
    return decoded


class FourBitHead(WeightHead):
    """A frozen bitsandbytes 4-bit weight (NF4 or FP4, nested or not, any blocksize and storage).

    Args:
        weight: the packed weight and its statistics.
        vocab_size, hidden_size: the shape of the weight before packing.
        bias: (V,) float tensor or None; may be trainable.
        scale, softcap: as for `DenseHead`.
    """

    kind = "four_bit"

    def __init__(
        self,
        weight: FourBit,
        vocab_size: int,
        hidden_size: int,
        bias: Tensor | None = None,
        *,
        scale: float = 1.0,
        softcap: float = 0.0,
    ) -> None:
        stored = [weight.packed, weight.code, weight.absmax, *weight.nested]
        super().__init__(stored, vocab_size, hidden_size, bias, scale=scale, softcap=softcap)
        self._blocksize, self._nested_blocksize = weight.blocksize, weight.nested_blocksize
        self._dtype = weight.dtype

    def _more_spec(self) -> str:
        return (
            f', "shape": [{self.vocab_size}, {self.hidden_size}], '
            f'"blocksize": {self._blocksize}, "nested_blocksize": {self._nested_blocksize}, '
            f'"dtype": "{_DTYPE_NAMES[self._dtype]}"'
        )

    @classmethod
    def from_spec(
        cls, spec: dict[str, Any], tensors: Sequence[Tensor], device: torch.device
    ) -> FourBitHead:
        head = super().from_spec(spec, tensors, device)
        assert isinstance(head, FourBitHead)
        head._blocksize, head._nested_blocksize = spec["blocksize"], spec["nested_blocksize"]
        head._dtype = getattr(torch, spec["dtype"])
        return head

    @property
    def weight(self) -> FourBit:
        packed, code, absmax, *nested = self.stored
        return FourBit(
            packed, code, absmax, nested, self._blocksize, self._nested_blocksize, self._dtype
        )

    def block(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        weight, width = self.weight, self.hidden_size
        decoded = decode_with_kernel(weight, width, start=start, end=end)
        if decoded is None:
            decoded = torch.empty(end - start, width, dtype=dtype, device=weight.packed.device)
            decode_range(weight, start * width, (end - start) * width, decoded.view(-1))
        return decoded.to(self.device, dtype)

    def gather(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        weight, ids = self.weight, ids.to(self.weight.packed.device)
        rows = decode_with_kernel(weight, self.hidden_size, ids=ids)
        if rows is None:
            rows = decode_rows(weight, ids, self.hidden_size, dtype)
        return rows.to(self.device, dtype)


class EightBitHead(WeightHead):
    """A frozen bitsandbytes int8 weight: W[v] = codes[v] * scales[v] / 127.

    The hidden states are not quantised, unlike in bitsandbytes' own int8 product.

    Args:
        codes: (V, D) int8.
        scales: (V,) float32, the largest magnitude of each row.
        bias: (V,) float tensor or None; may be trainable.
        scale, softcap: as for `DenseHead`.
    """

    kind = "eight_bit"

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        bias: Tensor | None = None,
        *,
        scale: float = 1.0,
        softcap: float = 0.0,
    ) -> None:
        vocab_size, hidden_size = codes.shape
        stored = [codes, scales]
        super().__init__(stored, vocab_size, hidden_size, bias, scale=scale, softcap=softcap)

    def _decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        # The product is formed in fp32 and rounded once, as bitsandbytes does in its backward.
        return codes.to(dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0)).to(self.device)

    def block(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        codes, scales = self.stored
        return self._decode(codes[start:end], scales[start:end], dtype)

    def gather(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        codes, scales = self.stored
        ids = ids.to(codes.device)
        return self._decode(codes.index_select(0, ids), scales.index_select(0, ids), dtype)


def four_bit_head(module: Any, **transforms: float) -> FourBitHead:
    """Read a `bitsandbytes.nn.Linear4bit` as it stands.

    Raises:
        ValueError: not yet quantised, or repacked for CPU inference.
    """
    name = name_of(module)
    weight = module.weight
    state = getattr(weight, "quant_state", None) or module.quant_state
    if state is None:
        reject(
            "a 4-bit lm_head must be quantised before it is used",
            f"{name} without quant_state",
            "Move it to its device first: `module.to('cuda')` or `.to('cpu')` quantises it. An lm_head "
            "tied to the embedding has lost its scales to the tie: load the model without "
            "llm_int8_skip_modules; DILConfig(quantize_lm_head=True) quantises a copy.",
        )
    if getattr(state, "packing_format_for_cpu", False):
        reject(
            "a 4-bit lm_head must be in bitsandbytes' standard layout",
            f"{name} repacked for CPU inference (packing_format_for_cpu)",
            "It was run in eval mode on an AVX512-BF16 CPU. `lm_head.state_dict()` puts it back, "
            "or reload the model.",
        )
    nested = [state.state2.code, state.state2.absmax, state.offset] if state.nested else []
    four_bit = FourBit(
        packed=full_tensor(weight).data.reshape(-1).view(torch.uint8),
        code=state.code,
        absmax=state.absmax,
        nested=nested,
        blocksize=state.blocksize,
        nested_blocksize=state.state2.blocksize if state.nested else 0,
        dtype=state.dtype,
    )
    vocab_size, hidden_size = state.shape
    bias = None if module.bias is None else full_tensor(module.bias)
    return FourBitHead(four_bit, vocab_size, hidden_size, bias, **transforms)


def eight_bit_head(module: Any, **transforms: float) -> EightBitHead:
    """Read a `bitsandbytes.nn.Linear8bitLt` as it stands.

    Raises:
        ValueError: not yet quantised, quantised anew at every step (`has_fp16_weights`), or without
            its scales.
    """
    name = name_of(module)
    weight, state = module.weight, module.state
    if state.has_fp16_weights:
        reject(
            "an 8-bit lm_head must hold int8 weights",
            f"{name} with has_fp16_weights=True",
            "Build it with has_fp16_weights=False, or use a plain nn.Linear.",
        )
    # bitsandbytes moves both from the weight to the state in the first forward.
    codes = full_tensor(weight).data if state.CB is None else state.CB
    scales = getattr(weight, "SCB", None) if state.SCB is None else state.SCB
    if codes.dtype is not torch.int8:
        reject(
            "an 8-bit lm_head must be quantised before it is used",
            f"{name} with a weight of {codes.dtype}",
            "Move it to its device first: `module.to('cuda')` or `.to('cpu')` quantises it.",
        )
    if scales is None:
        reject(
            "an 8-bit lm_head must have the scales of its rows",
            f"{name} without SCB",
            "FSDP2 loses them when it shards the weight: leave the lm_head out (`ignored_params`), or "
            "load it in 4 bits.",
        )
    bias = None if module.bias is None else full_tensor(module.bias)
    return EightBitHead(codes, scales, bias, **transforms)
