"""Options and data that do not fit are refused before anything is trained; the others arrive."""

import json
import math
from dataclasses import replace

import pytest
import tiny_models as tiny
import torch
from datasets import Dataset
from training_runs import COMMON, lora, losses
from trl import DPOConfig

from dilkern import LOSSES
from dilkern.integrations.trl import DILConfig, DILTrainer

REFUSED = [
    ({"loss_type": "lsiff"}, "must be one of"),
    ({"loss_type": ["lsif", "sft"]}, "one loss"),
    ({"loss_type": replace(LOSSES["bce"], beta=9.0)}, "must be a name.*received Loss"),
    ({"loss_weights": [1.0]}, "loss_weights"),
    ({"ld_alpha": 0.5}, "ld_alpha"),
    ({"f_divergence_type": "forward_kl"}, "fdpo_forward_kl"),
    ({"f_alpha_divergence_coef": 0.3}, "fdpo_alpha"),
    ({"use_weighting": True}, "use_weighting"),
    ({"discopop_tau": 0.1}, "discopop_tau"),
    ({"use_liger_kernel": True}, "use_liger_kernel"),
    ({"loss_type": "simpo", "precompute_ref_log_probs": True}, "has no reference"),
    ({"loss_type": "cpo", "sync_ref_model": True}, "has no reference"),
    ({"loss_type": "orpo", "reference_free": True}, "has no reference"),
    ({"reference_free": True, "precompute_ref_log_probs": True}, "runs no reference"),
    ({"loss_type": "kto", "precompute_ref_log_probs": True}, "mismatched"),
    ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
    ({"loss_type": "ipo", "beta": 0.2}, "no beta"),
    ({"loss_params": {"lam": 1.0}}, "lam"),
    ({"workspace_mib": 0}, "workspace_mib"),
    ({"backend": "cuda"}, "`backend` must be one of"),
    ({"mixture": 0.5, "pairing": "pairwise"}, "mixture"),
]


@pytest.mark.parametrize("options, message", REFUSED, ids=lambda value: str(value)[:40])
def test_options_that_do_not_apply_raise(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DILConfig(str(tmp_path), **{**COMMON, **options})


def test_data_that_does_not_fit_raises(quick):
    with pytest.raises(ValueError, match="pairwise pairing needs pairs"):
        quick(data=tiny.unpaired(), loss_type="dpo")
    with pytest.raises(ValueError, match="both be paired or both unpaired"):
        quick(init={"eval_dataset": tiny.unpaired()})
    with pytest.raises(ValueError, match="at least 2 examples"):
        quick(loss_type="kto", per_device_train_batch_size=1)
    with pytest.raises(ValueError, match="must be left out"):
        quick(loss_type="simpo", init={"ref_model": tiny.build()})
    with pytest.raises(ValueError, match="must be a DILConfig"):
        quick(config=DPOConfig)
    ids = {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}
    with pytest.raises(ValueError, match="train dataset, row 1: key 'chosen' is required"):
        quick(data=Dataset.from_list([ids]))
    with pytest.raises(ValueError, match=r"come as prompt_ids.*received no is_chosen"):
        quick(data=Dataset.from_list([{"prompt_ids": [5], "completion_ids": [6]}]))
    nothing = tiny.dataset(1).select([])
    with pytest.raises(ValueError, match="`train_dataset` must have at least one row"):
        quick(data=nothing)
    for empty in (nothing, {"a": tiny.dataset(2), "b": nothing}):
        with pytest.raises(ValueError, match="`eval_dataset` must have at least one row"):
            quick(init={"eval_dataset": empty})
    with pytest.raises(ValueError, match="train_dataset"):
        DILTrainer(tiny.build(), args=DILConfig("unused", **COMMON))


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_columns_and_completions_are_checked_in_every_dataset(quick, kind):
    rows = tiny.pairs(5, conversational=kind == "messages")
    good = Dataset.from_list(rows)
    misnamed = good.rename_column("rejected", "rejectd")
    empty = [{"role": "assistant", "content": " "}] if kind == "messages" else ""
    hollow = Dataset.from_list([*rows[:3], {**rows[3], "chosen": empty}, rows[4]])
    for data, message in (
        (misnamed, "dataset, row 1: key 'rejected' is required.*Rename 'rejectd'"),
        (hollow, "dataset, row 4: 'chosen' must not be empty.*drop the row"),
    ):
        with pytest.raises(ValueError, match=f"train {message}"):
            quick(data=data)
        with pytest.raises(ValueError, match=f"eval {message}"):
            quick(data=good, init={"eval_dataset": data})


def test_sequences_beyond_the_positions_of_the_model_are_refused(quick):
    rows = tiny.pairs(5)
    rows[2]["rejected"][0]["content"] *= 40
    data = Dataset.from_list(rows)
    for max_length in (None, 1024):
        with pytest.raises(ValueError, match=r"row 3 .tokenized.*256 positions.*max_length=256"):
            quick(data=data, max_length=max_length)
    assert len(losses(quick(data=data, max_length=256, max_steps=1))) == 1


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_unpaired_batches_are_cut_and_padded_as_trl_does(quick, mode):
    options = {"max_length": 20, "truncation_mode": mode, "pad_to_multiple_of": 8}
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": True}
        for row in tiny.pairs(3)
    ]
    same = [{**row, "rejected": row["chosen"]} for row in tiny.pairs(3)] + tiny.pairs(1)
    batches = []
    for data in (rows, same):
        trainer = quick(data=Dataset.from_list(data), loss_type="ukl", **options)
        batches.append(trainer.data_collator([trainer.train_dataset[i] for i in range(3)]))
    have, want = batches
    for name in ("input_ids", "attention_mask", "completion_mask"):
        assert torch.equal(have[name], want[name][:3]), name
    assert have["completion_mask"].any()
    assert have["input_ids"].shape == (3, 24)
    quick(data=tiny.unpaired(4), loss_type="kto", max_steps=1, **options).train()
    with pytest.raises(ValueError, match="pad_token"):
        quick(data=tiny.unpaired(4), pad_token="<none>")


def test_tokenized_rows_without_a_token_to_score_are_refused(quick):
    rows = [{"prompt_ids": [5, 6], "completion_ids": [7, 1], "is_chosen": True}] * 3
    for row, options in (
        ({"completion_ids": []}, {}),
        ({"prompt_ids": [], "completion_ids": [1]}, {}),
        ({"prompt_ids": [5] * 9}, {"max_length": 8}),
        ({}, {"max_length": 1, "truncation_mode": "keep_end"}),
    ):
        with pytest.raises(ValueError, match=r"row 1 .*completion_ids must have a token to score"):
            quick(data=Dataset.from_list([{**rows[0], **row}, *rows]), **options)
    quick(data=Dataset.from_list(rows), max_length=2, truncation_mode="keep_end")


@pytest.mark.parametrize("images", [False, True])
def test_pairs_of_equal_completions_are_said_or_refused(quick, caplog, tmp_path, images):
    rows = tiny.pairs(4)
    same = [{**row, "rejected": row["chosen"]} for row in rows]
    make = tiny.with_images if images else Dataset.from_list
    model = tiny.save_llava(tmp_path / "llava") if images else None
    init = {"processing_class": None} if images else {}
    with pytest.raises(ValueError, match="must differ; received the same twice in every row of 4"):
        quick(model, make(same), init=init)
    with caplog.at_level("WARNING", "dilkern"):
        quick(model, make(rows), init=init)
        assert not [r for r in caplog.records if r.name.startswith("dilkern")]
        quick(model, make(same[:3] + rows[3:]), init=init)
    assert "in 3 of 4 rows" in caplog.text


def test_pairs_that_truncation_makes_equal_are_refused(quick):
    rows = [{**row, "rejected": row["chosen"] + " But no."} for row in tiny.pairs(4, False)]
    quick(data=Dataset.from_list(rows))
    with pytest.raises(ValueError, match=r"in every row of 4.*cut before they part"):
        quick(data=Dataset.from_list(rows), max_length=20)


def test_the_model_card_says_what_was_trained_how_and_how_to_load_it(quick, folder, tmp_path):
    from huggingface_hub import ModelCard

    trainer = quick(loss_type="simpo", beta=3.0, max_steps=2, init={"peft_config": lora()})
    trainer.train()
    trainer.save_model()
    trainer.create_model_card("mine", "org/pairs", "first")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "None" not in card.content and card.data.library_name == "peft"
    assert {"trl", "dil", "simpo", "first"} <= set(card.data.tags)
    assert card.data.datasets == ["org/pairs"] and card.data.base_model is None  # a folder here
    for text in ("# mine", f"An adapter of `{folder}`", "beta=3.0", "Meng et al. 2024", "LORA, r=4",
                 "2 of 4 examples", "| loss | "):  # fmt: skip
        assert text in card.text, text
    assert "xiao2025" not in card.text and "to reference" not in card.text
    assert ", linear |" in card.text
    code = card.text.partition("```python\n")[2].partition("```")[0]
    found = {}
    exec(code, found)
    assert found["model"].peft_config["default"].r == 4


def test_a_reference_that_cannot_be_loaded_is_asked_for(quick):
    with pytest.raises(ValueError, match=r"ref_model=copy\.deepcopy"):
        quick(tiny.build(), loss_type="lsif")


def test_the_card_of_a_whole_model_without_a_name(quick, tmp_path):
    trainer = quick(tiny.build(), loss_type="lsif", reference_free=True)
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A fine-tuned version of `LlamaForCausalLM`" in card and "xiao2025" in card
    assert "## Results" not in card and "None" not in card


def test_the_card_of_an_adapter_without_rank_and_modules(quick, tmp_path):
    from peft import PromptTuningConfig

    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    quick(init={"peft_config": adapter}).create_model_card()  # as every checkpoint does
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| trained weights | PROMPT_TUNING |" in card


def test_a_loss_of_nan_is_logged_as_it_is(quick):
    data = tiny.dataset()
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        data = data.add_column(name, [float("nan")] * len(data))
    assert all(math.isnan(loss) for loss in losses(quick(data=data)))


def test_loss_parameters_arrive(quick, tmp_path):
    config = DILConfig(
        str(tmp_path), **COMMON, loss_type="power", loss_params='{"lam": -0.5}', beta=0.5
    )
    assert config.objective().params == {"lam": -0.5}
    assert json.loads(config.to_json_string())["loss_type"] == "power"
    reference = {"ref_model": tiny.build(seed=3)}
    one = losses(quick(loss_type="power", loss_params={"lam": 1.0}, init=reference, max_steps=1))
    lsif = losses(quick(loss_type="lsif", init={"ref_model": tiny.build(seed=3)}, max_steps=1))
    assert one[0] + (-1 + 0.5) == pytest.approx(lsif[0], abs=1e-5)  # the dropped constants
