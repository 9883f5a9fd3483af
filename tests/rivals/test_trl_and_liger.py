"""Losses against the functions that TRL 1.16 and Liger 0.8.5 run, in value and gradient.

Their code is called, not copied: TRL's through stub trainers whose model returns the log-probs that
we choose. Where they differ from the papers, docs/losses.md says how; here the options are set so
that both compute the same thing.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from dilkern import preference_loss

pytest.importorskip("trl")
pytest.importorskip("liger_kernel")

PAIRS, LENGTH = 3, 7


def batch(dtype=torch.float64):
    token_logps = -torch.rand(2 * PAIRS, LENGTH, dtype=dtype) * 2 - 0.05
    mask = torch.rand(2 * PAIRS, LENGTH) < 0.7
    mask[:, 0] = True
    token_logps = (token_logps * mask).requires_grad_()
    ref = token_logps.detach().sum(1) + 0.5 * torch.randn(2 * PAIRS, dtype=dtype)
    return token_logps, mask, ref


def stub_trainer(**options):
    same = lambda x: x  # noqa: E731
    return SimpleNamespace(
        model=SimpleNamespace(training=True), args=SimpleNamespace(),
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
        aux_loss_enabled=False, precompute_ref_logps=True, **options,
    )  # fmt: skip


def stub_model(token_logps):
    zeros = torch.zeros_like(token_logps).detach()
    return lambda **_: SimpleNamespace(
        log_probs=token_logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )


def trl_dpo(token_logps, mask, ref, loss_type, beta=0.1, label_smoothing=0.0, **options):
    from trl import DPOTrainer

    trainer = stub_trainer(
        ld_alpha=None, use_weighting=False, loss_types=[loss_type], loss_weights=[1.0], beta=beta,
        label_smoothing=label_smoothing,
        **{"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, **options},
    )  # fmt: skip
    completion = torch.cat([torch.zeros(2 * PAIRS, 1), mask], 1).long()
    chosen, rejected = ref.chunk(2)
    inputs = {
        "input_ids": torch.ones_like(completion), "attention_mask": torch.ones_like(completion),
        "completion_mask": completion, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected,
    }  # fmt: skip
    return DPOTrainer._compute_loss(trainer, stub_model(token_logps), inputs, False)


def ours(token_logps, mask, ref, loss, **options):
    logps = token_logps.sum(1)
    ratios = None if ref is None else logps - ref
    return preference_loss(
        logps, mask.sum(1), log_ratios=ratios, loss=loss, max_log_ratio=None, **options
    ).loss


def assert_same(mine, theirs, token_logps, rtol=1e-12):
    torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=rtol, atol=rtol)
    grads = [torch.autograd.grad(x, token_logps, retain_graph=True)[0] for x in (mine, theirs)]
    scored = token_logps.detach() != 0
    torch.testing.assert_close(grads[0] * scored, grads[1] * scored, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    "loss, loss_type, mine, theirs",
    [
        ("dpo", "sigmoid", {"beta": 0.3}, {"beta": 0.3}),
        ("dpo_norm", "sigmoid_norm", {}, {}),
        ("hinge", "hinge", {}, {}),
        ("ipo_norm", "ipo", {"params": {"tau": 0.2}}, {"beta": 0.2}),
        ("robust", "robust", {"params": {"epsilon": 0.2}}, {"label_smoothing": 0.2}),
        ("sft", "sft", {}, {}),
        ("fdpo_forward_kl", "sigmoid", {}, {"f_divergence_type": "forward_kl"}),
        ("fdpo_jsd", "sigmoid", {}, {"f_divergence_type": "js_divergence"}),
        ("bce", "bco_pair", {"beta": 0.1, "length_normalize": False}, {}),
        ("bce", "nca_pair", {"beta": 0.1, "length_normalize": False, "mixture": 0.5}, {}),
    ],
)
def test_trl_dpo_trainer(loss, loss_type, mine, theirs):
    token_logps, mask, ref = batch()
    reference = None if loss == "sft" else ref
    assert_same(
        ours(token_logps, mask, reference, loss, **mine),
        trl_dpo(token_logps, mask, ref, loss_type, **theirs),
        token_logps,
    )


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.9])
def test_trl_alpha_divergence_counts_alpha_from_the_other_end(alpha):
    token_logps, mask, ref = batch(torch.float32)
    assert_same(
        ours(token_logps, mask, ref, "fdpo_alpha", params={"alpha": alpha}),
        trl_dpo(token_logps, mask, ref, "sigmoid", f_divergence_type="alpha_divergence",
                f_alpha_divergence_coef=1 - alpha),
        token_logps, rtol=1e-5,
    )  # fmt: skip


def test_trl_sigmoid_ignores_label_smoothing_and_we_do_not():
    token_logps, mask, ref = batch()
    theirs = [trl_dpo(token_logps, mask, ref, "sigmoid", label_smoothing=e) for e in (0.0, 0.2)]
    mine = ours(token_logps, mask, ref, "dpo", label_smoothing=0.2)
    assert torch.equal(*theirs) and not torch.allclose(mine, theirs[1])
    torch.testing.assert_close(mine, ours(token_logps, mask, ref, "cdpo", params={"epsilon": 0.2}))


def test_trl_forward_kl_overflows_where_the_linear_extension_does_not():
    token_logps = (torch.full((2, 2), -100.0)).requires_grad_()
    mask, ref = torch.ones(2, 2, dtype=torch.bool), torch.zeros(2)
    mine = preference_loss(
        token_logps.sum(1), mask.sum(1), log_ratios=token_logps.sum(1) - ref, loss="fdpo_forward_kl"
    ).loss
    assert torch.isfinite(mine)
    completion = torch.tensor([[0, 1, 1], [0, 1, 1]])
    from trl import DPOTrainer

    trainer = stub_trainer(
        ld_alpha=None, use_weighting=False, loss_types=["sigmoid"], loss_weights=[1.0], beta=0.1,
        label_smoothing=0.0, f_divergence_type="forward_kl", f_alpha_divergence_coef=0.5,
    )  # fmt: skip
    inputs = {"input_ids": completion, "attention_mask": completion, "completion_mask": completion,
              "ref_chosen_logps": ref[:1], "ref_rejected_logps": ref[1:]}  # fmt: skip
    assert DPOTrainer._compute_loss(trainer, stub_model(token_logps), inputs, False).isnan()


@pytest.mark.parametrize("shift", [2.0, -2.0])
def test_trl_kto_trainer(shift):
    from trl import KTOTrainer

    token_logps, mask, ref = batch()
    kl, ref_kl = torch.randn(4).double() + shift, torch.randn(4).double()
    labels = torch.tensor([True, False, True, True, False, False])
    trainer = stub_trainer(
        calculate_KL=True, loss_type="kto", beta=0.1, desirable_weight=1.3, undesirable_weight=0.7,
        _compute_kl_logps=lambda model, batch: kl,
    )  # fmt: skip
    completion = torch.cat([torch.zeros(2 * PAIRS, 1), mask], 1).long()
    inputs = {
        "label": labels, "input_ids": completion, "attention_mask": completion,
        "completion_mask": completion, "ref_logps": ref, "ref_KL_logps": ref_kl,
    }  # fmt: skip
    theirs = KTOTrainer._compute_loss(trainer, stub_model(token_logps), inputs, False)
    mine = ours(
        token_logps, mask, ref, "kto", is_chosen=labels, kl_log_ratios=kl - ref_kl,
        params={"lambda_chosen": 1.3, "lambda_rejected": 0.7},
    )  # fmt: skip
    assert_same(mine, theirs, token_logps, rtol=1e-10)


@pytest.mark.parametrize(
    "loss, loss_type, smoothing",
    [("cpo", "sigmoid", 0.0), ("cpo", "sigmoid", 0.2), ("simpo", "simpo", 0.0)],
)
def test_trl_cpo_trainer(loss, loss_type, smoothing):
    from trl.experimental.cpo import CPOTrainer

    token_logps, mask, _ = batch()
    logps = token_logps.sum(1) / (mask.sum(1) if loss == "simpo" else 1)
    trainer = stub_trainer(
        alpha=0.0, loss_type=loss_type, beta=2.0, simpo_gamma=0.5, label_smoothing=smoothing
    )
    losses, *_ = CPOTrainer.cpo_loss(trainer, *logps.chunk(2))
    mine = ours(token_logps, mask, None, loss, beta=2.0, sft_weight=0.0, label_smoothing=smoothing)
    assert_same(mine, losses.mean(), token_logps)


def test_trl_orpo_trainer():
    from trl.experimental.orpo import ORPOTrainer

    token_logps, mask, _ = batch(torch.float32)
    average = token_logps.sum(1) / mask.sum(1)
    losses, *_ = ORPOTrainer.odds_ratio_loss(stub_trainer(beta=0.1), *average.chunk(2))
    mine = ours(token_logps, mask, None, "orpo", sft_weight=0.0)
    assert_same(mine, -losses.mean(), token_logps, rtol=1e-5)


@pytest.mark.parametrize(
    "loss, module, name, average, options",
    [
        ("cpo", "cpo_loss", "LigerFusedLinearCPOFunction", False, {"beta": 0.1}),
        ("simpo", "simpo_loss", "LigerFusedLinearSimPOFunction", True, {"beta": 2.0}),
        ("orpo", "orpo_loss", "LigerFusedLinearORPOFunction", True, {}),
    ],
)
def test_liger_reference_free(loss, module, name, average, options):
    theirs = getattr(__import__(f"liger_kernel.chunked_loss.{module}", fromlist=[name]), name)
    token_logps, mask, _ = batch()
    logps = token_logps.sum(1) / (mask.sum(1) if average else 1)
    value, *_ = theirs.preference_loss_fn(*logps.chunk(2), mask, **options)
    mine = ours(token_logps, mask, None, loss, sft_weight=0.0, **options)
    assert_same(mine, value, token_logps, rtol=1e-10)


@pytest.mark.parametrize(
    "loss, loss_type, mine, theirs",
    [
        ("dpo", "sigmoid", {}, {}),
        ("hinge", "hinge", {}, {}),
        ("bce", "bco_pair", {"beta": 0.1, "length_normalize": False}, {}),
        ("bce", "nca_pair", {"beta": 0.1, "length_normalize": False, "mixture": 0.5}, {}),
        ("robust", "robust", {"params": {"epsilon": 0.2}}, {"label_smoothing": 0.2}),
    ],
)
def test_liger_dpo(loss, loss_type, mine, theirs):
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction

    token_logps, mask, ref = batch()
    value, *_ = LigerFusedLinearDPOFunction.preference_loss_fn(
        *token_logps.sum(1).chunk(2), mask, *ref.chunk(2), loss_type=loss_type, **theirs
    )
    assert_same(ours(token_logps, mask, ref, loss, **mine), value, token_logps)


def test_liger_kto_loss_agrees_on_the_loss():
    from liger_kernel.chunked_loss.kto_loss import LigerFusedLinearKTOFunction

    token_logps, mask, ref = batch()
    labels = torch.tensor([True, False, True, True, False, False])
    kl = torch.tensor(0.4, dtype=torch.float64)
    value, *_ = LigerFusedLinearKTOFunction.preference_loss_fn(
        token_logps.sum(1), labels, labels, ref, kl=kl
    )
    mine = ours(token_logps, mask, ref, "kto", is_chosen=labels, kl_log_ratios=kl)
    assert_same(mine, value, token_logps)
