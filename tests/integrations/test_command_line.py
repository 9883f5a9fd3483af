"""The command line, end to end on a tiny model, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny_models as tiny
import transformers
import yaml
from typer.testing import CliRunner

from dilkern.cli import app, main

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
    result = CliRunner().invoke(app, ["train", *words], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_train_writes_everything(folder, data, tmp_path):
    out = tmp_path / "out"
    result = train(*flags(folder, data, out, **{"eval-split": 0.25, "eval-steps": 2}))
    assert result.exit_code == 0, result.output
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
    header = (out / "metrics.csv").read_text().splitlines()
    assert len(header) == 5
    assert "rewards/margins" in header[0]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["examples"] == 12
    assert summary["tokens_per_second"] > 0
    assert summary["peak_memory_mib"] > 100
    for name in summary:
        assert name in result.output


def test_flags_and_yaml_mean_the_same(folder, data, tmp_path):
    options = {"loss": "power", "beta": 0.5, "learning-rate": 0.001, "seed": 7}
    options["lora-target"] = "q_proj"
    assert train(*flags(folder, data, tmp_path / "a", **options), "--loss-param", "lam=-0.5")
    config = tmp_path / "run.yaml"
    values = {
        "model": folder, "dataset": data, "output_dir": str(tmp_path / "b"), "cpu": True,
        "max-steps": 4, "logging-steps": 1, "lora_r": 4, "loss_param": {"lam": -0.5}, **options,
        "beta": 9.0,
    }  # fmt: skip
    config.write_text(yaml.safe_dump(values))
    assert train("--config", str(config), "--beta", "0.5").exit_code == 0
    have, want = metrics(tmp_path / "b"), metrics(tmp_path / "a")
    assert [e.get("loss") for e in have] == [e.get("loss") for e in want]
    log = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert log["target_modules"] == ["q_proj"], "one word for an option that takes several"
    for text, message in (
        ("modell: x", r"run.yaml: every key .* 'modell'. Rename it to 'model'"),
        ("loer_r:", r"run.yaml: every key .* 'loer_r'. Rename it to 'lora_r'"),
        ("lora_r:", "'lora_r' must have a value"),
        ("max_log_ratio: null", "'none' in quotes"),
        ("model: [x", "must be a YAML file"),
        ("- model", "must map names"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            train("--config", str(config))
    with pytest.raises(ValueError, match="which is none"):
        train("--config", str(tmp_path / "none.yaml"))


VARIANTS = {
    "full": {"lora-r": 0, "learning-rate": 1e-3},
    "no reference": {"loss": "simpo", "lora-r": 0},
    "reference free": {"reference-free": True},
    "precomputed": {"precompute-ref-log-probs": True},
    "bf16": {"precision": "bf16"},
    "packed": {"padding-free": True, "attn-implementation": "eager"},
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
    result = train(*flags(folder, data, tmp_path / "out", **{"max-steps": 2, **options}))
    assert result.exit_code == 0, result.output
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
    result = train(*flags(folder, data, tmp_path / "out", **{name: 0}))
    assert result.exit_code == 2
    assert name in result.output


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
    assert train(*flags(folder, str(path), tmp_path / "b", loss="ukl")).exit_code == 0


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
    result = train(*flags(wide, data, tmp_path / "out", **options))
    assert {head.kind for head in kinds} == {kind}
    assert result.exit_code == 0, result.output
    assert metrics(tmp_path / "out")[0]["loss"] == pytest.approx(-0.5, abs=1e-6)


REFUSED = [
    ({"quantize-lm-head": True}, "goes with --load-in-4bit"),
    ({"loss": "lsiff"}, "must be one of"),
    ({"loss-param": "lam"}, "NAME=NUMBER"),
    ({"loss-param": "lam=1"}, "parameters of loss 'lsif'"),
    ({"loss": "power", "loss-param": ["lam=1", "lam=2"]}, "each parameter once"),
    ({"learning-rate": 0}, "learning-rate"),
    ({"epochs": 0}, "epochs"),
    ({"eval-steps": 2}, "needs held-out data"),
    ({"lora-r": 0, "lora-dropout": 0.1}, "need an adapter"),
    ({"max-length": 5000}, "256 positions"),
    ({"precision": "fp16"}, "needs a GPU"),
    ({"precision": "fp8"}, "precision"),
    ({"lora-r": -1}, "lora-r"),
    ({"load-in-4bit": True, "lora-r": 0}, "trains an adapter"),
    ({"eval-split": 2.0}, "fraction"),
    ({"max-log-ratio": "ten"}, "number or 'none'"),
    ({"resume": True}, "complete checkpoint"),
    ({"dataset": "missing.jsonl"}, "does not exist"),
    ({"backend": "cuda"}, "backend"),
    ({"report-to": "nowhere"}, "report_to. must be none, all, or among .*'nowhere'"),
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
    train(*flags(folder, data, out, **steps, resume=True))
    log = [e["loss"] for e in metrics(out) if "loss" in e]
    assert log == pytest.approx(whole, abs=1e-6)


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


def test_doctor():
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    for word in ("dilkern", "torch", "trl", "backend torch on cpu: can run", "backend triton"):
        assert word in result.output


def test_plan(folder, tmp_path):
    from dilkern.integrations.plan import Setting, head_bytes, longest, read_shape, total_bytes

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
        most = longest(kind, shape, setting, 64 * 2**20)
        at, beyond = (
            total_bytes(kind, shape, setting._replace(seq_len=n)) for n in (most, most + 1)
        )
        assert at <= 64 * 2**20 < beyond
    transformers.T5Config().save_pretrained(tmp_path / "t5")
    for words, message in (
        (["--model", "none"], "--model must be a folder"),
        (["--model", folder, "--workspace-mib", "-1"], "workspace-mib"),
        (["--model", folder, "--reserve", "-1"], "reserve"),
        (["--model", str(tmp_path / "t5")], "must be a causal LM.*T5Config"),
    ):
        with pytest.raises(ValueError, match=message):
            CliRunner().invoke(app, ["plan", *words], catch_exceptions=False)
    result = CliRunner().invoke(app, ["plan", "--model", folder, "--seq-len", "512"])
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.output.splitlines()[2:]] == [
        "naive",
        "trl",
        "dilkern",
    ]


def test_plan_counts_the_layers_of_gpt2(tmp_path):
    from peft import LoraConfig, get_peft_model

    from dilkern.integrations.plan import read_shape

    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)
    config.save_pretrained(tmp_path)
    shape = read_shape(str(tmp_path))
    lora = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=True)
    adapted = get_peft_model(transformers.GPT2LMHeadModel(config), lora)
    assert adapted.get_nb_trainable_parameters()[0] == 3 * shape.lora_per_rank
    assert shape.linear == 2 * 12 * 32 * 32
    assert shape.widest == (3 + 1 + 4 + 1) * 32


def test_importing_dilkern_loads_no_trainer_library():
    code = (
        "import sys, dilkern, dilkern.cli; "
        "found = {'transformers', 'trl', 'peft', 'datasets', 'accelerate'} & set(sys.modules); "
        "sys.exit(f'{found}' if found else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
