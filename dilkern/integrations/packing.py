"""Whether a model takes packed rows (`rows.py`): asked of the model itself, before training.

S sequences, L positions.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils.import_utils import is_flash_attn_2_available

from dilkern.integrations.data import IGNORE_INDEX
from dilkern.integrations.rows import pack
from dilkern.lm_head.modules import unwrap
from dilkern.validation import raised_by_check, reject

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_REMEDY = "Set padding_free=False and shared_prompts=False"


def check_attention(name: str | None, device: torch.device, packed: bool = False) -> None:
    """Refuse an attention implementation that cannot train here, before a model is loaded for it.

    Raises:
        ValueError: flash_attention_2 without its package or on a CPU; flex_attention on a CPU, or
            for packed rows.
    """
    if name == "flash_attention_2" and (device.type == "cpu" or not is_flash_attn_2_available()):
        reject(
            "attn_implementation='flash_attention_2' needs a GPU and the package flash-attn",
            "a CPU" if device.type == "cpu" else "flash-attn is not installed, or has no GPU",
            "On a machine with a GPU: pip install 'dilkern[flash]'. Anywhere: "
            "attn_implementation='sdpa', with which padding_free and shared_prompts work too.",
        )
    if name == "flex_attention" and packed:
        reject(
            "padding_free and shared_prompts hand attention a mask of numbers or boundaries",
            "attn_implementation='flex_attention', which takes neither",
            "Use attn_implementation='sdpa', 'eager' or 'flash_attention_2'.",
        )
    if name == "flex_attention" and device.type == "cpu":
        reject(
            "attn_implementation='flex_attention' needs a GPU",
            "a CPU, where torch has no backward of it",
            "Use attn_implementation='sdpa'.",
        )


def _probe(model: Any, answers: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Two prompts and their answers, all of other lengths, as a padded batch and its labels."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    shape = (answers, 2, 9)
    ids = torch.randint(min(vocabulary, 1000), shape, generator=generator)
    ids[1:, 0, :4], ids[1:, 1, :2] = ids[0, 0, :4], ids[0, 1, :2]
    labels = ids.clone()
    labels[:, 0, :4], labels[:, 1, :2] = IGNORE_INDEX, IGNORE_INDEX
    lengths = 9 - torch.arange(2 * answers) % 4
    mask = (torch.arange(9) < lengths.unsqueeze(1)).long()
    labels = labels.view(-1, 9).masked_fill(mask == 0, IGNORE_INDEX)
    device = next(model.parameters()).device
    batch = {"input_ids": ids.view(-1, 9).to(device), "attention_mask": mask.to(device)}
    return batch, labels.to(device)


def check_packing(model: Any, answers: int = 1) -> None:
    """Verify on a few tokens that the model scores a packed row as it scores the padded batch.

    Args:
        model: a causal LM with `install_head`, or a PEFT wrapper of one, where it will compute.
        answers: as in `pack`: 1 for padding-free rows, more for shared prompts.

    Raises:
        ValueError: layers that are no attention or one with a pattern of its own, an attention
            implementation that passes packed rows by, a sliding window that attention is not told,
            virtual tokens of an adapter, or log-probs that differ.
    """
    adapters = getattr(model, "peft_config", {}).values()
    config = unwrap(model).config.get_text_config()
    name, attention = type(unwrap(model)).__name__, config._attn_implementation
    types = set(getattr(config, "layer_types", None) or ())
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters):
        reject(
            "packed rows (padding_free, shared_prompts) need a model without virtual tokens",
            "a prompt-learning adapter",
            f"Use LoRA, or: {_REMEDY}.",
        )
    if types - _KNOWN_LAYERS:
        reject(
            "packed rows (padding_free, shared_prompts) need layers of full or sliding attention",
            f"{name} with {', '.join(sorted(types - _KNOWN_LAYERS))}",
            f"{_REMEDY}.",
        )
    check_attention(attention, next(model.parameters()).device, packed=True)
    batch, labels = _probe(unwrap(model), answers)
    (row,) = pack(batch, labels, answers=answers)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # no dropout
    try:
        with torch.no_grad():
            want = model(**batch, labels=labels, dil_head=True).token_logps
            try:
                have = model(**row.inputs, dil_head=True).token_logps
            except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as failure:
                if raised_by_check(failure):
                    raise
                reject(
                    "packed rows (padding_free, shared_prompts) need a model that takes them",
                    f"{name}: {failure}",
                    f"{_REMEDY}.",
                )
    finally:
        for module, training in modes:
            module.training = training
    windows = row.segments.windows
    window = getattr(config, "sliding_window", None)
    if window and (not types or "sliding_attention" in types) and window not in windows:
        reject(
            "packed rows (padding_free, shared_prompts) need attention that is told its window",
            f"{name} with sliding_window={window}, which its attention function does not get",
            f"{_REMEDY}.",
        )
    error, size = (have - want).abs().max().item(), want.abs().max().item()
    narrow = torch.is_autocast_enabled(want.device.type) or next(model.parameters()).itemsize < 4
    if not error <= (3e-2 if narrow else 1e-4) * size:
        reject(
            "packed rows (padding_free, shared_prompts) need a model whose attention keeps "
            "sequences apart",
            f"{name}, log-probs off by {error:.3g} of {size:.3g}",
            f"{_REMEDY}, or load it with attn_implementation='sdpa'.",
        )
