"""Heads whose weight is spread over processes: DTensor, ZeRO-3, vocabulary-parallel.

T tokens (flat), V vocabulary size (all ranks), D hidden size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dilkern.lm_head.base import Head, HeadSource
from dilkern.validation import check_label_values, name_of, reject, shape_of


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole plain tensor behind a DTensor (FSDP2); any other tensor as it is.

    The ranks saw different tokens, so the gradient that flows back is averaged over them, as FSDP
    does for the parameters it gathers itself; `full_tensor()` alone would leave it unreduced.
    """
    shape = getattr(tensor, "ds_shape", tensor.shape)
    if tensor.shape != shape:
        reject(
            "a head sharded by DeepSpeed ZeRO-3 must be gathered by the hooks of its module",
            f"a parameter of {shape_of(tensor)} in place of {tuple(shape)}",
            "Call deepspeed.initialize first, and pass the module (or an `LMHead`), not its weight.",
        )
    if type(tensor).__name__ != "DTensor":
        if hasattr(tensor, "__tensor_flatten__"):
            reject(
                "the parameters of a head must be plain tensors or DTensors",
                name_of(tensor),
                "Its layout is unknown here (torchao, for one): leave the lm_head out of it, or pass "
                "a dense weight.",
            )
        return tensor
    from torch.distributed.tensor import Partial

    sharded: Any = tensor
    gathered: Tensor = sharded.full_tensor(
        grad_placements=[Partial("avg")] * sharded.device_mesh.ndim
    )
    return gathered


def sharded_by_zero3(lm_head: Any) -> nn.Module | None:
    """Return the module of a head whose parameters DeepSpeed ZeRO-3 shards; None for any other."""
    if "deepspeed" not in sys.modules:
        return None
    module = lm_head.find() if isinstance(lm_head, HeadSource) else lm_head
    sharded = isinstance(module, nn.Module) and any(
        hasattr(p, "ds_id") for p in module.parameters()
    )
    return module if sharded else None


def call_gathered(
    module: nn.Module, score: Callable[[Tensor], Tensor], hidden_states: Tensor
) -> Tensor:
    """Return `score(hidden_states)`, called as the forward of a module that ZeRO-3 shards.

    ZeRO-3 gathers the parameters of a module in hooks around its call and around its backward, where
    they must be whole until autograd has put the gradient on them. So the module is called, with
    `score` in the place of its forward.

    Args:
        module: what `sharded_by_zero3` returned.
        score: reads the head anew; its result passes through the hooks.
        hidden_states: of any shape.
    """
    own = {id(p) for p in module.parameters(recurse=False)}
    for p in module.parameters():
        if hasattr(p, "ds_id") and id(p) not in own:
            # Those of an adapter, say: the hooks of `module` gather them too.
            sys.modules["deepspeed"].zero.register_external_parameter(module, p)
    before = vars(module).get("forward")
    module.forward = score  # type: ignore[method-assign]
    try:
        result: Tensor = module(hidden_states)
    finally:
        del module.forward
        if before is not None:
            module.forward = before  # type: ignore[method-assign]
    return result


def weights_come_later(module: nn.Module) -> bool:
    """Return whether the weights of `module` are not to be had before training has begun.

    They are on the meta device (another rank loads them), or ZeRO-3 shards them and its hooks, which
    `deepspeed.initialize` installs, are not there yet.
    """
    hooked = hasattr(module, "ds_id")  # of a module; a parameter's is there from its sharding on
    return any(
        p.device.type == "meta" or (hasattr(p, "ds_id") and not hooked) for p in module.parameters()
    )


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

    def kinds(self) -> list[str]:
        return [self.kind, *self.local.kinds()]

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
