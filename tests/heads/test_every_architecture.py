"""Every causal LM of transformers that can be built tiny is read right, or refused with a reason."""

import pytest
import torch
from naive import gather_logps

from dilkern import linear_logps
from dilkern.lm_head import LMHead

transformers = pytest.importorskip("transformers")
names = pytest.importorskip("transformers.models.auto.modeling_auto")

pytestmark = pytest.mark.slow

VOCAB = 67
# Sizes under the names that configs use for them; each config is given those that it knows.
SMALL = {
    "vocab_size vocab_size_per_layer_input": VOCAB,
    "hidden_size intermediate_size d_model n_embd ffn_dim d_ff max_position_embeddings": 64,
    "n_positions decoder_ffn_dim encoder_ffn_dim mamba_d_ssm ffn_hidden_size embedding_size": 64,
    "word_embed_proj_dim": 64,
    "num_attention_heads num_key_value_heads n_head n_heads num_heads mamba_n_heads": 2,
    "decoder_attention_heads encoder_attention_heads num_experts num_local_experts": 2,
    "n_routed_experts num_experts_per_tok moe_num_experts": 2,
    "head_dim v_head_dim moe_intermediate_size shared_expert_intermediate_size": 32,
    "mamba_d_head": 32,
    "kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim state_size mamba_d_state": 16,
    "hidden_size_per_layer_input rotary_dim": 16,
    "laurel_rank": 8,
    "num_kv_shared_layers pad_token_id": 0,
    "n_shared_experts first_k_dense_replace n_group topk_group moe_k bos_token_id": 1,
    "eos_token_id": 2,
    "layer_types n_inner": None,
}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
# Some architectures want four layers, or head sizes of their own.
ATTEMPTS = ((2, ()), (4, ()), (2, ("head_dim",)), (2, ("layer_types",)))
# A few among those that must be read, with the transform of the logits that their config declares.
MUST = {
    "llama": (1.0, 0.0), "qwen3": (1.0, 0.0), "qwen3_moe": (1.0, 0.0), "gpt2": (1.0, 0.0),
    "mistral": (1.0, 0.0), "mixtral": (1.0, 0.0), "olmo2": (1.0, 0.0), "phi3": (1.0, 0.0),
    "opt": (1.0, 0.0), "mamba": (1.0, 0.0), "falcon_h1": (1.0, 0.0), "gemma2": (1.0, 30.0),
    "cohere": (0.0625, 0.0), "cohere2": (0.0625, 0.0), "granite": (1.0, 0.0),
}  # fmt: skip


def small_config(model_type, layers, left_out):
    config_class = transformers.CONFIG_MAPPING[model_type]
    known = config_class().to_dict()
    sizes = {name: size for group, size in SMALL.items() for name in group.split()}
    given = sizes | dict.fromkeys(LAYERS, layers)
    return config_class(**{k: v for k, v in given.items() if k in known and k not in left_out})


def tiny(model_type):
    reasons = []
    for layers, left_out in ATTEMPTS:
        try:
            config = small_config(model_type, layers, left_out)
            with torch.device("meta"):
                size = sum(
                    p.numel()
                    for p in transformers.AutoModelForCausalLM.from_config(config).parameters()
                )
            if size > 2e7:
                reasons.insert(0, f"{size} parameters")
                break
            model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
            model(input_ids=torch.arange(4)[None])
            return model
        except Exception as error:  # whatever a config that does not fit its model comes to
            reasons.append(f"{type(error).__name__}: {error}")
    pytest.skip(f"not built tiny: {reasons[0]}"[:100].replace("\n", " "))


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine two threads that wait for each other take far longer over tiny models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("model_type", sorted(names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_read_right_or_refused(model_type):
    model = tiny(model_type)
    head = model.get_output_embeddings()
    for p in () if head is None else head.parameters():
        p.data.normal_(std=0.5)  # logits large enough for a softcap to matter
    try:
        head = LMHead.from_model(model)
    except ValueError as error:
        assert "; received transformers.models." in str(error), error
        assert model_type not in MUST, error
        return
    assert (head.scale, head.softcap) == MUST.get(model_type, (head.scale, head.softcap))
    ids = torch.randint(3, VOCAB, (2, 9))
    with torch.no_grad():
        got = linear_logps(model.base_model(input_ids=ids).last_hidden_state, head, ids, shift=True)
        want = gather_logps(model(input_ids=ids).logits[:, :-1], ids[:, 1:])
        # What is proposed where the model cannot be run is what the probe found.
        assert LMHead.from_model(model.to("meta")).scale == head.scale
    torch.testing.assert_close(got[:, 1:], want, atol=1e-4, rtol=1e-4)
