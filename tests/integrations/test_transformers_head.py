"""The head inside a model's forward: exact, idempotent, reversible, safe to copy."""

import copy
import pickle

import pytest
import tiny_models as tiny
import torch
from naive import gather_logps

from dilkern.integrations.transformers import (
    compute_loss,
    install_head,
    remove_head,
)
from dilkern.lm_head import LMHead

FAMILIES = ("llama", "qwen3", "gemma2", "granite", "cohere", "qwen3_moe")


def a_batch(size=4, length=12, seed=1):
    torch.manual_seed(seed)
    ids = torch.randint(5, 300, (size, length))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def full_logps(model, batch):
    """Full-logits twin of the head."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    return gather_logps(model(**inputs).logits.float()[:, :-1], batch["labels"][:, 1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_token_logps_and_gradients_equal_full_logits(family):
    batch, model = a_batch(), tiny.build(family).eval()
    want = full_logps(model, batch)
    want.sum().backward()
    want_grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    install_head(model)
    have = model(**batch, dil_head=True).token_logps
    torch.testing.assert_close(have[:, 1:], want, rtol=1e-5, atol=1e-5)
    assert torch.equal(have[:, 0], torch.zeros(4))
    have.sum().backward()
    for name, parameter in model.named_parameters():
        if name in want_grads:
            torch.testing.assert_close(
                parameter.grad, want_grads[name], rtol=1e-4, atol=2e-5, msg=name
            )


@pytest.mark.parametrize(
    "family, scale, softcap",
    [("llama", 1.0, 0.0), ("gemma2", 1.0, 5.0), ("granite", 0.25, 0.0), ("cohere", 0.25, 0.0)],
)
def test_weights_that_arrive_later_leave_the_transform_to_the_config(family, scale, softcap):
    model = tiny.build(family)
    for there in (True, False):
        head = LMHead.from_model(model if there else model.to("meta"))
        assert (head.scale, head.softcap) == (scale, softcap)


def test_probe_refuses_an_unknown_transform():
    model = tiny.build("llama")

    class Odd(type(model)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.01
            return out

    model.__class__ = Odd
    with pytest.raises(ValueError, match="under a known scale and softcap"):
        install_head(model)


def test_install_is_idempotent_and_remove_restores():
    model, batch = tiny.build(), a_batch()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    before = model(**inputs).logits
    keys = set(model.__dict__)
    install_head(model)
    forward = model.forward
    install_head(model, backend="torch")
    assert model.forward == forward
    assert torch.equal(model(**inputs).logits, before)
    remove_head(model)
    remove_head(model)
    assert set(model.__dict__) == keys
    assert "forward" not in model.__dict__
    assert torch.equal(model(**inputs).logits, before)


def test_remove_keeps_an_earlier_patch_and_refuses_under_a_later_one():
    model = tiny.build()
    earlier = model.forward
    model.forward = earlier
    install_head(model)
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(ValueError, match="outermost patch"):
        remove_head(model)
    model.forward = ours
    remove_head(model)
    assert model.__dict__["forward"] == earlier


def test_a_deep_copy_uses_its_own_weights():
    model, batch = tiny.build(), a_batch()
    install_head(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    fresh = tiny.build()
    install_head(fresh)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    assert torch.equal(twin(**inputs).logits, fresh(**inputs).logits)
    assert torch.equal(
        twin(**batch, dil_head=True).token_logps, fresh(**batch, dil_head=True).token_logps
    )


def test_an_unpickled_model_takes_the_head_anew():
    model, batch = tiny.build(), a_batch()
    install_head(model)
    loaded = pickle.loads(pickle.dumps(model))
    with pytest.raises(ValueError, match="head must be installed"):
        compute_loss(loaded, batch, loss="simpo")
    install_head(loaded)
    have, want = (m(**batch, dil_head=True).token_logps for m in (loaded, model))
    assert torch.equal(have, want)
    remove_head(loaded)
    with pytest.raises(ValueError, match="head must be installed"):
        compute_loss(loaded, batch, loss="simpo")
    with pytest.raises(ValueError, match="needs `labels`"):
        model(batch["input_ids"], dil_head=True)


def test_generate_is_unchanged():
    model, batch = tiny.build(), a_batch()
    options = {"max_new_tokens": 5, "do_sample": False}
    inputs = {"input_ids": batch["input_ids"], "attention_mask": torch.ones(4, 12).long()}
    before = model.generate(**inputs, **options)
    install_head(model)
    assert torch.equal(model.generate(**inputs, **options), before)


def test_nothing_scored_is_a_differentiable_zero():
    model, batch = tiny.build(), a_batch()
    install_head(model)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    model(**batch, dil_head=True).token_logps.sum().backward()
    assert all(float(p.grad.abs().sum()) == 0 for p in model.parameters() if p.grad is not None)


def test_lora_on_the_head_is_trained():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model, batch = get_peft_model(tiny.build(), config), a_batch()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    full_logps(model, batch).sum().backward()
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    want = {name: p.grad.clone() for name, p in adapters.items()}
    model.zero_grad()
    install_head(model)
    model(**batch, dil_head=True).token_logps.sum().backward()
    assert len(want) == 2
    for name, parameter in adapters.items():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-5, msg=name)


def test_modules_to_save_trains_the_copy_and_the_reference_keeps_the_original():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    model, batch = get_peft_model(tiny.build(), config), a_batch()
    install_head(model)
    with model.disable_adapter():
        start = model(**batch, dil_head=True).token_logps
    model(**batch, dil_head=True).token_logps.sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert model.get_output_embeddings().weight.grad is not None
    with model.disable_adapter():
        assert torch.equal(model(**batch, dil_head=True).token_logps, start)
    assert not torch.equal(model(**batch, dil_head=True).token_logps, start)


def test_compute_loss_takes_each_reference():
    from peft import LoraConfig, get_peft_model

    model, reference, batch = tiny.build(), tiny.build(), a_batch()
    install_head(model)
    install_head(reference)
    with pytest.raises(ValueError, match="needs a reference"):
        compute_loss(model, batch)
    by_model = compute_loss(model, batch, ref_model=reference)
    assert by_model.loss.item() == -0.5
    logps = reference(**batch, dil_head=True).token_logps.sum(1).detach()
    by_logps = compute_loss(model, {**batch, "ref_logps": logps}, loss="bce")
    assert by_logps.loss.item() == pytest.approx(1.386294, abs=1e-5)
    assert compute_loss(model, batch, loss="simpo").loss.requires_grad
    by_side = {"ref_chosen_logps": logps[:2], "ref_rejected_logps": logps[2:]}
    for idle, options in (
        (batch, {"loss": "simpo"}),
        ({**batch, "ref_logps": logps}, {}),
        ({**batch, **by_side}, {}),
    ):
        with pytest.raises(ValueError, match="Drop what is not used"):
            compute_loss(model, idle, ref_model=reference, **options)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(tiny.build(), config)
    install_head(adapted)
    assert compute_loss(adapted, batch).loss.item() == -0.5


@pytest.mark.parametrize("kind", ["labels", "completion_mask"])
def test_a_batch_without_a_token_to_score_is_refused(kind):
    model, batch = tiny.build(), a_batch()
    install_head(model)
    batch["labels"][:, 1:] = -100  # nothing predicts the first token
    if kind == "completion_mask":
        batch[kind] = (batch.pop("labels") != -100).long()
    with pytest.raises(ValueError, match=rf"must have a token to score.*{kind}.*max_length"):
        compute_loss(model, batch, loss="simpo")
    one = torch.zeros_like(batch["input_ids"])
    one[:2, 6] = one[2:, 5] = 1
    one[0] = 0  # a single sequence without one is the loss's own affair
    batch["completion_mask"] = one
    batch.pop("labels", None)
    assert compute_loss(model, batch, loss="simpo").loss.isfinite()


def test_a_batch_without_a_causal_lm():
    import transformers

    config = tiny.build().config
    with pytest.raises(ValueError, match="causal LM"):
        install_head(transformers.LlamaModel(config))
