"""linear_logps on the triton backend, against fp64 and bit by bit against itself."""

import subprocess
import sys

import pytest
import torch
from naive import gather_logps
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter

from dilkern import linear_logps
from dilkern.backends import base
from dilkern.kernels import configs
from dilkern.lm_head import DenseHead

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# T, V, D: empty, one of everything, one block, ragged blocks, D no multiple of 16 bytes.
SHAPES = [
    (0, 7, 16),
    (1, 1, 8),
    (1, 65, 16),
    (37, 203, 80),
    (64, 128, 64),
    (70, 333, 72),
    (9, 50, 7),
]
OPTIONS = {
    "plain": {},
    "all": {"bias": True, "scale": 1.7, "softcap": 8.0},
}


def make(shape, dtype, bias=False, scale=1.0, softcap=0.0, spread=1.0, seed=0):
    torch.manual_seed(seed)
    t, v, d = shape
    h = torch.randn(t, d).mul_(spread).to(dtype)
    w = torch.randn(v, d).div_(d**0.25).to(dtype)
    b = torch.randn(v).to(dtype) if bias else None
    labels = torch.randint(0, v, (t,))
    labels[torch.rand(t) < 0.2] = -100
    return h, w, b, labels, {"scale": scale, "softcap": softcap}


def eager(h, w, b, labels, scale, softcap):
    """What PyTorch users write, in the dtype of the inputs up to the log-softmax."""
    z = torch.nn.functional.linear(h, w, b) * scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    acc = torch.float64 if z.dtype is torch.float64 else torch.float32
    return gather_logps(z.to(acc), labels)


def run(fn, *tensors, g):
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    logps = fn(*leaves)
    (logps * g.to(logps.dtype)).sum().backward()
    return logps.detach(), [None if x is None else x.grad for x in leaves]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_fp64_within_the_budget(dtype, shape, option, path, budget):
    h, w, b, labels, opts = make(shape, dtype, **OPTIONS[option])
    g = torch.randn(labels.shape, dtype=torch.float64)
    doubles = [None if x is None else x.double() for x in (h, w, b)]
    truth, truth_grads = run(lambda *x: eager(*x, labels, **opts), *doubles, g=g)
    _, peer_grads = run(lambda *x: eager(*x, labels, **opts), h, w, b, g=g)
    fp32 = [None if x is None else x.float() for x in (h, w, b)]
    peer32 = eager(*fp32, labels, **opts)

    def ours(h, w, b):
        head = DenseHead(w, b, **opts)
        return linear_logps(h, head, labels, backend="triton", workspace_mib=0.06)

    got, grads = run(ours, h, w, b, g=g)
    # Products of 16-bit inputs are exact in fp32: the log-probs must be as good as fp32's own.
    budget.check("logps", got, peer32, truth)
    for name, mine, other, true in zip(("h", "w", "b"), grads, peer_grads, truth_grads):
        if true is not None:
            budget.check(f"grad {name}", mine, other, true)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_gradient_does_not_change_a_bit(dtype, option, path):
    h, w, b, labels, opts = make((53, 301, 72), dtype, **OPTIONS[option], spread=3.0)
    head = DenseHead(w, b, **opts)
    options = {"backend": "triton", "workspace_mib": 0.05}
    with_u = linear_logps(h.clone().requires_grad_(), head, labels, **options)
    without = linear_logps(h, head, labels, **options)
    assert torch.equal(with_u, without)


def test_two_runs_give_the_same_bits(path):
    h, w, b, labels, opts = make((40, 150, 48), torch.bfloat16, bias=True, softcap=9.0)
    runs = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in (h, w, b)]
        out = linear_logps(
            leaves[0], DenseHead(leaves[1], leaves[2], **opts), labels, backend="triton"
        )
        out.sum().backward()
        runs.append([out, *(x.grad for x in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_tokens_keep_their_gradient(dtype, path):
    torch.manual_seed(3)
    w = torch.randn(90, 64).to(dtype)
    labels = torch.randint(0, 90, (33,))
    h = (w[labels].float() * 0.4).to(dtype)  # p_y > 0.999
    g = torch.ones(33)
    truth, (grad_true,) = run(
        lambda x: eager(x, w.double(), None, labels, 1.0, 0.0), h.double(), g=g
    )
    assert truth.exp().min() > 0.9
    leaf = h.clone().requires_grad_()
    got = linear_logps(leaf, w, labels, backend="triton", workspace_mib=0.05)
    # Relative in each row, also of 1 - p_y: nothing may cancel.
    miss = torch.expm1(got.double()) / torch.expm1(truth)
    assert (miss - 1).abs().max() < 2e-4
    got.sum().backward()
    rows = (leaf.grad.double() - grad_true).norm(dim=1) / grad_true.norm(dim=1)
    tiny = grad_true.norm(dim=1) < 1e-5  # fp16 gradients are subnormal there
    assert rows[~tiny].max() < 8 * torch.finfo(dtype).eps + 2e-4


@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_any_finite_logit(order, size, path, budget):
    """Logits that climb by far more than the slack from block to block, and back."""
    torch.manual_seed(0)
    v = 300
    ramp = torch.linspace(-1, 1, v) if order == "rising" else torch.linspace(1, -1, v)
    w = torch.zeros(v, 16)
    w[:, 0] = ramp * size
    w[:, 1:] = torch.randn(v, 15)
    h = torch.randn(20, 16)
    h[:, 0] = 1 + 0.01 * torch.arange(20)
    labels = torch.randint(0, v, (20,))
    leaf, truth_leaf = h.clone().requires_grad_(), h.double().requires_grad_()
    head = w.clone().requires_grad_()
    got = linear_logps(leaf, head, labels, backend="triton", workspace_mib=0.02)
    truth = eager(truth_leaf, w.double(), None, labels, 1.0, 0.0)
    other = h.clone().requires_grad_()
    peer = eager(other, w, None, labels, 1.0, 0.0)
    for x in (got, truth, peer):
        x.sum().backward()
    budget.check("logps", got.detach(), peer.detach(), truth.detach())
    budget.check("grad", leaf.grad, other.grad, truth_leaf.grad)
    assert torch.isfinite(head.grad).all()


def test_logits_of_hundreds_keep_the_digits_of_the_head_gradient(path, budget):
    """Where one word has all the probability, the log-sum-exp must be its logit to the last place."""
    h, w, b, labels, options = make((40, 300, 32), torch.float32, bias=True, spread=40.0, seed=1)
    g = torch.randn(40)

    def fused(h, w, b):
        return linear_logps(h, DenseHead(w, b, **options), labels, backend="triton")

    def naive(h, w, b):
        return eager(h, w, b, labels, **options)

    _, got = run(fused, h, w, b, g=g)
    _, peer = run(naive, h, w, b, g=g)
    _, truth = run(naive, h.double(), w.double(), b.double(), g=g)
    for name, *three in zip(("hidden", "weight", "bias"), got, peer, truth):
        budget.check(name, *three)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_inputs_propagate(value, path):
    h, w, _, labels, _ = make((12, 140, 32), torch.float32)
    labels = labels.clamp_min(0)
    h[3, 5] = value
    got = linear_logps(h, w, labels, backend="triton")
    assert not torch.isfinite(got[3])
    assert torch.isfinite(got[torch.arange(12) != 3]).all()


def test_minus_infinite_bias_removes_words(path):
    h, w, _, labels, _ = make((12, 140, 32), torch.float32)
    labels = labels.clamp_min(0)
    b = torch.zeros(140)
    b[70:] = -float("inf")
    labels = labels % 70
    got = linear_logps(h, DenseHead(w, b), labels, backend="triton", workspace_mib=0.03)
    short = linear_logps(h, w[:70], labels, backend="torch")
    torch.testing.assert_close(got, short, rtol=1e-5, atol=1e-5)


def test_rows_and_weights_that_are_not_contiguous(path):
    h, w, _, labels, _ = make((30, 100, 48), torch.float16)
    plain = linear_logps(h, w, labels, backend="triton")
    strided = torch.empty(60, 96, dtype=torch.float16)[::2, ::2]
    strided.copy_(h)
    transposed = w.t().contiguous().t()
    offset = torch.zeros(101, 49, dtype=torch.float16)[1:, 1:].copy_(w)
    assert torch.equal(linear_logps(strided, w, labels, backend="triton"), plain)
    assert torch.equal(linear_logps(h, transposed, labels, backend="triton"), plain)
    assert torch.equal(linear_logps(h, offset, labels, backend="triton"), plain)


@pytest.mark.parametrize("workspace_mib", [0.012, 0.1, 64])
def test_any_workspace(workspace_mib, path):
    h, w, b, labels, opts = make((41, 260, 40), torch.bfloat16, bias=True)
    leaf = h.clone().requires_grad_()
    got = linear_logps(
        leaf, DenseHead(w, b, **opts), labels, backend="triton", workspace_mib=workspace_mib
    )
    got.sum().backward()
    truth, (grad, *_) = run(
        lambda *x: eager(*x, labels, **opts),
        h.double(),
        w.double(),
        b.double(),
        g=torch.ones(41),
    )
    assert (got - truth).abs().max() < 3e-5
    assert (leaf.grad - grad).abs().max() < 0.02 * grad.abs().max()


def test_inputs_are_left_alone(path):
    h, w, b, labels, _ = make((20, 90, 32), torch.float32, bias=True)
    before = [x.clone() for x in (h, w, b, labels)]
    leaf = h.requires_grad_()
    linear_logps(leaf, DenseHead(w, b), labels, backend="triton").sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (h.detach(), w, b, labels)))


class Operations(TorchDispatchMode):
    """The operations that launch something: neither views, nor new memory, nor products."""

    FREE = ("empty", "new_empty", "slice", "select", "unbind", "t", "detach", "mm", "addmm_")
    FREE += ("alias", "fill_")  # the latter of `poisoned_empty`

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.names += [] if name in self.FREE else [name]
        return func(*args, **(kwargs or {}))


def test_few_launches_beside_products_and_kernels(monkeypatch):
    """A row block gathers its rows and the labels' words and clears its sums: no more."""
    launch = interpreter.GridExecutor.__call__

    def unseen(*args, **kwargs):
        with _disable_current_modes():
            return launch(*args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", unseen)
    h, w, b, labels, opts = make((96, 100, 16), torch.float32, **OPTIONS["all"])
    backend, head = base.load("triton"), DenseHead(w, b, **opts)
    rows, labels = torch.arange(96), labels.clamp_min(0)
    counts = []
    for size in (16, 32):  # rows per block
        blocks = base.Blocks(size, size, 100)
        monkeypatch.setattr(backend, "plan", lambda *a, b=blocks, **k: b)
        with Operations() as seen:
            backend.forward(h, rows, labels, head, workspace_bytes=1 << 20, need_u=True)
        counts.append(len(seen.names))
    assert (counts[0] - counts[1]) / 3 <= 5, seen.names


def test_int32_labels():
    h, w, _, labels, _ = make((20, 90, 32), torch.float32)
    got = linear_logps(h, w, labels.int(), backend="triton")
    assert torch.equal(got, linear_logps(h, w, labels, backend="triton"))


def test_auto_stays_with_torch_on_cpu_and_fp64_is_refused():
    cpu = torch.device("cpu")
    assert base.resolve("auto", cpu) is base.load("torch")
    assert base.resolve("triton", cpu, torch.float32) is base.load("triton")
    with pytest.raises(ValueError, match="torch backend"):
        linear_logps(
            torch.randn(2, 4).double(),
            torch.randn(3, 4).double(),
            torch.zeros(2).long(),
            backend="triton",
        )
    with pytest.raises(ValueError, match="mps"):
        base.resolve("triton", torch.device("mps"))


def test_tf32_only_where_pytorch_allows_it():
    assert configs.input_precision(torch.float32) == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert configs.input_precision(torch.float32) == "tf32"
        assert configs.input_precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert configs.input_precision(torch.float32) == "ieee"


def test_bf16_is_refused_in_an_interpreter_as_it_comes():
    """Unmended it multiplies bit patterns, without an error."""
    code = (
        "import torch; from dilkern import linear_logps; x = torch.ones(2, 8).bfloat16(); "
        "linear_logps(x, x, torch.tensor([0, 1]), backend='triton')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "bit patterns of bfloat16" in done.stderr, done.stderr
