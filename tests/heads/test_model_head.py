"""LMHead.from_model on real transformers models (tiny, from config), under PEFT, in 4 bits."""

import types

import pytest
import torch
from head_cases import four_bit_linear, placed
from naive import gather_logps
from torch import nn

from dilkern import linear_logps
from dilkern.lm_head import EightBitHead, FourBitHead, LMHead, LoRAHead

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("device")

VOCAB = 67
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# model type -> (config beyond SIZES, scale, softcap)
FAMILIES = {
    "llama": ({}, 1.0, 0.0),
    "qwen3": ({"tie_word_embeddings": True}, 1.0, 0.0),
    "gemma2": ({"final_logit_softcapping": 20.0}, 1.0, 20.0),
    "gemma3_text": ({"final_logit_softcapping": 30.0}, 1.0, 30.0),
    "cohere": ({"logit_scale": 0.0625}, 0.0625, 0.0),
    "cohere2": ({"logit_scale": 0.0625}, 0.0625, 0.0),
    "falcon_h1": (
        {
            "lm_head_multiplier": 0.5,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 2,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
        },
        0.5,
        0.0,
    ),
    "granite": ({"logits_scaling": 8.0}, 1 / 8.0, 0.0),
    "hyperclovax": ({"logits_scaling": 0.25}, 0.25, 0.0),
    "minicpm3": (
        {
            "dim_model_base": 16,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
        },
        0.25,
        0.0,
    ),
}


def tiny(family, **more):
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    config = transformers.AutoConfig.for_model(family, **(SIZES | FAMILIES[family][0] | more))
    model = transformers.AutoModelForCausalLM.from_config(config)
    for p in model.get_output_embeddings().parameters():
        p.data.normal_(std=0.5)  # logits large enough for a softcap to matter
    return placed(model)


def some_ids():
    return placed(torch.randint(3, VOCAB, (2, 9)))


def model_logps(model, ids):
    """log p(ids[t] | ids[<t]) from the model's own logits, 0 for the first."""
    logits = model(input_ids=ids).logits.float()
    logps = gather_logps(logits[:, :-1], ids[:, 1:])
    return torch.cat((logps.new_zeros(len(ids), 1), logps), 1)


def head_logps(model, backbone, head, ids):
    hidden = backbone(input_ids=ids).last_hidden_state
    return linear_logps(hidden, head, ids, shift=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_transforms_and_logps_of_every_family(family):
    model = tiny(family)
    head = LMHead.from_model(model)
    _, scale, softcap = FAMILIES[family]
    assert (head.scale, head.softcap) == (scale, softcap)
    ids = some_ids()
    got = head_logps(model, model.base_model, head, ids)
    want = model_logps(model, ids)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    weight = model.get_output_embeddings().weight
    inputs = [weight, next(model.base_model.layers[0].parameters())]
    grads = [torch.autograd.grad(x.sum(), inputs) for x in (got, want)]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_are_recognised(family, dtype):
    head = LMHead.from_model(tiny(family).to(dtype))
    assert (head.scale, head.softcap) == FAMILIES[family][1:]


VISION = {"hidden_size": 32, "intermediate_size": 32}
COMPOSITE = {
    "gemma3": (
        {},
        {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    ),
    "qwen2_5_vl": (
        {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}},
        {"depth": 1, "num_heads": 2, "out_hidden_size": 64},
    ),
}


@pytest.mark.parametrize("family", COMPOSITE)
def test_the_head_of_a_vision_language_model(family):
    text, vision = COMPOSITE[family]
    config = transformers.AutoConfig.for_model(
        family, text_config=SIZES | text, vision_config=VISION | vision
    )
    model = placed(transformers.AutoModelForImageTextToText.from_config(config))
    model.get_output_embeddings().weight.data.normal_(std=0.5)
    ids = some_ids()
    got = head_logps(model, model.base_model, LMHead.from_model(model), ids)
    torch.testing.assert_close(got, model_logps(model, ids), atol=1e-4, rtol=1e-4)


def test_close_candidates_are_told_apart_by_the_smaller_error():
    model = tiny("granite", logits_scaling=1.02).to(torch.bfloat16)
    assert LMHead.from_model(model).scale == 1 / 1.02


def test_temperature():
    head = LMHead.from_model(tiny("gemma2"), temperature=0.5)
    assert (head.scale, head.softcap) == (2.0, 40.0)


def lora_model(family, target="lm_head", **config):
    model = tiny(family, tie_word_embeddings=False)
    targets = ["q_proj", target] if target else ["q_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **config)
    model = peft.get_peft_model(model, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.1)
    return model


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_peft_models_with_the_adapter_on_and_off(family):
    model = lora_model(family)
    head = LMHead.from_model(model)
    assert isinstance(head.head(), LoRAHead)
    ids = some_ids()
    backbone = model.get_base_model().base_model
    parameters = [p for n, p in model.named_parameters() if "lora_" in n]
    got, want = head_logps(model, backbone, head, ids), model_logps(model, ids)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    grads = [torch.autograd.grad(x.sum(), parameters) for x in (got, want)]
    torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-3)
    with model.disable_adapter():
        got, want = head_logps(model, backbone, head, ids), model_logps(model, ids)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_adapters_added_after_from_model_are_seen():
    model = tiny("llama")
    head = LMHead.from_model(model)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
    assert isinstance(head.head(), LoRAHead)


def test_modules_to_save_through_peft():
    model = lora_model("gemma2", target=None, modules_to_save=["lm_head"])
    wrapper = model.get_base_model().lm_head
    wrapper.modules_to_save["default"].weight.data.mul_(2)
    head = LMHead.from_model(model)
    assert head.head().tensors()[0] is wrapper.modules_to_save["default"].weight
    with model.disable_adapter():
        assert head.head().tensors()[0] is wrapper.original_module.weight


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("lora", [False, True])
def test_four_bit_head_in_a_model_keeps_its_layout(mode, lora):
    """In eval mode an AVX512-BF16 CPU would repack the weight in the probe's forward."""
    pytest.importorskip("bitsandbytes")
    model = tiny("gemma2", tie_word_embeddings=False)
    model.lm_head = four_bit_linear(VOCAB, 64)
    if lora:
        model.is_loaded_in_4bit = True
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
    head = LMHead.from_model(getattr(model, mode)())
    assert all(m.training == (mode == "train") for m in model.modules())
    assert head.softcap == 20.0
    assert isinstance(head.head(), LoRAHead if lora else FourBitHead)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_eight_bit_head_in_a_model(mode):
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny("granite", tie_word_embeddings=False)
    linear = bnb.nn.Linear8bitLt(64, VOCAB, bias=False, has_fp16_weights=False)
    linear.weight.data.normal_()
    model.lm_head = placed(linear)
    assert LMHead.from_model(getattr(model, mode)()).scale == 1 / 8.0


def test_an_unknown_transform_raises():
    model = tiny("llama")
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: forward(hidden) * 1.5
    with pytest.raises(ValueError, match=r"LlamaForCausalLM, off by .*scale=\.\.\., softcap="):
        LMHead.from_model(model)


def test_a_softcap_unknown_to_the_config_raises():
    model = tiny("llama")
    model.lm_head.weight.data.mul_(0.01)  # as it is, its logits are too small to show a softcap
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 50 * torch.tanh(forward(hidden) / 50)
    with pytest.raises(ValueError, match="known scale and softcap"):
        LMHead.from_model(model)


def test_a_backbone_that_is_not_called_as_a_module_raises():
    model = tiny("llama")

    def forward(input_ids):
        hidden = model.model.forward(input_ids).last_hidden_state
        return types.SimpleNamespace(logits=model.lm_head(hidden))

    model.forward = forward
    with pytest.raises(ValueError, match=r"LlamaForCausalLM, whose .*LlamaModel was not called"):
        LMHead.from_model(model)


def test_a_head_behind_a_projection_raises():
    model = tiny("llama", tie_word_embeddings=False)
    model.lm_head = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, VOCAB))
    model.get_output_embeddings = lambda: model.lm_head[1]
    with pytest.raises(ValueError, match=r"LlamaForCausalLM, hidden states D=64, lm_head D=32"):
        LMHead.from_model(placed(model))


def test_a_model_without_a_head_raises():
    config = transformers.AutoConfig.for_model("llama", **SIZES)
    with pytest.raises(ValueError, match=r"LlamaModel.*as_head"):
        LMHead.from_model(transformers.AutoModel.from_config(config))
    with pytest.raises(ValueError, match="Linear with get_output_embeddings"):
        LMHead.from_model(nn.Linear(3, 4))


def test_the_probe_leaves_the_model_and_the_generator_as_they_were():
    model = tiny("granite", attention_dropout=0.5).train()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    LMHead.from_model(model)
    assert not model.base_model._forward_hooks
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(state, torch.get_rng_state())


def test_autocast_around_the_probe_does_not_disturb_it(device):
    model = tiny("granite")
    with torch.autocast(device, dtype=torch.bfloat16):
        assert LMHead.from_model(model).scale == 1 / 8.0
    accelerate = pytest.importorskip("accelerate")
    # One state for a process, which a trainer of another test may have made for another precision.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    assert LMHead.from_model(model).scale == 1 / 8.0
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("load", ["load_in_4bit", "load_in_8bit"])
def test_qlora_model_loaded_with_a_quantised_head(load, tmp_path, device):
    """The path people take: from_pretrained with a quantisation config that spares no module."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    tiny("llama").save_pretrained(tmp_path)
    quantised = transformers.BitsAndBytesConfig(**{load: True}, llm_int8_skip_modules=[])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantised, device_map={"": device}, dtype=torch.float32
    )
    model = peft.prepare_model_for_kbit_training(
        model, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    model = peft.get_peft_model(model, config).train()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.1)
    head = LMHead.from_model(model)
    base = head.head().base
    assert isinstance(base, FourBitHead if load == "load_in_4bit" else EightBitHead)
    ids = some_ids()
    parameters = [p for n, p in model.named_parameters() if "lora_" in n]
    backbone = model.get_base_model().base_model
    got = head_logps(model, backbone, head, ids)
    layer = model.get_base_model().lm_head
    added = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    decoded = base.block(0, VOCAB, torch.float32) + layer.scaling["default"] * added
    logits = backbone(input_ids=ids).last_hidden_state[:, :-1].float() @ decoded.T
    torch.testing.assert_close(
        got[:, 1:], gather_logps(logits, ids[:, 1:]), atol=1e-4, rtol=1e-4, check_dtype=False
    )
    if device == "cuda" and load == "load_in_8bit":
        return  # there the layer itself multiplies rounded activations
    want = model_logps(model, ids)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    grads = [torch.autograd.grad(x.sum(), parameters) for x in (got, want)]
    torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-3)
