"""One row without padding trains as the padded batch does, under every attention implementation."""

import pytest
import tiny_models as tiny
from training_runs import column, lora, losses, same_steps

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


def test_padding_free_refuses_a_model_that_mixes_sequences(quick, folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)

    class MixingBackbone(type(model.model)):
        def forward(self, *args, position_ids=None, **kwargs):
            return super().forward(*args, **kwargs)

    model.model.__class__ = MixingBackbone
    with pytest.raises(ValueError, match="keeps packed sequences apart"):
        quick(model, padding_free=True)
