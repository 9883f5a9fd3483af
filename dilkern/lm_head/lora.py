"""LoRA on the lm_head, as further columns: [h, s h A^T] . [W, B]^T = h W^T + s (h A^T) B^T.

W + s B A is never formed nor rounded, so W may be dense or quantised, frozen or trainable. The op
sees a head of width D + r: the gradient of A comes by ordinary autograd through `project`, that of
B is the last columns of the block gradient. docs/heads.md compares this with PEFT's own forward.

V vocabulary size, D hidden size, r ranks of all active adapters together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dilkern.lm_head.base import Head, restore
from dilkern.lm_head.sharded import full_tensor
from dilkern.validation import check_float, name_of, reject, shape_of

# Width D + r is rounded up to this: rows of 16-bit blocks then start at 32-byte boundaries, which
# the kernels need in order to load asynchronously.
_WIDTH_MULTIPLE = 16


class Adapter(NamedTuple):
    """One LoRA adapter: it adds scaling * (B A h + bias) to the raw logits."""

    a: Tensor  # (r, D)
    b: Tensor  # (V, r)
    scaling: float
    bias: Tensor | None = None  # (V,)


class LoRAHead(Head):
    """A head of any kind with LoRA adapters on it.

    With `disabled=True` the adapters' columns are zeros, but they are there: the same products of
    the same shapes in the same order. So a policy whose B is still 0 and its reference (adapter
    disabled) give the same bits, and the log-ratio of training's first step is exactly 0.

    Args:
        base: the head under the adapters.
        adapters: at least one.
        disabled: leave the adapters out of the sum.

    Raises:
        ValueError: an adapter whose shapes do not fit the base.
    """

    kind = "lora"

    def __init__(self, base: Head, adapters: Sequence[Adapter], *, disabled: bool = False) -> None:
        for adapter in adapters:
            check_float("LoRA A", adapter.a)
            check_float("LoRA B", adapter.b)
            rank = adapter.a.shape[0]
            want_a, want_b = (rank, base.hidden_size), (base.vocab_size, rank)
            if adapter.a.shape != want_a or adapter.b.shape != want_b:
                reject(
                    f"LoRA A and B must have shapes {want_a} and {want_b}",
                    f"A {shape_of(adapter.a)}, B {shape_of(adapter.b)}",
                    "Pass A (r, D) and B (V, r) of an adapter of this lm_head.",
                )
            if adapter.bias is not None and adapter.bias.shape != want_b[:1]:
                reject(
                    f"the bias of LoRA B must have shape ({base.vocab_size},)",
                    shape_of(adapter.bias),
                    "Pass the bias that belongs to this B.",
                )
        self.base, self._adapters, self._disabled = base, list(adapters), disabled
        self._columns: list[Tensor] = []
        for adapter in adapters:
            self._columns.append(adapter.b.detach() if disabled else adapter.b)
            if adapter.bias is not None:
                self._columns.append(adapter.bias.detach() if disabled else adapter.bias)
        self._finish()

    def _finish(self) -> None:
        used = self.base.width + sum(_width(column) for column in self._columns)
        self._width = -(-used // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
        self.vocab_size, self.hidden_size = self.base.vocab_size, self.base.hidden_size
        self.scale, self.softcap = self.base.scale, self.base.softcap

    def kinds(self) -> list[str]:
        return [self.kind, *self.base.kinds()]

    @property
    def width(self) -> int:
        return self._width

    def tensors(self) -> list[Tensor]:
        return [*self._columns, *self.base.tensors()]

    def spec(self) -> str:
        return (
            f'{{"kind": "lora", "columns": {len(self._columns)}, '
            f'"disabled": {int(self._disabled)}, "base": {self.base.spec()}}}'
        )

    @classmethod
    def from_spec(
        cls, spec: dict[str, Any], tensors: Sequence[Tensor], device: torch.device
    ) -> LoRAHead:
        head = cls.__new__(cls)
        count = spec["columns"]
        head._columns = list(tensors[:count])
        head.base = restore(spec["base"], tensors[count:], device)
        head._disabled = bool(spec["disabled"])
        head._finish()
        return head

    def strict_dtypes(self) -> list[torch.dtype]:
        return self.base.strict_dtypes()  # PEFT keeps fp32 adapters over a 16-bit base

    def project(self, hidden_states: Tensor) -> Tensor:
        # A library sums in another order over strided operands: see Head.project.
        hidden_states = hidden_states.contiguous()
        parts = [self.base.project(hidden_states)]
        # Autocast picks the dtype of the product itself; outside it the adapter's own one counts.
        mixed = torch.is_autocast_enabled(hidden_states.device.type)
        for adapter in () if self._disabled else self._adapters:
            a = adapter.a.to(hidden_states.device).contiguous()
            states = hidden_states if mixed else hidden_states.to(a.dtype)
            low = nn.functional.linear(states, a) * adapter.scaling
            parts.append(low.to(hidden_states.dtype))
            if adapter.bias is not None:
                parts.append(low.new_full((*low.shape[:-1], 1), adapter.scaling).to(parts[0].dtype))
        used = sum(part.shape[-1] for part in parts)
        parts.append(hidden_states.new_zeros(*hidden_states.shape[:-1], self._width - used))
        return torch.cat(parts, -1)

    def _append(self, base: Tensor, columns: Sequence[Tensor]) -> Tensor:
        parts = [base]
        for column in () if self._disabled else columns:
            parts.append(column.to(base) if column.dim() == 2 else column.to(base)[:, None])
        used = sum(part.shape[1] for part in parts)
        return torch.cat([*parts, base.new_zeros(base.shape[0], self._width - used)], 1)

    def block(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        columns = [column[start:end] for column in self._columns]
        return self._append(self.base.block(start, end, dtype), columns)

    def gather(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        columns = [column.index_select(0, ids.to(column.device)) for column in self._columns]
        return self._append(self.base.gather(ids, dtype), columns)

    def bias(self) -> Tensor | None:
        return self.base.bias()

    def gradient_columns(self, needed: Sequence[bool]) -> slice:
        if self.base.gradient_columns(needed[len(self._columns) :]) != slice(0, 0):
            return slice(None)
        return slice(self.base.width, None)  # a frozen base: saves 2 N V D of the recompute pass

    def add_block_gradient(
        self, gradients: list[Tensor | None], start: int, end: int, d_weight: Tensor, d_bias: Tensor
    ) -> None:
        skipped = self._width - d_weight.shape[1]
        left = self.base.width - skipped
        self.base.add_block_gradient(
            gradients[len(self._columns) :], start, end, d_weight[:, :left], d_bias
        )
        for column, gradient in zip(self._columns, gradients):
            right = left + _width(column)
            if gradient is not None:
                block = d_weight[:, left:right]
                gradient[start:end].copy_(block if column.dim() == 2 else block[:, 0])
            left = right


def _width(column: Tensor) -> int:
    return column.shape[1] if column.dim() == 2 else 1


def lora_head(module: Any, read: Callable[[Any], Head]) -> Head:
    """Read a PEFT `lora.Linear` (or its bitsandbytes twins) as it stands at this moment.

    Args:
        module: the PEFT layer; its scaling, active adapters, merged and disabled state count.
        read: how to read `module.base_layer`.

    Raises:
        ValueError: a variant (DoRA, aLoRA, ...) or dropout at work.
    """
    if module.disable_adapters and module.merged:
        # PEFT's own forward does this in the same state, and the base weight is wrong without it.
        module.unmerge()
    base = read(module.base_layer)
    if module.merged:
        return base
    adapters = []
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        if name in module.lora_variant:
            reject(
                "LoRA on the lm_head must be plain LoRA",
                f"adapter {name!r} of {name_of(module)} with "
                f"{type(module.lora_variant[name]).__name__}",
                "Train the lm_head with use_dora=False and no other variant, merge the adapter, or "
                "leave the lm_head out of `target_modules`.",
            )
        dropout = module.lora_dropout[name]
        if getattr(dropout, "p", 0.0) and dropout.training and not module.disable_adapters:
            reject(
                "LoRA on the lm_head must have no dropout in training",
                f"adapter {name!r} of {name_of(module)} with lora_dropout={dropout.p}",
                "Use lora_dropout=0, or leave the lm_head out of `target_modules`.",
            )
        a, b = module.lora_A[name].weight, module.lora_B[name]
        bias = None if b.bias is None else full_tensor(b.bias)
        adapters.append(
            Adapter(full_tensor(a), full_tensor(b.weight), float(module.scaling[name]), bias)
        )
    if not adapters:
        return base
    return LoRAHead(base, adapters, disabled=bool(module.disable_adapters))
