"""One row without padding trains as the padded batch does, under every attention implementation."""

import pytest
import tiny_models as tiny
import torch
from training_runs import column, lora, losses, same_steps
from transformers import AttentionInterface, AttentionMaskInterface

from dilkern.integrations import packing
from dilkern.integrations.transformers import labels_of, model_inputs
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
}


@pytest.mark.parametrize("options", PACKED.values(), ids=PACKED)
def test_padding_free_equals_padded(quick, tmp_path, options):
    options = dict(options)
    path = tiny.save(tmp_path / "model", options.pop("family", "llama"))
    options["model_init_kwargs"] = {"attn_implementation": options.pop("attn", "sdpa")}
    options["max_steps"] = 3
    data = options.pop("data", None)
    padded = quick(path, data, **options)
    packed = quick(path, data, padding_free=True, **options)
    same_steps(losses(packed), losses(padded), 2e-2 if "bf16" in options else 1e-5)
    tolerance = 1e-1 if "bf16" in options else 2e-3  # summed log-probs of about 100 nats
    same_steps(column(packed, "logps/chosen"), column(padded, "logps/chosen"), tolerance)
    assert column(packed, "num_tokens") == column(padded, "num_tokens")


def varlen_attention(
    module, query, key, value, attention_mask, scaling, *, cu_seq_lens_q=None, cu_seq_lens_k=None,
    max_length_q=None, max_length_k=None, **kwargs,
):  # fmt: skip
    """What flash attention does with the boundaries of a packed row, in torch; it sees no mask.

    Without boundaries every row is one sequence (padding on the right is then never looked at).
    """
    assert attention_mask is None
    if cu_seq_lens_q is None:
        size = query.shape[2]
        bounds = torch.tensor([0, size])
    else:
        assert torch.equal(cu_seq_lens_q, cu_seq_lens_k)
        assert cu_seq_lens_q.dtype == torch.int32
        bounds, size = cu_seq_lens_q, max_length_q
        assert max_length_k == size >= bounds.diff().max()
        assert bounds[-1] == query.shape[2]
        SEEN.append((bounds.diff().tolist(), kwargs["position_ids"][0].tolist()))
    parts = []
    for start, end in bounds.unfold(0, 2, 1).tolist():
        q, k, v = (states[:, :, start:end] for states in (query, key, value))
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(parts, 2).transpose(1, 2), None


SEEN = []


@pytest.fixture
def varlen():
    """The name of `varlen_attention` in transformers' registries."""
    AttentionInterface.register("varlen_torch", varlen_attention)
    AttentionMaskInterface.register("varlen_torch", lambda *args, **kwargs: None)
    SEEN.clear()
    return "varlen_torch"


@pytest.mark.parametrize("options", [{}, {"family": "qwen3"}, {"checkpointing": True}], ids=str)
def test_boundaries_alone_keep_sequences_apart(quick, varlen, tmp_path, options):
    path = tiny.save(tmp_path / "model", options.get("family", "llama"))
    settings = {"max_steps": 3, "gradient_checkpointing": "checkpointing" in options}
    padded = losses(quick(path, **settings))
    packed = quick(
        path, padding_free=True, model_init_kwargs={"attn_implementation": varlen}, **settings
    )
    same_steps(losses(packed), padded, 1e-5)
    assert SEEN


def test_chosen_and_rejected_of_a_pair_are_neighbours(quick, varlen):
    init = {"attn_implementation": varlen}
    trainer = quick(padding_free=True, loss_type="simpo", max_steps=1, model_init_kwargs=init)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    chosen, rejected = batch["attention_mask"].sum(1).view(2, 3).tolist()
    SEEN.clear()
    with torch.no_grad():
        packed = trainer._score(trainer.model, batch, labels_of(batch)).token_logps
    lengths, positions = SEEN[0]
    assert lengths == [size for pair in zip(chosen, rejected) for size in pair]
    assert positions == [i for size in lengths for i in range(size)]
    with torch.no_grad():
        plain = trainer.model(**model_inputs(batch), labels=labels_of(batch), dil_head=True)
    torch.testing.assert_close(packed, plain.token_logps, rtol=0, atol=1e-5)


def test_attention_that_cannot_train_here_is_refused(tmp_path, monkeypatch):
    for name, message in (("flash_attention_2", "dilkern.flash"), ("flex_attention", "sdpa")):
        with pytest.raises(ValueError, match=message):
            DILConfig(str(tmp_path), use_cpu=True, model_init_kwargs={"attn_implementation": name})
    monkeypatch.setattr(packing, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(ValueError, match="not installed"):
        packing.check_attention("flash_attention_2", torch.device("cuda"))


def test_padding_free_refuses_a_model_that_mixes_sequences(quick, folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)

    class MixingBackbone(type(model.model)):
        def forward(self, *args, position_ids=None, **kwargs):
            return super().forward(*args, **kwargs)

    model.model.__class__ = MixingBackbone
    with pytest.raises(ValueError, match="keeps packed sequences apart"):
        quick(model, padding_free=True)
