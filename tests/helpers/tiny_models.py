"""Small models of real architectures and a tokenizer trained on the spot, for the trainer tests."""

import functools
import json

import torch
from datasets import Dataset

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NOUNS = ["river", "engine", "garden", "letter", "window", "teacher", "planet", "bridge"]


def pairs(count=16, conversational=True):
    """Preference pairs as rows: prompt, chosen, rejected."""
    rows = []
    for i in range(count):
        noun, other = NOUNS[i % 8], NOUNS[(3 * i + 1) % 8]
        texts = (
            f"What is a {noun} number {i}?",
            f"A {noun} is close to a {other}, and I am glad to say more about it.",
            f"No idea, look up {other} yourself." + " Really." * (i % 3),
        )
        if conversational:
            roles = ("user", "assistant", "assistant")
            texts = tuple([{"role": r, "content": t}] for r, t in zip(roles, texts))
        rows.append(dict(zip(("prompt", "chosen", "rejected"), texts)))
    return rows


def dataset(count=16, conversational=True):
    return Dataset.from_list(pairs(count, conversational))


def with_images(rows, different=None):
    """The rows as a dataset, each with an image of noise; `different` of them, over and over."""
    import numpy as np
    from PIL import Image

    noise = [np.random.default_rng(i).integers(0, 255, (8, 8, 3)) for i in range(len(rows))]
    images = [Image.fromarray(pixels.astype("uint8")) for pixels in noise]
    return Dataset.from_list(
        [{**row, "images": [images[i % (different or len(rows))]]} for i, row in enumerate(rows)]
    )


def unpaired(count=16):
    rows = []
    for i, row in enumerate(pairs(count)):
        kind = "chosen" if i % 3 else "rejected"
        rows.append({"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"})
    return Dataset.from_list(rows)


@functools.cache
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    text = [row[k] for row in pairs(64, False) for k in row]
    raw.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    result = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", pad_token="<pad>", model_max_length=256
    )
    result.chat_template = TEMPLATE
    return result


def build(family="llama", seed=0, **overrides):
    """A two-layer model of `family` over the vocabulary of `tokenizer()`, fp32, on CPU."""
    import transformers

    common = {
        "vocab_size": len(tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "pad_token_id": tokenizer().pad_token_id,
        "eos_token_id": tokenizer().eos_token_id,
        "bos_token_id": None,
    }
    own = {
        "llama": ("Llama", {}),
        "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
        "gemma2": ("Gemma2", {"final_logit_softcapping": 5.0, "attn_implementation": "eager"}),
        "granite": ("Granite", {"logits_scaling": 4.0}),
        "cohere": ("Cohere", {"logit_scale": 0.25}),
        "qwen3_moe": (
            "Qwen3Moe",
            {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "router_aux_loss_coef": 0.1,
                "output_router_logits": True,
            },
        ),
    }
    name, special = own[family]
    config = getattr(transformers, f"{name}Config")(**{**common, **special, **overrides})
    torch.manual_seed(seed)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def save(folder, family="llama", **overrides):
    """Write model and tokenizer to `folder` and return its path as text."""
    build(family, **overrides).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def save_llava(folder):
    """Write a two-layer LLaVA over images of 8 x 8 with its processor; return its path as text."""
    import copy

    import transformers
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaProcessor

    words = copy.deepcopy(tokenizer())
    words.add_tokens(["<image>"], special_tokens=True)
    # Where there are two, the one that needs no torchvision.
    images = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    parts = (
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endif %}"
    )
    LlavaProcessor(
        image_processor=images(size={"height": 8, "width": 8}, crop_size={"height": 8, "width": 8}),
        tokenizer=words,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("{{ m['content'] }}", parts),
    ).save_pretrained(folder)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=build(vocab_size=len(words)).config,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


def save_gguf(path):
    """Write a Qwen3 and its tokenizer as a GGUF file of Q8_0 weights; return what these stand for."""
    import gguf

    model, words = build("qwen3", head_dim=128), tokenizer()  # the one that transformers assumes
    config = model.config
    writer = gguf.GGUFWriter(str(path), "qwen3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    table = sorted(words.get_vocab().items(), key=lambda item: item[1])
    special = set(words.all_special_ids) | set(words.added_tokens_decoder)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([word for word, _ in table])
    writer.add_token_types([3 if number in special else 1 for _, number in table])
    merges = json.loads(words.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(words.eos_token_id)
    writer.add_pad_token_id(words.pad_token_id)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    kept = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        values = weight.numpy()
        kind = gguf.GGMLQuantizationType.F32
        if weight.dim() == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            values = gguf.quants.quantize(values, kind)
        kept[name] = torch.from_numpy(gguf.quants.dequantize(values, kind))
        writer.add_tensor(names.get_name(name, (".weight",)), values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept
