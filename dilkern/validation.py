"""Checks on what callers pass in. Every message states the rule, what came, and the remedy.

S sequences, L positions, T tokens (flat), D hidden size, V vocabulary size.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT_DTYPES = (torch.int64, torch.int32)


def reject(rule: str, received: str, remedy: str) -> NoReturn:
    """Raise the ValueError that every check of dilkern raises."""
    raise ValueError(f"{rule}; received {received}. {remedy}")


def raised_by_check(error: BaseException) -> bool:
    """Return whether `error` comes from `reject`, so that its message is all a reader needs."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__") == __name__


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that somebody who wrote `name` probably meant."""
    near = difflib.get_close_matches(name, list(known), 1)
    return near[0] if near else None


def shape_of(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def name_of(value: Any) -> str:
    """Return the full name of the type of `value`."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        reject(f"`{name}` must be a torch.Tensor", type(value).__name__, "Convert it to a tensor.")


def check_float(name: str, value: Any) -> None:
    check_tensor(name, value)
    if value.dtype not in FLOAT_DTYPES:
        reject(
            f"`{name}` must be float32, bfloat16, float16 or float64",
            str(value.dtype),
            f"Convert with `{name}.to(torch.bfloat16)` or the dtype of your model.",
        )


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        reject(
            f"`{name}` and `{other_name}` must be on one device",
            f"{name} on {value.device}, {other_name} on {other.device}",
            f"Move one of them: `{name}.to({str(other.device)!r})`.",
        )


def check_hidden_and_labels(hidden_states: Any, labels: Any) -> None:
    """hidden_states (S, L, D) with labels (S, L), or (T, D) with labels (T,)."""
    check_float("hidden_states", hidden_states)
    check_tensor("labels", labels)
    if hidden_states.dim() not in (2, 3):
        reject(
            "`hidden_states` must have shape (S, L, D) or (T, D)",
            shape_of(hidden_states),
            "Pass the last hidden layer of the model, before the lm_head.",
        )
    if labels.dtype not in INT_DTYPES:
        reject("`labels` must be int64 or int32", str(labels.dtype), "Use `labels.long()`.")
    if labels.shape != hidden_states.shape[:-1]:
        reject(
            "`labels` must have the shape of `hidden_states` without its last dimension",
            f"labels {tuple(labels.shape)}, hidden_states {tuple(hidden_states.shape)}",
            "Pass labels aligned with input_ids and let `shift=True` pair position t-1 with "
            "label t; do not slice one of the two.",
        )
    check_same_device("labels", labels, "hidden_states", hidden_states)


def check_label_values(labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    """labels (N,): the scored ones only, ignore_index already removed. One device sync."""
    if labels.numel() == 0:
        return
    low, high = torch.stack(torch.aminmax(labels)).tolist()
    if low < 0 or high >= vocab_size:
        reject(
            f"every label must be in [0, {vocab_size}) or equal to ignore_index={ignore_index}",
            f"a label of {low if low < 0 else high}",
            "Mask prompt and padding with ignore_index, and check that the tokenizer belongs to "
            "this lm_head (added tokens need `model.resize_token_embeddings`).",
        )


def check_cu_seqlens(cu_seqlens: Any, labels: Tensor) -> None:
    """cu_seqlens (S+1,), 0 = first <= ... <= last = T, for packed labels (T,)."""
    check_tensor("cu_seqlens", cu_seqlens)
    if labels.dim() != 1:
        reject(
            "`cu_seqlens` goes with packed labels of shape (T,)",
            f"labels {tuple(labels.shape)}",
            "Drop `cu_seqlens` for padded (S, L) batches, or flatten the batch.",
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in INT_DTYPES:
        reject(
            "`cu_seqlens` must be an integer tensor of shape (S+1,) with S >= 1",
            f"{shape_of(cu_seqlens)}, {cu_seqlens.dtype}",
            "Pass cumulative sequence lengths, e.g. tensor([0, 5, 9]) for lengths 5 and 4.",
        )
    check_same_device("cu_seqlens", cu_seqlens, "labels", labels)
    if not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        ordered = all(a <= b for a, b in pairwise(bounds))
        if bounds[0] != 0 or bounds[-1] != labels.numel() or not ordered:
            reject(
                f"`cu_seqlens` must rise from 0 to T={labels.numel()}",
                f"{bounds[:8]}{'...' if len(bounds) > 8 else ''}",
                "Build it with `torch.cumsum` over the lengths, with a leading 0.",
            )


def is_number(value: Any) -> bool:
    """Return whether `value` is a finite int or float."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) < math.inf


def check_positive(name: str, value: Any, example: float = 1.0) -> None:
    """Refuse what is not a number > 0; `name` is an argument, or the flag of a command line."""
    if not is_number(value) or not value > 0:
        remedy = f"{name} {example:g}" if name.startswith("-") else f"{name}={example:g}"
        reject(f"`{name}` must be a number > 0 and finite", repr(value), f"Pass e.g. {remedy}.")


def check_count(name: str, value: Any, example: int) -> None:
    """Refuse what is not a whole number > 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        reject(f"`{name}` must be a whole number > 0", repr(value), f"Pass e.g. {name}={example}.")


def check_bool(name: str, value: Any) -> None:
    """Only a bool passes: another project's integer would be taken for True."""
    if not isinstance(value, bool):
        reject(f"`{name}` must be True or False", repr(value), f"Pass {name}=True or {name}=False.")


def check_ignore_index(value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        reject(
            "`ignore_index` must be an integer",
            repr(value),
            "Pass -100, or a number that is no word: then every label is scored.",
        )


def check_choice(name: str, value: Any, choices: Any) -> None:
    if value not in choices:
        names = sorted(map(str, choices))
        near = nearest(str(value), names)
        reject(
            f"`{name}` must be one of: {', '.join(names)}",
            repr(value),
            f"Did you mean {near!r}?" if near else "Choose one of these.",
        )
