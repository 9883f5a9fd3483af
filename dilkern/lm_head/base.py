"""What a head is to the op: blocks of the effective weight, and what becomes of their gradient.

The op never asks for the whole weight. It asks a `Head` for `block(start, end, dtype)`, the rows
[start, end) of the matrix that multiplies the hidden states, and hands back the gradient of that
block. A new kind of head is one class and one line in `HEAD_KINDS` (`dilkern/lm_head/__init__.py`).

V vocabulary size, D hidden size, T tokens (flat), N rows asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from dilkern.validation import check_float, check_positive, reject, shape_of


class Head:
    """Base class: logits = softcap * tanh(scale * (W h + b) / softcap); softcap 0 means none.

    A head crosses into the custom op as a list of tensors and a JSON text (`tensors()`, `spec()`)
    and is rebuilt there by `rebuild`, so that torch.compile and autograd see plain tensors. Heads
    nest: the spec and the tensors of a wrapping head end with those of its base.
    """

    kind: ClassVar[str]
    vocab_size: int
    hidden_size: int
    scale: float
    softcap: float

    def tensors(self) -> list[Tensor]:
        """Return every tensor of the head; those that require grad receive a gradient."""
        raise NotImplementedError

    def spec(self) -> str:
        """Return the JSON text from which `rebuild` restores the head around its tensors.

        Made of f-strings and not by json.dumps, and without the shapes of tensors, which may be
        symbolic: torch.compile traces it.
        """
        raise NotImplementedError

    @classmethod
    def from_spec(
        cls, spec: dict[str, Any], tensors: Sequence[Tensor], device: torch.device
    ) -> Head:
        """Restore the head; what it returns from then on lies on `device`."""
        raise NotImplementedError

    def kinds(self) -> list[str]:
        """Return the kind of this head and of those under it."""
        return [self.kind]

    @property
    def width(self) -> int:
        """The columns of a block: D, and more where `project` widens the hidden states."""
        return self.hidden_size

    def strict_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes that hidden states must have outside autocast (none: any will do)."""
        return []

    def project(self, hidden_states: Tensor) -> Tensor:
        """Map hidden states (..., D) to what the blocks multiply; differentiable, not in the op.

        Equal numbers give equal bits, in whatever layout they come.
        """
        return hidden_states

    def local_labels(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Return the labels (T,) that the op sees; outside the op."""
        return labels

    def merge(
        self,
        token_logps: Tensor,  # (T,), of the op for `local_labels`
        hidden: Tensor,  # (T, width), as `project` returned it
        labels: Tensor,  # (T,), global
        shift: int,
        ignore_index: int,
    ) -> Tensor:
        """Return the final token_logps (T,); differentiable, outside the op."""
        return token_logps

    def block(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """Return rows [start, end) of the effective weight, (end-start, width), in `dtype`."""
        raise NotImplementedError

    def gather(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows `ids` (N,) of the effective weight, (N, width), in `dtype`."""
        raise NotImplementedError

    def bias(self) -> Tensor | None:
        """Return the bias (V,) or None."""
        raise NotImplementedError

    def new_gradients(self, needed: Sequence[bool]) -> list[Tensor | None]:
        """Allocate one zero gradient per entry of `tensors()` that needs one."""
        return [torch.zeros_like(t) if n else None for t, n in zip(self.tensors(), needed)]

    def gradient_columns(self, needed: Sequence[bool]) -> slice:
        """Return which columns of a block need a gradient: all, or the last few."""
        return slice(None)

    def add_block_gradient(
        self,
        gradients: list[Tensor | None],
        start: int,
        end: int,
        d_weight: Tensor,  # (end-start, columns), fp32: complete sum over all tokens
        d_bias: Tensor,  # (end-start,), fp32
    ) -> None:
        """Fold the gradient of one block into `gradients` (each block comes exactly once)."""
        raise NotImplementedError

    def check(self, hidden_states: Tensor) -> None:
        """Require hidden states (..., D) of this head's D."""
        if hidden_states.shape[-1] != self.hidden_size:
            reject(
                "`hidden_states` and `lm_head` must agree in the hidden size",
                f"hidden_states D={hidden_states.shape[-1]}, lm_head D={self.hidden_size}",
                "Pass the head of the model that made these hidden states.",
            )

    def logits(self, hidden_states: Tensor, *, block_size: int = 16384) -> Tensor:
        """Return the full logits (N, V) of a few hidden states (N, D), to probe or to inspect."""
        self.check(hidden_states)
        hidden = self.project(hidden_states)
        bias, blocks = self.bias(), []
        for start in range(0, self.vocab_size, block_size):
            end = min(start + block_size, self.vocab_size)
            raw = hidden @ self.block(start, end, hidden.dtype).t()
            blocks.append(raw if bias is None else raw + bias[start:end].to(raw.dtype))
        return self.transform(torch.cat(blocks, -1))

    def transform(self, raw: Tensor) -> Tensor:
        """Apply scale and softcap to raw logits W h + b, in any shape."""
        scaled = raw * self.scale
        return self.softcap * torch.tanh(scaled / self.softcap) if self.softcap else scaled


class HeadSource:
    """What gives a `Head` anew at every use, because the weight may be another one by then."""

    find: Callable[[], Any]  # the module or weight as it is now

    def head(self) -> Head:
        """Return the head as it is now."""
        raise NotImplementedError


class WeightHead(Head):
    """A head that owns a stored weight: what the dense and the quantised kinds share.

    Its tensors are `stored` (the weight in whatever form) and then the bias, if there is one.
    """

    stored: list[Tensor]

    def __init__(
        self,
        stored: list[Tensor],
        vocab_size: int,
        hidden_size: int,
        bias: Tensor | None,
        *,
        scale: float,
        softcap: float,
    ) -> None:
        if bias is not None:
            check_float("lm_head bias", bias)
            if bias.shape != (vocab_size,):
                reject(
                    f"the lm_head bias must have shape ({vocab_size},)",
                    shape_of(bias),
                    "Pass the bias that belongs to this weight.",
                )
        check_positive("scale", scale)
        if softcap != 0.0:
            check_positive("softcap", softcap)
        self.stored, self._bias, self.scale, self.softcap = stored, bias, scale, softcap
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.device: torch.device = stored[0].device

    def tensors(self) -> list[Tensor]:
        return self.stored if self._bias is None else [*self.stored, self._bias]

    def spec(self) -> str:
        return (
            f'{{"kind": "{self.kind}", "stored": {len(self.stored)}, "scale": {self.scale!r}, '
            f'"softcap": {self.softcap!r}{self._more_spec()}}}'
        )

    def _more_spec(self) -> str:
        """Further JSON fields of this kind, each with its leading comma."""
        return ""

    @classmethod
    def from_spec(
        cls, spec: dict[str, Any], tensors: Sequence[Tensor], device: torch.device
    ) -> WeightHead:
        head = cls.__new__(cls)  # checked when the caller built it
        count = spec["stored"]
        head.stored, head.device = list(tensors[:count]), device
        head._bias = tensors[count] if len(tensors) > count else None
        head.scale, head.softcap = spec["scale"], spec["softcap"]
        head.vocab_size, head.hidden_size = spec.get("shape") or head.stored[0].shape
        return head

    def bias(self) -> Tensor | None:
        return None if self._bias is None else self._bias.to(self.device)

    def gradient_columns(self, needed: Sequence[bool]) -> slice:
        return slice(None) if needed[0] else slice(0, 0)

    def add_block_gradient(
        self, gradients: list[Tensor | None], start: int, end: int, d_weight: Tensor, d_bias: Tensor
    ) -> None:
        for gradient, block in (
            (gradients[0], d_weight),  # only a dense weight can need one
            (None if self._bias is None else gradients[-1], d_bias),
        ):
            if gradient is not None:
                gradient[start:end].copy_(block)


class DenseHead(WeightHead):
    """A (V, D) weight with an optional (V,) bias, frozen or trainable.

    A weight on the CPU under hidden states on an accelerator is streamed block by block (pinned, its
    copies do not hold up the CPU); its gradient lands on the CPU.

    Args:
        weight: (V, D) float tensor; read at call time, never copied whole.
        bias: (V,) float tensor or None.
        scale: factor on the logits (Cohere `logit_scale`, 1/`logits_scaling` of Granite).
        softcap: Gemma's `final_logit_softcapping`, 0 for none.

    Raises:
        ValueError: shapes or dtypes that do not fit, scale or softcap not positive.
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
        vocab_size, hidden_size = weight.shape
        super().__init__([weight], vocab_size, hidden_size, bias, scale=scale, softcap=softcap)

    @property
    def weight(self) -> Tensor:
        return self.stored[0]

    def strict_dtypes(self) -> list[torch.dtype]:
        return [t.dtype for t in self.tensors()]

    def block(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        return self.weight[start:end].to(self.device, non_blocking=True).to(dtype)

    def gather(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        rows = self.weight.index_select(0, ids.to(self.weight.device))
        return rows.to(self.device).to(dtype)


HEAD_KINDS: dict[str, type[Head]] = {}


@lru_cache(maxsize=256)
def _parse(spec: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(spec)
    return parsed


def restore(spec: dict[str, Any], tensors: Sequence[Tensor], device: torch.device) -> Head:
    """Restore a head from its parsed spec; the way in which wrapping heads restore their base."""
    return HEAD_KINDS[spec["kind"]].from_spec(spec, tensors, device)


def rebuild(spec: str, tensors: Sequence[Tensor], device: torch.device) -> Head:
    """Restore a head from `Head.spec()` and `Head.tensors()`, giving its blocks on `device`."""
    return restore(_parse(spec), tensors, device)
