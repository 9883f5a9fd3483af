"""From what the caller calls a head to a `Head`: one reader per type of module.

Modules are known by the name of their class, so that nothing of PEFT, bitsandbytes or transformers
is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dilkern.lm_head.base import DenseHead, Head, HeadSource
from dilkern.lm_head.lora import lora_head
from dilkern.lm_head.quantized import eight_bit_head, four_bit_head
from dilkern.lm_head.sharded import full_tensor
from dilkern.validation import name_of, reject

Reader = Callable[..., Head]


def _linear(module: Any, **transforms: float) -> Head:
    bias = None if module.bias is None else full_tensor(module.bias)
    return DenseHead(full_tensor(module.weight), bias, **transforms)


def _lora(module: Any, **transforms: float) -> Head:
    return lora_head(module, lambda base: as_head(base, **transforms))


def _modules_to_save(module: Any, **transforms: float) -> Head:
    """The trained copy, or the original one where PEFT's own forward would take that."""
    saved, active = module.modules_to_save, module.active_adapters
    trained = not module.disable_adapters and active and all(name in saved for name in active)
    return as_head(saved[active[0]] if trained else module.original_module, **transforms)


READERS: dict[str, Reader] = {
    "torch.nn.modules.linear.Linear": _linear,
    "bitsandbytes.nn.modules.Linear4bit": four_bit_head,
    "bitsandbytes.nn.modules.Linear8bitLt": eight_bit_head,
    "peft.tuners.lora.layer.Linear": _lora,
    "peft.tuners.lora.bnb.Linear4bit": _lora,
    "peft.tuners.lora.bnb.Linear8bitLt": _lora,
    "peft.utils.other.ModulesToSaveWrapper": _modules_to_save,
}


def _reader(module: Any) -> Reader | None:
    """Return the reader of the nearest known class whose forward the module still has.

    So a subclass that changes nothing of the product is known too, as are the classes that
    `fully_shard` and `parametrize` put in front.
    """
    kind: Any = type(module)
    for cls in kind.__mro__:
        reader = READERS.get(f"{cls.__module__}.{cls.__qualname__}")
        if reader is not None and kind.forward is cls.forward:
            return reader
    return None


def unwrap(model: Any) -> Any:
    """Return the causal LM inside torch.compile, DDP, DeepSpeed and PEFT wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif (
            isinstance(model, nn.parallel.DistributedDataParallel)
            or type(model).__name__ == "DeepSpeedEngine"
        ):
            model = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def as_head(lm_head: Any, *, scale: float = 1.0, softcap: float = 0.0) -> Head:
    """Return the `Head` view of what the caller calls a head, as it is at this moment.

    Args:
        lm_head: a (V, D) tensor, an `nn.Linear`, a bitsandbytes `Linear4bit` or `Linear8bitLt`, a
            PEFT LoRA layer or `modules_to_save` wrapper around one of these, an `LMHead`, a `Head`.
        scale: factor on the logits.
        softcap: logits = softcap * tanh(scale * (W h + b) / softcap), 0 for none.

    Raises:
        ValueError: for a module whose effective weight is not known here, with its type; transforms
            for a `Head` or `LMHead`, which have their own.
    """
    # Defaults are not handed on: under dynamic shapes torch.compile makes a default that is passed
    # through a symbolic float, which a spec cannot hold.
    transforms = {}
    if scale != 1.0:
        transforms["scale"] = scale
    if softcap != 0.0:
        transforms["softcap"] = softcap
    if isinstance(lm_head, (Head, HeadSource)):
        if transforms:
            reject(
                "`scale` and `softcap` must be given where the head is made",
                f"a {type(lm_head).__name__} and scale={scale!r}, softcap={softcap!r}",
                "Pass them to its constructor.",
            )
        return lm_head if isinstance(lm_head, Head) else lm_head.head()
    if isinstance(lm_head, Tensor):
        return DenseHead(full_tensor(lm_head), None, **transforms)
    reader = _reader(lm_head)
    if reader is None:
        reject(
            "`lm_head` must be a (V, D) tensor, a dilkern Head, or a module of one of the types "
            f"{', '.join(READERS)}",
            name_of(lm_head),
            "Pass its dense weight, or subclass dilkern.lm_head.Head for it.",
        )
    if any(p.device.type == "meta" for p in lm_head.parameters()):
        reject(
            "the lm_head must hold its weights",
            f"{name_of(lm_head)} on the meta device",
            "accelerate's CPU or disk offload keeps them elsewhere; leave the lm_head out of it "
            "(a weight on the CPU is streamed).",
        )
    return reader(lm_head, **transforms)
