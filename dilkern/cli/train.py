"""`dilkern train`: from a settled command line to a trained model and what is written beside it."""

from __future__ import annotations

import json
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl.trainer.utils import get_peft_config, get_quantization_config

from dilkern import __version__
from dilkern.cli import picture, progress, run_folder
from dilkern.cli.model import (
    dequantize,
    locate,
    lora_targets,
    model_config,
    on_meta_device,
    positions_of,
    sequence_limit,
)
from dilkern.cli.options import Options, Parser, library_checks, read
from dilkern.integrations.data import check_against_tokenizer, read_preferences
from dilkern.integrations.trl import DILTrainer
from dilkern.losses import LOSSES
from dilkern.validation import reject


def _checkpoint(options: Options) -> str | None:
    """Return the checkpoint to go on from; refuse to write over those of another run."""
    output_dir = Path(options.config.output_dir)
    if options.script.resume:
        return str(run_folder.latest_checkpoint(output_dir))
    named = options.config.resume_from_checkpoint
    if named is not None:
        if not Path(named).is_dir():
            reject(
                "--resume-from-checkpoint must be a folder checkpoint-*",
                str(named),
                "Check the path, or let --resume find the newest one in --output-dir.",
            )
        return str(named)
    if any(output_dir.glob("checkpoint-*")):
        reject(
            "the output directory must not hold checkpoints of another run",
            str(output_dir),
            "Add --resume to go on with it, or choose another --output-dir.",
        )
    return None


def _datasets(options: Options) -> tuple[Any, Any]:
    """Return the training and the held-out dataset, the latter None where none is asked for."""
    script, config = options.script, options.config
    source, name = script.dataset_name, script.dataset_config
    train = read_preferences(source, split=script.dataset_train_split, name=name)
    if script.eval_dataset is not None:
        own = "dataset_test_split" in options.given
        split = script.dataset_test_split if own else script.dataset_train_split
        return train, read_preferences(script.eval_dataset, split=split)
    if script.eval_split:
        if len(train) < 2:
            reject("--eval-split needs at least 2 rows", str(len(train)), "Leave it out.")
        parts = train.train_test_split(test_size=script.eval_split, seed=config.seed)
        return parts["train"], parts["test"]
    if config.eval_strategy != "no":
        return train, read_preferences(source, split=script.dataset_test_split, name=name)
    return train, None


def _tokenizer(model: str, **source: Any) -> Any:
    try:
        return AutoTokenizer.from_pretrained(model, **source)
    except (OSError, ValueError) as error:
        reject(
            "--model must come with a tokenizer",
            f"{model}: {str(error).strip().splitlines()[0].rstrip('.')}",
            "Save one beside it: tokenizer.save_pretrained(folder).",
        )


def _make_output_dir(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reject("--output-dir must be a folder that can be written", str(error), "Choose another.")


def _dequantized(options: Options, tokenizer: Any, resumed: bool, **source: Any) -> str:
    """Unpack a GGUF file into a folder: what trains, and what an adapter needs. Return the folder.

    A resumed run finds it. The underscore keeps it from being pushed to the hub with the rest.
    """
    config, model = options.config, options.model
    folder = Path(config.output_dir) / "_base"
    state = PartialState()
    if state.is_main_process and not (resumed and (folder / "tokenizer_config.json").exists()):
        source["dtype"] = config.model_init_kwargs["dtype"]
        dequantize(model.model_name_or_path, options.script.gguf_file, folder, **source)
        tokenizer.save_pretrained(folder)  # last: it tells that the folder is whole
    state.wait_for_everyone()
    config.model_init_kwargs["revision"] = "main"
    model.model_name_or_path = str(folder)
    return str(folder)


def _prepare(options: Options, resumed: bool) -> dict[str, Any]:
    """Check everything that needs files, then return the keywords of the trainer."""
    script, config, model = options.script, options.config, options.model
    name = model.model_name_or_path
    train_data, eval_data = _datasets(options)
    trust = config.trust_remote_code
    source = {"trust_remote_code": trust, "revision": config.model_init_kwargs["revision"]}
    gguf = {"gguf_file": script.gguf_file} if script.gguf_file else {}
    architecture = model_config(name, **source, **gguf)
    if config.max_length is not None:
        asked = config.max_length if "max_length" in options.given else None
        config.max_length = sequence_limit(positions_of(architecture), asked)
    targets = model.lora_target_modules
    if model.use_peft and targets != "all-linear":
        model.lora_target_modules = lora_targets(
            on_meta_device(architecture, name, trust),
            [targets] if isinstance(targets, str) else targets,
        )
    if script.ref_model is not None:
        _, file = locate(script.ref_model, option="--ref-model")
        if file is not None:
            reject(
                "--ref-model must be a folder with a config.json or a model id of the hub",
                f"the GGUF file {file}",
                f"Dequantise it: AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file={file!r}, "
                "quantization_config=GgufConfig(dequantize=True)).save_pretrained(NEW).",
            )
        model_config(script.ref_model, trust, option="--ref-model")
    tokenizer = _tokenizer(name, **source, **gguf)
    check_against_tokenizer(train_data, tokenizer, script.dataset_name)
    _make_output_dir(Path(config.output_dir))
    compute = "bfloat16" if config.bf16 else "float16" if config.fp16 else "float32"
    if "dtype" not in options.given:
        # Frozen weights need no more digits than the products that they enter; trained ones do.
        model.dtype = compute if model.use_peft else "float32"
    config.model_init_kwargs.setdefault("dtype", model.dtype)
    if script.gguf_file is not None:
        name = _dequantized(options, tokenizer, resumed, **source)
    reference = None
    if script.ref_model is not None:
        init = {**config.model_init_kwargs, "dtype": getattr(torch, compute), "revision": "main"}
        reference = AutoModelForCausalLM.from_pretrained(
            script.ref_model, trust_remote_code=trust, **init
        )
    return {
        "model": name,
        "ref_model": reference,
        "args": config,
        "train_dataset": train_data,
        "eval_dataset": eval_data,
        "processing_class": tokenizer,
        "peft_config": get_peft_config(model),
        "quantization_config": get_quantization_config(model),
    }


def _announce(options: Options, trainer: Any) -> None:
    """Say what is about to be done: the choices that were left to us among them."""
    args, model = trainer.args, options.model
    loss = LOSSES[args.loss_type]
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    what = f"all {trained:,} weights"
    if model.use_peft:
        names = model.lora_target_modules
        names = names if isinstance(names, str) else ", ".join(sorted(names))
        what = f"LoRA of rank {model.lora_r} on {names}, {trained:,} weights"
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    held_out = f", {len(trainer.eval_dataset)} held out" if trainer.eval_dataset is not None else ""
    cut = f", up to {args.max_length} tokens" if args.max_length is not None else ""
    base = model.model_name_or_path
    file = options.script.gguf_file
    lines = {
        "model": f"{base} ({precision} on {args.device})",
        "gguf": file
        and f"{file} was dequantised into {base}"
        + (", which the adapter is loaded with: keep the two together" if model.use_peft else ""),
        "trained": f"{what}, learning rate {args.learning_rate:g}, {args.lr_scheduler_type.value}",
        "loss": f"{loss.name}: {loss.formula}",
        "": loss.note,
        "data": f"{len(trainer.train_dataset)} examples{held_out}{cut}",
    }
    print(f"dilkern {__version__}")
    for name, text in lines.items():
        if text:
            print(
                textwrap.fill(text, 79, initial_indent=f"  {name:<9}", subsequent_indent=" " * 11)
            )


def _write_summary(summary: dict[str, Any], output_dir: Path) -> None:
    text = json.dumps(summary, indent=2) + "\n"
    (output_dir / "summary.json").write_text(text, encoding="utf-8")


def run(words: list[str]) -> None:
    """Train, then write model or adapter, metrics and plot."""
    if "--help-all" in words:
        print(Parser().help_all())
        return
    options = read(words)
    checkpoint = _checkpoint(options)
    config = options.config
    output_dir = Path(config.output_dir)
    bars = sys.stderr.isatty() and not config.disable_tqdm
    config.disable_tqdm = not bars
    progress.calm_libraries(bars)
    keywords = _prepare(options, checkpoint is not None)
    rows_given, length = len(keywords["train_dataset"]), config.max_length
    metrics = progress.MetricsFile(output_dir / "metrics.jsonl")
    with library_checks():
        trainer = DILTrainer(**keywords, callbacks=[metrics])
    trainer.remove_callback(ProgressCallback if bars else PrinterCallback)
    if bars:
        trainer.add_callback(progress.Bar)
    reference = LOSSES[config.loss_type].reference and not config.reference_free
    chooses = "logging_steps" not in options.given
    trainer.add_callback(progress.ProgressTable(chooses, reference))
    settings = {
        "loss": config.loss_type,
        "model": options.model.model_name_or_path,
        "learning_rate": trainer.args.learning_rate,
        "max_log_ratio": config.max_log_ratio,
    }
    if trainer.is_world_process_zero():
        _announce(options, trainer)
        _write_summary(settings, output_dir)  # a run that breaks down has one too
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.create_model_card(dataset_name=options.script.dataset_name)
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=options.script.dataset_name)
    if not trainer.is_world_process_zero():
        return
    history = trainer.state.log_history
    rows: Any = trainer.train_dataset
    completions = ("chosen_ids", "rejected_ids", "completion_ids")
    longest = [
        len(row["prompt_ids"]) + max(len(row[name]) for name in completions if name in row)
        for row in rows
    ]
    run_folder.write_csv(history, output_dir / "metrics.csv")
    title = f"{config.loss_type}: {options.model.model_name_or_path}"
    drawn = run_folder.Run(str(output_dir), history, settings)
    picture.draw([drawn], output_dir / "training_dynamics.png", title)
    seconds = result.metrics["train_runtime"]
    summary = {
        **settings,
        "steps": trainer.state.global_step,
        "examples": len(rows),
        "examples_dropped": rows_given - len(rows),  # the prompt alone fills max_length
        "examples_truncated": sum(size > (length or size) for size in longest),
        "train_loss": result.metrics["train_loss"],
        "train_seconds": seconds,
        "tokens_per_second": trainer.tokens_trained / seconds,
        "peak_memory_mib": progress.peak_memory_mib(),
        "output_dir": str(output_dir),
    }
    _write_summary(summary, output_dir)
    print()
    for name, value in summary.items():
        print(f"{name:>18}  {f'{value:.6g}' if isinstance(value, float) else value}")
