"""Memory of a training run, predicted from a model's configuration alone.

An estimate for choosing settings, not a measurement: weights, adapter and optimizer are counted
exactly, activations by the size of what the layers keep, loss heads by their largest buffers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from dilkern.integrations.options import model_config
from dilkern.validation import check_positive, reject

HEADS = ("naive", "trl", "dilkern")
# Tile of trl/kernels/chunked_logprob.py (1.16): tokens x words.
_TRL_TILE = (4096, 32768)


class Shape(NamedTuple):
    """What the prediction needs of a model."""

    parameters: int
    linear: int  # parameters of linear layers inside the blocks: what 4-bit loading shrinks
    lora_per_rank: int  # adapter parameters per unit of rank, on these layers
    vocab_size: int
    hidden_size: int
    layers: int
    widest: int  # output features of one block's linear layers together


class Setting(NamedTuple):
    """What the user chooses."""

    seq_len: int
    batch_size: int  # pairs: twice as many sequences
    lora_r: int
    load_in_4bit: bool
    workspace_mib: float


def read_shape(model: str, *, trust_remote_code: bool = False) -> Shape:
    """Build the model on the meta device, where weights take no memory, and count.

    Args:
        model: folder with a config.json, or hub id.

    Raises:
        ValueError: no such model, or not a causal LM.
    """
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = model_config(model, trust_remote_code)
    try:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        reject(
            "--model must be a causal LM that transformers can build",
            f"{model}: {str(error).splitlines()[0].rstrip('.')}",
            "Take another model, or add --trust-remote-code where its code comes with it.",
        )
    text = config.get_text_config()
    # (out, in) of each linear layer; GPT-2's keep their weight the other way round.
    inner = [
        module.weight.shape[:: -1 if isinstance(module, Conv1D) else 1]
        for name, module in built.base_model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name
    ]
    return Shape(
        parameters=sum(p.numel() for p in built.parameters()),
        linear=sum(out * width for out, width in inner),
        lora_per_rank=sum(out + width for out, width in inner),
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        layers=text.num_hidden_layers,
        widest=sum(out for out, _ in inner) // text.num_hidden_layers,
    )


def head_bytes(kind: str, shape: Shape, setting: Setting) -> float:
    """Return the memory of the loss head above its inputs, forward and backward, frozen weight.

    naive: logits, log-softmax, their gradients, each (T, V) in fp32 (4.06 such buffers were measured
    on CPU, T=1024, V=128256). trl: a tile of logits and one of its gradient, fp32. dilkern: its
    workspace and u (T, D) in 16 bits.
    """
    tokens = 2 * setting.batch_size * setting.seq_len
    if kind == "naive":
        return 16.0 * tokens * shape.vocab_size
    if kind == "trl":
        return 8.0 * min(tokens, _TRL_TILE[0]) * min(shape.vocab_size, _TRL_TILE[1])
    if kind == "dilkern":
        return setting.workspace_mib * 2**20 + 2.0 * tokens * shape.hidden_size
    reject(f"`kind` must be one of: {', '.join(HEADS)}", repr(kind), "Choose one of these.")


def state_bytes(shape: Shape, setting: Setting) -> float:
    """Return weights, reference, gradients and Adam's two moments."""
    if setting.lora_r:
        frozen = 2.0 * shape.parameters
        if setting.load_in_4bit:  # NF4 with double quantisation: 4.127 bits per weight
            frozen -= (2.0 - 4.127 / 8) * shape.linear
        return frozen + 16.0 * setting.lora_r * shape.lora_per_rank
    return (16.0 + 2.0) * shape.parameters  # fp32 weights, gradients, moments; 16-bit reference


def activation_bytes(shape: Shape, setting: Setting) -> float:
    """Return what gradient checkpointing keeps: layer inputs, and one layer with its gradients."""
    tokens = 2 * setting.batch_size * setting.seq_len
    kept = 2.0 * tokens * shape.hidden_size * (shape.layers + 1)
    one_layer = 2 * 2.0 * tokens * (shape.widest + 4 * shape.hidden_size)
    return kept + one_layer


def total_bytes(kind: str, shape: Shape, setting: Setting) -> float:
    """Return the predicted peak: the head and one layer's recomputation do not coincide."""
    tokens = 2 * setting.batch_size * setting.seq_len
    kept = 2.0 * tokens * shape.hidden_size * (shape.layers + 1)
    peak = max(activation_bytes(shape, setting), kept + head_bytes(kind, shape, setting))
    return state_bytes(shape, setting) + peak


def longest(kind: str, shape: Shape, setting: Setting, available: float, limit: int = 2**20) -> int:
    """Return the largest seq_len whose prediction is within `available` bytes, 0 if none is.

    Args:
        available: bytes.
        limit: longest sequence considered.
    """
    check_positive("available", float(available))
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        fits = total_bytes(kind, shape, setting._replace(seq_len=middle)) <= available
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def table(shape: Shape, setting: Setting, vram_gib: float, reserve_gib: float) -> list[list[Any]]:
    """Return one row per head: name, head MiB, total GiB, whether it fits, longest sequence."""
    available = (vram_gib - reserve_gib) * 2**30
    rows = []
    for kind in HEADS:
        total = total_bytes(kind, shape, setting)
        rows.append(
            [
                kind,
                head_bytes(kind, shape, setting) / 2**20,
                total / 2**30,
                "yes" if total <= available else "no",
                longest(kind, shape, setting, available),
            ]
        )
    return rows
