"""LoRA on the lm_head in DILTrainer, which TRL refuses: exact, trained, saved, its reference right."""

import copy

import pytest
import tiny_models as tiny
import torch
from naive import gather_logps
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from training_runs import four_bit, losses, same_steps
from transformers import AutoModelForCausalLM, Trainer

TARGETS = ["q_proj", "v_proj", "lm_head"]
KINDS = {
    "dense": {"target_modules": TARGETS},
    "4-bit": {"target_modules": TARGETS},
    "modules_to_save": {"target_modules": TARGETS[:2], "modules_to_save": ["lm_head"]},
}


def adapter(**options):
    return LoraConfig(r=4, task_type="CAUSAL_LM", **{"target_modules": TARGETS, **options})


class FullLogits(Trainer):
    """LSIF the obvious way: PEFT's own forward of every layer, full logits, autograd."""

    def log_ratios(self, inputs, model):
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        picked = gather_logps(logits[:, :-1].float(), inputs["input_ids"][:, 1:])
        mask = inputs["completion_mask"][:, 1:]
        return (picked * mask).sum(1) / mask.sum(1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad(), model.disable_adapter():
            reference = self.log_ratios(inputs, model)
        chosen, rejected = (self.log_ratios(inputs, model) - reference).chunk(2)
        return (-chosen.exp()).mean() + (0.5 * (2 * rejected).exp()).mean()


def twin(trainer):
    """A full-logits trainer from the same start, on the same batches, with the same settings."""
    args = copy.copy(trainer.args)
    args.remove_unused_columns = False
    model = copy.deepcopy(trainer.model)
    # TRL's patch of the forward, under ours, holds on to the model that was copied.
    del model.get_base_model().forward
    return FullLogits(
        model,
        args,
        train_dataset=trainer.train_dataset,
        data_collator=trainer.data_collator,
    )


@pytest.fixture
def wide(tmp_path):
    # bitsandbytes 0.50.2 decodes wrongly on CPU where rows are no multiple of its block of 64.
    return tiny.save(tmp_path / "wide", hidden_size=64, intermediate_size=128, head_dim=16)


def of_the_head(trainer):
    named = trainer.model.named_parameters()
    return {n: p.detach().clone() for n, p in named if "lm_head" in n and p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_follows_full_logits(quick, wide, kind):
    init = {"peft_config": adapter(**KINDS[kind])}
    if kind == "4-bit":
        pytest.importorskip("bitsandbytes")
        config = four_bit()
        config.llm_int8_skip_modules = []  # the lm_head too
        init["quantization_config"] = config
    ours = quick(wide, loss_type="lsif", max_steps=20, init=init)
    theirs, before = twin(ours), of_the_head(ours)
    assert len(before) == (1 if kind == "modules_to_save" else 2)
    have = losses(ours)
    assert have[0] == pytest.approx(-0.5, abs=1e-6)
    assert have[-1] < -0.6
    # QLoRA keeps adapters in bf16: rounding separates the runs.
    same_steps(have, losses(theirs), 2e-3 if kind == "4-bit" else 1e-5)
    for name, parameter in of_the_head(ours).items():
        assert (parameter - before[name]).abs().max() > 1e-3, name


def test_every_reference_gives_the_same_run(quick):
    init = {"peft_config": adapter()}
    plain = losses(quick(init=init))
    same_steps(losses(quick(init=init, precompute_ref_log_probs=True)), plain, 1e-6)
    same_steps(losses(quick(init={**init, "ref_model": tiny.build()})), plain, 1e-6)
    same_steps(losses(quick(init=init, padding_free=True)), plain, 1e-5)
    by_model = quick(tiny.build(), init={"peft_config": adapter()})  # not by its folder
    same_steps(losses(by_model), plain, 1e-6)


def test_a_pretrained_adapter_on_the_head_is_its_own_reference(quick):
    model = get_peft_model(tiny.build(), adapter(init_lora_weights=False))
    assert losses(quick(model, max_steps=1)) == [pytest.approx(-0.5, abs=1e-6)]


def test_model_and_arguments_are_left_as_they_were(quick):
    options = {"attn_implementation": "eager"}
    trainer = quick(init={"peft_config": adapter()}, model_init_kwargs=options)
    assert trainer.args.model_init_kwargs == options
    assert trainer.model.config._attn_implementation == "eager"
    causal = trainer.model.get_base_model()
    assert "get_output_embeddings" not in vars(causal)
    assert hasattr(causal.get_output_embeddings(), "lora_A")


def test_saved_and_reloaded(quick, tmp_path, folder):
    trainer = quick(init={"peft_config": adapter()}, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(5, 25)[None]
    start = base(ids).logits
    fresh = PeftModel.from_pretrained(base, str(tmp_path / "saved"))
    trainer.model.eval()
    assert torch.equal(trainer.model(ids).logits, fresh(ids).logits)
    assert not torch.equal(fresh(ids).logits, start)


def layers_saved(folder):
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return {name.split(".")[-2] for name in file.keys()}  # noqa: SIM118


def test_the_frozen_lm_head_is_saved_only_where_the_base_has_another(quick, tmp_path, folder):
    quick(init={"peft_config": adapter()}).save_model(str(tmp_path / "same"))
    assert layers_saved(tmp_path / "same") == {"lora_A", "lora_B"}
    for kind in ("resized", "from a config"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if kind == "resized":
            model.resize_token_embeddings(384)
        else:
            model = tiny.build()
        trainer = quick(model, loss_type="simpo", init={"peft_config": adapter()})
        trainer.save_model(str(tmp_path / kind))
        assert layers_saved(tmp_path / kind) == {"lora_A", "lora_B", "base_layer"}, kind


def test_what_the_head_cannot_do_is_refused_before_training(quick):
    with pytest.raises(ValueError, match="must be plain LoRA"):
        quick(init={"peft_config": adapter(use_dora=True)})
    with pytest.raises(ValueError, match="no dropout in training"):
        quick(init={"peft_config": adapter(lora_dropout=0.1)}, disable_dropout=False)
