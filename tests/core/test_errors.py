"""Every misuse is a ValueError that states the rule, what came, and the remedy."""

import pytest
import torch
from batches import batch

from dilkern import (
    DenseHead,
    DILLoss,
    Objective,
    fused_dil_loss,
    fused_preference_loss,
    linear_logps,
    preference_loss,
)

H, W, Y = torch.randn(4, 6, 8), torch.randn(11, 8), torch.randint(0, 11, (4, 6))


@pytest.mark.parametrize(
    "args, options, message",
    [
        (([1.0], W, Y), {}, r"`hidden_states` must be a torch.Tensor; received list"),
        ((H.int(), W, Y), {}, r"`hidden_states` must be float32.*received torch.int32"),
        ((H[0, 0], W, Y), {}, r"must have shape \(S, L, D\) or \(T, D\); received shape \(8,\)"),
        ((H, W, Y[:, 1:]), {}, r"`labels` must have the shape of `hidden_states` without"),
        ((H, W, Y.float()), {}, r"`labels` must be int64 or int32; received torch.float32"),
        ((H, W, [1]), {}, r"`labels` must be a torch.Tensor"),
        (
            (H, W[:, :7], Y),
            {},
            r"agree in the hidden size; received hidden_states D=8, lm_head D=7",
        ),
        ((H, W[0], Y), {}, r"lm_head weight must have shape \(V, D\); received shape \(8,\)"),
        ((H, W.int(), Y), {}, r"`lm_head weight` must be float32"),
        (
            (H, W.double(), Y),
            {},
            r"one dtype outside autocast; received .*float32, lm_head .*float64",
        ),
        ((H, torch.nn.GELU(), Y), {}, r"received torch.nn.modules.activation.GELU"),
        ((H, W, torch.full_like(Y, 11)), {}, r"every label must be in \[0, 11\).*a label of 11"),
        ((H, W, torch.full_like(Y, -1)), {}, r"equal to ignore_index=-100; received a label of -1"),
        ((H, W, Y), {"backend": "cuda"}, r"`backend` must be 'auto' or one of: triton, torch"),
        (
            (H, W, Y),
            {"backend": "triton"},
            r"backend='triton' must be able to run on cpu; received",
        ),
        (
            (H, W, Y),
            {"workspace_mib": 0},
            r"`workspace_mib` must be a number > 0 and finite; received 0",
        ),
        ((H, W, Y), {"workspace_mib": 1e-5}, r"`workspace_mib` must be at least .* Raise"),
        ((H, W, Y), {"shift": 2}, r"`shift` must be True or False; received 2"),
        ((H, W, Y), {"shift": -1}, r"`shift` must be True or False; received -1"),
        ((H, W, Y), {"ignore_index": None}, r"`ignore_index` must be an integer; received None"),
        ((H.to("meta"), W, Y), {}, r"`labels` and `hidden_states` must be on one device"),
        ((H, W.to("meta"), Y), {}, r"`lm_head` and `hidden_states` must be on one device"),
    ],
)
def test_linear_logps(args, options, message):
    with pytest.raises(ValueError, match=message):
        linear_logps(*args, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bias": torch.zeros(3)}, r"lm_head bias must have shape \(11,\); received shape \(3,\)"),
        ({"scale": 0.0}, r"`scale` must be a number > 0"),
        ({"softcap": -1.0}, r"`softcap` must be a number > 0"),
    ],
)
def test_dense_head(options, message):
    with pytest.raises(ValueError, match=message):
        DenseHead(W, **options)


REF = {"ref_logps": torch.zeros(4)}
CU = torch.tensor([0, 6, 12, 18, 24])


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, r"exactly one of `ref_logps`, `ref_hidden_states` and `reference_free=True`.*none"),
        ({**REF, "reference_free": True}, r"received ref_logps, reference_free=True"),
        ({**REF, "ref_hidden_states": H}, r"received ref_logps, ref_hidden_states"),
        ({**REF, "ref_lm_head": W}, r"`ref_lm_head` goes with `ref_hidden_states`"),
        (
            {"ref_logps": torch.zeros(3)},
            r"`ref_logps` must have shape \(4,\) per sequence or \(4, 6\)",
        ),
        ({"ref_logps": torch.zeros(4).requires_grad_()}, r"`ref_logps` must not require grad"),
        ({"ref_hidden_states": H.clone().requires_grad_()}, r"must not require grad"),
        ({"ref_hidden_states": H[:, 1:]}, r"must have leading shape \(4, 6\)"),
        ({"ref_logps": torch.zeros(4).long()}, r"`ref_logps` must be float32"),
        ({**REF, "h": "dpo"}, r"`h` must be one of: bce, brier.*fused_preference_loss"),
        ({**REF, "h": "nope"}, r"`h` must be one of: bce, brier, kliep, lsif.*received 'nope'"),
        ({**REF, "beta": 0}, r"`beta` must be a number > 0"),
        ({**REF, "max_log_ratio": -1.0}, r"`max_log_ratio` must be a number > 0"),
        (
            {"ref_logps": torch.zeros(4, device="meta")},
            r"`ref_logps` and `labels` must be on one dev",
        ),
        (
            {**REF, "weights": torch.ones(4, device="meta")},
            r"`weights` must be on the device of the log-probs, cpu; received meta",
        ),
        ({**REF, "beta": float("inf")}, r"`beta` must be a number > 0 and finite; received inf"),
        (
            {**REF, "workspace_mib": float("inf")},
            r"`workspace_mib` must be a number > 0 and finite",
        ),
        ({**REF, "sft_weight": float("nan")}, r"`sft_weight` must be a number >= 0; received nan"),
        ({**REF, "label_smoothing": "0.1"}, r"`label_smoothing` must be in \[0, 0.5\]"),
        (
            {**REF, "h": "power", "params": {"lam": float("nan")}},
            r"`lam` must be a finite number; received nan",
        ),
        ({**REF, "params": {"lam": 1}}, r"parameters of loss 'lsif' are: none; received lam"),
        (
            {**REF, "h": "power", "params": "lam=1"},
            r"parameters of loss 'power' must be a mapping.*received 'lam=1'.*{'lam': 1.0}",
        ),
        ({**REF, "h": "nce", "params": {"nu": 0}}, r"`nu` must be > 0"),
        ({**REF, "label_smoothing": 0.7}, r"`label_smoothing` must be in \[0, 0.5\]"),
        ({**REF, "mixture": 2.0}, r"`mixture` must be in \[0, 1.0\]"),
        ({**REF, "mixture": 0.5, "label_smoothing": 0.1}, r"cannot be combined"),
        ({**REF, "mixture": 0.5, "pairing": "pairwise"}, r"goes with a pointwise h-function"),
        ({**REF, "pairing": "triplet"}, r"`pairing` can be 'pairwise'.*received pairing='triplet'"),
        ({**REF, "sft_weight": -1}, r"`sft_weight` must be a number >= 0; received -1"),
        ({**REF, "weights": torch.ones(3)}, r"`weights` must have the shape of `logps`, \(4,\)"),
        ({**REF, "is_chosen": torch.ones(4)}, r"`is_chosen` must be a bool tensor of shape \(4,\)"),
        ({**REF, "is_chosen": torch.ones(4).bool()}, r"received 4 chosen, 0 rejected"),
        ({**REF, "is_chosen": torch.zeros(4).bool()}, r"received 0 chosen, 4 rejected"),
        ({**REF, "cu_seqlens": CU}, r"`cu_seqlens` goes with packed labels"),
    ],
)
def test_fused_dil_loss(options, message):
    with pytest.raises(ValueError, match=message):
        fused_dil_loss(H, W, Y, **options)


@pytest.mark.parametrize(
    "use",
    [
        lambda **typo: fused_dil_loss(H, W, Y, **REF, **typo),
        lambda **typo: fused_preference_loss(H, W, Y, loss="dpo", **REF, **typo),
        lambda **typo: preference_loss(torch.zeros(4), torch.ones(4), **typo),
        lambda **typo: DILLoss("bce", **typo),
        lambda **typo: Objective("bce", **typo),
    ],
    ids=["fused_dil_loss", "fused_preference_loss", "preference_loss", "DILLoss", "Objective"],
)
def test_a_typo_is_named_with_what_was_meant(use):
    with pytest.raises(TypeError, match=r"'lable_smoothing'; did you mean 'label_smoothing'\?"):
        use(lable_smoothing=0.1)


def test_odd_batch_without_is_chosen():
    with pytest.raises(ValueError, match=r"even number S > 0; received S=3"):
        fused_dil_loss(H[:3], W, Y[:3], ref_logps=torch.zeros(3))


@pytest.mark.parametrize(
    "cu_seqlens, message",
    [
        (None, r"packed labels of shape \(T,\) need `cu_seqlens`"),
        ([0, 24], r"`cu_seqlens` must be a torch.Tensor"),
        (CU.float(), r"must be an integer tensor of shape \(S\+1,\)"),
        (CU[:1], r"with S >= 1"),
        (torch.tensor([0, 6, 12, 18, 23]), r"must rise from 0 to T=24"),
        (torch.tensor([1, 6, 12, 18, 24]), r"must rise from 0 to T=24"),
        (torch.tensor([0, 12, 6, 18, 24]), r"must rise from 0 to T=24"),
    ],
)
def test_packed(cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        fused_dil_loss(H.reshape(24, 8), W, Y.reshape(24), cu_seqlens=cu_seqlens, **REF)


@pytest.mark.parametrize(
    "loss, options, message",
    [
        ("nope", {}, r"`loss` must be one of: bce.*received 'nope'"),
        ("simpo", REF, r"loss 'simpo' has no reference; received ref_logps"),
        ("cpo", {"reference_free": True}, r"loss 'cpo' has no reference"),
        ("ipo", {**REF, "beta": 0.1}, r"loss 'ipo' has no beta; received beta=0.1.*tau"),
        ("ipo", {**REF, "params": {"tau": 0}}, r"`tau` must be > 0"),
        ("robust", {**REF, "params": {"epsilon": 0.5}}, r"`epsilon` must be in \[0, 0.5\)"),
        (
            "hinge",
            {**REF, "label_smoothing": 0.1},
            r"label_smoothing is not defined for loss 'hinge'",
        ),
        (
            "dpo",
            {**REF, "pairing": "pointwise"},
            r"`pairing` can be 'pairwise' for h-functions only",
        ),
        ("dpo", {**REF, "mixture": 0.5}, r"`mixture` goes with a pointwise h-function"),
        ("dpo", {**REF, "is_chosen": torch.ones(4).bool()}, r"pairwise loss 'dpo' needs pairs"),
        ("kto", REF, r"`kl_log_ratios` is required by loss 'kto'"),
        ("lsif", {**REF, "kl_log_ratios": torch.ones(3)}, r"is not used by loss 'lsif'"),
        (
            "robust",
            {**REF, "label_smoothing": 0.1, "params": {"epsilon": 0.2}},
            r"must be given once; received label_smoothing=0.1 and epsilon=0.2",
        ),
        (Objective("bce"), {**REF, "beta": 0.5}, r"Objective as `loss` brings its own.*beta"),
    ],
)
def test_fused_preference_loss(loss, options, message):
    with pytest.raises(ValueError, match=message):
        fused_preference_loss(H, W, Y, loss=loss, **options)


@pytest.mark.parametrize(
    "logps, options, message",
    [
        (torch.zeros(4, 1), {}, r"`logps` must have shape \(S,\); received shape \(4, 1\)"),
        ([0.0, 0.0], {}, r"`logps` must be a torch.Tensor; received list"),
        (torch.zeros(4, dtype=torch.long), {}, r"`logps` must be float32.*received torch.int64"),
        (torch.zeros(4), {"weights": [1.0] * 4}, r"`weights` must be a torch.Tensor"),
        (torch.zeros(4), {"loss": "kto", "kl_log_ratios": 0.0}, r"`kl_log_ratios` must be a torch"),
    ],
)
def test_preference_loss_tensors(logps, options, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(logps, torch.ones(4), log_ratios=torch.zeros(4), **options)


def test_preference_loss_reference():
    logps, n = torch.zeros(2), torch.ones(2)
    with pytest.raises(ValueError, match="loss 'dpo' needs a reference; received none"):
        preference_loss(logps, n, loss="dpo")
    with pytest.raises(ValueError, match="loss 'sft' has no reference; received one"):
        preference_loss(logps, n, loss="sft", log_ratios=logps)


def test_module_checks_h_and_options_at_construction():
    with pytest.raises(ValueError, match="`h` must be one of"):
        DILLoss("nope")
    with pytest.raises(ValueError, match="`beta` must be a number > 0"):
        DILLoss("bce", beta=-1.0)
    with pytest.raises(ValueError, match="`h` must be an h-function"):
        DILLoss(Objective("dpo"))


def test_message_has_three_parts():
    states, weight, labels, _ = batch()
    with pytest.raises(ValueError) as caught:
        fused_dil_loss(states, weight, labels)
    rule, rest = str(caught.value).split("; received ")
    received, remedy = rest.split(". ", 1)
    assert rule and received == "none" and remedy.startswith("Pass")
