"""What each of two gloo processes runs under real DeepSpeed ZeRO-3; see heads/test_zero3.py.

The truth is fp64 autograd over full logits in one process, on the weights as they are before each
step, averaged over the ranks; the peer is the same in the dtype of the engine.
"""

import copy
import os
import warnings

import pytest
import torch
from head_cases import D, T, V, check_budget, four_bit_linear, gather_logps, recipe, results
from torch import nn

from dilkern import linear_logps
from dilkern.lm_head import LMHead

WORLD = 2
KINDS = ("frozen", "trainable", "tied", "lora", "twice")

SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,  # nothing is kept from forward to backward
    },
}


def deepspeed():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed

    return deepspeed


class Scorer(nn.Module):
    """An embedding, one layer, and a head; `plain`: a dense one in the place of a 4-bit one."""

    def __init__(self, kind, plain):
        super().__init__()
        self.twice = kind == "twice"
        self.embedding = nn.Embedding(V, D)
        self.body = nn.Linear(D, D)
        self.lm_head = nn.Linear(D, V, bias=kind != "tied")
        if kind == "tied":
            self.lm_head.weight = self.embedding.weight
        if kind == "four_bit":
            self.lm_head, self.is_loaded_in_4bit = four_bit_linear(), not plain
            if plain:
                weight = nn.Parameter(recipe(self.lm_head))
                self.lm_head = nn.Linear(D, V, bias=False)
                self.lm_head.weight = weight
        self.lm_head.requires_grad_(kind not in ("frozen", "four_bit"))

    def logps(self, hidden, labels, full):
        if full:
            return gather_logps(self.lm_head(hidden).to(full), labels)
        return linear_logps(hidden, self.lm_head, labels, workspace_mib=0.1)

    def forward(self, ids, labels, full=None):
        hidden = torch.tanh(self.body(self.embedding(ids)))
        size = 9 if self.twice else T  # several calls of the op in one graph
        parts = zip(hidden.split(size), labels.split(size))
        return torch.cat([self.logps(*part, full) for part in parts])


def build(kind, plain=False):
    torch.manual_seed(0)
    model = Scorer(kind, plain)
    if kind in ("lora", "four_bit"):
        import peft

        config = peft.LoraConfig(r=4, target_modules=["lm_head"], modules_to_save=["body"])
        model = peft.get_peft_model(model, config)
        model.base_model.model.lm_head.lora_B["default"].weight.data.normal_(std=0.1)
    return model


def batch(rank, step):
    rng = torch.Generator().manual_seed(100 + rank + 10 * step)
    ids, labels = torch.randint(0, V, (2, T), generator=rng)
    labels[:2] = -100
    return ids, labels, torch.randn(T, generator=rng)


def initialize(model, dtype):
    settings = SETTINGS | {"bf16": {"enabled": dtype is torch.bfloat16}}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return deepspeed().initialize(model=model, config=settings, optimizer=optimizer)[0]


def plain_results(plain, dtype, rank, step):
    """This rank's log-probs and the gradients averaged over the ranks, in one process."""
    model = copy.deepcopy(plain).to(dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    full = torch.promote_types(dtype, torch.float32)
    parts = []
    for ids, labels, g in (batch(r, step) for r in range(WORLD)):
        parts.append(results(model(ids, labels, full), g, trained))
    return [parts[rank][0], *(sum(grads) / WORLD for grads in list(zip(*parts))[1:])]


def train(rank, kind, dtype, steps=3):
    """From the second step on DeepSpeed prefetches by the trace that it recorded in the first."""
    zero = deepspeed().zero
    from deepspeed.utils import safe_get_full_grad

    model, plain = build(kind), build(kind, plain=True)
    engine = initialize(model, dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.numel() == 0 for p in model.parameters())
    for step in range(steps):
        with zero.GatheredParameters(list(model.parameters())):
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                if p.is_floating_point():  # 4-bit codes do not change
                    q.data = p.data.to(torch.float32, copy=True)
        ids, labels, g = batch(rank, step)
        logps = engine(ids, labels)
        if step == 0:  # later DeepSpeed already fetches for the backward here
            assert all(p.numel() == 0 for p in model.parameters())
        engine.backward((logps * g).sum())
        got = [logps.detach(), *(safe_get_full_grad(p).to(dtype) for p in trained)]
        peer, truth = (plain_results(plain, d, rank, step) for d in (dtype, torch.float64))
        check_budget(got, peer, truth)
        engine.step()


def every_kind(rank):
    for kind in KINDS:
        for dtype in (torch.float32, torch.bfloat16):
            train(rank, kind, dtype)


def four_bit(rank):
    """LoRA over a 4-bit head: the packed bytes are sharded like any parameter."""
    train(rank, "four_bit", torch.float32)


def transformers_model(rank):
    """A softcapped model with LoRA on its lm_head: found, probed, and its adapter switched off."""
    import peft
    import transformers

    from dilkern.integrations.transformers import install_head

    def gemma():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config)

    config = transformers.AutoConfig.for_model(
        "gemma2", vocab_size=V, hidden_size=D, intermediate_size=D, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, final_logit_softcapping=5.0,
        tie_word_embeddings=False,
    )  # fmt: skip
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    model = peft.get_peft_model(gemma(), adapter)
    model.base_model.model.lm_head.lora_B["default"].weight.data.normal_(std=0.1)
    plain = copy.deepcopy(model)
    install_head(model)
    engine = initialize(model, torch.float32)
    assert LMHead.from_model(engine).softcap == 5.0  # probed through DeepSpeed's hooks
    ids = batch(rank, 0)[0][None]
    with torch.no_grad(), model.disable_adapter():
        reference = engine(input_ids=ids, labels=ids, dil_head=True).token_logps
    with torch.no_grad(), plain.disable_adapter():
        want = gather_logps(plain(input_ids=ids).logits[0, :-1].double(), ids[0, 1:])
    torch.testing.assert_close(reference[0, 1:].double(), want, atol=1e-5, rtol=1e-5)
    logps = engine(input_ids=ids, labels=ids, dil_head=True).token_logps
    engine.backward(logps.sum())
    from deepspeed.utils import safe_get_full_grad

    trained = [(p, q) for p, q in zip(model.parameters(), plain.parameters()) if p.requires_grad]
    got = [safe_get_full_grad(p) for p, _ in trained]
    total = 0.0
    for other in range(WORLD):
        ids = batch(other, 0)[0]
        total = total + gather_logps(plain(input_ids=ids[None]).logits[0, :-1], ids[1:]).sum()
    want = torch.autograd.grad(total / WORLD, [q for _, q in trained])
    torch.testing.assert_close(got, list(want), atol=1e-5, rtol=1e-4)

    # Sharded from the start, as Trainer does: nothing can be probed before deepspeed.initialize.
    early = gemma()
    deepspeed().zero.Init(module=early, config_dict_or_path=SETTINGS)
    assert early.lm_head.weight.numel() == 0 and LMHead.from_model(early).softcap == 5.0
    with pytest.raises(ValueError, match=r"ZeRO-3.*shape \(0,\) in place of \(301, 64\)"):
        linear_logps(torch.randn(3, D), early.lm_head, torch.tensor([1, 2, 3]))


def all_kinds(rank):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    every_kind(rank)
    four_bit(rank)
    transformers_model(rank)
