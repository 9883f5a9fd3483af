"""Attention of packed rows: the model's own function, sequence by sequence.

Nothing is switched: the function that a model calls, whichever attn_implementation it was loaded
with, is taught one more keyword. Without it, as in generation, a call goes through as it was.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dilkern.integrations.rows import PackedRow, Segments, gather

_Attention = Callable[..., tuple[Tensor, Any]]
_EAGER: set[type] = set()  # models whose own eager function has been taught


def _many_shapes(query: Tensor) -> AbstractContextManager[Any]:
    """Keep cuDNN, which makes a plan for each shape that it meets, from calls of many shapes.

    On Hopper and Blackwell torch gives it precedence where it is allowed.
    """
    others = {
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: cuda.math_sdp_enabled(),
    }
    allowed = [backend for backend, is_on in others.items() if is_on]
    return sdpa_kernel(allowed) if query.is_cuda and allowed else nullcontext()


def _by_segment(
    base: _Attention,
    module: Any,
    query: Tensor,  # (1, H, T, D)
    key: Tensor,
    value: Tensor,
    segments: Segments,
    window: int | None,
    options: dict[str, Any],
) -> Tensor:
    # Slices of one tensor would each write a gradient of its full size; the parts of a split do not.
    queries, keys, values = (states.split(segments.sizes, 2) for states in (query, key, value))
    outputs = []
    for part, q, k, v in zip(segments.parts, queries, keys, values):
        if part.shared:
            k, v = (
                torch.cat([whole[part.holder][:, :, : part.shared], own], 2)
                for whole, own in ((keys, k), (values, v))
            )
        # Square and without a window sdpa needs no mask; other functions may take none as blindness.
        plain = not part.shared and (window is None or window >= part.size)
        mask = None if plain and base is sdpa_attention_forward else segments.mask(part, window, q)
        outputs.append(base(module, q, k, v, mask, **options)[0])
    return torch.cat(outputs, 1)


def _varlen(
    base: _Attention,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    options: dict[str, Any],
) -> Tensor:
    index, bounds = segments.varlen(query.device)
    if index is not None:
        key, value = gather(key, 2, index), gather(value, 2, index)
    # Causal here is aligned to the last key, and so is a window.
    return base(module, query, key, value, None, **options, **bounds)[0]


def _taught(base: _Attention, by_boundaries: bool) -> _Attention:
    """Return an attention function that does as `base` and takes packed rows too."""

    @functools.wraps(base)
    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        packed_row: PackedRow | None = None,
        **options: Any,
    ) -> tuple[Tensor, Any]:
        if packed_row is None:
            return base(module, query, key, value, attention_mask, *args, **options)
        options.pop("position_ids", None)  # from which flash attention would make boundaries
        segments, window = packed_row.segments, options.get("sliding_window")
        segments.windows.add(window)
        if by_boundaries:
            return _varlen(base, module, query, key, value, segments, options), None
        with _many_shapes(query):
            output = _by_segment(base, module, query, key, value, segments, window, options)
        return output, None

    attention._takes_packed_rows = True  # type: ignore[attr-defined]
    return attention


def teach_packed_rows(model: Any) -> None:
    """Let the attention function of a transformers model take `packed_row=...`; done once.

    sdpa, flash attention and functions of one's own are entered in `AttentionInterface` anew under
    their name, which stays what the model, generation and saved configurations know. The eager
    function is not in it: each modeling module has its own, and there it is replaced.
    """
    name = model.config.get_text_config()._attn_implementation
    if name in ALL_ATTENTION_FUNCTIONS:
        base = ALL_ATTENTION_FUNCTIONS[name]
        if not hasattr(base, "_takes_packed_rows"):
            AttentionInterface.register(name, _taught(base, "flash" in name))
        return
    if type(model) in _EAGER:
        return
    for source in {type(module).__module__ for module in model.modules()}:
        scope = vars(sys.modules[source])
        base = scope.get("eager_attention_forward")
        if base is not None and not hasattr(base, "_takes_packed_rows"):
            scope["eager_attention_forward"] = _taught(base, False)
    _EAGER.add(type(model))
