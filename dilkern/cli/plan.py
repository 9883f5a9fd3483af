"""`dilkern plan`: memory of a training run, predicted from a model's configuration alone.

An estimate for choosing settings, not a measurement: weights, adapter and optimizer are counted
exactly, activations by the size of what the layers keep, loss heads by their largest buffers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

from torch import nn
from transformers import HfArgumentParser
from transformers.pytorch_utils import Conv1D

from dilkern.cli.model import (
    check_adapter_options,
    locate,
    model_config,
    on_meta_device,
    positions_of,
    sequence_limit,
)
from dilkern.validation import check_positive, reject

HEADS = ("naive", "trl", "dilkern")
_NF4 = 4.127 / 8  # bytes per weight with double quantisation
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
    tied: bool  # whether the lm_head is the embedding
    positions: int | None  # longest sequence of the model


@dataclass
class Setting:
    """What the user chooses: the options of the command."""

    model: str | None = None
    gguf_file: str | None = None
    seq_len: int = 2048
    batch_size: int = 1  # pairs: twice as many sequences
    vram: float = 24.0
    reserve: float = 1.0
    lora_r: int | None = None
    load_in_4bit: bool = False
    quantize_lm_head: bool = False
    workspace_mib: float = 256.0
    trust_remote_code: bool = False

    @property
    def tokens(self) -> int:
        return 2 * self.batch_size * self.seq_len


def read_shape(
    model: str, *, gguf_file: str | None = None, trust_remote_code: bool = False
) -> Shape:
    """Build the model on the meta device, where weights take no memory, and count.

    Args:
        model: folder with a config.json, or hub id.
        gguf_file: of a GGUF model its file there.

    Raises:
        ValueError: no such model, or not a causal LM.
    """
    config = model_config(model, trust_remote_code, gguf_file=gguf_file)
    built = on_meta_device(config, model, trust_remote_code)
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
        tied=built.get_output_embeddings().weight is built.get_input_embeddings().weight,
        positions=positions_of(config),
    )


def head_bytes(kind: str, shape: Shape, setting: Setting) -> float:
    """Return the memory of the loss head above its inputs, forward and backward, frozen weight.

    naive: logits, log-softmax, their gradients, each (T, V) in fp32 (4.06 such buffers were measured
    on CPU, T=1024, V=128256). trl: a tile of logits and one of its gradient, fp32. dilkern: its
    workspace and u (T, D) in 16 bits.
    """
    if kind == "naive":
        return 16.0 * setting.tokens * shape.vocab_size
    if kind == "trl":
        return 8.0 * min(setting.tokens, _TRL_TILE[0]) * min(shape.vocab_size, _TRL_TILE[1])
    return setting.workspace_mib * 2**20 + 2.0 * setting.tokens * shape.hidden_size


def state_bytes(shape: Shape, setting: Setting) -> float:
    """Return weights, reference, gradients and Adam's two moments."""
    if not setting.lora_r:
        return (16.0 + 2.0) * shape.parameters  # fp32 weights, gradients, moments; 16-bit reference
    frozen = 2.0 * shape.parameters
    if setting.load_in_4bit:
        frozen -= (2.0 - _NF4) * shape.linear
    if setting.quantize_lm_head:  # of a tied head a copy: the embedding stays as it is
        head = shape.vocab_size * shape.hidden_size
        frozen += (_NF4 if shape.tied else _NF4 - 2.0) * head
    return frozen + 16.0 * setting.lora_r * shape.lora_per_rank


def total_bytes(kind: str, shape: Shape, setting: Setting) -> float:
    """Return the predicted peak under gradient checkpointing.

    It keeps the layers' inputs; one layer's recomputation and the head do not coincide.
    """
    kept = 2.0 * setting.tokens * shape.hidden_size * (shape.layers + 1)
    one_layer = 2 * 2.0 * setting.tokens * (shape.widest + 4 * shape.hidden_size)
    return state_bytes(shape, setting) + kept + max(one_layer, head_bytes(kind, shape, setting))


def longest(kind: str, shape: Shape, setting: Setting, available: float) -> int:
    """Return the largest seq_len whose prediction is within `available` bytes, 0 if none is.

    Never more than the positions of the model; 2^20 where it names none.
    """
    low, high = 0, shape.positions or 2**20
    while low < high:
        middle = (low + high + 1) // 2
        fits = total_bytes(kind, shape, replace(setting, seq_len=middle)) <= available
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


class _Parser(HfArgumentParser):  # type: ignore[misc]
    def error(self, message: str) -> NoReturn:
        reject("`dilkern plan` cannot read its options", message, "See dilkern plan --help.")


def _setting(words: list[str]) -> Setting:
    kind: Any = Setting
    parser = _Parser(kind, add_help=False, allow_abbrev=False)
    asked = Setting(**vars(parser.parse_args(words)))
    if asked.model is None:
        reject("`dilkern plan` needs --model", "none", "See dilkern plan --help.")
    asked.model, asked.gguf_file = locate(asked.model, asked.gguf_file)
    check_positive("--seq-len", asked.seq_len, 2048)
    check_positive("--batch-size", asked.batch_size)
    check_positive("--workspace-mib", asked.workspace_mib, 256)
    if not asked.vram > asked.reserve >= 0:
        reject(
            "--vram must be more than --reserve, and that not negative",
            f"{asked.vram} and {asked.reserve} GiB",
            "Correct one of them.",
        )
    check_adapter_options(vars(asked))
    if asked.lora_r is None:
        asked.lora_r = 16 if asked.load_in_4bit else 0
    return asked


def run(words: list[str]) -> None:
    """Print the prediction for three loss heads."""
    asked = _setting(words)
    shape = read_shape(
        str(asked.model), gguf_file=asked.gguf_file, trust_remote_code=asked.trust_remote_code
    )
    sequence_limit(shape.positions, asked.seq_len, "--seq-len")
    tied = ", lm_head tied to the embedding" if shape.tied else ""
    positions = f", {shape.positions} positions" if shape.positions else ""
    trained = f"LoRA of rank {asked.lora_r}" if asked.lora_r else "all weights trained"
    print(
        f"{shape.parameters / 1e9:.3g} B parameters, vocabulary {shape.vocab_size}{tied}{positions}\n"
        f"{2 * asked.batch_size} sequences of {asked.seq_len} tokens, {trained}, {asked.vram:g} GiB. "
        "Prediction, not measured:"
    )
    available = (asked.vram - asked.reserve) * 2**30
    print(f"{'head':<9}{'head MiB':>10}{'total GiB':>11}{'fits':>6}{'longest sequence':>18}")
    for kind in HEADS:
        head = head_bytes(kind, shape, asked) / 2**20
        total = total_bytes(kind, shape, asked)
        fits = "yes" if total <= available else "no"
        most = longest(kind, shape, asked, available)
        print(f"{kind:<9}{head:>10.0f}{total / 2**30:>11.2f}{fits:>6}{most:>18}")
