"""Models whose lm_head is the embedding: quantised from a copy, or refused under an adapter."""

import logging

import pytest
import tiny_models as tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from training_runs import four_bit, lora, losses
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from dilkern.integrations.heads import untie_lm_head
from dilkern.integrations.transformers import PreferenceMixin, keep_trainable


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A tied Llama, wide enough for blocks of 64."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return tiny.save(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True, **sizes)


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def on_the_head(**options):
    options = {"target_modules": ["q_proj", "lm_head"], **options}
    return LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **options)


def without_skips():
    config = four_bit()
    config.llm_int8_skip_modules = []
    return config


@pytest.mark.parametrize("given", ["path", "model"])
def test_a_tied_lm_head_is_quantised_from_a_copy(quick, tied, tmp_path, caplog, given):
    bnb = pytest.importorskip("bitsandbytes")
    start, init = load(tied), {"peft_config": lora(), "quantization_config": four_bit()}
    model = tied
    if given == "model":
        model = load(tied, quantization_config=init.pop("quantization_config"))
    with caplog.at_level(logging.WARNING, "dilkern"):
        trainer = quick(model, init=init, quantize_lm_head=True, max_steps=3)
    (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("dilkern")]
    assert "4 bits (nf4): a copy" in line
    assert losses(trainer)[0] == -0.5  # policy and reference read one head
    causal = trainer.model.get_base_model()
    head, embedding = causal.get_output_embeddings(), causal.get_input_embeddings()
    assert isinstance(head, bnb.nn.Linear4bit)
    assert head.weight.quant_state.quant_type == "nf4"
    assert not causal.config.tie_word_embeddings
    assert torch.equal(embedding.weight, start.get_input_embeddings().weight)
    ids = torch.arange(5, 25)[None]
    trainer.save_model(str(tmp_path / "adapter"))
    trainer.model.eval()
    have = trainer.model(ids).logits
    # The base, saved as it stands, and the adapter, each from its files.
    trainer.model.unload().save_pretrained(tmp_path / "base")
    base = load(tmp_path / "base")
    assert isinstance(base.get_output_embeddings(), bnb.nn.Linear4bit)
    fresh = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    keep_trainable(fresh)  # bitsandbytes' repacked product is one of bf16
    assert torch.equal(base.get_output_embeddings().weight, head.weight)
    torch.testing.assert_close(fresh(ids).logits, have, rtol=0, atol=2e-3)  # trained in bf16


def test_an_untied_lm_head_is_quantised_by_the_same_option(quick, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    wide = tiny.save(tmp_path / "wide", hidden_size=64, intermediate_size=128, head_dim=16)
    init = {"peft_config": on_the_head(), "quantization_config": four_bit()}
    ours = quick(wide, init=init, quantize_lm_head=True)
    theirs = quick(wide, init={**init, "quantization_config": without_skips()})
    heads = [
        t.model.get_base_model().get_output_embeddings().get_base_layer() for t in (ours, theirs)
    ]
    assert all(isinstance(head, bnb.nn.Linear4bit) for head in heads)
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert losses(ours) == losses(theirs)


def test_a_4_bit_lm_head_that_cannot_be_is_refused(quick, tied, folder):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match=r"needs a model loaded in 4 bits.*load_in_4bit"):
        quick(folder, init={"peft_config": lora()}, quantize_lm_head=True)
    with pytest.raises(ValueError, match=r"needs a model loaded in 4 bits.*LlamaForCausalLM"):
        quick(load(folder), init={"peft_config": lora()}, quantize_lm_head=True)
    init = {"peft_config": lora(), "quantization_config": without_skips()}
    with pytest.raises(ValueError, match=r"tied to the embedding.*quantize_lm_head=True"):
        quick(tied, init=init)
    whole = on_the_head(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"cannot be trained whole"):
        quick(tied, init={**init, "peft_config": whole}, quantize_lm_head=True)
    broken = load(tied, quantization_config=without_skips())
    with pytest.raises(ValueError, match=r"without quant_state.*quantize_lm_head=True"):
        quick(broken, init={"peft_config": lora()})


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_of_two_tied_layers_is_refused(quick, tied, layer):
    init = {"peft_config": on_the_head(target_modules=["q_proj", layer])}
    with pytest.raises(ValueError, match=r"another model than the one trained.*untie_lm_head"):
        quick(tied, init=init)


class PlainTrainer(PreferenceMixin, Trainer):
    pass


def test_a_trainer_of_transformers_refuses_it_too(tied, tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, remove_unused_columns=False)
    with pytest.raises(ValueError, match=r"an adapter on the lm_head of a model with tied"):
        PlainTrainer(get_peft_model(load(tied), on_the_head()), args)
    on_others = get_peft_model(load(tied), on_the_head(target_modules=["q_proj"]))
    assert PlainTrainer(on_others, args).objective.loss.name == "lsif"


def test_so_is_one_on_the_4_bit_copy_for_the_base_is_tied_when_it_is_merged(quick, tied):
    pytest.importorskip("bitsandbytes")
    init = {"peft_config": on_the_head(), "quantization_config": four_bit()}
    with pytest.raises(ValueError, match=r"on the lm_head of a model with tied embeddings"):
        quick(tied, init=init, quantize_lm_head=True)


REMEDIES = {
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "untied": {},
}


@pytest.mark.parametrize("remedy", REMEDIES)
def test_what_is_named_instead_merges_into_the_model_that_was_trained(
    quick, tied, tmp_path, remedy
):
    base = tied
    if remedy == "untied":
        model = load(tied)
        untie_lm_head(model)
        model.save_pretrained(tmp_path / "base")
        base = str(tmp_path / "base")
    trainer = quick(base, init={"peft_config": on_the_head(**REMEDIES[remedy])}, max_steps=2)
    trainer.train()
    trainer.model.eval()
    ids = torch.arange(5, 25)[None]
    want = trainer.model(ids).logits
    trainer.save_model(str(tmp_path / "adapter"))
    merged = PeftModel.from_pretrained(load(base), str(tmp_path / "adapter")).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(load(tmp_path / "merged")(ids).logits, want, rtol=0, atol=2e-5)
    assert (want - load(tied)(ids).logits).abs().max() > 1e-3
