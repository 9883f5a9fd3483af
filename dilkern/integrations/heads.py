"""Heads that are tied to the embedding: untied, quantised from a copy, or refused under an adapter.

Two modules that share one weight cannot be changed apart: quantising one of them loses its scales to
the tie, and merging an adapter on one of them changes the other.

V vocabulary, D hidden size.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import AutoConfig

from dilkern.lm_head import weights_come_later
from dilkern.lm_head.modules import unwrap
from dilkern.validation import name_of, reject

_UNTIE = (
    "from dilkern.integrations.heads import untie_lm_head; "
    "model = AutoModelForCausalLM.from_pretrained(...); untie_lm_head(model); "
    "model.save_pretrained(folder)"
)


def _weight(module: Any) -> Any:
    """Return the weight of a layer, or of the layer under an adapter."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    return getattr(base, "weight", None)


def is_tied(model: Any) -> bool:
    """Return whether lm_head and embedding of a causal LM, also inside PEFT, are one weight."""
    causal = unwrap(model)
    if not hasattr(causal, "get_output_embeddings"):
        return False
    weight = _weight(causal.get_output_embeddings())
    return weight is not None and weight is _weight(causal.get_input_embeddings())


def _forget_tie(causal: Any, head: nn.Module) -> None:
    """Let neither loading, resizing nor saving put the embedding back into the lm_head."""
    causal.config.tie_word_embeddings = False
    causal.config.get_text_config().tie_word_embeddings = False
    names = {f"{name}.weight" for name, module in causal.named_modules() if module is head}
    ties = getattr(causal, "all_tied_weights_keys", {})
    causal.all_tied_weights_keys = {k: v for k, v in ties.items() if not names & {k, v}}


def untie_lm_head(model: Any) -> None:
    """Give the lm_head of a tied causal LM a weight of its own, a copy of the embedding's.

    Its logits stay the same. Save it before an adapter on the lm_head is trained: merging then gives
    the model that was trained. An untied model is left as it is.

    Args:
        model: a causal LM of transformers.

    Example:
        >>> from dilkern.integrations.heads import untie_lm_head  # doctest: +SKIP
        >>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")  # doctest: +SKIP
        >>> untie_lm_head(model)  # doctest: +SKIP
        >>> model.save_pretrained("qwen3-untied")  # doctest: +SKIP
    """
    causal = unwrap(model)
    if is_tied(causal):
        head = causal.get_output_embeddings()
        weight = head.weight
        head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        _forget_tie(causal, head)


def check_adapter(model: Any) -> None:
    """Refuse an adapter on a layer that is tied wherever the base is loaded for it to be merged.

    Raises:
        ValueError: names the layer and how to train it.
    """
    causal = unwrap(model)
    for name, module in (
        ("lm_head", causal.get_output_embeddings()),
        ("embedding", causal.get_input_embeddings()),
    ):
        if hasattr(module, "get_base_layer"):
            reject(
                "an adapter needs a layer with a weight of its own; merged into a weight that lm_head "
                "and embedding share, it gives another model than the one trained",
                f"an adapter on the {name} of a model with tied embeddings",
                "Leave the layer out of target_modules (--lora-target), train it whole with "
                f"modules_to_save=['lm_head'], or untie the model first and train the untied one: "
                f"{_UNTIE}.",
            )


def _base_is_at_hand(causal: Any) -> bool:
    """Return whether the base model's own files hold the frozen layers under adapters, as they are."""
    layers = [causal.get_output_embeddings(), causal.get_input_embeddings()]
    under = [_weight(layer) for layer in layers if hasattr(layer, "get_base_layer")]
    if not under or any(weight is None or weight.requires_grad for weight in under):
        return False
    try:
        stored = AutoConfig.from_pretrained(causal.config._name_or_path, trust_remote_code=False)
    except (OSError, ValueError):  # a model from a config, or code of its own
        return False
    have, want = causal.config.get_text_config(), stored.get_text_config()
    return all(
        getattr(have, name, None) == getattr(want, name, None)
        for name in ("vocab_size", "tie_word_embeddings")
    )


@contextlib.contextmanager
def adapter_alone(model: Any) -> Iterator[None]:
    """Let `save_pretrained` of a PEFT model leave out the frozen layer under an adapter on the lm_head.

    PEFT saves it beside such an adapter, in case it was resized. It still does where the base
    model's own files do not hold it: resized, untied since, or no files.
    """
    if not hasattr(model, "peft_config") or not _base_is_at_hand(unwrap(model)):
        yield
        return
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)
    try:
        yield
    finally:
        del model.save_pretrained


def check_quantization(config: Any, quantization: Any) -> None:
    """Refuse before loading what loading could not make right: a 4-bit lm_head that is tied.

    Args:
        config: of the model.
        quantization: its BitsAndBytesConfig or None.
    """
    skipped = getattr(quantization, "llm_int8_skip_modules", None)
    tied = getattr(config, "tie_word_embeddings", False)
    if tied and skipped is not None and "lm_head" not in {n.split(".")[-1] for n in skipped}:
        reject(
            "transformers cannot quantise an lm_head that is tied to the embedding",
            f"llm_int8_skip_modules={skipped!r} and a model with tied embeddings",
            "Leave llm_int8_skip_modules out; for a 4-bit lm_head set "
            "DILConfig(quantize_lm_head=True), which quantises a copy.",
        )


def quantize_lm_head(model: Any) -> str | None:
    """Replace the lm_head of a model loaded in 4 bits by a 4-bit one, made as its other layers are.

    A tied head is quantised from a copy: the embedding stays as it is, and the tie is forgotten in
    the config of this instance. A head that is in 4 bits already is left as it is.

    Args:
        model: a causal LM of transformers, loaded with BitsAndBytesConfig(load_in_4bit=True).

    Returns:
        What was done, in a line; None if nothing.

    Raises:
        ValueError: a model that is not in 4 bits, or whose lm_head is no plain linear layer.
    """
    causal = unwrap(model)
    if not getattr(causal, "is_loaded_in_4bit", False):
        reject(
            "quantize_lm_head=True needs a model loaded in 4 bits",
            f"a {type(causal).__name__} that is not",
            "Load it with quantization_config=BitsAndBytesConfig(load_in_4bit=True, "
            "bnb_4bit_quant_type='nf4'), or leave quantize_lm_head out.",
        )
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    head: Any = causal.get_output_embeddings()
    if isinstance(head, Linear4bit):
        return None  # one without its scales is refused when it is first read
    if type(head) is not nn.Linear or weights_come_later(head):
        reject(
            "quantize_lm_head=True needs a plain linear lm_head with its weights at hand",
            f"{name_of(head)}{' on the meta device' if weights_come_later(head) else ''}",
            "Pass an adapter as peft_config, so that it is put on afterwards.",
        )
    tied = is_tied(causal)
    # Not the caller's own object, which may load further models.
    config = causal.config.quantization_config = copy.deepcopy(causal.config.quantization_config)
    size, weight = head.weight.nbytes, head.weight
    kind: Any = {
        "compress_statistics": config.bnb_4bit_use_double_quant,
        "quant_type": config.bnb_4bit_quant_type,
        "quant_storage": config.bnb_4bit_quant_storage,
    }
    new: Any = Linear4bit(
        head.in_features,
        head.out_features,
        bias=False,
        compute_dtype=config.bnb_4bit_compute_dtype,
        device="meta",
        **kind,
    )
    new.weight = Params4bit(weight.detach(), requires_grad=False, module=new, **kind)
    new.bias = head.bias
    new.source_cls = nn.Linear  # as transformers marks the layers that it replaces
    new.to(weight.device).train(head.training)  # packs into new memory; `weight` is only read
    causal.set_output_embeddings(new)
    _forget_tie(causal, new)
    # What a saved copy of this model keeps out of 4 bits: every other layer that is not in 4 bits.
    config.llm_int8_skip_modules = [
        name for name, module in causal.named_modules() if type(module) is nn.Linear
    ]
    if hasattr(causal, "hf_quantizer"):
        causal.hf_quantizer.quantization_config = config
    before, after = f"{size / 2**20:.1f} MiB", f"{new.weight.nbytes / 2**20:.1f} MiB"
    done = f"a copy of {after} beside the embedding of" if tied else f"{after}, was"
    return f"lm_head in 4 bits ({config.bnb_4bit_quant_type}): {done} {before}"
