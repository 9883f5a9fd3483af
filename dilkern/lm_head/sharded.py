"""Heads whose weight is spread over processes: DTensor, ZeRO-3, vocabulary-parallel.

T tokens (flat), V vocabulary size (all ranks), D hidden size.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dilkern.lm_head.base import Head, HeadSource
from dilkern.validation import check_label_values, reject


def whole(tensor: Tensor) -> Tensor:
    """Return the whole plain tensor behind a DTensor (FSDP2); any other tensor as it is.

    The ranks saw different tokens, so the gradient that flows back is averaged over them, as FSDP
    does for the parameters it gathers itself; `full_tensor()` alone would leave it unreduced.
    """
    if type(tensor).__name__ != "DTensor":
        return tensor
    from torch.distributed.tensor import Partial

    sharded: Any = tensor
    gathered: Tensor = sharded.full_tensor(
        grad_placements=[Partial("avg")] * sharded.device_mesh.ndim
    )
    return gathered


def gathered(holder: Any) -> AbstractContextManager[Any]:
    """Gather DeepSpeed ZeRO-3 parameters for the time of a `with`; nothing for all others.

    Args:
        holder: what `as_head` takes, or a list of tensors.
    """
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is None:
        return nullcontext()
    if isinstance(holder, HeadSource):
        holder = holder.find()
    tensors: Iterable[Any] = [holder] if isinstance(holder, Tensor) else holder
    if isinstance(holder, nn.Module):
        tensors = holder.parameters()
    elif isinstance(holder, Head):
        tensors = holder.tensors()
    partitioned = [t for t in tensors if hasattr(t, "ds_id")]
    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(partitioned)
    return context


class _CopyToShards(torch.autograd.Function):
    """The same hidden states go to every rank's rows: identity, whose gradient is summed."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # In fp32: a sum of 16-bit partial gradients would round once per rank.
        (grad,) = grads
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        torch.distributed.all_reduce(total, group=ctx.group)
        return total.to(grad.dtype), None


class _MergeShards(torch.autograd.Function):
    """From each rank's logp against its own rows to the log-probability over all rows.

    With z the logit of the rank's label (the true one on its owner, a stand-in elsewhere) and logp
    its local log-probability, lse = z - logp. Let rest be the log-sum-exp of the other ranks' lse:
        token_logp = logp_owner - log(1 + exp(rest - lse_owner)),
    which keeps the digits of confident tokens. With share = exp(lse - lse_all):
        owner: d/dlogp = share, d/dz = 1 - share; others: d/dlogp = share, d/dz = -share.
    """

    @staticmethod
    def forward(ctx: Any, logp: Tensor, z: Tensor, mine: Tensor, group: Any) -> Tensor:
        lse = z - logp
        owner = torch.stack((torch.where(mine, lse, 0.0), torch.where(mine, logp, 0.0)))
        torch.distributed.all_reduce(owner, group=group)
        lse_owner, logp_owner = owner
        others = torch.where(mine, -torch.inf, lse)
        top = others.clone()
        torch.distributed.all_reduce(top, torch.distributed.ReduceOp.MAX, group=group)
        top = torch.where(top == -torch.inf, 0.0, top)  # a group of one
        rest = torch.exp(others - top)
        torch.distributed.all_reduce(rest, group=group)
        lead = top + torch.log(rest) - lse_owner
        loss = -nn.functional.logsigmoid(-lead)
        miss = torch.sigmoid(lead)  # share of all ranks but the owner
        share = torch.where(mine, torch.sigmoid(-lead), torch.exp(lse - lse_owner - loss))
        ctx.save_for_backward(share, torch.where(mine, miss, -share))
        merged: Tensor = logp_owner - loss
        return merged

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_logp, d_z = ctx.saved_tensors
        return grads[0] * d_logp, grads[0] * d_z, None, None


class VocabParallelHead(Head):
    """A head whose rows are divided over the ranks of a process group (tensor parallelism).

    Each rank holds its own rows as a head of any kind and calls `linear_logps` with the *same*
    hidden states and labels. Results and gradients of hidden states are equal on all ranks; the
    gradient of each rank's rows stays on it. Ranks follow one another in the vocabulary in the
    order of the group. (A DTensor sharded for *data* parallelism, FSDP2, needs no wrapper.)

    Args:
        local: this rank's rows.
        group: the process group; None for the default one.

    Raises:
        ValueError: `torch.distributed` is not initialised.
    """

    kind = "vocab_parallel"

    def __init__(self, local: Head, group: Any = None) -> None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            reject(
                "a vocabulary-parallel head needs an initialised process group",
                "torch.distributed uninitialised",
                "Call torch.distributed.init_process_group, or pass the head itself.",
            )
        sizes: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(sizes, local.vocab_size, group=group)
        self.local, self._group = local, group
        self._first: int = sum(sizes[: torch.distributed.get_rank(group)])
        self._total: int = sum(sizes)
        self.vocab_size, self.hidden_size = local.vocab_size, local.hidden_size
        self.scale, self.softcap = local.scale, local.softcap

    def tensors(self) -> list[Tensor]:
        return self.local.tensors()

    def spec(self) -> str:
        return self.local.spec()  # the op sees the local head, which has all that backends ask for

    def strict_dtypes(self) -> list[torch.dtype]:
        return self.local.strict_dtypes()

    def project(self, hidden_states: Tensor) -> Tensor:
        # Behind the local projection, so that the gradient of a replicated LoRA A, which comes
        # through it, is complete on every rank too.
        projected: Tensor = _CopyToShards.apply(self.local.project(hidden_states), self._group)
        return projected

    def _mine(self, labels: Tensor) -> Tensor:
        return (labels >= self._first) & (labels < self._first + self.vocab_size)

    def local_labels(self, labels: Tensor, ignore_index: int) -> Tensor:
        scored = labels != ignore_index
        check_label_values(labels[scored], self._total, ignore_index)
        local = torch.where(self._mine(labels), labels - self._first, 0)
        return torch.where(scored, local, ignore_index)

    def merge(
        self, token_logps: Tensor, hidden: Tensor, labels: Tensor, shift: int, ignore_index: int
    ) -> Tensor:
        scored = (labels != ignore_index).nonzero().squeeze(1)
        targets = labels.index_select(0, scored)
        mine = self._mine(targets)
        local = torch.where(mine, targets - self._first, 0)
        full = token_logps.new_zeros(token_logps.shape)
        with torch.autocast(hidden.device.type, enabled=False):
            rows = self.local.gather(local, hidden.dtype).to(token_logps.dtype)
            raw = torch.linalg.vecdot(hidden.index_select(0, scored - shift).to(rows.dtype), rows)
            bias = self.local.bias()
            if bias is not None:
                raw = raw + bias.index_select(0, local).to(raw.dtype)
            merged: Tensor = _MergeShards.apply(
                token_logps.index_select(0, scored), self.transform(raw), mine, self._group
            )
        return full.index_copy(0, scored, merged)
