"""fused_dil_loss with every kernel, against the torch backend: one launch gives the same loss."""

import pytest
import torch
from batches import batch

from dilkern import LOSSES, DenseHead, fused_dil_loss, fused_preference_loss, pointwise

TWINS = [name for name, entry in LOSSES.items() if entry.triton]
LAYOUTS = ["padded", "packed", "unpaired", "empty", "weighted"]


def problem(layout, dtype=torch.float32):
    states, weight, labels, other = batch(5, 4, 12, 16, 40, dtype, empty=layout == "empty")
    kw = {}
    if layout == "packed":
        kw["cu_seqlens"] = torch.tensor([0, 12, 20, 36, 48])
        states, other, labels = states.reshape(48, 16), other.reshape(48, 16), labels.reshape(48)
    if layout == "unpaired":
        kw["is_chosen"] = torch.tensor([False, True, False, False])
    if layout == "weighted":
        kw |= {"weights": torch.tensor([1.0, 0.5, 2.0, 0.0]), "counts": (3.0, 5.0)}
    return states, weight, labels, other, kw


def both(states, weight, labels, **kw):
    """Loss, gradient and every output of the two backends."""
    results = []
    for backend in ("triton", "torch"):
        x = states.detach().clone().requires_grad_()
        out = fused_dil_loss(x, weight, labels, backend=backend, workspace_mib=0.5, **kw)
        out.loss.backward()
        results.append((out, x.grad))
    return results


def assert_same(mine, theirs, rtol=2e-5):
    (out, grad), (other, other_grad) = mine, theirs
    for name, a, b in zip(out._fields, out, other):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(
                a, b, rtol=rtol, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert a == b, name
    torch.testing.assert_close(grad, other_grad, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("h", TWINS)
def test_same_loss_as_the_torch_backend(h, layout):
    states, weight, labels, other, kw = problem(layout)
    assert_same(*both(states, weight, labels, ref_hidden_states=other, h=h, **kw))


@pytest.mark.parametrize("reference", ["tokens", "sequences", "free"])
@pytest.mark.parametrize("length_normalize", [True, False])
def test_every_form_of_reference(reference, length_normalize):
    states, weight, labels, _, _ = problem("padded")
    ref = {
        "tokens": {"ref_logps": torch.where(labels == -100, torch.nan, -3.5)},
        "sequences": {"ref_logps": torch.tensor([-30.0, -25.0, -28.0, -31.0])},
        "free": {"reference_free": True},
    }[reference]
    kw = {"length_normalize": length_normalize, "beta": 0.3, "max_log_ratio": 0.5}
    assert_same(*both(states, weight, labels, **ref, **kw))


def test_it_is_the_kernel_that_ran(monkeypatch):
    calls = []
    run = pointwise.pointwise_loss
    monkeypatch.setattr(
        "dilkern.preference.pointwise_loss", lambda *a, **k: calls.append(1) or run(*a, **k)
    )
    states, weight, labels, other, _ = problem("padded")
    kw = {"ref_hidden_states": other, "backend": "triton"}
    fused_dil_loss(states, weight, labels, **kw)
    assert calls == [1]
    # What the kernel does not know goes through the torch path, on the same log-probs.
    for options in ({"label_smoothing": 0.1}, {"sft_weight": 0.1}, {"pairing": "pairwise"}):
        fused_dil_loss(states, weight, labels, **kw, **options)
    fused_preference_loss(states, weight, labels, loss="dpo", **kw)
    assert calls == [1]


def test_policy_equal_to_reference_is_exactly_zero_and_errors_are_the_same():
    states, weight, labels, _, _ = problem("padded", torch.bfloat16)
    kw = {"ref_hidden_states": states, "backend": "triton"}
    out = fused_dil_loss(states.clone().requires_grad_(), weight, labels, **kw)
    assert (out.chosen_log_ratios == 0).all() and out.loss.item() == -0.5
    with pytest.raises(ValueError, match="strict"):
        fused_dil_loss(states, weight, labels, ref_logps=torch.full((4,), -1e4), strict=True,
                       backend="triton")  # fmt: skip
    with pytest.raises(ValueError, match="received 4 chosen, 0 rejected"):
        fused_dil_loss(states, weight, labels, is_chosen=torch.ones(4).bool(), **kw)
    with pytest.raises(ValueError, match="`weights` must have the shape"):
        fused_dil_loss(states, weight, labels, weights=torch.ones(3), **kw)


def test_operators_are_registered_rightly():
    states, weight, labels, _, _ = problem("padded")
    flat, y = states.reshape(-1, 16).requires_grad_(), labels.reshape(-1)
    head = DenseHead(weight.requires_grad_())
    # Fake tensors are checked in tests/core: the registration is the same for every backend, and
    # the poisoned torch.empty of this folder does not know them.
    checks = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.dilkern.linear_logps.default,
        (flat, y, head.tensors(), head.spec(), 0, -100, "triton", 1 << 20, 0.0, True, False),
        test_utils=checks,
    )
    logps = -torch.rand(48, requires_grad=True)
    torch.library.opcheck(
        torch.ops.dilkern.pointwise_loss.default,
        (logps, y != -100, torch.arange(0, 49, 12), torch.tensor([True, True, False, False]),
         torch.ones(4), None, torch.zeros(4), "bce", 1.0, True, 10.0, 0.0),
        test_utils=checks,
    )  # fmt: skip
