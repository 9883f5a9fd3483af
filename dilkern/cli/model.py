"""What the configuration of a model says before its weights are loaded."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from dilkern.validation import nearest, reject

_ORIGINAL = "Take the original model, in safetensors, that the file was made of."


def locate(
    model: str, gguf_file: str | None = None, *, option: str = "--model"
) -> tuple[str, str | None]:
    """Return the folder or hub id of a model, and the GGUF file in it that is meant, if one is.

    Args:
        model: folder, hub id, or a GGUF file itself.
        gguf_file: name of a GGUF file in it.
        option: what gave `model`.

    Raises:
        ValueError: GGUF files and none named, one that is not there, or no package to read it; or a
            transformers that reads another end-of-sequence token out of it than it has.
    """
    path = Path(model)
    if path.suffix == ".gguf" and path.is_file():
        if gguf_file is not None:
            received = f"{option} {model} and --gguf-file {gguf_file}"
            reject("a GGUF file is named once", received, "Drop one of them.")
        model, gguf_file = str(path.parent), path.name
    elif path.is_dir():
        found = sorted(file.name for file in path.glob("*.gguf"))
        names = ", ".join(found) or "none"
        if gguf_file is not None and not (path / gguf_file).is_file():
            received = f"{gguf_file!r}, which is not in {model}"
            reject("--gguf-file must name a file in --model", received, f"Files there: {names}.")
        if gguf_file is None and found and not (path / "config.json").exists():
            reject(
                f"of a folder of GGUF files {option} needs to know which",
                f"{model} with {names}",
                f"Add --gguf-file {found[0]}."
                if option == "--model"
                else f"Write {option} {path / found[0]}.",
            )
    remedy = "pip install 'dilkern[models]'"
    if gguf_file is not None and importlib.util.find_spec("gguf") is None:
        reject(f"{gguf_file} is read with the package gguf", "it is not installed", remedy)
    if gguf_file is not None and Version(installed := version("transformers")) < Version("5.18"):
        rule = "transformers reads the special tokens of a GGUF file from 5.18 on"
        reject(rule, f"{installed}, which takes others for them", remedy)
    return model, gguf_file


def dequantize(model: str, gguf_file: str, folder: Path, **options: Any) -> None:
    """Write the model of a GGUF file, its weights unpacked, and its tokenizer into a folder.

    Args:
        model: folder or hub id of the file.
        gguf_file: its name.
        folder: where they go; what is there is replaced.
        options: of `from_pretrained`, such as dtype and revision.

    Raises:
        ValueError: weights of the model are not in the file, or not under names that are known.
    """
    import transformers

    # Without it the weights stay packed: nothing to train, and nothing that can be saved.
    if hasattr(transformers, "GgufConfig"):  # else they are always unpacked
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    both: Any = transformers.AutoModelForCausalLM.from_pretrained(
        model, gguf_file=gguf_file, output_loading_info=True, **options
    )
    loaded, found = both
    if missing := sorted(found["missing_keys"]):  # which transformers fills with random numbers
        reject(
            f"{gguf_file} must hold every weight that transformers expects of its architecture",
            f"none for {', '.join(missing[:3])}{', ...' if missing[3:] else ''}",
            _ORIGINAL,
        )
    shutil.rmtree(folder, ignore_errors=True)
    loaded.save_pretrained(folder)


def model_config(
    model: str,
    trust_remote_code: bool = False,
    *,
    revision: str = "main",
    gguf_file: str | None = None,
    option: str = "--model",
) -> Any:
    """Return the configuration of a folder, of a model of the hub, or of a GGUF file in one of them.

    Raises:
        ValueError: there is none, or transformers does not know it.
    """
    from transformers import AutoConfig

    gguf = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        return AutoConfig.from_pretrained(
            model, trust_remote_code=trust_remote_code, revision=revision, **gguf
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0].partition(". Should have")[0].rstrip(".")
        if gguf_file is not None:
            reject("a GGUF file must be one that transformers reads", reason, _ORIGINAL)
        local = Path(model).is_dir()
        reject(
            f"{option} must be a folder with a config.json or a model id of the hub",
            f"{model}: {reason}",
            "Its config.json needs the model_type of an architecture of transformers; fetch it again "
            "from where the weights are from."
            if local and (Path(model) / "config.json").exists()
            else "Check the path: model.save_pretrained(folder) writes what is needed."
            if local
            else "Check the path or id, the network, and HF_TOKEN for a gated model; a file of GGUF "
            "weights is named with --gguf-file.",
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
