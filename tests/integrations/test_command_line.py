"""The command line, end to end on a tiny model, and what it refuses."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import tiny_models as tiny
import torch
import transformers
import yaml
from packaging.version import Version

import dilkern
from dilkern.cli import main
from dilkern.cli.options import Parser, read
from dilkern.cli.plan import run as plan
from dilkern.cli.run_folder import COLUMNS
from dilkern.cli.train import run

ROWS = tiny.pairs(16)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def flags(folder, data, out, **options):
    options = {
        "model": folder,
        "dataset": data,
        "output-dir": str(out),
        "cpu": True,
        "precision": "fp32",
        "batch-size": 4,
        "max-steps": 4,
        "logging-steps": 1,
        "lora-r": 4,
        **options,
    }
    words = []
    for name, value in options.items():
        for item in value if isinstance(value, list) else [value]:
            if item is not None:
                words += [f"--{name}"] if item is True else [f"--{name}", str(item)]
    return words


def train(*words):
    """Run `dilkern train` in this process; what it refuses comes as a ValueError."""
    run([str(word) for word in words])


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_train_writes_everything(folder, data, tmp_path, capsys):
    out = tmp_path / "out"
    train(*flags(folder, data, out, **{"eval-split": 0.25, "eval-steps": 2}))
    said = capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md",
        "metrics.jsonl", "metrics.csv", "summary.json", "training_dynamics.png",
    }  # fmt: skip
    assert (out / "training_dynamics.png").read_bytes()[:4] == b"\x89PNG"
    log = metrics(out)
    assert [e["step"] for e in log if "loss" in e] == [1, 2, 3, 4]
    assert [e["step"] for e in log if "eval_loss" in e] == [2, 4]
    assert log[0]["loss"] == -0.5
    table = (out / "metrics.csv").read_text().splitlines()
    assert table[0] == ",".join(COLUMNS)
    assert [row.split(",")[:2] for row in table[1:]] == [
        ["1", "train"], ["2", "train"], ["2", "eval"], ["3", "train"], ["4", "train"], ["4", "eval"],
    ]  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["examples"] == 12
    assert summary["tokens_per_second"] > 0
    assert summary["peak_memory_mib"] > 100
    for name in summary:
        assert name in said
    assert "LoRA of rank 4 on all-linear" in said and "learning rate 0.0001" in said
    rows = [line.split() for line in said.splitlines()]
    assert [row[0] for row in rows if len(row) == 8 and row[1][0] == "-"] == list("1234")
    assert sum(row[:2] == ["held", "out"] for row in rows) == 2
    assert "Warning" not in said and "{" not in said, "rows for people, not dicts"


def test_flags_and_yaml_mean_the_same(folder, data, tmp_path):
    options = {"loss": "power", "beta": 0.5, "learning-rate": 0.001, "seed": 7}
    options["lora-target"] = "q_proj"
    train(*flags(folder, data, tmp_path / "a", **options), "--loss-param", "lam=-0.5")
    config = tmp_path / "run.yaml"
    values = {
        "model": folder, "dataset": data, "output_dir": str(tmp_path / "b"), "cpu": True,
        "max-steps": 4, "logging-steps": 1, "lora_r": 4, "loss_param": {"lam": -0.5}, **options,
        "beta": 9.0, "precision": "fp32", "batch_size": 4,
    }  # fmt: skip
    config.write_text(yaml.safe_dump(values))
    train("--config", str(config), "--beta", "0.5")
    have, want = metrics(tmp_path / "b"), metrics(tmp_path / "a")
    assert [e.get("loss") for e in have] == [e.get("loss") for e in want]
    log = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert log["target_modules"] == ["q_proj"], "one word for an option that takes several"


def test_yaml_is_read_as_flags_are(tmp_path):
    config = tmp_path / "run.yaml"

    def settled(text):
        config.write_text("model: m\ndataset: d\nuse_cpu: true\n" + text)
        return read(["--config", str(config)])

    assert settled("no-gradient-checkpointing: true").config.gradient_checkpointing is False
    assert settled("no_gradient_checkpointing: false").config.gradient_checkpointing is True
    assert settled("length-normalize: false").config.length_normalize is False
    assert settled("max_log_ratio: null").config.max_log_ratio is None
    assert settled("save_strategy: no").config.save_strategy == "no"  # false, to YAML
    assert settled("env:\n  DILKERN_TEST: 1").config.use_cpu
    assert os.environ.pop("DILKERN_TEST") == "1"
    for text, message in (
        ("modell: x", r"run.yaml: every option .* 'modell'. Rename it to 'model'"),
        ("model: x\nlora_r: 8\nlora_r: 9", r"names an option once; received .*'lora_r' twice"),
        ("model: x\nlora_r: 8\nlora-r: 9", r"names an option once; received .*'lora_r' twice"),
        ("loer_r:", r"run.yaml: every option .* 'loer_r'. Rename it to 'lora_r'"),
        ("lora_r:", "'lora_r' must have a value"),
        ("lora_r: many", "invalid int value: 'many'"),
        ("beta: [1, 2]", "'beta' takes one value"),
        ("no-gradient-checkpointing: yes please", "must be true or false"),
        ("model: [x", "must be a YAML file"),
        ("env: 3", "'env' must map names to values; received 3"),
        ("test_split_size: 0.1", "Use --eval-split"),
    ):
        with pytest.raises(ValueError, match=message):
            settled(text)
    config.write_text("- model")
    with pytest.raises(ValueError, match="must map names"):
        read(["--config", str(config)])
    with pytest.raises(ValueError, match="No such file"):
        read(["--config", str(tmp_path / "none.yaml")])


def test_what_trl_documents_for_dpo_is_settled(tmp_path):
    """The command lines in the docstring of trl/scripts/dpo.py, and its example YAML files."""
    import trl.scripts.dpo

    blocks = re.findall(
        r"```bash\npython trl/scripts/dpo.py (.*?)```", trl.scripts.dpo.__doc__, re.S
    )
    full, lora = (shlex.split(block.replace("\\\n", " ")) for block in blocks)
    cpu = ["--use_cpu", "--bf16", "False"]
    script, config, model, _ = read(full + cpu)
    assert (script.dataset_name, config.learning_rate) == ("trl-lib/ultrafeedback_binarized", 5e-7)
    assert model.model_name_or_path == "Qwen/Qwen2-0.5B-Instruct"
    assert (config.eval_strategy, config.eval_steps) == ("steps", 50)
    assert config.remove_unused_columns is False
    assert model.use_peft is False, "without --use_peft all weights are trained, as there"
    model = read(lora + cpu).model
    assert (model.use_peft, model.lora_r, model.lora_alpha) == (True, 32, 16)
    file = tmp_path / "example_config.yaml"  # examples/cli_configs and docs/source/clis.md of TRL
    file.write_text(
        "model_name_or_path:\n  Qwen/Qwen2.5-0.5B\ndataset_name:\n  anthropic/hh-rlhf\n"
        "report_to:\n  none\nlearning_rate:\n  0.0001\nlr_scheduler_type:\n  cosine\n"
    )
    script, config, model, _ = read(["--config", str(file), *cpu])
    assert (script.dataset_name, config.learning_rate) == ("anthropic/hh-rlhf", 1e-4)
    assert (config.lr_scheduler_type, config.report_to) == ("cosine", [])
    for line, message in (
        ("--num_processes 4", "accelerate launch"),
        ("--accelerate_config zero2", "accelerate launch"),
        ("--dataset_streaming", "no option 'dataset_streaming'"),
        ("--loss_type exo_pair", "loss_type. must be one of.*'exo_pair'"),
        ("--loss_type sigmoid bco_pair sft --loss_weights 0.8 0.2 1.0", "must be one loss"),
        ("--f_divergence_type forward_kl", "fdpo_forward_kl"),
        ("--use_liger_kernel", "use_liger_kernel"),
    ):
        with pytest.raises(ValueError, match=message):
            read(full + cpu + line.split())


def test_every_option_of_trl_dpo_is_taken_or_refused_by_name():
    from trl.scripts.dpo import make_parser

    reader, refused = Parser(), set()
    for action in make_parser()._actions:
        for option in action.option_strings:
            try:
                reader.name(option[2:])
            except ValueError as error:
                assert "has no option" in str(error) or action.dest == "help", option
                refused.add(action.dest)
    assert refused == {
        "help", "datasets", "streaming", "test_split_size", "dataset_streaming", "ignore_bias_buffers",
    }  # fmt: skip


def test_short_names_are_those_of_trl(tmp_path):
    words = (
        "--model m --dataset d --dataset-split s --loss dpo --lora-target q_proj --lora-target k_proj "
        "--epochs 2 --batch-size 3 --gradient-accumulation 4 --lr-scheduler cosine --warmup 5 --cpu "
        "--max-log-ratio none --no-length-normalize --precision fp32 --eval-split 0.5"
    )
    script, config, model, _ = read(words.split())
    assert (script.dataset_name, script.dataset_train_split) == ("d", "s")
    assert (config.loss_type, config.num_train_epochs, config.warmup_steps) == ("dpo", 2, 5)
    assert (config.per_device_train_batch_size, config.per_device_eval_batch_size) == (3, 3)
    assert (config.gradient_accumulation_steps, config.lr_scheduler_type) == (4, "cosine")
    assert (config.max_log_ratio, config.length_normalize, config.bf16) == (None, False, False)
    assert (config.eval_strategy, config.eval_steps) == ("steps", 0.2)
    assert model.use_peft and model.lora_target_modules == ["q_proj", "k_proj"]


def test_learning_rate_is_that_of_what_trains(folder, tmp_path):
    from peft import LoraConfig

    from dilkern.integrations.trl import DILConfig, DILTrainer

    args = DILConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    for peft_config, rate in ((LoraConfig(target_modules="all-linear"), 1e-4), (None, 1e-6)):
        trainer = DILTrainer(
            folder, args=args, train_dataset=tiny.dataset(4), peft_config=peft_config,
            processing_class=tiny.tokenizer(),
        )  # fmt: skip
        assert trainer.args.learning_rate == rate
        trainer.create_optimizer()
        assert trainer.optimizer.param_groups[0]["lr"] == rate
    assert args.learning_rate is None, "the configuration serves both"


def test_bf16_is_the_default_where_the_hardware_has_it(tmp_path, monkeypatch):
    from dilkern.integrations.trl import DILConfig

    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able})
        assert DILConfig(str(tmp_path), use_cpu=True).bf16 is able
        # A machine without an accelerator need not be told that it has none.
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        assert DILConfig(str(tmp_path)).use_cpu and DILConfig(str(tmp_path)).bf16 is able


VARIANTS = {
    "full": {"lora-r": 0, "learning-rate": 1e-3},
    "no reference": {"loss": "simpo", "lora-r": 0},
    "reference free": {"reference-free": True},
    "precomputed": {"precompute-ref-log-probs": True},
    "bf16": {"precision": "bf16"},
    "packed": {"padding-free": True, "attn-implementation": "eager"},
    "shared": {"shared-prompts": True, "max-tokens-per-batch": 150},
    "by length": {"train-sampling-strategy": "group_by_length"},
    "bf16 full": {"precision": "bf16", "lora-r": 0},
    "bpo": {"loss": "bce", "pairing": "pairwise", "label-smoothing": 0.1},
    "paper": {"max-log-ratio": "none", "no-length-normalize": True, "backend": "torch"},
    "mixture": {"loss": "bce", "mixture": 0.5, "sft-weight": 0.1, "workspace-mib": 2},
    "lora on the head": {"lora-target": ["q_proj", "lm_head"]},
    "lora": {"lora-alpha": 4, "lora-dropout": 0.1, "lora-target": "q_proj"},
    "batch": {"batch-size": 2, "gradient-accumulation": 2, "max-length": 64, "epochs": 1},
    "schedule": {"lr-scheduler": "linear", "warmup": 2, "weight-decay": 0.1, "max-grad-norm": 0.5},
    "saves": {"save-steps": 1, "save-total-limit": 1, "no-gradient-checkpointing": True},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_options_work(folder, data, tmp_path, options):
    train(*flags(folder, data, tmp_path / "out", **{"max-steps": 2, **options}))
    if "save-steps" in options:
        assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_dropout_of_the_adapter_is_at_work(folder, data, tmp_path):
    runs = {}
    for dropout in (0.0, 0.5):
        out = tmp_path / str(dropout)
        train(*flags(folder, data, out, **{"lora-dropout": dropout, "learning-rate": 0.01}))
        runs[dropout] = [e["loss"] for e in metrics(out) if "loss" in e]
    assert runs[0.0] != runs[0.5]


@pytest.mark.parametrize("name", ["batch-size", "gradient-accumulation", "logging-steps"])
def test_counts_must_be_positive(folder, data, tmp_path, name):
    with pytest.raises(ValueError, match=f"--{name}. must be a number > 0"):
        train(*flags(folder, data, tmp_path / "out", **{name: 0}))


def test_long_examples_are_counted(folder, tmp_path):
    rows = tiny.pairs(6)
    rows[0]["prompt"][0]["content"] *= 20
    rows[1]["chosen"][0]["content"] *= 4
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(*flags(folder, str(path), tmp_path / "out", **{"max-length": 64, "max-steps": 1}))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["examples"] == 5
    assert summary["examples_dropped"] == 1
    assert summary["examples_truncated"] == 1
    with pytest.raises(ValueError, match="shorter than max_length=4"):
        train(*flags(folder, str(path), tmp_path / "none", **{"max-length": 4}))


def test_second_model_eval_file_and_unpaired(folder, data, tmp_path):
    other = tiny.save(tmp_path / "other", seed=5)
    options = {"ref-model": other, "eval-dataset": data, "max-steps": 1, "lora-r": 0}
    train(*flags(folder, data, tmp_path / "a", **options))
    assert abs(metrics(tmp_path / "a")[0]["loss"] + 0.5) > 1e-4
    path = tmp_path / "unpaired.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in tiny.unpaired(12)))
    train(*flags(folder, str(path), tmp_path / "b", loss="ukl"))


FOUR_BIT = {
    "dense": {},
    "four_bit": {"quantize-lm-head": True},
    "lora": {"quantize-lm-head": True, "lora-target": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize("kind", FOUR_BIT)
def test_four_bit(kind, data, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    from dilkern.lm_head import LMHead

    kinds = []
    build = LMHead.head
    monkeypatch.setattr(LMHead, "head", lambda self: kinds.append(build(self)) or kinds[-1])
    wide = tiny.save(tmp_path / "wide", hidden_size=64, intermediate_size=128, head_dim=16)
    options = {"load-in-4bit": True, "max-steps": 2, "lora-target": "q_proj", **FOUR_BIT[kind]}
    train(*flags(wide, data, tmp_path / "out", **options))
    assert {head.kind for head in kinds} == {kind}
    assert metrics(tmp_path / "out")[0]["loss"] == pytest.approx(-0.5, abs=1e-6)


REFUSED = [
    ({"quantize-lm-head": True}, "goes with --load-in-4bit"),
    ({"bnb-4bit-quant-type": "fp4"}, "bnb-4bit-quant-type say how .* no --load-in-4bit"),
    ({"loss": "dop"}, "must be one of.*Did you mean 'dpo'"),
    ({"modell": "x"}, "received '--modell'. Did you mean --model"),
    ({"lora-target": "qproj"}, "modules of the model: .*v_proj; .*Did you mean 'q_proj'"),
    ({"batch-size": "x"}, "invalid int value: 'x'"),
    ({"lr-scheduler": "cosin"}, "invalid choice: 'cosin'.*Did you mean 'cosine'"),
    ({"model-init-kwargs": "x"}, "must be a JSON object"),
    ({"load_best_model_at_end": True}, "must fit together; .*save and eval strategy"),
    ({"fsdp": "full_shard"}, "must fit together; .*fsdp only works in distributed"),
    ({"loss": "power", "loss-param": "la=1"}, "parameters of loss 'power'.*Did you mean 'lam'"),
    ({"output-dir": __file__}, "must be a folder that can be written.*File exists"),
    ({"output-dir": "/proc/out"}, "must be a folder that can be written"),
    ({"loss-param": "lam"}, "NAME=NUMBER"),
    ({"loss-param": "lam=1"}, "parameters of loss 'lsif'"),
    ({"loss": "power", "loss-param": ["lam=1", "lam=2"]}, "each parameter once"),
    ({"learning-rate": 0}, "learning-rate.*Pass e.g. --learning-rate 0.0001"),
    ({"lora-r": 4, "use-peft": "false"}, "need an adapter"),
    ({"eval-strategy": "steps"}, "needs held-out data"),
    ({"epochs": 0}, "epochs"),
    ({"eval-steps": 2}, "needs held-out data"),
    ({"lora-r": 0, "lora-dropout": 0.1}, "need an adapter"),
    ({"max-length": 5000}, "256 positions"),
    ({"precision": "fp16"}, "needs a GPU"),
    ({"precision": "fp8"}, "precision"),
    ({"lora-r": -1}, "lora-r"),
    ({"load-in-4bit": True, "lora-r": 0}, "trains an adapter"),
    ({"eval-split": 2.0}, "fraction"),
    ({"max-log-ratio": "ten"}, "--max-log-ratio: invalid float value: 'ten'"),
    ({"resume": True}, "complete checkpoint"),
    ({"resume-from-checkpoint": "True"}, "a folder checkpoint-.*--resume"),
    ({"dataset": "missing.jsonl"}, "does not exist"),
    ({"backend": "cuda"}, "backend"),
    ({"report-to": "nowhere"}, "report_to. must be one of: all, .*wandb; received 'nowhere'"),
    ({"lora-target": ["all-linear", "lm_head"]}, "stands alone"),
    ({"model": "none"}, "config.json or a model id"),
    ({"ref-model": "none"}, "--ref-model must be a folder with a config.json"),
    ({"attn-implementation": "flash_attention_2"}, r"pip install 'dilkern\[flash\]'.*sdpa"),
    ({"ref-model": "x", "precompute-ref-log-probs": True}, "Drop one of them"),
    ({"eval-split": 0.1, "eval-dataset": "x"}, "from one place"),
]


@pytest.mark.parametrize("options, message", REFUSED, ids=lambda value: str(value)[:40])
def test_refused_before_training(folder, data, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(*flags(folder, data, tmp_path / "out", **options))
    assert not list(tmp_path.glob("out/checkpoint-*"))


def test_folders_that_hold_no_model_are_refused(data, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(ValueError, match=r"config.json needs the model_type"):
        train(*flags(str(tmp_path / "bare"), data, tmp_path / "out"))


def needs_gguf():
    pytest.importorskip("gguf")
    if Version(transformers.__version__) < Version("5.18"):
        pytest.skip("transformers takes other tokens for the special ones of a GGUF file")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """A GGUF file, and the weights that it stands for."""
    needs_gguf()
    file = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    return file, tiny.save_gguf(file)


def test_a_gguf_file_is_dequantised_and_its_adapter_finds_the_base(gguf, data, tmp_path, capsys):
    from peft import AutoPeftModelForCausalLM

    file, weights = gguf
    out = tmp_path / "out"
    options = {"gguf-file": file.name, "max-steps": 2, "save-steps": 1, "lora-target": "q_proj"}
    train(*flags(str(file.parent), data, out, **options))
    said = "".join(capsys.readouterr().out.split())  # lines end at hyphens too
    assert f"gguf{file.name}wasdequantisedinto{out}/_base,whichtheadapter" in said
    base = transformers.AutoModelForCausalLM.from_pretrained(out / "_base")
    for name, weight in weights.items():
        assert torch.equal(base.state_dict()[name], weight), name
    tuned = AutoPeftModelForCausalLM.from_pretrained(out)
    assert tuned.peft_config["default"].base_model_name_or_path == str(out / "_base")
    assert any(p.any() for name, p in tuned.named_parameters() if "lora_B" in name)
    words = transformers.AutoTokenizer.from_pretrained(out)
    assert words.chat_template == tiny.TEMPLATE
    text = ROWS[0]["chosen"][0]["content"]
    assert words.decode(words(text)["input_ids"]) == text

    folder, before = out / "_base", (out / "_base" / "model.safetensors").stat().st_mtime_ns
    (out / "checkpoint-2" / "trainer_state.json").unlink()
    train(*flags(str(file), data, out, **{**options, "gguf-file": None, "resume": True}))
    assert (folder / "model.safetensors").stat().st_mtime_ns == before, "a resumed run finds it"


@pytest.mark.parametrize(
    "options", [{"lora-r": 0, "gguf_file": "tiny.Q8_0.gguf"}, {"load-in-4bit": True}], ids=str
)
def test_what_else_a_gguf_file_goes_with(gguf, data, tmp_path, options):
    if "load-in-4bit" in options:
        pytest.importorskip("bitsandbytes")
    file, _ = gguf
    model = file.parent if "gguf_file" in options else file
    train(*flags(str(model), data, tmp_path / "out", **{"max-steps": 1, **options}))
    assert metrics(tmp_path / "out")[0]["loss"] == pytest.approx(-0.5, abs=1e-6)


def test_gguf_files_are_named_once_and_exist(folder, data, tmp_path, monkeypatch):
    needs_gguf()
    packed = tmp_path / "gguf"
    packed.mkdir()
    for name in ("b.gguf", "a.gguf"):
        (packed / name).touch()
    for options, message in (
        ({"model": packed}, "which; received .*with a.gguf, b.gguf. Add --gguf-file a.gguf"),
        ({"model": packed, "gguf-file": "c.gguf"}, "not in .* Files there: a.gguf, b.gguf"),
        ({"model": folder, "gguf-file": "c.gguf"}, "not in .* Files there: none"),
        ({"model": packed / "a.gguf", "gguf-file": "b.gguf"}, "named once"),
        ({"model": packed / "a.gguf"}, "must be one that transformers reads.*in safetensors"),
        ({"ref-model": packed}, "--ref-model needs to know which.*Write --ref-model .*/a.gguf"),
        ({"ref-model": packed / "a.gguf"}, "--ref-model must be .*the GGUF file a.gguf. Deq"),
    ):
        with pytest.raises(ValueError, match=message):
            train(*flags(folder, data, tmp_path / "out", **options))
    with monkeypatch.context() as older:
        older.setattr("dilkern.cli.model.version", lambda name: "5.17.0")
        with pytest.raises(ValueError, match=r"from 5.18 on; received 5.17.0.*'dilkern\[models\]'"):
            read(flags(str(packed / "a.gguf"), data, tmp_path / "out"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed. pip install 'dilkern\[models\]'"):
        read(flags(str(packed / "a.gguf"), data, tmp_path / "out"))


def test_no_chat_template_is_refused_before_training(data, tmp_path):
    folder = tmp_path / "model"
    bare = tiny.save(folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"pairs.jsonl, row 1: .*chat template.*instruction-tuned"):
        train(*flags(bare, data, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_bad_line_and_messages_of_main(folder, data, tmp_path, monkeypatch, capsys):
    with open(data, "a") as file:
        file.write('{"prompt": "a", "chosen": "b"}\n')
    argv = ["dilkern", "train", *flags(folder, data, tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error:")
    assert f"{data}, line 17: key 'rejected' is required" in message
    assert not (tmp_path / "out").exists()


def test_the_table_has_no_accuracy_where_policy_and_reference_are_one(
    folder, data, tmp_path, capsys
):
    steps = {"max-steps": 2, "logging-steps": 1}
    train(*flags(folder, data, tmp_path / "out", **steps))
    lines = capsys.readouterr().out.splitlines()
    start = next(n for n, line in enumerate(lines) if line.split()[:1] == ["step"])
    headings, first, second = (lines[start + n].split() for n in range(3))
    place = headings.index("accuracy")
    assert float(first[headings.index("margin")]) == 0 and first[place] == "-"
    assert 0 <= float(second[place]) <= 1


def test_tensorboard_receives_the_metrics(folder, data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(*flags(folder, data, tmp_path / "out", **{"report-to": "tensorboard"}))
    (file,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    log = [entry for entry in metrics(tmp_path / "out") if "loss" in entry]
    for name in ("loss", "rewards/margins", "logps/chosen_avg", "num_tokens"):
        have = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert have == [(e["step"], pytest.approx(e[name], rel=1e-6)) for e in log], name


def test_a_logging_backend_that_is_not_installed_is_refused(folder, data, tmp_path, monkeypatch):
    from dilkern.integrations import trl_config

    monkeypatch.setattr(trl_config, "get_available_reporting_integrations", list)
    with pytest.raises(ValueError, match=r"not installed.*pip install wandb"):
        train(*flags(folder, data, tmp_path / "out", **{"report-to": "wandb"}))


def test_resume_passes_over_a_half_written_checkpoint(folder, data, tmp_path):
    out, steps = tmp_path / "out", {"max-steps": 6, "save-steps": 2, "save-total-limit": 5}
    train(*flags(folder, data, out, **steps))
    whole = [e["loss"] for e in metrics(out) if "loss" in e]
    with pytest.raises(ValueError, match="checkpoints of another run"):
        train(*flags(folder, data, out, **steps))
    state = out / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:50])
    weights = out / "checkpoint-4" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    table = (out / "metrics.csv").read_text()
    train(*flags(folder, data, out, **steps, resume=True))
    log = [e["loss"] for e in metrics(out) if "loss" in e]
    assert log == pytest.approx(whole, abs=1e-6)
    assert (out / "metrics.csv").read_text() == table, "the same columns, and every row once"


def test_killed_and_resumed_equals_uninterrupted(folder, data, tmp_path):
    steps = {"max-steps": 8, "save-steps": 2, "save-total-limit": 9}
    train(*flags(folder, data, tmp_path / "whole", **steps))
    out = tmp_path / "out"
    code = "from dilkern.cli import main; main()"
    command = [sys.executable, "-W", "ignore", "-c", code, "train"]
    with subprocess.Popen(
        [*command, *flags(folder, data, out, **steps)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ,
    ) as process:  # fmt: skip
        deadline = time.time() + 120
        while not (out / "checkpoint-4").exists() and time.time() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert len(metrics(out)) < 8
    train(*flags(folder, data, out, **steps, resume=True))
    have = [e["loss"] for e in metrics(out) if "loss" in e]
    want = [e["loss"] for e in metrics(tmp_path / "whole") if "loss" in e]
    assert have == pytest.approx(want, abs=1e-6)


def test_doctor(capsys):
    main(["doctor"])
    said = capsys.readouterr().out
    for word in ("dilkern", "torch", "trl", "backend torch on cpu: can run", "backend triton"):
        assert word in said


def test_help_fits_and_names_options_that_exist(capsys):
    reader = Parser()
    for command in ("", "train", "report", "plan", "doctor"):
        main([*command.split(), "--help"])
        said = capsys.readouterr().out
        assert max(map(len, said.splitlines())) <= 80
        if command == "train":
            for option in {*re.findall(r"--([a-z][\w-]+)", said)} - {
                "help-all",
                "config",
                "no-NAME",
            }:
                reader.name(option)
    main(["train", "--help-all"])
    assert "--optim_target_modules" in capsys.readouterr().out
    main(["--version"])
    assert capsys.readouterr().out == f"dilkern {dilkern.__version__}\n"
    with pytest.raises(SystemExit):
        main(["trian"])
    assert "Did you mean 'train'?" in capsys.readouterr().err


def test_plan(folder, tmp_path, capsys):
    from dilkern.cli.plan import Setting, head_bytes, longest, read_shape, state_bytes, total_bytes

    model = tiny.build()
    shape = read_shape(folder)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    adapted = tiny.build()
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    trainable, _ = get_peft_model(adapted, config).get_nb_trainable_parameters()
    assert trainable == 3 * shape.lora_per_rank
    setting = Setting(seq_len=128, batch_size=2, lora_r=8, load_in_4bit=False, workspace_mib=1)
    assert head_bytes("naive", shape, setting) == 16 * 512 * shape.vocab_size
    assert head_bytes("dilkern", shape, setting) == 2**20 + 2 * 512 * 32
    for kind in ("naive", "trl", "dilkern"):
        most = longest(kind, shape._replace(positions=None), setting, 64 * 2**20)
        at, beyond = (
            total_bytes(kind, shape, replace(setting, seq_len=n)) for n in (most, most + 1)
        )
        assert at <= 64 * 2**20 < beyond
        assert longest(kind, shape, setting, 64 * 2**20) == 256, "the positions of the model"
    nf4 = replace(setting, load_in_4bit=True, lora_r=8)
    head = 32 * shape.vocab_size
    tied = shape._replace(tied=True)
    assert not shape.tied and read_shape(tiny.save(tmp_path / "tied", "qwen3")).tied
    more = state_bytes(tied, replace(nf4, quantize_lm_head=True)) - state_bytes(tied, nf4)
    assert more == pytest.approx(head * 4.127 / 8), "a copy beside the embedding"
    more = state_bytes(shape, replace(nf4, quantize_lm_head=True)) - state_bytes(shape, nf4)
    assert more == pytest.approx(head * (4.127 / 8 - 2))
    transformers.T5Config().save_pretrained(tmp_path / "t5")
    for words, message in (
        ([], "needs --model"),
        (["--model", "none"], "--model must be a folder"),
        (["--model", folder, "--workspace-mib", "-1"], "workspace-mib"),
        (["--model", folder, "--reserve", "-1"], "reserve"),
        (["--model", folder, "--seq-len", "512"], "256 positions"),
        (["--model", folder, "--quantize-lm-head"], "goes with --load-in-4bit"),
        (["--model", folder, "--seqlen", "8"], "unrecognized arguments: --seqlen"),
        (["--model", str(tmp_path / "t5")], "must be a causal LM.*T5Config"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(words)
    plan(["--model", str(tmp_path / "tied"), "--seq-len", "128", "--lora-r", "8"])
    said = capsys.readouterr().out.splitlines()
    assert "lm_head tied to the embedding" in said[0] and "LoRA of rank 8" in said[1]
    assert [line.split()[0] for line in said[3:]] == ["naive", "trl", "dilkern"]


def test_plan_reads_a_gguf_file(gguf, tmp_path):
    from dilkern.cli.plan import read_shape

    shape = read_shape(str(gguf[0].parent), gguf_file=gguf[0].name)
    assert shape == read_shape(tiny.save(tmp_path, "qwen3", head_dim=128))
    with pytest.raises(ValueError, match=f"Add --gguf-file {gguf[0].name}"):
        plan(["--model", str(gguf[0].parent)])


def test_plan_counts_the_layers_of_gpt2(tmp_path):
    from peft import LoraConfig, get_peft_model

    from dilkern.cli.plan import read_shape

    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)
    config.save_pretrained(tmp_path)
    shape = read_shape(str(tmp_path))
    lora = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=True)
    adapted = get_peft_model(transformers.GPT2LMHeadModel(config), lora)
    assert adapted.get_nb_trainable_parameters()[0] == 3 * shape.lora_per_rank
    assert shape.linear == 2 * 12 * 32 * 32
    assert shape.widest == (3 + 1 + 4 + 1) * 32


def test_a_missing_package_names_the_extra(monkeypatch, capsys):
    for name in ("dilkern.cli.train", "dilkern.cli.options"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl.scripts.utils", None)
    with pytest.raises(SystemExit):
        main(["train", "--model", "m", "--dataset", "d"])
    assert "needs trl: pip install 'dilkern[train]'" in capsys.readouterr().err


def test_importing_dilkern_loads_no_trainer_library():
    code = (
        "import sys, dilkern, dilkern.cli; "
        "found = {'transformers', 'trl', 'peft', 'datasets', 'accelerate'} & set(sys.modules); "
        "sys.exit(f'{found}' if found else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
