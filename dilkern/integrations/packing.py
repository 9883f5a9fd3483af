"""Padding-free batches: all sequences of a batch in one row, each seeing only itself.

S sequences, L positions, T tokens of the batch without its padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.utils.import_utils import is_flash_attn_2_available

from dilkern.integrations.transformers import IGNORE_INDEX, DILOutput, model_inputs
from dilkern.lm_head.modules import unwrap
from dilkern.logps import mask_first_labels
from dilkern.validation import reject


def score_packed(
    model: Any,
    inputs: Mapping[str, Any],
    labels: Tensor,  # (S, L)
    *,
    pairs: bool = False,
    **extra: Any,
) -> DILOutput:
    """Score a padded batch (S, L) without its padding: one row of T tokens, positions restarting.

    Beside the positions, from which sdpa, eager and flex attention learn where sequences begin, the
    row carries its boundaries, which flash attention takes as they are.

    Args:
        model: a causal LM with `install_head`.
        inputs: input_ids and attention_mask (S, L).
        labels: aligned with input_ids, -100 ignored.
        pairs: the batch is chosen first half, rejected second half. In the row the two of a pair
            are then neighbours, chosen first, as sharing their prompt will need.
        **extra: further keywords of the model.

    Returns:
        DILOutput as of the padded batch, token_logps (S, L). See `check_packing`.

    Raises:
        ValueError: a batch with anything else for the model, such as images or token types: what
            positions and masks a model makes of them in a packed row is its own affair.
    """
    others = sorted(model_inputs(inputs).keys() - {"input_ids", "attention_mask"})
    if others:
        reject(
            "padding_free takes batches of input_ids and attention_mask alone",
            ", ".join(others),
            "Set padding_free=False, or leave them out of the batch.",
        )
    real = inputs["attention_mask"].bool()
    order = torch.arange(len(real), device=real.device)
    if pairs:
        order = order.view(2, -1).T.flatten()
    real, ids, labels = real[order], inputs["input_ids"][order], labels[order]
    positions = real.long().cumsum(1) - 1
    ends = real.sum(1).cumsum(0, dtype=torch.int32)
    bounds = torch.cat([ends.new_zeros(1), ends])
    output: DILOutput = model(
        input_ids=ids[real].unsqueeze(0),
        position_ids=positions[real].unsqueeze(0),
        labels=mask_first_labels(labels[real], bounds, ignore_index=IGNORE_INDEX).unsqueeze(0),
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=real.shape[1],
        max_length_k=real.shape[1],
        dil_head=True,
        **extra,
    )
    flat = output.token_logps[0]
    token_logps = flat.new_zeros(labels.shape).masked_scatter(real, flat)
    output.token_logps = token_logps[order.argsort()]
    return output


def check_attention(name: str | None, device: torch.device) -> None:
    """Refuse an attention implementation that cannot train here, before a model is loaded for it.

    Raises:
        ValueError: flash_attention_2 without its package or on a CPU; flex_attention on a CPU.
    """
    if name == "flash_attention_2" and (device.type == "cpu" or not is_flash_attn_2_available()):
        reject(
            "attn_implementation='flash_attention_2' needs a GPU and the package flash-attn",
            "a CPU" if device.type == "cpu" else "flash-attn is not installed, or has no GPU",
            "On a machine with a GPU: pip install 'dilkern[flash]'. Anywhere: "
            "attn_implementation='sdpa', with which padding_free works too.",
        )
    if name == "flex_attention" and device.type == "cpu":
        reject(
            "attn_implementation='flex_attention' needs a GPU",
            "a CPU, where torch has no backward of it",
            "Use attn_implementation='sdpa', with which padding_free works too.",
        )


def check_packing(model: Any) -> None:
    """Verify on two short sequences that none sees the other in a packed row.

    Raises:
        ValueError: the model or its attention implementation ignores restarting positions.
    """
    adapters = getattr(model, "peft_config", {}).values()
    if any(getattr(config, "is_prompt_learning", False) for config in adapters):
        reject(
            "padding_free needs a model without virtual tokens",
            "a prompt-learning adapter",
            "Use LoRA, or set padding_free=False.",
        )
    device = next(model.parameters()).device
    ids = torch.arange(10, device=device).reshape(2, 5) % 7
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # no dropout
    try:
        with torch.no_grad():
            want = model(**batch, labels=ids, dil_head=True).token_logps
            have = score_packed(model, batch, ids).token_logps
    finally:
        for module, training in modes:
            module.training = training
    error, size = (have - want).abs().max().item(), want.abs().max().item()
    narrow = torch.is_autocast_enabled(device.type) or next(model.parameters()).itemsize < 4
    if not error <= (3e-2 if narrow else 1e-4) * size:
        reject(
            "padding_free needs a model whose attention keeps packed sequences apart",
            f"{type(unwrap(model)).__name__}, log-probs off by {error:.3g} of {size:.3g}",
            "Set padding_free=False, or load it with attn_implementation='sdpa'.",
        )
