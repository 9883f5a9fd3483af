"""The heavy op: numbers, gradients, dtypes, autograd behaviour."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dilkern import DenseHead, linear_logps, reference


def make(tokens, vocab, hidden, dtype=torch.float64, bias=True, sharpness=1.0):
    h = torch.randn(tokens, hidden, dtype=torch.float64)
    w = sharpness * torch.randn(vocab, hidden, dtype=torch.float64) / hidden**0.5
    b = torch.randn(vocab, dtype=torch.float64) if bias else None
    y = torch.randint(0, vocab, (tokens,))
    return h.to(dtype), w.to(dtype), None if b is None else b.to(dtype), y


def upstream(logps, loss_scale):
    return loss_scale * torch.linspace(-1, 2, logps.numel(), dtype=logps.dtype).reshape(logps.shape)


def naive(h, w, b, y, dtype, loss_scale=1.0, **kw):
    """Full-logits log-probs and their gradients in `dtype` under a fixed upstream gradient."""
    tensors = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (h, w, b)]
    logps = reference.token_logps(tensors[0], tensors[1], y, lm_head_bias=tensors[2], **kw)
    inputs = [t for t in tensors if t is not None]
    return logps.detach(), torch.autograd.grad(logps, inputs, upstream(logps, loss_scale))


def ours(h, w, b, y, scale=1.0, softcap=0.0, loss_scale=1.0, **kw):
    tensors = [None if t is None else t.detach().clone().requires_grad_() for t in (h, w, b)]
    head = DenseHead(tensors[1], tensors[2], scale=scale, softcap=softcap)
    logps = linear_logps(tensors[0], head, y, **kw)
    inputs = [t for t in tensors if t is not None]
    return logps.detach(), torch.autograd.grad(logps, inputs, upstream(logps, loss_scale))


@pytest.mark.parametrize("seed", range(60))
def test_fp64_equals_naive_autograd(seed, budget):
    rng = torch.Generator().manual_seed(seed)
    tokens, vocab, hidden = (int(torch.randint(1, n, (), generator=rng)) for n in (70, 300, 40))
    workspace = [0.02, 0.1, 1.0, 256][seed % 4]
    kw = {"scale": 0.5 + seed % 3, "softcap": [0.0, 4.0][seed % 2]}
    h, w, b, y = make(tokens, vocab, hidden, bias=seed % 3 > 0, sharpness=1 + seed % 5)
    y[torch.rand(tokens, generator=rng) < 0.3] = -100
    logps, grads = ours(h, w, b, y, workspace_mib=workspace, **kw)
    truth, truth_grads = naive(h, w, b, y, torch.float64, **kw)
    budget.exact64("logps", logps, truth)
    for name, got, want in zip(("hidden", "weight", "bias"), grads, truth_grads):
        budget.exact64(f"grad {name}", got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("sharpness", [1.0, 6.0])
def test_error_within_twice_that_of_naive(dtype, softcap, sharpness, budget):
    h, w, b, y = make(96, 777, 64, dtype, sharpness=sharpness)
    logps, grads = ours(h, w, b, y, softcap=softcap, workspace_mib=0.5)
    peer, peer_grads = naive(h, w, b, y, dtype, softcap=softcap)
    truth, truth_grads = naive(h, w, b, y, torch.float64, softcap=softcap)
    budget.check("logps", logps, peer, truth)
    for name, got, other, want in zip(("hidden", "weight", "bias"), grads, peer_grads, truth_grads):
        assert got.dtype == dtype
        budget.check(f"grad {name}", got, other, want)


def confident(dtype, margin):
    """Tokens whose label has probability 1 - V e^-margin: h points at its own row of W."""
    tokens, vocab, hidden = 48, 512, 64
    w = torch.randn(vocab, hidden, dtype=torch.float64) * 0.05
    y = torch.randperm(vocab)[:tokens]
    h = 0.1 * torch.randn(tokens, hidden, dtype=torch.float64)
    h = h + margin * w[y] / w[y].square().sum(-1, keepdim=True)
    return h.to(dtype), w.to(dtype), y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("margin", [17.0, 21.0])
def test_confident_tokens_keep_their_gradient(dtype, margin, budget):
    h, w, y = confident(dtype, margin)
    # A gradient of 1e-6 does not exist in fp16: its users train with a scaled loss.
    loss_scale = 4096.0 if dtype is torch.float16 else 1.0
    truth, (truth_grad, _) = naive(h, w, None, y, torch.float64, loss_scale)
    peer, (peer_grad, _) = naive(h, w, None, y, dtype, loss_scale)
    logps, (grad, _) = ours(h, w, None, y, loss_scale=loss_scale)
    assert truth.exp().min() > (0.999 if margin == 17.0 else 0.9999)
    budget.check("logps", logps, peer, truth)
    budget.check("grad", grad, peer_grad, truth_grad)
    rows = (grad.double() - truth_grad).norm(dim=1) / truth_grad.norm(dim=1).clamp(min=1e-30)
    assert rows.max() < 0.02


def test_bf16_log_probs_are_within_a_millinat_of_fp64():
    h, w, _, y = make(256, 4000, 128, torch.bfloat16, bias=False, sharpness=4.0)
    truth = reference.token_logps(h.double(), w.double(), y)
    rms = (linear_logps(h, w, y).double() - truth).square().mean().sqrt()
    rounded = reference.token_logps(h, w, y).double()  # bf16 logits, as rivals round them
    assert rms < 1e-3
    assert (rounded - truth).square().mean().sqrt() > 10 * rms


@pytest.mark.parametrize("size", [50.0, 3e4])
def test_large_logits_do_not_overflow(size):
    h, w, _, y = make(16, 100, 8, torch.float32, bias=False)
    logps, grads = ours(h * size, w, None, y, workspace_mib=0.01)
    truth, _ = naive(h * size, w, None, y, torch.float64)
    assert torch.isfinite(logps).all()
    torch.testing.assert_close(logps.double(), truth, rtol=1e-5, atol=1e-3)
    assert all(torch.isfinite(g).all() for g in grads)


def test_masked_words_have_no_weight(budget):
    h, w, b, y = make(20, 64, 8)
    b[10:20] = -torch.inf
    y = torch.where((y >= 10) & (y < 20), 0, y)
    truth, truth_grads = naive(h, w, b, y, torch.float64)
    logps, grads = ours(h, w, b, y, workspace_mib=0.01)
    budget.exact64("logps", logps, truth)
    budget.exact64("grad", grads[0], truth_grads[0])


@pytest.mark.parametrize("shape", [(0,), (1,), (13,), (2, 0), (3, 7)])
def test_shapes(shape):
    h, w, y = torch.randn(*shape, 8), torch.randn(23, 8), torch.randint(0, 23, shape)
    h.requires_grad_()
    logps = linear_logps(h, w, y)
    assert logps.shape == y.shape and logps.dtype == torch.float32
    logps.sum().backward()
    assert h.grad.shape == h.shape
    torch.testing.assert_close(logps, reference.token_logps(h, w, y))


def test_shift_pairs_each_label_with_the_state_before_it():
    h, w, y = torch.randn(3, 6, 8), torch.randn(23, 8), torch.randint(0, 23, (3, 6))
    y[1, 2:4] = -100
    got = linear_logps(h, w, y, shift=True)
    torch.testing.assert_close(got, reference.shifted_token_logps(h, w, y))
    assert (got[:, 0] == 0).all() and (got[1, 2:4] == 0).all()


def test_all_ignored_is_zero_and_differentiable():
    h = torch.randn(4, 8, requires_grad=True)
    logps = linear_logps(h, torch.randn(9, 8), torch.full((4,), -100))
    logps.sum().backward()
    assert (logps == 0).all() and (h.grad == 0).all()


def test_non_contiguous_and_unchanged_inputs():
    h = torch.randn(8, 12).t()
    w = torch.randn(8, 23).t()
    y = torch.randint(0, 23, (24,))[::2]
    copies = [t.clone() for t in (h, w, y)]
    torch.testing.assert_close(linear_logps(h, w, y), reference.token_logps(h, w, y))
    assert all(torch.equal(a, b) for a, b in zip((h, w, y), copies))


@pytest.mark.parametrize("what", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)])
def test_gradients_of_any_subset(what):
    h, w, b, y = make(9, 31, 8)
    full = dict(zip(range(3), naive(h, w, b, y, torch.float64)[1]))
    tensors = [t.clone().requires_grad_(bool(r)) for t, r in zip((h, w, b), what)]
    logps = linear_logps(tensors[0], DenseHead(tensors[1], tensors[2]), y)
    (logps * torch.linspace(-1, 2, 9, dtype=torch.float64)).sum().backward()
    for i, tensor in enumerate(tensors):
        assert (tensor.grad is None) == (not what[i])
        if what[i]:
            torch.testing.assert_close(tensor.grad, full[i])


def test_gradcheck():
    h, w, b, y = make(5, 13, 4)
    y[2] = -100
    for t in (h, w, b):
        t.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logps(h, DenseHead(w, b, softcap=3.0), y), (h, w, b)
    )


def test_trainable_linear_module_and_tied_embedding(budget):
    embedding = torch.nn.Embedding(17, 6).double()
    head = torch.nn.Linear(6, 17, bias=False).double()
    head.weight = embedding.weight
    tokens, y = torch.randint(0, 17, (12,)), torch.randint(0, 17, (12,))
    linear_logps(embedding(tokens), head, y).sum().backward()
    weight = embedding.weight.detach().clone().requires_grad_()
    reference.token_logps(weight[tokens], weight, y).sum().backward()
    budget.exact64("tied gradient", embedding.weight.grad, weight.grad)


def test_same_bits_twice_and_with_or_without_gradient():
    h, w, _, y = make(300, 1000, 32, torch.float32, bias=False)
    first, second = (ours(h, w, None, y, workspace_mib=0.5) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1]))
    with torch.no_grad():
        assert torch.equal(first[0], linear_logps(h, w, y, workspace_mib=0.5))


def test_row_permutation_permutes_the_result():
    h, w, _, y = make(40, 99, 16, torch.float64, bias=False)
    order = torch.randperm(40)
    torch.testing.assert_close(linear_logps(h, w, y)[order], linear_logps(h[order], w, y[order]))


def test_retain_graph_gives_the_same_gradient_twice():
    h, w, y = torch.randn(7, 8, requires_grad=True), torch.randn(11, 8), torch.randint(0, 11, (7,))
    loss = linear_logps(h, w, y).square().sum()
    (first,) = torch.autograd.grad(loss, h, retain_graph=True)
    (second,) = torch.autograd.grad(loss, h)
    assert torch.equal(first, second)


@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("power", [1, 2])
def test_double_backward_is_refused(head_trains, power):
    h, y = torch.randn(7, 8, requires_grad=True), torch.randint(0, 11, (7,))
    w = torch.randn(11, 8, requires_grad=head_trains)
    loss = linear_logps(h, w, y).pow(power).sum()
    for tensor in (h, w) if head_trains else (h,):
        (grad,) = torch.autograd.grad(loss, tensor, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.square().sum().backward(retain_graph=True)


@pytest.mark.parametrize("which", ["hidden", "head"])
def test_forward_mode_is_refused(which):
    h, w, y = torch.randn(7, 8), torch.randn(11, 8), torch.randint(0, 11, (7,))
    score = (
        (lambda x: linear_logps(x, w, y)) if which == "hidden" else lambda x: linear_logps(h, x, y)
    )
    x = h if which == "hidden" else w
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(score, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    h, w, y = torch.randn(7, 8), torch.randn(11, 8), torch.randint(0, 11, (7,))
    plain, wrapped = (h.clone().requires_grad_() for _ in range(2))
    linear_logps(plain, w, y).sum().backward()
    checkpoint(linear_logps, wrapped, w, y, use_reentrant=reentrant).sum().backward()
    assert torch.equal(plain.grad, wrapped.grad)


def test_autocast_uses_its_dtype_and_keeps_fp32_statistics():
    h, w, _, y = make(64, 500, 32, torch.float32, bias=False)
    h.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logps = linear_logps(h, w, y)
    logps.sum().backward()
    assert logps.dtype == torch.float32 and h.grad.dtype == torch.float32
    assert torch.equal(logps, linear_logps(h.bfloat16(), w.bfloat16(), y))
    with torch.autocast("cpu", torch.bfloat16):  # mixed dtypes are what autocast is for
        assert torch.equal(logps, linear_logps(h.bfloat16(), w, y))


def test_nan_and_inf_propagate_and_stay_in_their_row():
    h, w, y = torch.randn(6, 8), torch.randn(11, 8), torch.randint(0, 11, (6,))
    h[2, 3], h[4, 0] = torch.nan, torch.inf
    logps = linear_logps(h, w, y)
    assert not torch.isfinite(logps[[2, 4]]).any()
    assert torch.isfinite(logps[[0, 1, 3, 5]]).all()


def test_saves_u_and_not_the_hidden_states_for_a_frozen_head():
    h, w, y = torch.randn(64, 32), torch.randn(101, 32), torch.randint(0, 101, (64,))
    y[::2] = -100
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_logps(h.clone().requires_grad_(), w, y)
    assert sum(t.numel() for t in saved) <= 32 * 32 + 3 * 64


# What torch 2.15 warns of itself about, in its own checks.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("filter_eps", [0.0, 0.05])
def test_custom_op_registration(filter_eps):
    h = torch.randn(7, 8, requires_grad=True)
    head = DenseHead(torch.randn(11, 8, requires_grad=True))
    args = (h, torch.randint(0, 11, (7,)), head.tensors(), head.spec(), 0, -100, "torch")
    asked = (1 << 20, filter_eps, True, True)
    torch.library.opcheck(torch.ops.dilkern.linear_logps.default, (*args, *asked))


@pytest.mark.parametrize("filter_eps", [None, 0.05])
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_fullgraph(dynamic, filter_eps):
    w, y = torch.randn(31, 8, requires_grad=True), torch.randint(0, 31, (2, 9))
    y[0, :4] = -100

    def loss(h):
        return linear_logps(h, w, y, shift=True, filter_eps=filter_eps).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    plain, traced = (torch.ones(2, 9, 8).requires_grad_() for _ in range(2))
    loss(plain).backward()
    of_head, w.grad = w.grad, None
    compiled(traced).backward()
    assert torch.equal(plain.grad, traced.grad) and torch.equal(of_head, w.grad)
