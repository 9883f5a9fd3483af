"""What the options of `dilkern train` stand for, each checked before a model is loaded."""

from __future__ import annotations

from typing import Any

import torch

from dilkern.validation import check_choice, reject


def loss_params(items: list[str]) -> dict[str, float]:
    """Read the NAME=NUMBER of --loss-param."""
    params = {}
    for item in items:
        name, _, value = item.partition("=")
        if name in params:
            reject("--loss-param must name each parameter once", repr(item), "Drop one of them.")
        try:
            params[name] = float(value)
        except ValueError:
            reject("--loss-param must be NAME=NUMBER", repr(item), "Write e.g. lam=-0.5.")
    return params


def limit(text: str) -> float | None:
    """Read --max-log-ratio, a number or none."""
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        reject("--max-log-ratio must be a number or 'none'", repr(text), "10 is the default.")


def model_config(model: str, trust_remote_code: bool, *, option: str = "--model") -> Any:
    """Return the configuration of a folder or of a model of the hub."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except OSError as error:
        reject(
            f"{option} must be a folder with a config.json or a model id of the hub",
            f"{model}: {str(error).splitlines()[0].rstrip('.')}",
            "Check the path or id, the network, and HF_TOKEN for a gated model.",
        )


def model_limits(model: str, max_length: int | None, trust_remote_code: bool) -> int:
    """Return the sequence length to train with, at most what the model has positions for."""
    config = model_config(model, trust_remote_code)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if max_length is None:
        return min(1024, positions or 1024)
    if positions is not None and max_length > positions:
        reject(
            f"--max-length must be at most the {positions} positions of the model",
            str(max_length),
            "Lower it, or take a model with a longer context.",
        )
    return max_length


def precision(name: str, on_cpu: bool) -> tuple[bool, bool]:
    """Return (bf16, fp16) of --precision."""
    check_choice("precision", name, ("auto", "fp32", "bf16", "fp16"))
    if name == "auto":
        name = "fp32" if on_cpu or not torch.cuda.is_bf16_supported() else "bf16"
    if name == "fp16" and on_cpu:
        reject("--precision fp16 needs a GPU", "a CPU", "Use fp32 or bf16.")
    return name == "bf16", name == "fp16"


def lora(rank: int, alpha: int | None, dropout: float, targets: list[str]) -> Any:
    """Return the LoraConfig of the --lora options, None for rank 0."""
    if rank < 0:
        reject("--lora-r must be >= 0", str(rank), "0 trains all weights.")
    if rank == 0:
        if alpha is not None or dropout or targets != ["all-linear"]:
            reject(
                "--lora-alpha, --lora-dropout and --lora-target need an adapter",
                "--lora-r 0",
                "Give a rank, e.g. --lora-r 16, or drop them.",
            )
        return None
    if "all-linear" in targets and len(targets) > 1:
        reject(
            "--lora-target all-linear stands alone; it is every linear layer but the lm_head",
            ", ".join(targets),
            "Name the modules, e.g. --lora-target q_proj --lora-target lm_head.",
        )
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )


def four_bit(compute: torch.dtype) -> Any:
    """Return the quantisation of --load-in-4bit: NF4, double."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def splits(dataset: str, split: str, held_out: str | None, fraction: float, seed: int) -> Any:
    """Return the training and the held-out dataset, the latter None where none is asked for."""
    from dilkern.integrations.data import read_preferences

    train = read_preferences(dataset, split=split)
    if held_out is not None:
        if fraction:
            reject(
                "held-out pairs come from one place", "--eval-dataset and --eval-split", "Drop one."
            )
        return train, read_preferences(held_out, split=split)
    if not fraction:
        return train, None
    if not 0 < fraction < 1 or len(train) < 2:
        reject(
            "--eval-split must be a fraction between 0 and 1 of at least 2 rows",
            f"{fraction} of {len(train)}",
            "Use e.g. 0.1.",
        )
    parts = train.train_test_split(test_size=fraction, seed=seed)
    return parts["train"], parts["test"]
