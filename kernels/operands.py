"""What kernels are given: their device, and for matrix products aligned rows or descriptors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dilkern.kernels import configs
from dilkern.kernels.tile_math import Transform


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


def transform_of(bias: Tensor | None, scale: float, softcap: float) -> Transform:
    return Transform(
        dense(bias),
        None if scale == 1 else float(scale),
        float(softcap) if softcap else None,
    )


def is_aligned(matrix: Tensor, config: configs.Tile) -> bool:
    """Whether rows of `matrix` (r, D) can be loaded as the tile wants to.

    Descriptors (TMA) need rows that start on 16 bytes. Pointers need a D and a stride that 16
    divides, in elements: only that does Triton see, and without it cp.async is lost.
    """
    unit = _unit(matrix, config)
    whole = config.descriptors or matrix.shape[1] % unit == 0
    placed = matrix.stride(1) == 1 and matrix.stride(0) % unit == 0
    return whole and placed and matrix.data_ptr() % 16 == 0


def _unit(matrix: Tensor, config: configs.Tile) -> int:
    return 16 // matrix.dtype.itemsize if config.descriptors else 16


def aligned(matrix: Tensor, config: configs.Tile) -> Tensor:
    """Return `matrix` (r, D) itself if its rows are aligned, else a copy with zeros up to D'."""
    if is_aligned(matrix, config):
        return matrix
    (rows, width), unit = matrix.shape, _unit(matrix, config)
    copy = matrix.new_zeros(rows, -(-width // unit) * unit)
    copy[:, :width] = matrix
    return copy


class Source(NamedTuple):
    """Where the products of a tile come from: arguments of `tile_math.tile_products` and of launch."""

    block_t: int
    block_v: int
    arguments: dict[str, Any]


def tile_source(a: Tensor, weight: Tensor | None, softcap: float) -> Source:
    """Prepare (n, D) hidden rows and (v, D) words, or (n, v) fp32 products without `weight`."""
    if weight is None:
        assert a.stride(1) == 1
        rows = configs.rows("chunk", a.device)
        none = dict.fromkeys(("w", "d", "stride_w", "BLOCK_D", "EVEN_D", "PRECISION"))
        return Source(
            rows.block_t,
            rows.block,
            {"a": a, "stride_a": a.stride(0), "BLOCK_T": rows.block_t, "BLOCK_V": rows.block}
            | {"DESCRIPTORS": False, **none, **rows.launch},
        )
    config = configs.tile(a.device, a.dtype)
    h, weight = aligned(a, config), aligned(weight, config)
    d = h.shape[1]
    arguments: dict[str, Any] = {"a": h, "w": weight}
    if config.descriptors:
        blocks = ((config.block_t, config.block_d), (config.block_v, config.block_d))
        for name, matrix, block in zip("aw", (h, weight), blocks):
            arguments[name] = TensorDescriptor(
                matrix, list(matrix.shape), [matrix.stride(0), 1], list(block)
            )
    arguments |= {
        "d": d,
        "stride_a": h.stride(0),
        "stride_w": weight.stride(0),
        "BLOCK_T": config.block_t,
        "BLOCK_V": config.block_v,
        "BLOCK_D": config.block_d,
        "DESCRIPTORS": config.descriptors,
        "EVEN_D": d % config.block_d == 0,
        "PRECISION": configs.input_precision(a.dtype),
        **config.launch(softcap),
    }
    return Source(config.block_t, config.block_v, arguments)
