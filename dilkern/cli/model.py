"""What the configuration of a model says before its weights are loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dilkern.validation import nearest, reject


def _check_no_gguf(model: str, option: str) -> None:
    path = Path(model)
    folder = path.is_dir() and not (path / "config.json").exists()
    found = next(path.glob("*.gguf"), None) if folder else path
    if found is not None and found.suffix == ".gguf":
        reject(
            f"{option} must have weights that can be trained",
            f"{found}, a GGUF file: weights quantised for inference with llama.cpp",
            "Take the original model, in safetensors, from the hub page that the GGUF names as its "
            "base; --load-in-4bit loads that one in 4 bits.",
        )


def model_config(
    model: str, trust_remote_code: bool = False, *, revision: str = "main", option: str = "--model"
) -> Any:
    """Return the configuration of a folder or of a model of the hub.

    Raises:
        ValueError: there is none, or transformers does not know it.
    """
    from transformers import AutoConfig

    _check_no_gguf(model, option)
    try:
        return AutoConfig.from_pretrained(
            model, trust_remote_code=trust_remote_code, revision=revision
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0].partition(". Should have")[0].rstrip(".")
        local = Path(model).is_dir()
        reject(
            f"{option} must be a folder with a config.json or a model id of the hub",
            f"{model}: {reason}",
            "Its config.json needs the model_type of an architecture of transformers; fetch it again "
            "from where the weights are from."
            if local and (Path(model) / "config.json").exists()
            else "Check the path: model.save_pretrained(folder) writes what is needed."
            if local
            else "Check the path or id, the network, and HF_TOKEN for a gated model.",
        )


def sequence_limit(config: Any, max_length: int | None) -> int | None:
    """Return the tokens to train with: at most what the model has positions for.

    Args:
        config: of the model.
        max_length: None for the default, 1024 or the model's.
    """
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    if max_length is None:
        return min(1024, positions or 1024)
    if positions is not None and max_length > positions:
        reject(
            f"--max-length must be at most the {positions} positions of the model",
            str(max_length),
            "Lower it, or take a model with a longer context.",
        )
    return max_length


def on_meta_device(config: Any, model: str, trust_remote_code: bool = False) -> Any:
    """Build the model on the meta device, where weights take no memory.

    Raises:
        ValueError: not a causal LM.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        reject(
            "--model must be a causal LM that transformers can build",
            f"{model}: {str(error).splitlines()[0].rstrip('.')}",
            "Take another model, or add --trust-remote-code where its code comes with it.",
        )


def lora_targets(built: Any, targets: list[str]) -> str | list[str]:
    """Return what PEFT takes for --lora-target; each must be a module of the model.

    Args:
        built: the model, if only on the meta device.
        targets: last parts of module names, or one regular expression over whole names.
    """
    modules = dict(built.named_modules())
    for target in targets:
        if any(name == target or name.endswith(f".{target}") for name in modules):
            continue
        try:
            if len(targets) == 1 and any(re.fullmatch(target, name) for name in modules):
                return target
        except re.error:
            pass
        # Linear layers of transformers and of GPT-2, which keep their weight the other way round.
        known = sorted(
            {
                name.rpartition(".")[2]
                for name, module in modules.items()
                if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            }
        )
        near = nearest(target, known)
        reject(
            f"--lora-target must name modules of the model: {', '.join(known)}",
            repr(target),
            f"Did you mean {near!r}?" if near else "Take some of these, or all-linear.",
        )
    return targets
