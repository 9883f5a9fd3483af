"""The options of `dilkern train`: TRL's own parser, short names, and rules across options.

Every rule here is checked before a model or a dataset is loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from trl.scripts.utils import ScriptArguments, TrlParser
from trl.trainer.model_config import ModelConfig

from dilkern.cli.model import check_adapter_options, locate
from dilkern.integrations.trl_config import DILConfig
from dilkern.validation import check_choice, check_positive, nearest, raised_by_check, reject

_ALIASES = {
    "model": "model_name_or_path",
    "dataset": "dataset_name",
    "dataset_split": "dataset_train_split",
    "loss": "loss_type",
    "lora_target": "lora_target_modules",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
    "lr_scheduler": "lr_scheduler_type",
    "warmup": "warmup_steps",
    "cpu": "use_cpu",
}
_SHORT = {name: short for short, name in _ALIASES.items()}
# What `trl dpo` takes and this command does not.
_LAUNCH = "Start it as `accelerate launch [its options] -m dilkern train ...`."
_ELSEWHERE = {
    "accelerate_config": _LAUNCH,
    "num_processes": _LAUNCH,
    "config_file": _LAUNCH,
    "datasets": "Write the rows into one file, and name it with --dataset.",
    "streaming": "Leave it out: every row is checked before training.",
    "dataset_streaming": "Leave it out: every row is checked before training.",
    "test_split_size": "Use --eval-split.",
    "ignore_bias_buffers": "Leave it out.",
}
# What is said once: the rule and the options of which one may be there.
_ONCE = (
    ("held-out pairs come from one place", "eval_dataset", "eval_split"),
    ("the parameters of the loss are named once", "loss_param", "loss_params"),
    ("the reference is a second model, or where training starts",
     "ref_model", "precompute_ref_log_probs"),
)  # fmt: skip
# Where an adapter is asked for, in place of TRL's: every linear layer, and the dropout that is left
# after TRL's `disable_dropout`. DILConfig has the other defaults.
_ADAPTER_DEFAULTS = {
    "lora_dropout": 0.0,
    "lora_target_modules": ["all-linear"],
    "use_bnb_nested_quant": True,
}


@dataclass
class TrainArguments(ScriptArguments):  # type: ignore[misc]
    """What is neither of the model nor of the trainer."""

    gguf_file: str | None = field(
        default=None, metadata={"help": "GGUF file of --model; it is dequantised."}
    )
    eval_dataset: str | None = field(default=None, metadata={"help": "Held-out data."})
    eval_split: float = field(default=0.0, metadata={"help": "Share of the data held out."})
    ref_model: str | None = field(default=None, metadata={"help": "Reference model."})
    loss_param: list[str] = field(
        default_factory=list, metadata={"help": "Parameter of the loss, NAME=NUMBER."}
    )
    precision: str | None = field(default=None, metadata={"help": "auto, fp32, bf16 or fp16."})
    resume: bool = field(default=False, metadata={"help": "Go on from the newest checkpoint."})


class Options(NamedTuple):
    """A settled command line."""

    script: Any  # TrainArguments
    config: Any  # DILConfig
    model: Any  # ModelConfig
    given: frozenset[str]  # the options that were written down


def flag(name: str) -> str:
    """Return an option as people write it."""
    return "--" + _SHORT.get(name, name).replace("_", "-")


class Parser(TrlParser):  # type: ignore[misc]
    """TRL's over script, trainer and model: flags and YAML, of the options written down alone."""

    def __init__(self) -> None:
        kinds: Any = (TrainArguments, DILConfig, ModelConfig)
        usage = "dilkern train --model MODEL --dataset DATA ..."
        super().__init__(kinds, usage=usage, add_help=False)
        # Of a switch and its `no_` form, which share a destination, the first.
        self.options = {action.dest: action for action in reversed(self._actions)}

    def add_argument(self, *names: str, **options: Any) -> Any:
        if names[0] in ("--loss_type", "--report_to"):
            options["nargs"] = "+"
        if options.get("nargs") == "+":
            options["action"] = "extend"
        if getattr(options.get("type"), "__name__", "") == "string_to_bool":
            options |= {"nargs": "?", "const": True}
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        value, *choices = re.findall("'([^']+)'", message) or [""]
        near = nearest(value, choices)
        remedy = f"Did you mean {near!r}?" if near else "See dilkern train --help."
        reject("`dilkern train` cannot read its options", message, remedy)

    def help_all(self) -> str:
        """Return the help of every option."""
        self.set_defaults(output_dir="out", lora_alpha="twice the rank", **_ADAPTER_DEFAULTS)
        text: str = self.format_help()
        return text

    def name(self, key: str, where: str = "") -> tuple[str, bool]:
        """Return the option that is meant, and whether a `no` before it turns its value round."""
        name = key.replace("-", "_")
        name = _ALIASES.get(name, name)
        if name in _ELSEWHERE:
            reject(f"{where}`dilkern train` has no option {key!r}", "it", _ELSEWHERE[name])
        if name in self.options:
            return name, False
        positive = _ALIASES.get(name.removeprefix("no_"), name.removeprefix("no_"))
        if positive in self.options and self.options[positive].const is True:
            return positive, True
        near = nearest(name, [*self.options, *_ALIASES, "config"])
        reject(
            f"{where}every option must be one of `dilkern train`",
            repr(key if where else f"--{key}"),
            "See dilkern train --help-all."
            if near is None
            else f"Rename it to {near!r}."
            if where
            else f"Did you mean {flag(near)}?",
        )

    def parse(self, words: list[str]) -> dict[str, Any]:
        """Return what words in argparse's form say."""
        unset: list[str] = []  # a list, from which options of several values start
        blank = argparse.Namespace(**dict.fromkeys(self.options, unset))
        found, rest = self.parse_known_args(words, blank)
        if rest:
            reject(
                "every value must follow an option that takes it", " ".join(rest),
                "Most options take one value; quote what has spaces.",
            )  # fmt: skip
        return {name: value for name, value in vars(found).items() if value is not unset}

    def flags(self, words: list[str]) -> dict[str, Any]:
        """Read the words of a command line."""
        plain = []
        for word in words:
            if word.startswith("--"):
                key, equals, value = word[2:].partition("=")
                name, negated = self.name(key)
                if negated and equals:
                    reject(f"--{key} takes no value", repr(value), f"Write {flag(name)} {value}.")
                word = f"--{name}=false" if negated else f"--{name}{equals}{value}"
            plain.append(word)
        return self.parse(plain)

    def yaml(self, path: Path) -> dict[str, Any]:
        """Read a YAML file; its `env` goes into the environment, as in TRL."""
        import yaml

        try:
            text = path.read_text(encoding="utf-8")
            values, node = yaml.safe_load(text) or {}, yaml.compose(text, yaml.SafeLoader)
        except (OSError, ValueError, yaml.YAMLError) as error:
            reject("--config must be a YAML file", f"{path}: {error}", "Check path and text.")
        if not isinstance(values, dict):
            reject(
                "--config must map names of options to values",
                f"{path}, a {type(values).__name__}",
                "Write lines such as `lora_r: 8`.",
            )
        names = [str(key.value).replace("-", "_") for key, _ in node.value] if values else []
        if twice := {name for name in names if names.count(name) > 1}:
            reject("--config names an option once", f"{path}: {min(twice)!r} twice", "Drop one.")
        env = values.pop("env", None) or {}
        if not isinstance(env, dict):
            reject(
                f"{path}: 'env' must map names to values", repr(env), "Write NAME: value under it."
            )
        os.environ.update({str(k): str(v) for k, v in env.items()})
        words: list[str] = []
        for key, value in values.items():
            words += self._yaml_words(f"{path}: ", str(key), value)
        return self.parse(words)

    def _yaml_words(self, where: str, key: str, value: Any) -> list[str]:
        name, negated = self.name(key, where)
        action = self.options[name]
        if isinstance(value, dict):
            if name != "loss_param":
                return [f"--{name}={json.dumps(value)}"]
            value = [f"{param}={number}" for param, number in value.items()]
        if value is False and "no" in (action.choices or ()):
            value = "no"  # which YAML reads as false
        if negated and not isinstance(value, bool):
            reject(f"{where}{key!r} must be true or false", repr(value), "Correct it.")
        if value is None:
            if action.default is None:
                return []
            if getattr(action.type, "__qualname__", "").startswith("_accept_none"):
                return [f"--{name}=none"]
            reject(f"{where}{key!r} must have a value", "none", "Fill it in or delete the line.")
        if isinstance(value, list):
            if action.nargs != "+":
                reject(f"{where}{key!r} takes one value", repr(value), "Write one.")
            return [f"--{name}", *map(str, value)]
        return [f"--{name}={value != negated if isinstance(value, bool) else value}"]


def _loss_params(items: list[str]) -> dict[str, float]:
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


def _settle_precision(given: dict[str, Any]) -> None:
    name = given.pop("precision", "auto")
    check_choice("--precision", name, ("auto", "fp32", "bf16", "fp16"))
    if name != "auto":
        if {"bf16", "fp16"} & set(given):
            reject("the precision is named once", "--precision with --bf16 or --fp16", "Drop one.")
        given.update(bf16=name == "bf16", fp16=name == "fp16")
    if given.get("fp16") and (given.get("use_cpu") or not torch.cuda.is_available()):
        reject("--precision fp16 needs a GPU", "a CPU", "Use fp32 or bf16.")


def _settle_adapter(given: dict[str, Any]) -> None:
    """Decide whether an adapter is trained: where --use-peft or anything of one is asked for."""
    check_adapter_options(given)
    rank = given.get("lora_r")
    asked = [
        name
        for name, value in given.items()
        if value not in (None, False, 0)
        and (name.startswith("lora_") or name in ("use_peft", "use_dora", "use_rslora"))
    ]
    bits = [name for name in ("load_in_4bit", "load_in_8bit") if given.get(name)]
    if asked and (rank == 0 or given.get("use_peft") is False):
        why = "--lora-r 0" if rank == 0 else "--use-peft false"
        names = ", ".join(map(flag, asked))
        reject(f"{names} need an adapter", why, "Give a rank, e.g. --lora-r 16, or drop them.")
    idle = [name for name in given if "bnb" in name and given[name]]
    if idle and "load_in_4bit" not in bits:
        reject(
            f"{', '.join(map(flag, idle))} say how weights are put into 4 bits",
            "no --load-in-4bit",
            "Add --load-in-4bit, or drop them.",
        )
    given["use_peft"] = bool(asked or bits)
    if not given["use_peft"]:
        return
    for name, value in {**_ADAPTER_DEFAULTS, "lora_alpha": 2 * (rank or 16)}.items():
        given.setdefault(name, value)
    targets = given["lora_target_modules"]
    if "all-linear" in targets and len(targets) > 1:
        reject(
            "--lora-target all-linear stands alone; it is every linear layer but the lm_head",
            ", ".join(targets),
            "Name the modules, e.g. --lora-target q_proj lm_head.",
        )
    if given["lora_dropout"]:  # TRL's switch takes the adapter's away with the model's
        given.setdefault("disable_dropout", False)
    if bits and importlib.util.find_spec("bitsandbytes") is None:
        reject(
            f"{flag(bits[0])} needs bitsandbytes",
            "it is not installed",
            "pip install 'dilkern[quant]'",
        )


def _settle_evaluation(given: dict[str, Any]) -> None:
    share = given.get("eval_split", 0.0)
    if not 0 <= share < 1:
        reject("--eval-split must be a fraction between 0 and 1", str(share), "Use e.g. 0.1.")
    asked = [n for n in ("eval_steps", "eval_strategy") if given.get(n) not in (None, "no")]
    if share or given.get("eval_dataset"):
        if not asked:
            given.setdefault("eval_steps", 0.2)  # at each fifth of the run: a curve
        given.setdefault("eval_strategy", "steps")
    elif asked and ("eval_strategy" not in asked or Path(given["dataset_name"]).is_file()):
        # Of other datasets there is --dataset-test-split, as in TRL.
        reject(
            f"{flag(asked[0])} needs held-out data", "none", "Add --eval-dataset or --eval-split."
        )
    if "per_device_train_batch_size" in given:
        given.setdefault("per_device_eval_batch_size", given["per_device_train_batch_size"])


@contextlib.contextmanager
def library_checks() -> Iterator[None]:
    """Pass on what transformers and TRL say of options that do not fit, without a traceback."""
    try:
        yield
    except (ValueError, ImportError) as error:
        if raised_by_check(error):
            raise
        text = " ".join(str(error).split()).rstrip(".")
        reject("the options must fit together", text, "See dilkern train --help-all.")


def _build(kind: Any, given: dict[str, Any]) -> Any:
    """Build one of the dataclasses."""
    names = {field.name for field in dataclasses.fields(kind) if field.init}
    with library_checks():
        return kind(**{name: value for name, value in given.items() if name in names})


def read(words: list[str]) -> Options:
    """Read a command line, with its --config, and settle what its options imply for each other.

    Args:
        words: what follows `dilkern train`.

    Raises:
        ValueError: an option that does not exist, a value that it does not take, or options that
            do not go together; with what to write instead.
    """
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", type=Path)
    file, words = files.parse_known_args(words)
    parser = Parser()
    given = parser.yaml(file.config) if file.config is not None else {}
    given.update(parser.flags(words))
    written = frozenset(given)
    for name in ("model_name_or_path", "dataset_name"):
        if not given.get(name):
            reject(f"`dilkern train` needs {flag(name)}", "none", "See dilkern train --help.")
    given["model_name_or_path"], given["gguf_file"] = locate(
        given["model_name_or_path"], given.get("gguf_file")
    )
    for name, example in (
        ("learning_rate", 1e-4), ("num_train_epochs", 1), ("per_device_train_batch_size", 4),
        ("gradient_accumulation_steps", 1), ("logging_steps", 10),
    ):  # fmt: skip
        if given.get(name) is not None:
            check_positive(flag(name), given[name], example)
    for rule, *names in _ONCE:
        both = [flag(name) for name in names if given.get(name)]
        if len(both) > 1:
            reject(rule, " and ".join(both), "Drop one of them.")
    if params := _loss_params(given.pop("loss_param", [])):
        given["loss_params"] = params
    _settle_precision(given)
    _settle_adapter(given)
    _settle_evaluation(given)
    given.setdefault("output_dir", "out")
    model = _build(ModelConfig, given)
    init = {"revision": model.model_revision, "attn_implementation": model.attn_implementation}
    text = given.get("model_init_kwargs") or "{}"
    try:
        init.update(json.loads(text))
    except (ValueError, TypeError):
        reject("--model-init-kwargs must be a JSON object", repr(text), "Write '{\"a\": 1}'.")
    config = _build(DILConfig, {**given, "model_init_kwargs": init})
    return Options(_build(TrainArguments, given), config, model, written)
