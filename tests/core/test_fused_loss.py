"""fused_dil_loss against the specification: layouts, references, options, bits."""

import pickle
from itertools import pairwise

import pytest
import torch
from batches import batch

from dilkern import (
    DILLoss,
    Objective,
    fused_dil_loss,
    fused_preference_loss,
    linear_logps,
    preference_loss,
    preference_metrics,
    reference,
)
from dilkern.losses import LOSSES

H_NAMES = ["lsif", "ukl", "bce"]


def ref_sums(other, weight, labels):
    return reference.shifted_token_logps(other, weight, labels).sum(1)


@pytest.mark.parametrize("seed", range(140))
def test_fp64_equals_full_logits(seed, budget):
    """Shapes, ignored labels, empty completions, padded and packed, workspace tiny to huge."""
    rng = torch.Generator().manual_seed(seed)
    sequences = 2 * int(torch.randint(1, 4, (), generator=rng))
    length, hidden, vocab = (int(torch.randint(2, n, (), generator=rng)) for n in (20, 24, 200))
    states, weight, labels, other = batch(
        seed, sequences, length, hidden, vocab, empty=seed % 5 == 0
    )
    h, length_normalize = H_NAMES[seed % 3], seed % 2 == 0
    beta = [1.0, 0.1][seed % 2]
    workspace = [0.02, 0.2, 256][seed % 3]
    ref = ref_sums(other, weight, labels)
    options = {"h": h, "beta": beta, "length_normalize": length_normalize}
    states.requires_grad_()
    weight.requires_grad_()
    truth = reference.dil_loss(states, weight, labels, ref, **options)
    truth_grads = torch.autograd.grad(truth, (states, weight))
    inputs = {"labels": labels}
    if seed % 4 >= 2:
        inputs = {
            "labels": labels.reshape(-1),
            "cu_seqlens": torch.arange(0, labels.numel() + 1, length),
        }
    out = fused_dil_loss(
        states.reshape(*inputs["labels"].shape, hidden), weight, **inputs, ref_logps=ref,
        max_log_ratio=None, workspace_mib=workspace, **options,
    )  # fmt: skip
    budget.exact64("loss", out.loss.detach(), truth.detach())
    for name, got, want in zip(("hidden", "weight"), torch.autograd.grad(out.loss, (states, weight)),
                               truth_grads):  # fmt: skip
        budget.exact64(f"grad {name}", got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("h", H_NAMES)
def test_error_within_twice_that_of_naive(dtype, h, budget):
    states, weight, labels, other = batch(3, 8, 40, 64, 900, dtype)

    def naive(d):
        x = states.detach().to(d).requires_grad_()
        ref = ref_sums(other.to(d), weight.to(d), labels)
        loss = reference.dil_loss(x, weight.to(d), labels, ref, h=h)
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    x = states.detach().clone().requires_grad_()
    out = fused_dil_loss(x, weight, labels, ref_hidden_states=other, h=h)
    out.loss.backward()
    (truth, truth_grad), (peer, peer_grad) = naive(torch.float64), naive(dtype)
    assert out.loss.dtype == torch.float32 and out.loss.dim() == 0
    budget.check("loss", out.loss.detach(), peer, truth)
    budget.check("grad", x.grad, peer_grad, truth_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("h", H_NAMES)
def test_policy_equal_to_reference_has_log_ratios_of_exactly_zero(dtype, h):
    states, weight, labels, _ = batch(1, 6, 50, 32, 500, dtype)
    states.requires_grad_()
    out = fused_dil_loss(
        states, weight, labels, ref_hidden_states=states.detach(), h=h, workspace_mib=0.5
    )
    assert (out.chosen_log_ratios == 0).all() and (out.rejected_log_ratios == 0).all()
    expected = {"lsif": -0.5, "ukl": 1.0, "bce": 2 * torch.log(torch.tensor(2.0)).item()}[h]
    assert out.loss.item() == pytest.approx(expected, rel=1e-6)


def test_three_forms_of_reference_agree():
    states, weight, labels, other = batch()
    tokens = reference.shifted_token_logps(other, weight, labels)
    tokens_with_garbage = torch.where(labels == -100, torch.nan, tokens)
    losses = [
        fused_dil_loss(states, weight, labels, **ref).loss
        for ref in (
            {"ref_hidden_states": other},
            {"ref_hidden_states": other, "ref_lm_head": weight.clone()},
            {"ref_logps": tokens.sum(1)},
            {"ref_logps": tokens_with_garbage},
        )
    ]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-12, atol=0)


def test_reference_free_takes_log_probs_as_ratios():
    states, weight, labels, _ = batch()
    free = fused_dil_loss(states, weight, labels, reference_free=True)
    zero = fused_dil_loss(states, weight, labels, ref_logps=torch.zeros(4))
    assert torch.equal(free.loss, zero.loss)


def test_unpaired_sides_are_averaged_by_their_own_count():
    states, weight, labels, other = batch(sequences=5)
    is_chosen = torch.tensor([True, False, False, True, False])
    ref = ref_sums(other, weight, labels)
    out = fused_dil_loss(states, weight, labels, ref_logps=ref, is_chosen=is_chosen)
    lengths = (labels[:, 1:] != -100).sum(1)
    f = (ref_sums(states, weight, labels) - ref) / lengths
    expected = -f[is_chosen].exp().mean() + (2 * f[~is_chosen]).exp().mean() / 2
    torch.testing.assert_close(out.loss, expected)
    assert out.chosen_logps.shape == (2,) and out.rejected_logps.shape == (3,)


def test_packed_sequences_never_predict_across_their_border():
    states, weight, labels, other = batch(sequences=4, length=7)
    lengths = torch.tensor([7, 3, 1, 6])
    keep = torch.arange(7) < lengths[:, None]
    labels = torch.where(keep, labels.abs() % 31, -100)
    padded = fused_dil_loss(states, weight, labels, ref_hidden_states=other)
    packed = fused_dil_loss(
        states[keep], weight, labels[keep], ref_hidden_states=other[keep],
        cu_seqlens=torch.tensor([0, 7, 10, 11, 17]),
    )  # fmt: skip
    torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(packed.chosen_logps, padded.chosen_logps)


@pytest.mark.parametrize("cu_seqlens", [[0, 3, 3, 6, 6], [0, 0, 3, 3, 6], [0, 0, 0]])
def test_empty_packed_sequences(cu_seqlens):
    states, weight, labels, other = batch(sequences=1, length=6)
    out = fused_dil_loss(
        states[0, : cu_seqlens[-1]], weight, labels[0, : cu_seqlens[-1]].abs() % 31,
        ref_hidden_states=other[0, : cu_seqlens[-1]], cu_seqlens=torch.tensor(cu_seqlens),
    )  # fmt: skip
    assert torch.isfinite(out.loss)
    lengths = torch.cat([out.chosen_lengths, out.rejected_lengths])
    assert lengths.tolist() == [max(0, b - a - 1) for a, b in pairwise(cu_seqlens)]


def test_padding_does_not_change_the_loss():
    states, weight, labels, other = batch()
    pad = (0, 0, 0, 5)
    more = torch.nn.functional.pad
    padded = fused_dil_loss(
        more(states, pad, value=3.0), weight, more(labels, (0, 5), value=-100),
        ref_hidden_states=more(other, pad),
    )  # fmt: skip
    plain = fused_dil_loss(states, weight, labels, ref_hidden_states=other)
    torch.testing.assert_close(padded.loss, plain.loss, rtol=1e-12, atol=0)


def test_empty_completions_carry_no_weight_and_no_nan():
    states, weight, labels, other = batch()
    states.requires_grad_()
    labels[0] = -100
    out = fused_dil_loss(states, weight, labels, ref_hidden_states=other)
    out.loss.backward()
    assert torch.isfinite(out.loss) and torch.isfinite(states.grad).all()
    assert (states.grad[0] == 0).all()
    alone = fused_dil_loss(
        states[1:], weight, labels[1:], ref_hidden_states=other[1:],
        is_chosen=torch.tensor([True, False, False]),
    )  # fmt: skip
    torch.testing.assert_close(out.loss, alone.loss)


def test_every_completion_empty_gives_zero():
    states, weight, labels, other = batch()
    states.requires_grad_()
    out = fused_dil_loss(states, weight, torch.full_like(labels, -100), ref_hidden_states=other)
    out.loss.backward()
    assert out.loss == 0 and (states.grad == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("loss", ["lsif", "ukl", "bce", "dpo", "simpo", "sft"])
def test_non_finite_hidden_states_reach_the_loss(bad, loss):
    states, weight, labels, other = batch()
    states[0, -2, 0] = bad  # the row that predicts a scored label
    ref = {} if loss in ("simpo", "sft") else {"ref_hidden_states": other}
    assert not torch.isfinite(fused_preference_loss(states, weight, labels, loss=loss, **ref).loss)


def test_max_log_ratio_keeps_extreme_ratios_finite_and_counts_them():
    states, weight, labels, _ = batch(dtype=torch.float32)
    states.requires_grad_()
    ref = torch.tensor([-5000.0, 0.0, -5000.0, 0.0])
    out = fused_dil_loss(states, weight, labels, ref_logps=ref, length_normalize=False)
    out.loss.backward()
    assert torch.isfinite(out.loss) and torch.isfinite(states.grad).all()
    assert states.grad[2].abs().max() > 0  # a clamp would have left the rejected sample alone
    assert out.clip_fraction.item() == 0.5
    assert out.chosen_clipped.tolist() == out.rejected_clipped.tolist() == [True, False]
    metrics = preference_metrics(out)
    assert metrics["clip_frac/chosen"] == metrics["clip_frac/rejected"] == 0.5
    with pytest.raises(ValueError, match="strict"):
        fused_dil_loss(states, weight, labels, ref_logps=ref, length_normalize=False, strict=True)
    with pytest.raises(ValueError, match="strict=True and max_log_ratio=None"):
        fused_dil_loss(states, weight, labels, ref_logps=ref, max_log_ratio=None, strict=True)


def test_module_is_the_function():
    states, weight, labels, other = batch()
    module = DILLoss("bce", beta=0.3, workspace_mib=1)
    out = module(states, weight, labels, ref_hidden_states=other)
    same = fused_dil_loss(states, weight, labels, ref_hidden_states=other, h="bce", beta=0.3)
    torch.testing.assert_close(out.loss, same.loss)
    assert "beta=0.3" in repr(module)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "beta": 0.3}], ids=str)
def test_an_objective_stands_for_a_name_and_its_options(options):
    states, weight, labels, other = batch()
    kw, objective = {"ref_hidden_states": other}, Objective("bce", **options)
    named = fused_dil_loss(states, weight, labels, h="bce", **kw, **options).loss
    assert torch.equal(fused_dil_loss(states, weight, labels, h=objective, **kw).loss, named)
    out = fused_preference_loss(states, weight, labels, loss=objective, **kw)
    assert torch.equal(out.loss, named)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_objective_survives_pickle(loss):
    objective = Objective(loss)
    again = pickle.loads(pickle.dumps(objective))
    assert again.loss is LOSSES[loss] and repr(again) == repr(objective)


def test_outputs_beside_the_loss_are_detached():
    states, weight, labels, other = batch()
    out = fused_dil_loss(states.requires_grad_(), weight, labels, ref_hidden_states=other)
    for name, value in out._asdict().items():
        if isinstance(value, torch.Tensor):
            assert value.requires_grad == (name == "loss"), name


def test_gradient_reaches_hidden_states_through_the_identity():
    """dL/dh_i = g_i u_i with the reference's u, for a loss made up on the spot."""
    states, weight, labels, _ = batch()
    flat, y = states.reshape(-1, 16).requires_grad_(), labels.reshape(-1)
    logps = linear_logps(flat, weight, y)
    loss = (logps * torch.linspace(0, 3, y.numel(), dtype=torch.float64)).sin().sum()
    g = torch.autograd.grad(loss, logps, retain_graph=True)[0]
    (grad,) = torch.autograd.grad(loss, flat)
    u = reference.unscaled_gradient(flat.detach(), weight, y.clamp(min=0))
    torch.testing.assert_close(grad, (g * (y != -100)).unsqueeze(1) * u)


@pytest.mark.parametrize("loss", ["lsif", "dpo", "simpo", "orpo"])
def test_torch_compile_fullgraph(loss):
    states, weight, labels, other = batch()
    ref = {} if loss in ("simpo", "orpo") else {"ref_hidden_states": other}

    def step(x):
        return fused_preference_loss(x, weight, labels, loss=loss, **ref).loss

    torch._dynamo.reset()
    traced, plain = (states.clone().requires_grad_() for _ in range(2))
    torch.compile(step, fullgraph=True, backend="aot_eager")(traced).backward()
    step(plain).backward()
    torch.testing.assert_close(traced.grad, plain.grad, rtol=1e-12, atol=1e-14)


def test_every_option_of_preference_loss_reaches_it():
    """Each knob changes the loss through fused_dil_loss as it does through preference_loss."""
    states, weight, labels, other = batch()
    token_ref = 1.2 * reference.shifted_token_logps(other, weight, labels)
    token = reference.shifted_token_logps(states, weight, labels)
    lengths = (labels[:, 1:] != -100).sum(1)
    sums = {"log_ratios": (token - token_ref).sum(1)}
    plain = fused_dil_loss(states, weight, labels, ref_logps=token_ref).loss
    for options in (
        {"beta": 0.5}, {"length_normalize": False}, {"max_log_ratio": 0.01},
        {"pairing": "pairwise"}, {"label_smoothing": 0.2}, {"mixture": 0.3}, {"sft_weight": 0.5},
        {"weights": torch.tensor([1.0, 0.5, 2.0, 0.1], dtype=torch.float64)},
        {"counts": (3.0, 5.0)}, {"is_chosen": torch.tensor([True, False, True, True])},
    ):  # fmt: skip
        fused = fused_dil_loss(states, weight, labels, ref_logps=token_ref, **options).loss
        direct = preference_loss(token.sum(1), lengths, **sums, **options).loss
        torch.testing.assert_close(fused, direct, rtol=1e-12, atol=1e-14, msg=str(options))
        assert abs(fused - plain) > 1e-6, options
