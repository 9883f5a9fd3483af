"""What kernels are given: their device, and for matrix products aligned rows or descriptors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dilkern.kernels import configs


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's device current: Triton launches on the current one, whatever it is given."""
    if tensor.is_cuda:
        return torch.cuda.device_of(tensor)
    return torch.xpu.device_of(tensor) if tensor.is_xpu else nullcontext()


def dense(vector: Tensor | None) -> Tensor | None:
    """Return what a kernel reads by index alone, without gaps: the tensor itself or a copy of it.

    A launcher calls this for every such input, since nobody else knows what its pointers assume.
    """
    return None if vector is None else vector.contiguous()


def dense_rows(matrix: Tensor) -> Tensor:
    """Return `matrix` (r, D) itself if the elements of a row lie side by side, else a copy."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


class Operands(NamedTuple):
    h: Any
    w: Any
    d: int
    stride_h: int
    stride_w: int
    constants: dict[str, Any]


def aligned(matrix: Tensor, config: configs.Tile) -> Tensor:
    """Return `matrix` (r, D) itself if its rows are aligned, else a copy with zeros up to D'.

    Descriptors (TMA) need rows that start on 16 bytes. Pointers need a D and a stride that 16
    divides, in elements: only that does Triton see, and without it cp.async is lost.
    """
    rows, width = matrix.shape
    unit = 16 // matrix.dtype.itemsize if config.descriptors else 16
    whole = config.descriptors or width % unit == 0
    placed = matrix.stride(1) == 1 and matrix.stride(0) % unit == 0 and matrix.data_ptr() % 16 == 0
    if whole and placed:
        return matrix
    copy = matrix.new_zeros(rows, -(-width // unit) * unit)
    copy[:, :width] = matrix
    return copy


def tile_operands(h: Tensor, weight: Tensor, config: configs.Tile) -> Operands:
    """Prepare (n, D) hidden rows and (v, D) words for `tile_math.product`."""
    h, weight = aligned(h, config), aligned(weight, config)
    d = h.shape[1]
    constants = {
        "BLOCK_T": config.block_t,
        "BLOCK_V": config.block_v,
        "BLOCK_D": config.block_d,
        "DESCRIPTORS": config.descriptors,
        "EVEN_D": d % config.block_d == 0,
        "PRECISION": configs.input_precision(h.dtype),
    }
    operands: tuple[Any, Any] = (h, weight)
    if config.descriptors:
        operands = (
            TensorDescriptor(h, list(h.shape), [h.stride(0), 1], [config.block_t, config.block_d]),
            TensorDescriptor(
                weight, list(weight.shape), [weight.stride(0), 1], [config.block_v, config.block_d]
            ),
        )
    return Operands(*operands, d, h.stride(0), weight.stride(0), constants)
