"""DILTrainer against TRL's own trainer and against a full-logits trainer of the same objective."""

import math

import pytest
import tiny_models as tiny
import torch
import trl
from peft import PeftModel, get_peft_model
from training_runs import FullLogitsLSIF, column, four_bit, lora, losses, same_steps
from trl import DPOConfig, DPOTrainer

from dilkern import LOSSES

beside_trl = pytest.mark.skipif(
    trl.__version__.startswith("1.15.") and not torch.cuda.is_available(),
    reason="TRL 1.15's own DPO needs a GPU (its head is Triton only)",
)


@beside_trl
@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_dpo_follows_trl(quick, kind, tmp_path):
    init, model = {}, None
    if kind != "full":
        init["peft_config"] = lora()
    if kind == "qlora":
        pytest.importorskip("bitsandbytes")
        init["quantization_config"] = four_bit()
        # bitsandbytes 0.50.2 decodes wrongly on CPU where rows are no multiple of its block of 64.
        model = tiny.save(tmp_path / "wide", hidden_size=64, intermediate_size=128, head_dim=16)
    steps = {"loss_type": "dpo", "learning_rate": 3e-4}
    ours = quick(model, init=init, **steps)
    theirs = quick(model, trainer=DPOTrainer, config=DPOConfig, init=init, learning_rate=3e-4)
    # QLoRA keeps adapters in bf16: rounding separates the runs.
    tolerance = 2e-3 if kind == "qlora" else 2e-5
    same_steps(losses(ours), losses(theirs), tolerance)
    for name in ("logps/chosen", "logps/rejected"):
        a, b = column(ours, name), column(theirs, name)
        assert max(abs(x - y) / abs(y) for x, y in zip(a, b)) < (1e-2 if kind == "qlora" else 1e-5)
    for name in ("rewards/chosen", "rewards/margins", "rewards/accuracies"):
        same_steps(column(ours, name), column(theirs, name), 5e-2 if kind == "qlora" else 5e-5)
    assert column(ours, "num_tokens") == column(theirs, "num_tokens")


def test_four_bit_training_stays_right_after_an_evaluation(quick, tmp_path):
    pytest.importorskip("bitsandbytes")
    wide = tiny.save(tmp_path / "wide", hidden_size=64, intermediate_size=128, head_dim=16)
    init = {"peft_config": lora(), "quantization_config": four_bit()}
    init["eval_dataset"] = tiny.dataset(4)
    plain = losses(quick(wide, init=init))
    same_steps(losses(quick(wide, init=init, eval_strategy="steps", eval_steps=1)), plain, 1e-6)


def test_lsif_follows_full_logits_training_over_20_steps(quick):
    ours = quick(loss_type="lsif", max_steps=20)
    theirs = quick(trainer=FullLogitsLSIF, config=DPOConfig, max_steps=20)
    same_steps(losses(ours), losses(theirs), 1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains(quick, name):
    trainer = quick(loss_type=name, max_steps=2)
    if not LOSSES[name].reference:
        assert trainer.ref_model is None
    values = losses(trainer)
    assert all(map(math.isfinite, values)), values
    assert {"rewards/accuracies", "logps/chosen_avg"} <= set(trainer.state.log_history[0])


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("adapted", [False, True])
def test_families(quick, tmp_path, family, adapted):
    path = tiny.save(tmp_path / family, family)
    trainer = quick(path, loss_type="bce", init={"peft_config": lora()} if adapted else None)
    values = losses(trainer)
    assert values[-1] < values[0]
    assert ("aux_loss" in trainer.state.log_history[0]) == (family == "qwen3_moe")


@beside_trl
def test_moe_aux_loss_equals_trl(quick, tmp_path):
    path = tiny.save(tmp_path / "moe", "qwen3_moe")
    ours = quick(path, loss_type="dpo")
    theirs = quick(path, trainer=DPOTrainer, config=DPOConfig)
    same_steps(losses(ours), losses(theirs), 2e-5)
    same_steps(column(ours, "aux_loss"), column(theirs, "aux_loss"), 2e-5)


def test_precomputed_reference_gives_the_same_run(quick):
    plain = losses(quick())
    same_steps(losses(quick(precompute_ref_log_probs=True)), plain, 1e-6)
    adapted = losses(quick(init={"peft_config": lora()}))
    again = quick(init={"peft_config": lora()}, precompute_ref_log_probs=True)
    same_steps(losses(again), adapted, 1e-6)


def test_reference_log_probs_may_come_with_the_dataset(quick):
    first = quick(precompute_ref_log_probs=True)
    given = first.train_dataset
    data = tiny.dataset()
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        data = data.add_column(name, given[name])
    trainer = quick(data=data)
    assert trainer.ref_model is None
    same_steps(losses(trainer), losses(quick()), 1e-6)
    with pytest.raises(ValueError, match="the dataset brings ref_chosen_logps"):
        quick(data=data, init={"ref_model": tiny.build()})
    with pytest.raises(ValueError, match="both bring reference log-probs"):
        quick(data=data, init={"eval_dataset": tiny.dataset()})
    with pytest.raises(ValueError, match="come together"):
        quick(data=data.remove_columns("ref_rejected_logps"))
    with pytest.raises(ValueError, match="in the eval dataset alone"):
        quick(data=tiny.dataset(), init={"eval_dataset": data})


def test_a_second_model_as_reference(quick):
    trainer = quick(init={"ref_model": tiny.build(seed=3)})
    assert abs(losses(trainer)[0] + 0.5) > 1e-4
    assert trainer.ref_model is not None


def test_a_pretrained_adapter_is_its_own_reference(quick):
    model = get_peft_model(tiny.build(), lora(init_lora_weights=False))
    trainer = quick(model)
    values = losses(trainer)
    assert values[0] == pytest.approx(-0.5, abs=1e-6)
    assert values[-1] < values[0]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(quick, adapted, reentrant):
    init = {"peft_config": lora()} if adapted else {}
    plain = losses(quick(init=init))
    kept = {"gradient_checkpointing": True}
    kept["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    same_steps(losses(quick(init=init, **kept)), plain, 1e-6)


def test_accumulation_equals_one_large_batch(quick):
    # Pairwise means over equal parts: the mean of means is the mean.
    whole = losses(quick(loss_type="dpo", per_device_train_batch_size=8, max_steps=2))
    parts = losses(
        quick(
            loss_type="dpo",
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=2,
        )
    )
    same_steps(parts, whole, 1e-5)


def test_metrics_are_over_all_pairs_since_the_last_log(quick):
    """A spread or a correlation over batches of one pair would say nothing of those pairs."""
    options = {"loss_type": "dpo", "max_steps": 4, "logging_steps": 2, "learning_rate": 1e-2}
    whole = quick(**options)
    parts = quick(**options, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    losses(whole), losses(parts)
    names = {name for name in whole.state.log_history[0] if "/" in name}
    assert {"log_ratio/chosen_std", "length/margin_corr", "rewards/margins"} <= names
    for name in names:
        have, want = column(parts, name), column(whole, name)
        assert have == pytest.approx(want, rel=1e-3, abs=1e-4), name
    assert min(column(parts, "log_ratio/rejected_std")) > 1e-3


def test_rare_logs_hold_few_tensors(quick, monkeypatch):
    from dilkern.integrations import metrics

    options = {"loss_type": "dpo", "max_steps": 5, "logging_steps": 5, "learning_rate": 1e-2}
    want = quick(**options)
    losses(want)
    monkeypatch.setattr(metrics, "_AT_ONCE", 2)
    have, most, keep = quick(**options), [], metrics.LoggedOutputs.keep

    def counted(self, *args):
        keep(self, *args)
        most.append(len(self._kept[True]))

    monkeypatch.setattr(metrics.LoggedOutputs, "keep", counted)
    losses(have)
    assert max(most) == 1 and len(most) == 5
    assert {n: v for n, v in have.state.log_history[0].items() if "/" in n} == {
        n: v for n, v in want.state.log_history[0].items() if "/" in n
    }


def test_an_evaluation_after_predict_is_its_own(quick):
    trainer = quick(init={"eval_dataset": tiny.dataset(4)})
    trainer.evaluate()
    trainer.predict(trainer.train_dataset)
    trainer.evaluate()
    first, second = column(trainer, "eval_logps/chosen")
    assert first == second


def test_bf16_autocast(quick):
    values = losses(quick(bf16=True, gradient_checkpointing=True))
    assert values[0] == -0.5, "policy == reference under autocast, to the bit"
    same_steps(values, losses(quick()), 2e-2)


def test_eval_save_and_resume(quick, tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    evals = {"eval_strategy": "steps", "eval_steps": 3}
    init = {"peft_config": lora(), "eval_dataset": tiny.dataset(6)}
    trainer = quick(init=init, **options, **evals)
    whole = losses(trainer)
    assert "eval_rewards/margins" in str(trainer.state.log_history)
    assert len(column(trainer, "eval_loss")) == 2
    metrics = trainer.evaluate(tiny.dataset(4))
    assert math.isfinite(metrics["eval_loss"])
    again = quick(init=init, **options, **evals)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    resumed = [e["loss"] for e in again.state.log_history if "loss" in e]
    same_steps(resumed, whole, 1e-6)
    files = {path.name for path in (tmp_path / "out" / "checkpoint-6").iterdir()}
    assert "adapter_model.safetensors" in files
    assert not {name for name in files if name.endswith((".bin", ".pt", ".pth"))} - {
        "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    }  # fmt: skip


def test_generate_after_training_equals_the_reloaded_model(quick, tmp_path, folder):
    from transformers import AutoModelForCausalLM

    trainer = quick(init={"peft_config": lora()})
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    fresh = PeftModel.from_pretrained(base, str(tmp_path / "saved"))
    ids = torch.tensor([tiny.tokenizer()("What is a river?")["input_ids"]])
    options = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 8,
        "do_sample": False,
    }
    trainer.model.eval()
    assert torch.equal(trainer.model.generate(**options), fresh.generate(**options))


def test_compute_metrics_receives_logits(quick):
    shapes = []

    def metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {"own": 1.0}

    init = {"eval_dataset": tiny.dataset(4), "compute_metrics": metrics}
    result = quick(init=init, per_device_eval_batch_size=4).evaluate()
    assert result["eval_own"] == 1.0
    assert shapes[0][-1] == len(tiny.tokenizer())


@pytest.mark.parametrize("name", ["lsif", "bce", "kto"])
def test_unpaired_data(quick, name):
    init = {"eval_dataset": tiny.unpaired(6)}
    trainer = quick(data=tiny.unpaired(), loss_type=name, max_steps=8, init=init)
    values = losses(trainer)
    assert values[-1] < values[0]
    assert "rewards/accuracies" not in trainer.state.log_history[0]
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_unpaired_batches_with_one_kind_only(quick):
    rows = [row for row in tiny.unpaired(24) if row["label"]][:4]
    from datasets import Dataset

    trainer = quick(data=Dataset.from_list(rows), max_steps=1)
    assert losses(trainer) == [pytest.approx(-1.0, abs=1e-6)]
    assert "logps/chosen" in trainer.state.log_history[0]
    assert "logps/rejected" not in trainer.state.log_history[0]


def test_paired_data_as_unpaired_gives_the_same_loss(quick):
    from datasets import Dataset

    pairs = tiny.pairs(4)
    rows = [
        {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
        for kind in ("chosen", "rejected")
        for row in pairs
    ]
    reference = {"ref_model": tiny.build(seed=5)}
    unpaired = quick(
        data=Dataset.from_list(rows), init=reference, max_steps=1, per_device_train_batch_size=8
    )
    paired = quick(
        data=Dataset.from_list(pairs), init={"ref_model": tiny.build(seed=5)}, max_steps=1
    )
    same_steps(losses(unpaired), losses(paired), 1e-5)
