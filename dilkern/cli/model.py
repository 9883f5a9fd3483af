"""What the configuration of a model says before its weights are loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
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


def positions_of(config: Any) -> int | None:
    """Return the tokens that the model has positions for; None where it names no end."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def sequence_limit(positions: int | None, asked: int | None, option: str = "--max-length") -> int:
    """Return the tokens of a sequence: what is asked for, or 1024 if the model has so many.

    Raises:
        ValueError: more are asked for than the model has positions.
    """
    if asked is not None and positions is not None and asked > positions:
        reject(
            f"{option} must be at most the {positions} positions of the model",
            str(asked),
            "Lower it, or take a model with a longer context.",
        )
    return asked or min(1024, positions or 1024)


def check_adapter_options(given: Mapping[str, Any]) -> None:
    """Refuse what rank and loading in few bits cannot mean together, as both commands have them."""
    rank = given.get("lora_r")
    if rank is not None and rank < 0:
        reject("--lora-r must be >= 0", str(rank), "0 trains all weights.")
    if rank == 0 or given.get("use_peft") is False:
        why = "--lora-r 0" if rank == 0 else "--use-peft false"
        for bits in ("4bit", "8bit"):
            if given.get(f"load_in_{bits}"):
                reject(f"--load-in-{bits} trains an adapter", why, "Give a rank, e.g. --lora-r 16.")
    if given.get("quantize_lm_head") and not given.get("load_in_4bit"):
        reject("--quantize-lm-head goes with --load-in-4bit", "it alone", "Add --load-in-4bit.")


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
