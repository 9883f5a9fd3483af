"""The command line: `dilkern train`, `dilkern plan`, `dilkern doctor`."""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import torch

from dilkern import __version__
from dilkern.backends.base import BACKENDS, why_not
from dilkern.integrations import options
from dilkern.losses import LOSSES, get_loss
from dilkern.validation import check_positive, reject

try:
    import typer
except ImportError:
    sys.exit("dilkern's command line needs typer: pip install 'dilkern[train]'")

app = typer.Typer(
    help="Direct Imitation Learning losses without the logits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Option = typer.Option


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Let a YAML file stand in for flags; flags win over it."""
    if path is None:
        return None
    import yaml

    if not path.is_file():
        reject("--config must be a YAML file", f"{path}, which is none", "Check the path.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        reject("--config must be a YAML file", f"{path}: {error}", "Correct this place.")
    if not isinstance(values, dict):
        reject(
            "--config must map names of options to values",
            f"{path}, a {type(values).__name__}",
            "Write lines such as `lora_r: 8`.",
        )
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    parameters = {str(parameter.name): parameter for parameter in context.command.params}
    for key, value in values.items():
        if key not in parameters or key == "config":
            near = difflib.get_close_matches(key, parameters, 1)
            reject(
                f"{path}: every key must be an option of `dilkern {context.info_name}`",
                repr(key),
                f"Rename it to {near[0]!r}." if near else "See --help for the options.",
            )
        if value is None and parameters[key].default is not None:
            reject(
                f"{path}: {key!r} must have a value",
                "none",
                "Write 'none' in quotes for no limit."
                if key == "max_log_ratio"
                else "Fill it in or delete the line.",
            )
    if isinstance(values.get("loss_param"), dict):
        values["loss_param"] = [f"{key}={value}" for key, value in values["loss_param"].items()]
    for key, value in values.items():
        if getattr(parameters[key], "multiple", False) and not isinstance(value, list):
            values[key] = [value]
    context.default_map = values
    return path


@app.command()
def train(
    context: typer.Context,
    model: Annotated[str, Option(help="Folder or hub id of a causal LM.")] = ...,  # type: ignore[assignment]
    dataset: Annotated[str, Option(help=".jsonl, .parquet, folder of them, or hub id.")] = ...,  # type: ignore[assignment]
    output_dir: Annotated[Path, Option(help="Where everything is written.")] = Path("out"),
    config: Annotated[
        Path | None,
        Option(help="YAML file with any of these options.", callback=_read_config, is_eager=True),
    ] = None,
    dataset_split: Annotated[str, Option(help="Split of a folder or hub dataset.")] = "train",
    eval_dataset: Annotated[str | None, Option(help="Held-out pairs, as --dataset.")] = None,
    eval_split: Annotated[float, Option(help="Fraction of the data held out.")] = 0.0,
    loss: Annotated[str, Option(help=f"One of: {', '.join(LOSSES)}.")] = "lsif",
    loss_param: Annotated[list[str], Option(help="Parameter of the loss, NAME=NUMBER.")] = [],  # noqa: B006
    beta: Annotated[float | None, Option(help="Temperature; default of the loss.")] = None,
    length_normalize: Annotated[
        bool | None, Option(help="Log-ratios per token; default of the loss.")
    ] = None,
    pairing: Annotated[str | None, Option(help="pointwise or pairwise (BPO).")] = None,
    max_log_ratio: Annotated[str, Option(help="Exponentials are linear beyond; or none.")] = "10",
    label_smoothing: Annotated[float, Option(help="Probability of a flipped pair.")] = 0.0,
    mixture: Annotated[float, Option(help="Chosen share in the denominator.")] = 0.0,
    sft_weight: Annotated[float | None, Option(help="Weight of the chosen NLL.")] = None,
    reference_free: Annotated[bool, Option(help="Use no reference model.")] = False,
    ref_model: Annotated[str | None, Option(help="Reference model, else the start.")] = None,
    precompute_ref_log_probs: Annotated[bool, Option(help="Score the reference once.")] = False,
    backend: Annotated[str, Option(help="auto, torch or triton.")] = "auto",
    workspace_mib: Annotated[float, Option(help="Temporary memory of the loss head.")] = 256,
    lora_r: Annotated[int, Option(help="LoRA rank, 0 trains all weights.")] = 16,
    lora_alpha: Annotated[int | None, Option(help="Default: twice the rank.")] = None,
    lora_dropout: Annotated[
        float, Option(help="Dropout of the adapter; 0 turns the model's own off too.")
    ] = 0.0,
    lora_target: Annotated[list[str], Option(help="Module names, or all-linear.")] = ["all-linear"],  # noqa: B006
    load_in_4bit: Annotated[bool, Option(help="NF4 base weights (QLoRA).")] = False,
    quantize_lm_head: Annotated[bool, Option(help="NF4 lm_head too.")] = False,
    precision: Annotated[str, Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    attn_implementation: Annotated[
        str | None, Option(help="sdpa, eager, flash_attention_2, ...; default of transformers.")
    ] = None,
    cpu: Annotated[bool, Option(help="Do not use a GPU.")] = False,
    epochs: Annotated[float, Option(help="Passes over the data.")] = 1.0,
    max_steps: Annotated[int, Option(help="Overrides --epochs if > 0.")] = -1,
    batch_size: Annotated[int, Option(min=1, help="Examples per device and step.")] = 4,
    gradient_accumulation: Annotated[int, Option(min=1, help="Steps per update.")] = 1,
    learning_rate: Annotated[float | None, Option(help="Default: 1e-4 LoRA, 1e-6 full.")] = None,
    lr_scheduler: Annotated[str, Option(help="linear, cosine, constant, ...")] = "cosine",
    warmup: Annotated[float, Option(help="Steps, or below 1 a share of them.")] = 0.1,
    weight_decay: Annotated[float, Option(help="AdamW's.")] = 0.0,
    max_grad_norm: Annotated[float, Option(help="Gradient clipping.")] = 1.0,
    max_length: Annotated[int | None, Option(help="Default: 1024 or the model's.")] = None,
    padding_free: Annotated[bool, Option(help="One row without padding per step.")] = False,
    gradient_checkpointing: Annotated[bool, Option(help="Recompute activations.")] = True,
    logging_steps: Annotated[int, Option(min=1, help="Updates between two logs.")] = 10,
    eval_steps: Annotated[int, Option(min=0, help="Updates between evaluations; 0: epochs.")] = 0,
    save_steps: Annotated[int, Option(min=0, help="Updates between checkpoints; 0: epochs.")] = 0,
    save_total_limit: Annotated[int, Option(help="Checkpoints kept.")] = 2,
    resume: Annotated[bool, Option(help="Go on from the newest whole checkpoint.")] = False,
    report_to: Annotated[list[str], Option(help="tensorboard, wandb, trackio, ...")] = ["none"],  # noqa: B006
    seed: Annotated[int, Option(help="Of data order and adapter.")] = 42,
    trust_remote_code: Annotated[bool, Option(help="Run code that comes with a model.")] = False,
) -> None:
    """Preference-tune a causal LM; writes model or adapter, metrics and a plot to --output-dir."""
    entry = get_loss(loss, argument="--loss")
    check_positive("--epochs", epochs)
    if learning_rate is not None:
        check_positive("--learning-rate", learning_rate)
    if eval_steps and eval_dataset is None and not eval_split:
        reject("--eval-steps needs held-out data", "none", "Add --eval-dataset or --eval-split.")
    params = options.loss_params(loss_param)
    if resume:
        from dilkern.integrations.run import latest_checkpoint

        checkpoint: str | None = str(latest_checkpoint(output_dir))
    else:
        checkpoint = None
        if any(output_dir.glob("checkpoint-*")):
            reject(
                "the output directory must not hold checkpoints of another run",
                str(output_dir),
                "Add --resume to go on with it, or choose another --output-dir.",
            )
    if load_in_4bit and lora_r == 0:
        reject("--load-in-4bit trains an adapter", "--lora-r 0", "Give a rank, e.g. --lora-r 16.")
    if quantize_lm_head and not load_in_4bit:
        reject("--quantize-lm-head goes with --load-in-4bit", "it alone", "Add --load-in-4bit.")
    if ref_model is not None and precompute_ref_log_probs:
        reject(
            "the reference is either a second model or precomputed from the start of training",
            "--ref-model and --precompute-ref-log-probs",
            "Drop one of them.",
        )
    on_cpu = cpu or not torch.cuda.is_available()
    bf16, fp16 = options.precision(precision, on_cpu)
    train_data, eval_data = options.splits(dataset, dataset_split, eval_dataset, eval_split, seed)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dilkern.integrations.data import check_against_tokenizer
    from dilkern.integrations.run import MetricsFile, peak_memory_mib, plot_dynamics, write_csv
    from dilkern.integrations.trl import DILConfig, DILTrainer

    length = options.model_limits(model, max_length, trust_remote_code)
    if ref_model is not None:
        options.model_config(ref_model, trust_remote_code, option="--ref-model")
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    check_against_tokenizer(train_data, tokenizer, dataset)
    evaluate = eval_data is not None
    compute = torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32
    # Frozen weights need no more digits than the products that they enter; trained ones do.
    init: dict[str, Any] = {"dtype": str(compute if lora_r else torch.float32).split(".")[1]}
    if attn_implementation is not None:
        init["attn_implementation"] = attn_implementation
    args = DILConfig(
        str(output_dir),
        model_init_kwargs=init,
        loss_type=entry.name,
        loss_params=params or None,
        beta=beta,
        length_normalize=length_normalize,
        pairing=pairing,
        max_log_ratio=options.limit(max_log_ratio),
        label_smoothing=label_smoothing,
        mixture=mixture,
        sft_weight=sft_weight,
        reference_free=reference_free,
        precompute_ref_log_probs=precompute_ref_log_probs,
        backend=backend,
        workspace_mib=workspace_mib,
        quantize_lm_head=quantize_lm_head,
        use_cpu=on_cpu,
        bf16=bf16,
        fp16=fp16,
        num_train_epochs=epochs,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation,
        learning_rate=(1e-4 if lora_r else 1e-6) if learning_rate is None else learning_rate,
        lr_scheduler_type=lr_scheduler,
        warmup_steps=warmup,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        max_length=length,
        padding_free=padding_free,
        gradient_checkpointing=gradient_checkpointing,
        disable_dropout=not lora_dropout,  # TRL's switch takes the adapter's away with the model's
        logging_steps=logging_steps,
        eval_strategy=("steps" if eval_steps else "epoch") if evaluate else "no",
        eval_steps=eval_steps or None,
        save_strategy="steps" if save_steps else "epoch",
        save_steps=save_steps or 500,
        save_total_limit=save_total_limit,
        report_to=report_to,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    reference = None
    if ref_model is not None:
        reference = AutoModelForCausalLM.from_pretrained(
            ref_model, trust_remote_code=trust_remote_code, **{**init, "dtype": compute}
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    trainer = DILTrainer(
        model,
        ref_model=reference,
        args=args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        peft_config=options.lora(lora_r, lora_alpha, lora_dropout, lora_target),
        quantization_config=options.four_bit(compute) if load_in_4bit else None,
        callbacks=[MetricsFile(output_dir / "metrics.jsonl")],
    )
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    history = trainer.state.log_history
    rows: Any = trainer.train_dataset
    completions = ("chosen_ids", "rejected_ids", "completion_ids")
    longest = [
        len(row["prompt_ids"]) + max(len(row[name]) for name in completions if name in row)
        for row in rows
    ]
    write_csv(history, output_dir / "metrics.csv")
    plot_dynamics(history, output_dir / "training_dynamics.png", f"{entry.name}: {model}")
    seconds = result.metrics["train_runtime"]
    tokens = trainer.tokens_trained
    summary = {
        "loss": entry.name,
        "steps": trainer.state.global_step,
        "examples": len(rows),
        "examples_dropped": len(train_data) - len(rows),  # the prompt alone fills max_length
        "examples_truncated": sum(size > length for size in longest),
        "train_loss": result.metrics["train_loss"],
        "train_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_mib": peak_memory_mib(),
        "output_dir": str(output_dir),
    }
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for name, value in summary.items():
        typer.echo(f"{name:>18}  {f'{value:.6g}' if isinstance(value, float) else value}")


@app.command()
def plan(
    model: Annotated[str, Option(help="Folder with a config.json, or hub id.")] = ...,  # type: ignore[assignment]
    seq_len: Annotated[int, Option(min=2, help="Tokens per sequence.")] = 2048,
    batch_size: Annotated[int, Option(min=1, help="Pairs per device and step.")] = 1,
    vram: Annotated[float, Option(help="Memory of the GPU in GiB.")] = 24.0,
    reserve: Annotated[float, Option(help="GiB left to the driver and to fragments.")] = 1.0,
    lora_r: Annotated[int, Option(min=0, help="LoRA rank, 0 trains all weights.")] = 16,
    load_in_4bit: Annotated[bool, Option(help="NF4 base weights (QLoRA).")] = False,
    workspace_mib: Annotated[float, Option(help="Temporary memory of the loss head.")] = 256,
    trust_remote_code: Annotated[bool, Option(help="Run code that comes with a model.")] = False,
) -> None:
    """Predict memory for three loss heads, and the longest sequence that fits, from the config."""
    from dilkern.integrations.plan import Setting, read_shape, table

    check_positive("--workspace-mib", workspace_mib)
    if not vram > reserve >= 0:
        reject(
            "--vram must be more than --reserve, and that not negative",
            f"{vram} and {reserve} GiB",
            "Correct one of them.",
        )
    if load_in_4bit and lora_r == 0:
        reject("--load-in-4bit trains an adapter", "--lora-r 0", "Give a rank, e.g. --lora-r 16.")
    shape = read_shape(model, trust_remote_code=trust_remote_code)
    setting = Setting(seq_len, batch_size, lora_r, load_in_4bit, workspace_mib)
    typer.echo(
        f"{shape.parameters / 1e9:.3g} B parameters, vocabulary {shape.vocab_size}, "
        f"{2 * batch_size} sequences of {seq_len} tokens, {vram:g} GiB. Prediction, not measured:"
    )
    typer.echo(f"{'head':<9}{'head MiB':>10}{'total GiB':>11}{'fits':>6}{'longest sequence':>18}")
    for name, head, total, fits, most in table(shape, setting, vram, reserve):
        typer.echo(f"{name:<9}{head:>10.0f}{total:>11.2f}{fits:>6}{most:>18}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@app.command()
def doctor() -> None:
    """Print versions, devices, and for each backend whether it can run and why not."""
    typer.echo(f"dilkern {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in (
        "torch", "triton", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes",
        "flash-attn", "matplotlib",
    ):  # fmt: skip
        typer.echo(f"  {package:<14}{_version(package)}")
    typer.echo(f"CPU: {torch.get_num_threads()} threads")
    devices = [torch.device("cpu")]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        typer.echo(
            f"cuda:{index}: {found.name}, {found.total_memory / 2**30:.1f} GiB, "
            f"compute capability {found.major}.{found.minor}"
        )
        devices.append(torch.device("cuda", index))
    if len(devices) == 1:
        typer.echo(f"GPU: none that torch {torch.__version__} can use")
    for name in BACKENDS:
        for device in devices:
            reason = why_not(name, device)
            typer.echo(f"backend {name} on {device}: {'can run' if reason is None else reason}")


def _raised_by_a_check(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__") == "dilkern.validation"


def main() -> None:
    """Run the command line; a failed check prints its message, anything else its traceback."""
    try:
        app(prog_name="dilkern")
    except ValueError as error:
        if not _raised_by_a_check(error):
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
