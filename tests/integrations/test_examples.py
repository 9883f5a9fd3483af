"""Each example runs and lowers its loss; the collator prepares what TRL prepares."""

import copy
import importlib.util
import json
from pathlib import Path

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


def test_shipped_pairs():
    rows = read_preferences(str(EXAMPLES / "data" / "preferences.jsonl"))
    assert len(rows) >= 64
    prompts = [row["prompt"][0]["content"] for row in rows]
    assert len(set(prompts)) == len(prompts)
    assert all(row["chosen"] != row["rejected"] for row in rows)


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
