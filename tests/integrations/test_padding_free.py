"""One row without padding, prompts once or twice, trains as the padded batch does."""

import json
import math
import os
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from datasets import Dataset
from training_runs import column, lora, losses, same_steps

from dilkern.integrations import packing
from dilkern.integrations.trl import DILConfig

PACKED = {
    "llama": {},
    "llama eager": {"attn": "eager"},
    "qwen3": {"family": "qwen3"},
    "gemma2": {"family": "gemma2", "attn": "eager"},
    "moe": {"family": "qwen3_moe"},
    "lora": {"init": {"peft_config": lora()}},
    "precomputed": {"precompute_ref_log_probs": True},
    "unpaired": {"data": tiny.unpaired()},
    "kto": {"loss_type": "kto"},
    "bf16": {"bf16": True},
    "cut at the start": {"max_length": 30, "truncation_mode": "keep_end"},
}


@pytest.mark.parametrize("options", PACKED.values(), ids=PACKED)
def test_padding_free_equals_padded(quick, tmp_path, options):
    options = dict(options)
    path = tiny.save(tmp_path / "model", options.pop("family", "llama"))
    options["model_init_kwargs"] = {"attn_implementation": options.pop("attn", "sdpa")}
    options["max_steps"] = 3
    data = options.pop("data", None)
    padded = quick(path, data, **options)
    want = losses(padded)
    tolerance = 1e-1 if "bf16" in options else 2e-3  # summed log-probs of about 100 nats
    for way in ("padding_free",) if data else ("padding_free", "shared_prompts"):
        packed = quick(path, data, **{way: True}, **options)
        same_steps(losses(packed), want, 2e-2 if "bf16" in options else 1e-5)
        same_steps(column(packed, "logps/chosen"), column(padded, "logps/chosen"), tolerance)
        assert column(packed, "num_tokens") == column(padded, "num_tokens")


@pytest.mark.parametrize("loss", ["lsif", "dpo", "simpo"])
def test_20_steps_of_shared_prompts_equal_padded(quick, loss):
    init = {"init": {"peft_config": lora()}} if loss == "dpo" else {}
    options = {"loss_type": loss, "max_steps": 20, "gradient_checkpointing": loss == "lsif", **init}
    want = losses(quick(**options))
    same_steps(losses(quick(shared_prompts=True, **options)), want, 1e-5)


SMOLLM2 = os.environ.get("DILKERN_SMOLLM2", "")
HH = Path(__file__).resolve().parents[3] / "shared" / "data" / "hh_harmless_1799.jsonl"


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2 or not HH.exists(), reason=f"needs DILKERN_SMOLLM2=FOLDER and {HH}")
@pytest.mark.parametrize("loss", ["lsif", "dpo", "simpo"])
def test_20_steps_of_shared_prompts_equal_padded_on_real_weights_and_pairs(quick, loss):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(SMOLLM2)
    rows = [row for row in map(json.loads, HH.read_text().splitlines()) if len(str(row)) < 700]
    options = {"loss_type": loss, "max_steps": 20, "per_device_train_batch_size": 2}
    init = {"init": {"peft_config": lora(), "processing_class": tokenizer}}
    options |= {"learning_rate": 1e-4, "data": Dataset.from_list(rows), **init}
    want = losses(quick(SMOLLM2, **options))
    found = losses(quick(SMOLLM2, shared_prompts=True, **options))
    print(loss, [f"{x:.6f}" for x in want], max(abs(a - b) for a, b in zip(want, found)))
    same_steps(found, want, 1e-5)


CUT = {
    "lsif": {"loss_type": "lsif"},
    "dpo": {"loss_type": "dpo", "init": {"peft_config": lora()}},
    "likelihood per token": {"loss_type": "cpo"},
    "likelihood per sequence": {"loss_type": "slic"},
    "precomputed": {"precompute_ref_log_probs": True},
    "accumulated": {"gradient_accumulation_steps": 2, "max_steps": 2},
    "unpaired": {"data": tiny.unpaired(), "sft_weight": 0.1},
    "not shared": {"padding_free": True},
}


@pytest.mark.parametrize("options", CUT.values(), ids=CUT)
def test_rows_within_a_budget_train_as_the_whole_batch(quick, options, monkeypatch):
    options = {
        "max_steps": 4,
        "max_grad_norm": 0.05,
        "optim": "sgd",
        "learning_rate": 0.5,
        **options,
    }
    data = options.pop("data", None)
    way = {"padding_free": True} if data or "padding_free" in options else {"shared_prompts": True}
    options.pop("padding_free", None)
    passes = []
    whole = quick(data=data, **options)
    want = losses(whole)
    cut = quick(data=data, max_tokens_per_batch=100, **way, **options)
    backward = cut.accelerator.backward
    monkeypatch.setattr(
        cut.accelerator, "backward", lambda *a, **k: (passes.append(1), backward(*a, **k))
    )
    same_steps(losses(cut), want, 1e-5)
    assert len(passes) > cut.state.max_steps * cut.args.gradient_accumulation_steps
    for name, tolerance in (
        ("grad_norm", 1e-4),
        ("logps/rejected", 2e-3),
        ("rewards/margins", 1e-4),
    ):
        same_steps(column(cut, name), column(whole, name), tolerance)
    assert column(cut, "num_tokens") == column(whole, "num_tokens")
    moved = [(a - b).abs().max() for a, b in zip(whole.model.parameters(), cut.model.parameters())]
    assert max(moved) < 1e-4


def test_a_budget_holds_in_evaluation_too(quick):
    init = {"eval_dataset": tiny.dataset(6)}
    whole = quick(init=init).evaluate()
    cut = quick(init=init, shared_prompts=True, max_tokens_per_batch=100).evaluate()
    assert math.isfinite(whole["eval_loss"])
    assert cut.keys() == whole.keys()
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen_avg"):
        assert cut[name] == pytest.approx(whole[name], abs=1e-5)


def lengths_of(trainer, epoch):
    """Lengths of the longest sequence of each pair, batch by batch."""
    loader = trainer.get_train_dataloader()
    loader.set_epoch(epoch)
    loader.iteration = epoch
    return [batch["attention_mask"].sum(1).view(2, -1).amax(0).tolist() for batch in loader]


def test_batches_by_length_waste_less_and_follow_from_the_seed(quick):
    rows = tiny.pairs(32)
    for i, row in enumerate(rows):
        row["chosen"][0]["content"] *= 1 + i % 5
    options = {"data": Dataset.from_list(rows), "train_sampling_strategy": "group_by_length"}
    trainer = quick(seed=1, **options)
    batches = lengths_of(trainer, 0)
    spread = sum(max(batch) - min(batch) for batch in batches)
    mixed = lengths_of(quick(data=options["data"]), 0)
    assert spread < 0.7 * sum(max(batch) - min(batch) for batch in mixed)
    torch.rand(7)  # the state of the process decides nothing
    assert lengths_of(trainer, 0) == batches
    assert lengths_of(quick(seed=1, **options), 0) == batches
    later = lengths_of(trainer, 1)
    assert later != batches
    assert sorted(n for batch in later for n in batch) == sorted(n for b in batches for n in b)
    assert lengths_of(quick(seed=2, **options), 0) != batches


def test_evaluation_by_length_covers_every_pair(quick):
    init = {"eval_dataset": tiny.dataset(8)}
    want = quick(init=init).evaluate()
    have = quick(init=init, train_sampling_strategy="group_by_length").evaluate()
    assert have["eval_logps/chosen"] == pytest.approx(want["eval_logps/chosen"], rel=1e-5)


def test_a_run_by_length_resumes_where_it_was(quick, tmp_path):
    options = {"train_sampling_strategy": "group_by_length", "max_steps": 7}
    options |= {"save_strategy": "steps", "save_steps": 5}  # in the middle of the second epoch
    want = losses(quick(**options))
    again = quick(**options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    assert [entry["loss"] for entry in again.state.log_history if "loss" in entry] == want


def test_what_cannot_be_shared_cut_or_grouped_is_refused(quick, tmp_path):
    for options, message in (
        ({"max_tokens_per_batch": 100}, "counts the tokens of packed rows"),
        ({"max_tokens_per_batch": 0, "shared_prompts": True}, "max_tokens_per_batch"),
        ({"max_tokens_per_batch": 100.5, "shared_prompts": True}, "whole number"),
        ({"learning_rate": "1e-4"}, "YAML reads 1e-4 as text"),
        ({"max_tokens_per_batch": 9, "shared_prompts": True, "loss_type": "kto"}, "which examples"),
        ({"max_tokens_per_batch": 9, "padding_free": True, "optim": "lomo"}, "steps in each"),
        ({"train_sampling_strategy": "group_by_length", "loss_type": "kto"}, "which examples"),
        ({"shared_prompts": "no"}, "`shared_prompts` must be True or False"),
        ({"shared_prompts": True, "torch_compile": True}, "would compile anew"),
        ({"train_sampling_strategy": "batch_rebalance"}, "must hold as many pairs"),
    ):
        with pytest.raises(ValueError, match=message):
            DILConfig(str(tmp_path), use_cpu=True, report_to="none", **options)
    with pytest.raises(ValueError, match="shared_prompts needs pairs"):
        quick(data=tiny.unpaired(), shared_prompts=True)
    with pytest.raises(ValueError, match="would follow their lengths"):
        quick(data=tiny.unpaired(), train_sampling_strategy="group_by_length")
    moe = tiny.save(tmp_path / "moe", "qwen3_moe")
    with pytest.raises(ValueError, match="load-balancing loss"):
        quick(moe, shared_prompts=True, max_tokens_per_batch=100)


def test_attention_that_cannot_train_here_is_refused(tmp_path, monkeypatch):
    for name, message in (("flash_attention_2", "dilkern.flash"), ("flex_attention", "sdpa")):
        with pytest.raises(ValueError, match=message):
            DILConfig(str(tmp_path), use_cpu=True, model_init_kwargs={"attn_implementation": name})
    init = {"attn_implementation": "flex_attention"}
    with pytest.raises(ValueError, match="takes neither"):
        DILConfig(str(tmp_path), use_cpu=True, shared_prompts=True, model_init_kwargs=init)
    monkeypatch.setattr(packing, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(ValueError, match="not installed"):
        packing.check_attention("flash_attention_2", torch.device("cuda"))
