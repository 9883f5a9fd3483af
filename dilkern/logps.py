"""The heavy op: log-probabilities of labels straight from hidden states and head.

Everything of cost that dilkern does happens here, for every loss. Equations: docs/math.md.
S sequences, L positions, T = S * L tokens (flat), N of them scored, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from dilkern.backends import base as backends
from dilkern.backends.base import Quiet
from dilkern.backends.word_filter import threshold
from dilkern.lm_head import Head, as_head, call_gathered, rebuild, sharded_by_zero3
from dilkern.validation import (
    check_bool,
    check_hidden_and_labels,
    check_ignore_index,
    check_label_values,
    check_positive,
    check_same_device,
    reject,
)


@torch.library.custom_op("dilkern::linear_logps", mutates_args=())
def _linear_logps(
    hidden: Tensor,  # (T, D)
    labels: Tensor,  # (T,)
    head_tensors: Sequence[Tensor],
    head_spec: str,
    shift: int,  # 1: hidden row t-1 predicts label t
    ignore_index: int,
    backend: str,
    workspace_bytes: int,
    filter_eps: float,  # 0.0: no filter
    need_u: bool,
    need_head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return token_logps (T,), scored positions (N,), their logps (N,) and lse (2, N), u (N, D).

    Then the fields of `Quiet`, empty without a filter or with a frozen head.
    """
    head = rebuild(head_spec, head_tensors, hidden.device)
    # The callers' autocast would round what is kept in fp32 here on purpose.
    with torch.autocast(hidden.device.type, enabled=False):
        scored = (labels != ignore_index).nonzero().squeeze(1)
        targets = labels.index_select(0, scored).long()
        check_label_values(targets, head.vocab_size, ignore_index)
        result = backends.resolve(backend, hidden.device, hidden.dtype).forward(
            hidden,
            scored - shift,
            targets,
            head,
            workspace_bytes=workspace_bytes,
            need_u=need_u,
            filter_eps=filter_eps,
            need_quiet=need_head and filter_eps > 0,
        )
        token_logps = result.logps.new_zeros(labels.shape).index_copy_(0, scored, result.logps)
    weights, mass = result.quiet or (result.logps.new_empty(0, 0) for _ in range(2))
    return token_logps, scored, result.logps, result.lse, result.u, weights, mass


@_linear_logps.register_fake
def _(hidden: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, ...]:
    filter_eps, need_u, need_head = options[-3:]
    new_size = torch.library.get_ctx().new_dynamic_size
    num_scored = new_size()
    acc = backends.accumulation_dtype(hidden.dtype)
    u_dtype = acc if hidden.dtype is torch.float16 else hidden.dtype
    filtered = filter_eps > 0 and need_head
    parts, words, blocks = (new_size() if filtered else 0 for _ in range(3))
    return (
        hidden.new_empty(labels.shape, dtype=acc),
        labels.new_empty(num_scored, dtype=torch.int64),
        hidden.new_empty(num_scored, dtype=acc),
        hidden.new_empty(2, num_scored, dtype=acc),
        hidden.new_empty(num_scored if need_u else 0, hidden.shape[1], dtype=u_dtype),
        hidden.new_empty(parts, words, dtype=acc),
        hidden.new_empty(blocks, num_scored if filtered else 0, dtype=acc),
    )


@torch.library.custom_op("dilkern::linear_logps_hidden_backward", mutates_args=())
def _hidden_backward(
    grad: Tensor,  # (T,)
    token_logps: Tensor,  # (T,), unread: ties the result to the graph, so double backward is refused
    scored: Tensor,  # (N,)
    u: Tensor,  # (N, D)
    shift: int,
    dtype: torch.dtype,
) -> Tensor:
    """grad_hidden_i = g_i u_i (7), zero for rows that are not scored."""
    with torch.autocast(grad.device.type, enabled=False):
        rows = (grad.index_select(0, scored).unsqueeze(1) * u).to(dtype)
        return rows.new_zeros(grad.shape[0], u.shape[1]).index_copy_(0, scored - shift, rows)


@_hidden_backward.register_fake
def _(
    grad: Tensor, token_logps: Tensor, scored: Tensor, u: Tensor, shift: int, dtype: torch.dtype
) -> Tensor:
    return u.new_empty(grad.shape[0], u.shape[1], dtype=dtype)


@torch.library.custom_op("dilkern::linear_logps_head_backward", mutates_args=())
def _head_backward(
    grad: Tensor,  # (T,)
    token_logps: Tensor,  # (T,), unread: as above
    hidden: Tensor,  # (T, D)
    labels: Tensor,  # (T,)
    scored: Tensor,  # (N,)
    logps: Tensor,  # (N,)
    lse: Tensor,  # (2, N)
    quiet_weights: Tensor,  # the fields of `Quiet`, or empty
    quiet_mass: Tensor,
    head_tensors: Sequence[Tensor],
    head_spec: str,
    needed: Sequence[bool],
    shift: int,
    backend: str,
    workspace_bytes: int,
) -> list[Tensor]:
    """Return one gradient per head tensor, empty where none is needed."""
    head = rebuild(head_spec, head_tensors, hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        gradients = backends.resolve(backend, hidden.device, hidden.dtype).head_backward(
            hidden,
            scored - shift,
            labels.index_select(0, scored).long(),
            head,
            logps,
            lse,
            grad.index_select(0, scored),
            Quiet(quiet_weights, quiet_mass) if quiet_weights.numel() else None,
            needed=needed,
            workspace_bytes=workspace_bytes,
        )
    return [t.new_empty(0) if g is None else g for t, g in zip(head_tensors, gradients)]


@_head_backward.register_fake
def _(
    grad: Tensor,
    token_logps: Tensor,
    hidden: Tensor,
    labels: Tensor,
    scored: Tensor,
    logps: Tensor,
    lse: Tensor,
    quiet_weights: Tensor,
    quiet_mass: Tensor,
    head_tensors: Sequence[Tensor],
    head_spec: str,
    needed: Sequence[bool],
    *options: Any,
) -> list[Tensor]:
    return [torch.empty_like(t) if n else t.new_empty(0) for t, n in zip(head_tensors, needed)]


def _refuse_double_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "dilkern.linear_logps has no second derivative: its first one is a saved constant. "
        "Drop `create_graph=True`, or use dilkern.reference for small problems."
    )


def _no_context(ctx: Any, inputs: Any, output: Any) -> None:
    pass


_hidden_backward.register_autograd(_refuse_double_backward, setup_context=_no_context)
_head_backward.register_autograd(_refuse_double_backward, setup_context=_no_context)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, labels, head_tensors, head_spec, shift, _, backend, workspace_bytes, *_ = inputs
    token_logps, scored, logps, lse, u, *quiet = output
    ctx.mark_non_differentiable(scored, logps, lse, u, *quiet)
    ctx.set_materialize_grads(False)
    ctx.head_needs = [t.requires_grad for t in head_tensors]
    ctx.options = (head_spec, shift, backend, workspace_bytes)
    ctx.dtype, ctx.num_head_tensors = hidden.dtype, len(head_tensors)
    # With a frozen head u replaces the hidden states as the saved tensor.
    extra = (hidden, labels, logps, lse, *quiet, *head_tensors) if any(ctx.head_needs) else ()
    ctx.save_for_backward(token_logps, scored, u, *extra)


def _backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    head_grads: list[Tensor | None] = [None] * ctx.num_head_tensors
    grad_hidden = None
    if grad is not None:
        token_logps, scored, u, *extra = ctx.saved_tensors
        head_spec, shift, backend, workspace_bytes = ctx.options
        if ctx.needs_input_grad[0]:
            grad_hidden = _hidden_backward(grad, token_logps, scored, u, shift, ctx.dtype)
        if any(ctx.head_needs):
            hidden, labels, logps, lse, weights, mass, *head_tensors = extra
            computed = _head_backward(
                grad,
                token_logps,
                hidden,
                labels,
                scored,
                logps,
                lse,
                weights,
                mass,
                head_tensors,
                head_spec,
                ctx.head_needs,
                shift,
                backend,
                workspace_bytes,
            )
            head_grads = [g if n else None for g, n in zip(computed, ctx.head_needs)]
    return grad_hidden, None, head_grads, *[None] * 8


_linear_logps.register_autograd(_backward, setup_context=_setup_context)


def compute_dtype(hidden_states: Tensor, head: Head) -> torch.dtype:
    """The autocast dtype where autocast is on, else the common dtype of states and head."""
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type) and hidden_states.dtype is not torch.float64:
        return torch.get_autocast_dtype(device_type)
    for dtype in head.strict_dtypes():
        if dtype != hidden_states.dtype:
            reject(
                "`hidden_states` and `lm_head` must have one dtype outside autocast",
                f"hidden_states {hidden_states.dtype}, lm_head {dtype}",
                "Convert one of them, or run under torch.autocast.",
            )
    return hidden_states.dtype


def mask_first_labels(
    labels: Tensor,  # (S, L) or (T,)
    cu_seqlens: Tensor | None = None,  # (S+1,)
    *,
    ignore_index: int = -100,
) -> Tensor:
    """Return labels in which the first of each sequence is ignored: nothing predicts it.

    (S, L) are S sequences; packed (T,) are those between cu_seqlens, or one without it. Masking
    twice changes nothing.
    """
    labels = labels.clone()
    if cu_seqlens is None:
        labels[..., :1] = ignore_index
    elif labels.numel():
        # The start of an empty last sequence is T, one past the end.
        last = labels.numel() - 1
        starts = cu_seqlens[:-1].long()
        at = starts.clamp(max=last)
        labels[at] = torch.where(starts > last, labels[at], ignore_index)
    return labels


def linear_logps(
    hidden_states: Tensor,  # (S, L, D) or (T, D)
    lm_head: Any,
    labels: Tensor,  # (S, L) or (T,)
    *,
    shift: bool = False,
    ignore_index: int = -100,
    backend: str = "auto",
    workspace_mib: float = 256,
    filter_eps: float | str | None = None,
) -> Tensor:
    r"""Compute the log-probability of each label without holding the logits.

    $\log p(y_t) = z_{t,y_t} - \log \sum_v e^{z_{t,v}}$ with $z_t = W h_t$ (docs/math.md, 1-3).
    The same pass over the vocabulary yields $u_t = \partial \log p(y_t) / \partial h_t$, so that with
    a frozen head backward is the product $g_t u_t$, for any loss of the token log-probs.

    Args:
        hidden_states: (S, L, D) or (T, D), float32, bfloat16, float16 (float64 for tests): the last
            hidden layer, after the final norm.
        lm_head: a (V, D) tensor, an `nn.Linear`, a bitsandbytes or PEFT layer, an `LMHead` or `Head`
            of `dilkern.lm_head` (docs/heads.md). If it requires grad, its gradient is computed by one
            recompute pass in backward. A head on the CPU under hidden states on an accelerator is
            streamed block by block.
        labels: (S, L) or (T,), integers in [0, V) or `ignore_index`.
        shift: False: row t is scored against label t. True: labels are aligned with input_ids as
            Hugging Face gives them, so row t-1 is scored against label t within each sequence (a
            (T,) input is one sequence), and the first label is not scored.
        ignore_index: the label that is not scored; such rows never reach the head.
        backend: "auto", "torch" or "triton".
        workspace_mib: the most temporary memory in MiB, beside O(T D) for results and u.
        filter_eps: None: exact gradients. A number in (0, 1]: words whose mean probability over a
            block of rows is below it enter the gradient by their mean, which saves much of its time;
            log-probs keep their bits. "auto": 2^-21 for fp32, 2^-19 for 16 bits, with an error below
            that of 16-bit logits. Look with `filter_report`; docs/filter.md.

    Returns:
        token_logps: float32 (float64 for float64 inputs), the shape of `labels`, in nats; entry t
        belongs to label t in both settings of `shift`; 0 where a label is ignored.

    Raises:
        ValueError: shapes, dtypes, devices that do not fit; a label outside [0, V); a backend that
            cannot run; a workspace too small for one token.
        RuntimeError: on double backward and under forward-mode differentiation.

    Numerics: logits, statistics and accumulation in fp32; same inputs, same bits, with or without
    gradient; NaN and Inf propagate. Two device syncs (which labels are scored, and their range).
    Under autocast the products take operands of the autocast dtype.

    Memory: `workspace_mib` + u (N, D) when hidden states require grad; never (T, V). With filter_eps
    and a trainable head also V numbers per block of rows, which a small workspace makes many.

    Example:
        >>> import torch
        >>> from dilkern import linear_logps
        >>> hidden_states, weight = torch.randn(5, 8), torch.randn(11, 8)
        >>> labels = torch.tensor([1, 4, -100, 10, 0])
        >>> token_logps = linear_logps(hidden_states, weight, labels)
        >>> full = (hidden_states @ weight.T).log_softmax(-1)
        >>> bool(torch.allclose(token_logps[0], full[0, 1], atol=1e-5)), token_logps[2].item()
        (True, 0.0)
    """
    check_hidden_and_labels(hidden_states, labels)
    check_positive("workspace_mib", workspace_mib)
    check_bool("shift", shift)
    check_ignore_index(ignore_index)
    if shift:
        labels = mask_first_labels(labels, ignore_index=ignore_index)

    def score(states: Tensor) -> Tensor:
        return _score(
            states,
            as_head(lm_head),
            labels,
            shift,
            ignore_index,
            backend,
            workspace_mib,
            filter_eps,
        )

    sharded = sharded_by_zero3(lm_head)
    return score(hidden_states) if sharded is None else call_gathered(sharded, score, hidden_states)


def _score(
    hidden_states: Tensor,
    head: Head,
    labels: Tensor,
    shift: bool,
    ignore_index: int,
    backend: str,
    workspace_mib: float,
    filter_eps: float | str | None,
) -> Tensor:
    head.check(hidden_states)
    for tensor in head.tensors():
        if tensor.device.type != "cpu":
            check_same_device("lm_head", tensor, "hidden_states", hidden_states)
    hidden = head.project(hidden_states.to(compute_dtype(hidden_states, head)))
    # torch drops tangents at a custom op without a word.
    if any(unpack_dual(tensor).tangent is not None for tensor in (hidden, *head.tensors())):
        raise RuntimeError("dilkern.linear_logps has no forward-mode derivative: use backward.")
    hidden, flat = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    outputs: tuple[Tensor, ...] = _linear_logps(
        hidden,
        head.local_labels(flat, ignore_index),
        head.tensors(),
        head.spec(),
        int(shift),
        ignore_index,
        backend,
        int(workspace_mib * 2**20),
        threshold(filter_eps, hidden.dtype),
        torch.is_grad_enabled() and hidden.requires_grad,
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in head.tensors()),
    )
    token_logps = head.merge(outputs[0], hidden, flat, int(shift), ignore_index)
    return token_logps.reshape(labels.shape)
