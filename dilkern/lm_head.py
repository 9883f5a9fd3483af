"""One view of every output head: blocks of the effective weight, and what becomes of their gradient.

The op never asks for the whole weight. It asks a `Head` for `block(start, end, dtype)`, the rows
[start, end) of the matrix that multiplies the hidden states, and hands back the gradient of that
block. A new kind of head is one class here.

V vocabulary size, D hidden size, N rows asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dilkern.validation import check_float, check_positive, reject, shape_of


class Head:
    """Base class: logits = softcap * tanh(scale * (W h + b) / softcap); softcap 0 means none.

    A head crosses into the custom op as a list of tensors and a JSON text (`tensors()`, `spec()`)
    and is rebuilt there by `rebuild`, so that torch.compile and autograd see plain tensors.
    """

    kind: ClassVar[str]
    vocab_size: int
    hidden_size: int
    scale: float = 1.0
    softcap: float = 0.0

    def tensors(self) -> list[Tensor]:
        """Return every tensor of the head; those that require grad receive a gradient."""
        raise NotImplementedError

    def spec(self) -> str:
        """Return the JSON text from which `rebuild` restores the head around its tensors."""
        raise NotImplementedError

    @classmethod
    def from_spec(cls, spec: dict[str, Any], tensors: Sequence[Tensor]) -> Head:
        raise NotImplementedError

    def project(self, hidden_states: Tensor) -> Tensor:
        """Map hidden states (..., D) to what the blocks multiply; differentiable, outside the op."""
        return hidden_states

    def block(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """Return rows [start, end) of the effective weight, (end-start, D), in `dtype`."""
        raise NotImplementedError

    def gather(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows `ids` (N,) of the effective weight, (N, D), in `dtype`."""
        raise NotImplementedError

    def bias(self) -> Tensor | None:
        """Return the bias (V,) or None."""
        return None

    def new_gradients(self, needed: Sequence[bool]) -> list[Tensor | None]:
        """Allocate one zero gradient per entry of `tensors()` that needs one."""
        return [torch.zeros_like(t) if n else None for t, n in zip(self.tensors(), needed)]

    def add_block_gradient(
        self,
        gradients: list[Tensor | None],
        start: int,
        end: int,
        d_weight: Tensor,  # (end-start, D), fp32: complete sum over all tokens
        d_bias: Tensor,  # (end-start,), fp32
    ) -> None:
        """Fold the gradient of one block into `gradients` (each block comes exactly once)."""
        raise NotImplementedError


class DenseHead(Head):
    """A (V, D) weight with an optional (V,) bias, frozen or trainable.

    Args:
        weight: (V, D) float tensor; read at call time, never copied whole.
        bias: (V,) float tensor or None.
        scale: factor on the logits (Cohere `logit_scale`, 1/`logits_scaling` of Granite).
        softcap: Gemma's `final_logit_softcapping`, 0 for none.
    """

    kind = "dense"

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        scale: float = 1.0,
        softcap: float = 0.0,
    ) -> None:
        check_float("lm_head weight", weight)
        if weight.dim() != 2:
            reject(
                "the lm_head weight must have shape (V, D)",
                shape_of(weight),
                "Pass `model.get_output_embeddings()` or its weight; packed 4-bit weights need "
                "their bitsandbytes module.",
            )
        if bias is not None:
            check_float("lm_head bias", bias)
            if bias.shape != weight.shape[:1]:
                reject(
                    f"the lm_head bias must have shape ({weight.shape[0]},)",
                    shape_of(bias),
                    "Pass the bias that belongs to this weight.",
                )
        check_positive("scale", scale)
        if softcap != 0.0:
            check_positive("softcap", softcap)
        self.weight, self._bias, self.scale, self.softcap = weight, bias, scale, softcap
        self.vocab_size, self.hidden_size = weight.shape

    def tensors(self) -> list[Tensor]:
        return [self.weight] if self._bias is None else [self.weight, self._bias]

    def spec(self) -> str:
        # An f-string and not json.dumps: torch.compile traces this line.
        return f'{{"kind": "dense", "scale": {self.scale!r}, "softcap": {self.softcap!r}}}'

    @classmethod
    def from_spec(cls, spec: dict[str, Any], tensors: Sequence[Tensor]) -> DenseHead:
        head = cls.__new__(cls)  # checked when the caller built it
        head.weight, head._bias = tensors[0], tensors[1] if len(tensors) > 1 else None
        head.scale, head.softcap = spec["scale"], spec["softcap"]
        head.vocab_size, head.hidden_size = head.weight.shape
        return head

    def block(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        return self.weight[start:end].to(dtype)

    def gather(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.weight.index_select(0, ids).to(dtype)

    def bias(self) -> Tensor | None:
        return self._bias

    def add_block_gradient(
        self, gradients: list[Tensor | None], start: int, end: int, d_weight: Tensor, d_bias: Tensor
    ) -> None:
        for gradient, block in zip(gradients, (d_weight, d_bias)):
            if gradient is not None:
                gradient[start:end].copy_(block)


HEAD_KINDS: dict[str, type[Head]] = {cls.kind: cls for cls in (DenseHead,)}


@lru_cache(maxsize=256)
def _parse(spec: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(spec)
    return parsed


def rebuild(spec: str, tensors: Sequence[Tensor]) -> Head:
    """Restore a head from `Head.spec()` and `Head.tensors()`."""
    parsed = _parse(spec)
    return HEAD_KINDS[parsed["kind"]].from_spec(parsed, tensors)


def as_head(lm_head: Any) -> Head:
    """Return the `Head` view of what the caller calls a head.

    Args:
        lm_head: a (V, D) tensor, an `nn.Linear`, or a `Head`.

    Raises:
        ValueError: for a module whose effective weight is not known here.
    """
    if isinstance(lm_head, Head):
        return lm_head
    if isinstance(lm_head, Tensor):
        return DenseHead(lm_head)
    if type(lm_head) is nn.Linear:
        return DenseHead(lm_head.weight, lm_head.bias)
    reject(
        "`lm_head` must be a (V, D) tensor, an nn.Linear or a dilkern Head",
        f"{type(lm_head).__module__}.{type(lm_head).__qualname__}",
        "Pass its dense weight, or subclass dilkern.lm_head.Head for it.",
    )
