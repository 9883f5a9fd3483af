"""Batches with images: every loss sees them, or the option that would lose them is refused."""

import pytest
import tiny_models as tiny
import torch
import trl
from datasets import Dataset
from naive import gather_logps
from training_runs import COMMON, column, losses, same_steps
from trl import DPOConfig, DPOTrainer

from dilkern.integrations.collators import mismatched
from dilkern.integrations.rows import pack
from dilkern.integrations.transformers import labels_of, model_inputs
from dilkern.integrations.trl import DILConfig, DILTrainer


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return tiny.save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def seeing(llava, tmp_path):
    """Build a trainer of the tiny LLaVA."""

    def make(data=None, trainer=DILTrainer, config=DILConfig, **options):
        args = config(str(tmp_path / "out"), **{**COMMON, "max_steps": 2, **options})
        data = tiny.with_images(tiny.pairs(8)) if data is None else data
        return trainer(llava, args=args, train_dataset=data)

    return make


def batch_of(trainer):
    return dict(next(iter(trainer.get_train_dataloader())))


def full_logps(model, inputs):
    """Summed log-probs of the completions by full logits."""
    with torch.no_grad():
        logits = model(**model_inputs(inputs)).logits[:, :-1]
    picked = gather_logps(logits, inputs["input_ids"][:, 1:])
    return (picked * inputs["completion_mask"][:, 1:]).sum(1)


@pytest.mark.skipif(
    trl.__version__.startswith("1.15.") and not torch.cuda.is_available(),
    reason="TRL 1.15's own DPO needs a GPU (its head is Triton only)",
)
def test_dpo_with_images_follows_trl(seeing):
    same_steps(
        losses(seeing(loss_type="dpo")), losses(seeing(trainer=DPOTrainer, config=DPOConfig)), 2e-5
    )


def test_padding_free_refuses_what_it_would_not_hand_on(seeing):
    with pytest.raises(ValueError, match=r"take text alone.*images"):
        seeing(padding_free=True)
    trainer = seeing()
    inputs = batch_of(trainer)
    with pytest.raises(ValueError, match=r"input_ids and attention_mask alone.*pixel_values"):
        pack(inputs, labels_of(inputs))


def test_mismatched_pairs_keep_the_images_of_their_prompts(seeing):
    trainer = seeing(loss_type="kto")
    trainer.model.eval()
    inputs = batch_of(trainer)
    size = len(inputs["input_ids"])
    inputs["token_type_ids"] = inputs["input_ids"] + 1000
    pairs = mismatched(inputs, tiny.tokenizer().pad_token_id, None, "keep_start")
    assert torch.equal(pairs["pixel_values"], inputs["pixel_values"])
    real = pairs["attention_mask"] == 1
    assert torch.equal(pairs["token_type_ids"][real], pairs["input_ids"][real] + 1000)
    assert not pairs["token_type_ids"][~real].any()
    del inputs["token_type_ids"]
    with torch.no_grad():  # away from the reference, or every ratio is 0
        trainer.model.get_output_embeddings().weight.mul_(1.5)
    # Each by itself: the prompt of row i with its image, the completion of row i + 1.
    want = []
    for i in range(size):
        prompt = (inputs["attention_mask"][i] == 1) & (inputs["completion_mask"][i] == 0)
        after = (i + 1) % size
        completion = inputs["input_ids"][after][inputs["completion_mask"][after] == 1]
        ids = torch.cat([inputs["input_ids"][i][prompt], completion])[None]
        mask = torch.ones_like(ids)
        mask[:, : prompt.sum()] = 0
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
        row["pixel_values"] = inputs["pixel_values"][i : i + 1]
        want.append(full_logps(trainer.model, row) - full_logps(trainer.ref_model, row))
    have = trainer._kl_log_ratios(trainer.model, inputs)
    torch.testing.assert_close(have, torch.cat(want).mean(), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="without position_ids"):
        mismatched({**inputs, "position_ids": inputs["input_ids"]}, 0, None, "keep_start")


@pytest.mark.parametrize("loss", ["lsif", "kto"])
def test_unpaired_data_with_images(seeing, loss):
    pairs = tiny.pairs(4)
    rows = [
        {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
        for kind in ("rejected", "chosen")
        for row in pairs
    ]
    options = {"loss_type": loss, "max_steps": 1, "per_device_train_batch_size": 8}
    single = seeing(tiny.with_images(rows, 4), **options)
    assert batch_of(single)["is_chosen"].tolist() == [True] * 4 + [False] * 4
    paired = seeing(tiny.with_images(pairs), **{**options, "per_device_train_batch_size": 4})
    same_steps(losses(single), losses(paired), 1e-5)
    for name in ("logps/chosen", "logps/rejected"):
        same_steps(column(single, name), column(paired, name), 1e-3)


def test_rows_with_images_are_checked_too(seeing):
    rows = tiny.pairs(3)
    rows[1]["chosen"] = [{"role": "assistant", "content": " "}]
    with pytest.raises(ValueError, match="train_dataset, row 2: 'chosen' must not be empty"):
        seeing(tiny.with_images(rows))
    given = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in tiny.pairs(3)]
    with pytest.raises(ValueError, match="reference log-probs come with text alone"):
        seeing(tiny.with_images(given))


def test_the_last_example_of_an_epoch_has_a_baseline_of_0(quick):
    data = Dataset.from_list(tiny.pairs(5))
    trainer = quick(data=data, loss_type="kto", max_steps=-1, num_train_epochs=2)
    losses(trainer)
    assert column(trainer, "kl")[1::2] == [0.0, 0.0]
    assert column(trainer, "kl")[2] > 0
