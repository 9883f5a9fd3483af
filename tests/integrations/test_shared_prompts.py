"""A row with each prompt once gives the padded batch's log-probs and gradients, in fp64."""

import os
import sys
import types
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad
from transformers import AttentionInterface

from dilkern import Objective
from dilkern.integrations.attention import _many_shapes
from dilkern.integrations.packing import check_packing
from dilkern.integrations.rows import pack
from dilkern.integrations.transformers import compute_loss, install_head
from dilkern.preference import loss_from_token_logps

WINDOW = 5  # below the prompts' lengths
FAMILIES = {
    "Llama": {},
    "Qwen3": {"tie_word_embeddings": True},
    "Mistral": {"sliding_window": WINDOW},
    "Phi3": {"sliding_window": WINDOW},
    "Gemma2": {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0},
    "Gemma3": {"sliding_window": WINDOW, "sliding_window_pattern": 2},
    "GptOss": {
        "sliding_window": WINDOW,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "experts_implementation": "eager",
    },
}


class _Exact:
    """torch, as modeling files see it, without their roundings to fp32."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def exact(monkeypatch):
    """Models compute in fp64 throughout, norms and eager attention too."""
    for family in FAMILIES:
        source = sys.modules[getattr(transformers, f"{family}ForCausalLM").__module__]
        monkeypatch.setattr(source, "torch", _Exact())
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.double())


@pytest.fixture
def registry(monkeypatch):
    """`AttentionInterface`, as it was again afterwards."""
    known = dict(AttentionInterface._global_mapping)
    monkeypatch.setattr(AttentionInterface, "_global_mapping", known)
    return AttentionInterface


def build(family, attention="sdpa", **options):
    """A model of two layers in fp64 with the head installed."""
    special = {**FAMILIES[family], **options}
    name = "Gemma3Text" if family == "Gemma3" else family
    config = getattr(transformers, f"{name}Config")(
        **{
            "vocab_size": 37,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8 if family != "Phi3" else 4,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "attn_implementation": attention,
            **special,
        }
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).double()
    for parameter in model.parameters():  # zeros and ones would hide much
        torch.nn.init.normal_(parameter, std=0.3)
    install_head(model)
    return model


def batch_of(groups, side="right"):
    """A padded batch of prompts and the answers to each: all first answers, all second ones, ..."""
    rows = [(prompt, answers[k]) for k in range(len(groups[0][1])) for prompt, answers in groups]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, mask, labels = [], [], []
    for prompt, answer in rows:
        free = width - len(prompt) - len(answer)
        space = (0, free) if side == "right" else (free, 0)
        ids.append(pad(torch.tensor([*prompt, *answer]), space))
        mask.append(pad(torch.ones(len(prompt) + len(answer), dtype=torch.long), space))
        labels.append(pad(torch.tensor([-100] * len(prompt) + answer), space, value=-100))
    return {"input_ids": torch.stack(ids), "attention_mask": torch.stack(mask)}, torch.stack(labels)


LONG = [3, 9, 4, 30, 12, 7, 8, 2, 11]
PAIRS = [
    (LONG, ([5, 6, 7, 8, 21], [5, 9])),  # completions that begin alike, a prompt beyond the window
    ([3, 1], ([14], [15])),  # one token each
    ([4, 5, 6], ([7, 8, 9], [7, 8, 9])),  # the same twice
    (LONG[:6], ([20, 21, 22, 23, 24, 25, 26, 27], [13, 12, 11, 10, 9, 8, 7])),
]
APART = ([*LONG], ([3, 4, 5], [6, 7]))


def scores(model, batch, labels, answers=None, checkpointing=False):
    """Token log-probs and all gradients of a sum in which every log-prob has a weight of its own."""
    model.zero_grad()
    model.train(
        bool(checkpointing)
    )  # which happens in training mode alone; nothing here has dropout
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    if answers is None:
        logps = model(**batch, labels=labels, dil_head=True).token_logps
    else:
        (row,) = pack(batch, labels, answers=answers)
        logps = model(**row.inputs, dil_head=True).token_logps
    (logps * torch.linspace(-1, 2, logps.numel()).view_as(logps)).sum().backward()
    if checkpointing:
        model.gradient_checkpointing_disable()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logps.detach(), grads


def same(have, want, tolerance=1e-10):
    logps, grads = have
    assert want[0].abs().max() > 1
    assert grads.keys() == want[1].keys()
    torch.testing.assert_close(logps, want[0], rtol=0, atol=tolerance)
    for name, gradient in want[1].items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(
            grads[name], gradient, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_equal_the_padded_run(family):
    batch, labels = batch_of(PAIRS)
    model = build(family, "eager")
    want = scores(model, batch, labels)
    for attention in ("eager",) if family in ("Gemma2", "GptOss") else ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        check_packing(model, 2)
        for answers in (1, 2):
            same(scores(model, batch, labels, answers), want)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("way", [True, "reentrant"])
@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
def test_gradient_checkpointing_keeps_segments_apart(family, way):
    batch, labels = batch_of(PAIRS)
    model = build(family)
    want = scores(model, batch, labels)
    same(scores(model, batch, labels, 2, checkpointing=way), want)


@pytest.mark.usefixtures("exact")
def test_lora_gradients_equal_the_padded_run():
    from peft import LoraConfig, get_peft_model

    batch, labels = batch_of(PAIRS)
    adapter = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(build("Llama"), adapter)
    want = scores(model, batch, labels)
    assert all("lora" in name for name in want[1])
    same(scores(model, batch, labels, 2), want)
    (row,) = pack(batch, labels)
    with model.disable_adapter(), torch.no_grad():
        base = model(**row.inputs, dil_head=True).token_logps
        plain = model(**batch, labels=labels, dil_head=True).token_logps
    torch.testing.assert_close(base, plain, rtol=0, atol=1e-10)
    assert (base - want[0]).abs().max() > 1e-3


def test_autocast_stays_close():
    batch, labels = batch_of(PAIRS)
    model = build("Llama").float()
    want = scores(model, batch, labels)[0]
    with torch.autocast("cpu", torch.bfloat16):
        padded = scores(model, batch, labels)[0]
        shared = scores(model, batch, labels, 2)[0]
    assert (shared - want).abs().max() <= 2 * (padded - want).abs().max() + 0.05


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_may_be_on_either_side(side):
    model = build("Llama")
    batch, labels = batch_of(PAIRS, side)
    logps = scores(model, batch, labels, 2)[0]
    right, its_labels = batch_of(PAIRS)
    want = scores(model, right, its_labels)[0]
    assert torch.equal(logps != 0, labels != -100)
    # Masks of unlike size take sums in another order.
    torch.testing.assert_close(logps[labels != -100], want[its_labels != -100])


@pytest.mark.parametrize("answers", [None, 1, 2])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_first_token_is_not_scored_behind_padding_either(side, answers):
    batch, labels = batch_of([([], ([5, 6], [7])), ([2], ([3], [4, 8]))], side)
    output = compute_loss(
        build("Llama"), {**batch, "labels": labels}, loss="simpo", answers=answers
    )
    assert output.chosen_lengths.tolist() == [1, 1]
    assert output.rejected_lengths.tolist() == [0, 2]
    assert output.rejected_logps[0] == 0


@pytest.mark.usefixtures("exact")
def test_nothing_is_shared_where_nothing_is_common():
    batch, labels = batch_of(PAIRS)
    batch["input_ids"][len(PAIRS) :, 0] = 33  # the second half of the batch has another first token
    model = build("Qwen3")
    (row,) = pack(batch, labels)
    assert row.num_tokens == batch["attention_mask"].sum()
    same(scores(model, batch, labels, 2), scores(model, batch, labels))


@pytest.mark.usefixtures("exact")
def test_what_truncation_cut_differently_is_not_shared():
    # keep_end: the longer answer leaves less of the prompt, at other positions.
    batch, labels = batch_of([(LONG, ([5, 6, 7], [8])), (LONG[:3], ([1, 2], [3, 2]))])
    ids, mask = batch["input_ids"][0].clone(), batch["attention_mask"][0]
    ids[:-2], labels[0] = ids[2:].clone(), labels[0].roll(-2)
    batch["input_ids"][0] = ids * (mask := mask.roll(-2) * mask)
    batch["attention_mask"][0] = mask
    labels[0, -2:], mask[-2:] = -100, 0
    model = build("Llama")
    (row,) = pack(batch, labels)
    assert row.num_tokens == batch["attention_mask"].sum() - 3
    same(scores(model, batch, labels, 2), scores(model, batch, labels))


@pytest.mark.usefixtures("exact")
def test_many_answers_share_one_prompt():
    groups = [
        (LONG, ([5, 6, 7], [8], [9, 10, 11, 12], [5, 6])),
        ([3, 1], ([14], [15, 16], [17], [14])),
    ]
    batch, labels = batch_of(groups)
    model = build("Mistral")
    want = scores(model, batch, labels)
    (row,) = pack(batch, labels, answers=4)
    assert row.num_tokens == 9 + 10 + 2 + 5
    same(scores(model, batch, labels, 4), want)


def test_the_same_inputs_give_the_same_bits():
    batch, labels = batch_of(PAIRS)
    model = build("Gemma3").float()
    first, second = (scores(model, batch, labels, 2) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_rows_within_a_budget_hold_whole_pairs_in_order():
    batch, labels = batch_of(PAIRS)
    model = build("Llama")
    sizes = [9 + 5 + 2, 2 + 2, 3 + 6, 6 + 15]
    whole = scores(model, batch, labels)[0]
    for limit, pairs in ((20, [[0, 1], [2], [3]]), (5, [[0], [1], [2], [3]])):
        rows = pack(batch, labels, max_tokens=limit)
        assert [row.num_tokens for row in rows] == [sum(sizes[i] for i in row) for row in pairs]
        assert [row.sequences.tolist() for row in rows] == [
            [*row, *(4 + i for i in row)] for row in pairs
        ]
        parts = [model(**row.inputs, dil_head=True).token_logps for row in rows]
        for row, part in zip(rows, parts):
            torch.testing.assert_close(part, whole[row.sequences], rtol=0, atol=1e-10)
    (row,) = pack(batch, labels, max_tokens=50)
    assert row.sequences is None
    for answers, together, message in (
        (3, None, "multiple of 3"),
        (2.0, None, "`answers` must be a whole number"),
        (2, 3, "`together`"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(batch, labels, answers=answers, together=together)


def varlen_attention(
    module, query, key, value, attention_mask, scaling, *, sliding_window=None, cu_seq_lens_q=None,
    cu_seq_lens_k=None, max_length_q=None, max_length_k=None, **kwargs,
):  # fmt: skip
    """What flash attention does with boundaries, in torch: causal from the last key; no mask."""
    if cu_seq_lens_q is None:  # a padded batch, on the right
        size = query.shape[2]
        mask = torch.ones(size, size, dtype=torch.bool).tril()
        bounds = [((0, size), (0, size), mask)]
    else:
        assert "position_ids" not in kwargs
        assert cu_seq_lens_q.dtype == cu_seq_lens_k.dtype == torch.int32
        assert max_length_q == cu_seq_lens_q.diff().max()
        assert max_length_k == cu_seq_lens_k.diff().max()
        assert cu_seq_lens_k[-1] == key.shape[2]
        runs = [pairs.unfold(0, 2, 1).tolist() for pairs in (cu_seq_lens_q, cu_seq_lens_k)]
        bounds = []
        for q, k in zip(*runs):
            ahead = torch.arange(k[1] - k[0]) - torch.arange(q[1] - q[0]).unsqueeze(1)
            ahead = ahead - (k[1] - k[0] - q[1] + q[0])
            seen = ahead <= 0
            if sliding_window is not None:
                seen &= ahead > -sliding_window
            bounds.append((q, k, seen))
        SEEN.append((cu_seq_lens_q.tolist(), cu_seq_lens_k.tolist()))
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :, q0:q1], key[:, :, k0:k1], value[:, :, k0:k1], seen,
            scale=scaling, enable_gqa=True,
        )
        for (q0, q1), (k0, k1), seen in bounds
    ]  # fmt: skip
    return torch.cat(parts, 2).transpose(1, 2), None


SEEN = []


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_boundaries_alone_are_enough_for_flash_attention(family, registry):
    batch, labels = batch_of(PAIRS)
    model = build(family)
    want = scores(model, batch, labels)
    registry.register("flash_torch", varlen_attention)
    # `set_attn_implementation` would look for a package of this name.
    model.config._attn_implementation = "flash_torch"
    same(scores(model, batch, labels, 2), want)
    SEEN.clear()
    same(scores(model, batch, labels, 2, checkpointing=True), want)
    queries, keys = SEEN[0]
    assert queries == [0, 14, 16, 19, 20, 26, 29, 43, 50]
    assert keys == [0, 14, 25, 28, 31, 37, 43, 57, 70]
    same(scores(model, batch, labels, 1), want)


def test_a_plain_call_goes_through_unchanged():
    batch, labels = batch_of(PAIRS)
    for attention in ("sdpa", "eager"):
        model = build("Gemma3", attention).float()
        before = model(**batch).logits
        generated = model.generate(batch["input_ids"][:1], max_new_tokens=4, do_sample=False)
        scores(model, batch, labels, 2)
        assert model.config._attn_implementation == attention
        assert torch.equal(model(**batch).logits, before)
        again = model.generate(batch["input_ids"][:1], max_new_tokens=4, do_sample=False)
        assert torch.equal(again, generated)


def test_moe_auxiliary_loss_counts_a_prompt_for_each_answer():
    batch, labels = batch_of(PAIRS)
    model = tiny.build("qwen3_moe")
    install_head(model)
    want = model(**batch, labels=labels, dil_head=True).aux_loss
    (row,) = pack(batch, labels)
    torch.testing.assert_close(model(**row.inputs, dil_head=True).aux_loss, want)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("loss", ["lsif", "dpo", "simpo"])
def test_compute_loss_shares_prompts_for_policy_and_reference(loss):
    batch, labels = batch_of(PAIRS)
    batch["labels"] = labels
    model, ref_model = build("Llama"), None
    if loss != "simpo":
        ref_model = build("Qwen3")
    grads = []
    for answers in (None, 1, 2):
        model.zero_grad()
        output = compute_loss(model, batch, ref_model=ref_model, loss=loss, answers=answers)
        output.loss.backward()
        grads.append((output.loss.detach(), model.model.embed_tokens.weight.grad.clone()))
    for have in grads[1:]:
        torch.testing.assert_close(have, grads[0], rtol=0, atol=1e-10)


@pytest.mark.usefixtures("exact")
def test_best_of_n_rows_train_by_hand():
    groups = [(LONG, ([5, 6, 7], [8], [9, 10])), ([3, 1], ([14], [15, 16], [17]))]
    batch, labels = batch_of(groups)
    model = build("Llama")
    is_chosen = torch.arange(6) < 2
    (row,) = pack(batch, labels, answers=3)
    values = [
        loss_from_token_logps(
            Objective("bce"), logps, labels != -100, reference_free=True, is_chosen=is_chosen
        ).loss
        for logps in (
            model(**row.inputs, dil_head=True).token_logps,
            model(**batch, labels=labels, dil_head=True).token_logps,
        )
    ]
    torch.testing.assert_close(*values, rtol=0, atol=1e-10)


def refusal(model, answers=2):
    install_head(model)
    with pytest.raises(ValueError) as caught:
        check_packing(model, answers)
    return str(caught.value)


def test_layers_that_cannot_share_are_refused_by_name():
    config = transformers.Qwen3NextConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, linear_num_value_heads=2, num_experts=2,
        linear_num_key_heads=1, linear_key_head_dim=8, linear_value_head_dim=8, num_experts_per_tok=1,
        moe_intermediate_size=8, shared_expert_intermediate_size=8, full_attention_interval=2,
    )  # fmt: skip
    message = refusal(transformers.Qwen3NextForCausalLM(config))
    assert "Qwen3NextForCausalLM with linear_attention" in message


def test_a_recurrent_model_is_refused_by_name():
    config = transformers.MambaConfig(
        vocab_size=37, hidden_size=16, num_hidden_layers=1, state_size=4, intermediate_size=32
    )
    message = refusal(transformers.MambaForCausalLM(config))
    assert "MambaForCausalLM" in message
    assert "shared_prompts=False" in message


def test_a_model_that_passes_the_row_by_is_refused():
    model = build("Llama")

    class Deaf(type(model.model)):
        def forward(self, *args, packed_row=None, **kwargs):
            return super().forward(*args, **kwargs)

    model.model.__class__ = Deaf
    assert "which does not call that of 'sdpa'" in refusal(model)
    batch, labels = batch_of(PAIRS)  # nor does it train where nobody asked `check_packing`
    with pytest.raises(ValueError, match="which does not call that of 'sdpa'"):
        compute_loss(model, {**batch, "labels": labels}, loss="simpo", answers=2)


def test_a_model_that_loses_the_positions_is_refused():
    model = build("Llama")

    class Counting(type(model.model)):
        def forward(self, *args, position_ids=None, **kwargs):
            return super().forward(*args, **kwargs)

    model.model.__class__ = Counting
    assert "keeps sequences apart" in refusal(model)


def test_a_window_that_attention_is_not_told_is_refused():
    model = build("Mistral", sliding_window=40)
    for layer in model.model.layers:
        layer.self_attn.config = transformers.LlamaConfig(
            **{**layer.self_attn.config.to_dict(), "sliding_window": None},
            attn_implementation="sdpa",
        )
    assert "sliding_window=40" in refusal(model)


def test_virtual_tokens_are_refused():
    from peft import PromptTuningConfig, get_peft_model

    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert "prompt-learning adapter" in refusal(get_peft_model(build("Llama"), adapter))


def test_flex_attention_is_refused():
    model = build("Llama")
    model.config._attn_implementation = "flex_attention"
    assert "mask of numbers or boundaries" in refusal(model)


def test_anything_beside_ids_and_mask_is_refused():
    batch, labels = batch_of(PAIRS)
    with pytest.raises(ValueError, match="received token_type_ids"):
        pack({**batch, "token_type_ids": batch["input_ids"]}, labels)


def test_the_check_leaves_four_bit_layers_trainable():
    """In eval mode bitsandbytes would repack them on some CPUs, for good and without a gradient."""
    model = tiny.build()
    layer = model.model.layers[0].self_attn.q_proj
    layer.support_avx512bf16_for_cpu = True  # as of Linear4bit on such a CPU
    install_head(model)
    check_packing(model, 2)
    assert not layer.support_avx512bf16_for_cpu


def test_scored_padding_and_gaps_are_refused():
    batch, labels = batch_of(PAIRS)
    with pytest.raises(ValueError, match="labels other than -100 where attention_mask is 0"):
        pack(batch, labels.masked_fill(batch["attention_mask"] == 0, 0))
    mask = batch["attention_mask"].clone()
    mask[0, 3] = 0
    with pytest.raises(ValueError, match="attention_mask with a gap"):
        pack({**batch, "attention_mask": mask}, labels)


def test_a_model_that_fails_on_the_row_is_refused_by_name():
    config = transformers.BloomConfig(vocab_size=37, hidden_size=16, n_layer=1, n_head=2)
    assert "BloomForCausalLM: " in refusal(transformers.BloomForCausalLM(config))


SMOLLM2 = os.environ.get("DILKERN_SMOLLM2", "")
HH = Path(__file__).resolve().parents[3] / "shared" / "data" / "hh_harmless_1799.jsonl"


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2 or not HH.exists(), reason=f"needs DILKERN_SMOLLM2=FOLDER and {HH}")
def test_real_weights_on_real_pairs():
    from peft import LoraConfig, get_peft_model

    from dilkern.integrations.collators import PreferenceCollator
    from dilkern.integrations.data import read_preferences

    tokenizer = transformers.AutoTokenizer.from_pretrained(SMOLLM2)
    model = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    adapter = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(model, adapter)
    install_head(model)
    check_packing(model, 2)
    batch = PreferenceCollator(tokenizer, 256)(list(read_preferences(str(HH)))[:2])
    labels = batch.pop("labels")
    want, have = (scores(model, batch, labels, answers) for answers in (None, 2))
    # Sums of hundreds of terms in fp32, in another order.
    torch.testing.assert_close(have[0], want[0], rtol=0, atol=2e-4)
    apart = torch.stack([(have[1][name] - g).norm() for name, g in want[1].items()]).norm()
    assert apart <= 1e-4 * torch.stack([g.norm() for g in want[1].values()]).norm()


def test_cudnn_has_no_part_in_calls_of_many_shapes():
    """Its plans are per shape; what else the user has allowed stays."""
    on_gpu = types.SimpleNamespace(is_cuda=True)
    found = torch.backends.cuda
    with _many_shapes(on_gpu):
        assert not found.cudnn_sdp_enabled()
        assert found.flash_sdp_enabled() and found.math_sdp_enabled()
    assert found.cudnn_sdp_enabled()
    with sdpa_kernel(SDPBackend.MATH), _many_shapes(on_gpu):
        assert found.math_sdp_enabled() and not found.flash_sdp_enabled()
    with _many_shapes(types.SimpleNamespace(is_cuda=False)):
        assert found.cudnn_sdp_enabled()
