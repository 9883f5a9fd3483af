"""The word filter's kernels, and the op with them, against fp64."""

import math

import pytest
import torch
from guard import guarded
from torch.utils._python_dispatch import TorchDispatchMode

from dilkern import linear_logps
from dilkern.backends import base, word_filter
from dilkern.kernels import configs, split_words
from dilkern.kernels.add_words import add_words
from dilkern.lm_head import Adapter, DenseHead, FourBit, FourBitHead, LoRAHead

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LN2 = math.log(2)
SETTINGS = {"most_loud": 0.5, "most_quiet": 1 / 16}


@pytest.fixture(params=["pointers", "descriptors"])
def product(request, monkeypatch):
    config = configs.product
    chosen = request.param == "descriptors"
    monkeypatch.setattr(configs, "product", lambda *a: config(*a)._replace(descriptors=chosen))


# Loud words of a block, by number, in so many words: none, one, a tile, ragged, half, more than half.
@pytest.mark.parametrize("k", [0, 1, 16, 37, 95, 96])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_words_are_split(dtype, k, monkeypatch):
    """Column sums, which words are loud, their columns side by side, and the mean of the others."""
    torch.manual_seed(k)
    n, v, d = 45, 190, 40
    top = torch.randint(-3, 9, (n,)).float()
    state = torch.stack((top, 1 + torch.rand(n), top - torch.randint(0, 12, (n,))))
    peak = top * LN2 + torch.randn(n)
    # Labels so likely that no other word has much of all: loud is who has much of the wrong ones.
    outlook = split_words.Outlook(peak, torch.rand(n), peak + 4 + torch.randn(n))
    strong = torch.randperm(v)[:k]
    p = torch.rand(n, v) * 1e-4 * (top - state[2]).exp2()[:, None]
    p[:, strong] *= 1e3
    p, weight = p.to(dtype), torch.randn(v, d).to(dtype)
    is_label = torch.zeros(v, dtype=torch.bool)
    is_label[strong[:1]] = True
    p[:, strong[:1]] = 0  # loud for being a label alone
    (weights, intact), (mass, intact_mass) = guarded(v), guarded(n)
    limit = 0.01 * n
    # What a kernel does not write looks like nothing left out.
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    split = split_words.split_words(
        p, weight, state, outlook, is_label, weights, mass, limit=limit, **SETTINGS
    )
    intact(), intact_mass()
    assert split.bounds.tolist() == ([k, -1] if k <= v // 2 else [-1, v])
    wide = p.double()
    ahead = outlook.to_come.double() * (outlook.peak.double() - state[2].double() * LN2).exp()
    wrong = state[1].double() * (state[0] - state[2]).double().exp2() + ahead
    every = wrong + (outlook.z_y.double() - state[2].double() * LN2).exp()
    loud = is_label | ((wide / wrong[:, None]).sum(0) > limit)
    assert loud.nonzero().squeeze(1).tolist() == strong.sort().values.tolist()
    q = torch.where(loud, -1.0, (wide / every[:, None]).sum(0))
    torch.testing.assert_close(weights.double(), q, rtol=1e-5, atol=0)
    if k > v // 2:
        return
    words = split.words[:k].long()
    assert torch.equal(words, loud.nonzero().squeeze(1))
    step = configs.product(p.device, dtype).block_v
    used = max(1, -(-k // step)) * step
    assert torch.equal(split.p[:, :k], p[:, words]) and (split.p[:, k:used] == 0).all()
    torch.testing.assert_close(mass.double(), wide[:, ~loud].sum(1), rtol=1e-5, atol=0)
    sums = (q.clamp_min(0)[:, None] * weight.double()).sum(0)
    torch.testing.assert_close(split.sums.double().sum(0), sums, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(split.shares.double().sum(), q.clamp_min(0).sum())


@pytest.mark.parametrize("quiet", [0.06, 0.07, float("nan")])
def test_a_row_with_too_much_in_quiet_words_has_its_block_taken_whole(quiet):
    n, v = 40, 100
    p, state = torch.zeros(n, v), torch.tensor([[0.0], [1.0], [0.0]]).repeat(1, n)
    p[-1] = quiet / v
    nothing = torch.full((n,), -100.0)
    outlook = split_words.Outlook(nothing, torch.zeros(n), nothing)
    split = split_words.split_words(
        p, torch.ones(v, 8), state, outlook, torch.zeros(v, dtype=torch.bool), torch.empty(v),
        torch.empty(n), limit=1.0, **SETTINGS,
    )  # fmt: skip
    assert split.bounds.tolist() == ([0, -1] if quiet == 0.06 else [-1, v])


@pytest.mark.parametrize("k", [0, 1, 16, 37, None])  # None: the block is taken whole
@pytest.mark.parametrize("shape", [(1, 40, 8), (45, 190, 130)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loud_words_and_their_mean_are_added(dtype, shape, k, product):
    torch.manual_seed(0)
    n, v, d = shape
    p, weight = torch.rand(n, v).to(dtype), torch.randn(v, d).to(dtype)
    u, intact = guarded(n, d)
    u.copy_(torch.randn(n, d))
    words = torch.randperm(v)[: k or 0].sort().values
    p_loud = torch.full((n, 48), float("nan"), dtype=dtype)
    p_loud[:, : max(16, -(-(k or 0) // 16) * 16)] = 0
    p_loud[:, : k or 0] = p[:, words]
    index = torch.full((48,), 1 << 30, dtype=torch.int32)
    index[: k or 0] = words.int()
    bounds = torch.tensor([-1, v] if k is None else [k, -1], dtype=torch.int32)
    mass, sums = torch.rand(n), torch.randn(split_words.CHUNKS, d)
    shares = torch.rand(split_words.CHUNKS)
    if k is None:
        sums.fill_(float("nan"))
    expected, left = u.double(), p_loud[:, : k or 0].double()
    if k is None:
        expected = expected + p.double() @ weight.double()
    else:
        mean = sums.double().sum(0) / shares.double().sum()
        expected = expected + left @ weight[words].double() + mass.double()[:, None] * mean
    add_words(u, p, weight, split_words.Split(p_loud, index, bounds, mass, sums, shares))
    intact()
    torch.testing.assert_close(u.double(), expected, rtol=1e-5, atol=1e-4)


N, V, D = 45, 400, 24
EPS = 2e-4


def problem(dtype, kind="dense", rows=N, **transform):
    """Rows that agree on which words are frequent, as text does."""
    torch.manual_seed(0)
    hidden = (0.5 * torch.randn(rows, D) + torch.randn(D)).to(dtype)
    weight = (3 * torch.randn(V, D) / D**0.5).to(dtype)
    labels = torch.distributions.Categorical(logits=(hidden @ weight.T).float()).sample()
    bias = torch.randn(V).to(dtype) if transform.pop("bias", False) else None
    if kind == "lora":
        a, b = (torch.randn(*s).to(dtype) / 4 for s in ((4, D), (V, 4)))
        head = LoRAHead(DenseHead(weight, bias, **transform), [Adapter(a, b, 0.5)])
        return head.project(hidden), labels, head
    if kind == "4bit":
        packed = torch.randint(0, 256, (V * D // 2,), dtype=torch.uint8)
        absmax = 0.2 + torch.rand(V * D // 24)
        return hidden, labels, FourBitHead(
            FourBit(packed, torch.linspace(-2, 2, 16), absmax, [], 24, 256, dtype), V, D
        )  # fmt: skip
    return hidden, labels, DenseHead(weight, bias, **transform)


def told(out, blocks, p, part_of):
    """P (N, V) as `Quiet` says that it was multiplied: loud words' own, quiet ones' in shares."""
    kept = torch.zeros_like(p)
    for row, part in enumerate(part_of):
        q = out.quiet.weights[part].double()
        kept[row] = torch.where(q < 0, p[row], 0)
        for number, (start, end) in enumerate(blocks):
            some = q[start:end].clamp_min(0)
            share = some / some.sum().clamp_min(1e-300)
            kept[row, start:end] += out.quiet.mass[number, row].double() * share
    return kept


CASES = {
    "plain": ("dense", {}),
    "all": ("dense", {"bias": True, "scale": 0.9, "softcap": 12.0}),
    "lora": ("lora", {}),
    "4bit": ("4bit", {}),
}


@pytest.mark.parametrize("own", [False, True], ids=["library", "own"])
@pytest.mark.parametrize(
    "case, dtype",
    [("plain", DTYPES[0]), *(("all", x) for x in DTYPES), ("lora", DTYPES[2]), ("4bit", DTYPES[2])],
    ids=str,
)
def test_gradients_are_those_of_the_words_that_it_kept(case, dtype, own, budget, monkeypatch):
    """Every gradient against fp64 with P as the filter made it; what it left out is its own mass."""
    monkeypatch.setattr(configs, "own_product", lambda *_: own)
    kind, transform = CASES[case]
    hidden, labels, head = problem(dtype, kind, **transform)
    backend, rows, g = base.load("triton"), torch.arange(N), torch.randn(N)
    sizes = {"workspace_bytes": 1 << 18}
    exact = backend.forward(hidden, rows, labels, head, need_u=True, **sizes)
    out = backend.forward(
        hidden, rows, labels, head, need_u=True, filter_eps=EPS, need_quiet=True, **sizes
    )
    assert torch.equal(out.logps, exact.logps) and torch.equal(out.lse, exact.lse)
    plan = backend.plan(N, head, hidden, own=own, **sizes)
    part_of = [i for i, part in enumerate(plan.parts(N)) for _ in range(part.start, part.stop)]
    blocks = list(plan.words(V))
    assert len(blocks) > 1 and out.quiet.mass.shape == (len(blocks), N)
    weight, h = head.block(0, V, dtype).double(), hidden.double()
    raw = h @ weight.T + (0 if head.bias() is None else head.bias().double())
    z = raw * head.scale
    z = head.softcap * torch.tanh(z / head.softcap) if head.softcap else z
    slope = 1 - (z / head.softcap).square() if head.softcap else torch.ones_like(z)
    p = z.softmax(1)
    miss = 1 - p[rows, labels]
    p = (p * slope).index_put((rows, labels), torch.zeros(N, dtype=torch.float64))
    kept = told(out, blocks, p, part_of)
    loud = (out.quiet.weights < 0)[part_of]
    assert loud[rows, labels].all() and 0.01 < loud.double().mean() < 0.9
    # A row keeps its probability.
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(kept.sum(1), p.sum(1), **tolerance)

    def gradients(p):
        dz = (-p).index_put((rows, labels), miss * slope[rows, labels]) * head.scale
        return dz @ weight, (g.double()[:, None] * dz).T @ h, (g.double()[:, None] * dz).sum(0)

    needed = [True] * len(head.tensors()) if kind == "dense" else [kind == "lora", False]
    got = [out.u]
    got += backend.head_backward(
        hidden, rows, labels, head, out.logps, out.lse, g, out.quiet, needed=needed, **sizes
    )
    plain = backend.head_backward(
        hidden, rows, labels, head, exact.logps, exact.lse, g, needed=needed, **sizes
    )
    want, truth = gradients(kept), gradients(p)
    assert (got[0].double() - truth[0]).norm() > 1e-4 * truth[0].norm()  # it did leave out
    if kind == "lora":  # the columns that belong to B
        want, truth = ((x[0], x[1][:, D : D + 4]) for x in (want, truth))
    for name, mine, peer, expected, true in zip("uwb", got, (exact.u, *plain), want, truth):
        if mine is not None:
            budget.check(name, mine, peer.double() - true + expected, expected)


@pytest.mark.parametrize("own", [False, True], ids=["library", "own"])
def test_blocks_taken_whole_have_the_exact_gradient(own, monkeypatch):
    monkeypatch.setattr(configs, "own_product", lambda *_: own)
    monkeypatch.setattr(word_filter, "MOST_QUIET", 1e-30)
    hidden, labels, head = problem(torch.float32, bias=True)
    backend, rows, g = base.load("triton"), torch.arange(N), torch.randn(N)
    sizes = {"workspace_bytes": 1 << 18}
    exact = backend.forward(hidden, rows, labels, head, need_u=True, **sizes)
    out = backend.forward(
        hidden, rows, labels, head, need_u=True, filter_eps=EPS, need_quiet=True, **sizes
    )
    assert (out.quiet.weights == -1).all() and (out.quiet.mass == 0).all()
    torch.testing.assert_close(out.u, exact.u, rtol=1e-5, atol=1e-5)
    sizes["needed"] = [True, True]
    got, want = (
        backend.head_backward(hidden, rows, labels, head, x.logps, x.lse, g, x.quiet, **sizes)
        for x in (out, exact)
    )
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_it_never_asks_the_device_within_a_pass(monkeypatch):
    """The number of loud words stays where it is: no operation that a block adds waits for it."""

    class Waits(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            self.count += name in (
                "_local_scalar_dense",
                "nonzero",
                "unique_dim",
                "_unique2",
                "item",
            )
            return func(*args, **(kwargs or {}))

    hidden, labels, head = problem(torch.float32)
    backend, counts = base.load("triton"), []
    for size in (100, 400):  # words per block
        blocks = base.Blocks(N, N, size)
        monkeypatch.setattr(backend, "plan", lambda *a, b=blocks, **k: b)
        with Waits() as seen:
            backend.forward(
                hidden, torch.arange(N), labels, head, workspace_bytes=1 << 20, need_u=True,
                filter_eps=EPS, need_quiet=True,
            )  # fmt: skip
        counts.append(seen.count)
    assert counts[0] == counts[1]


def run(hidden, labels, head, *tensors, **options):
    leaf = hidden.clone().requires_grad_()
    logps = linear_logps(leaf, head, labels, backend="triton", workspace_mib=0.25, **options)
    return logps.detach(), *torch.autograd.grad(logps.sum(), [leaf, *tensors])


def test_same_bits_twice_and_a_row_of_nan_stays_in_its_row(path):
    hidden, labels, head = problem(torch.bfloat16)
    weight = head.tensors()[0].requires_grad_()
    first, second = (run(hidden, labels, weight, weight, filter_eps=EPS) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    only_head = linear_logps(
        hidden, weight, labels, backend="triton", workspace_mib=0.25, filter_eps=EPS
    )
    assert torch.equal(torch.autograd.grad(only_head.sum(), weight)[0], first[2])
    hidden[3] = torch.nan
    got = run(hidden, labels, weight.detach(), filter_eps=EPS)[1]
    others = torch.arange(N) != 3
    assert got[3].isnan().all() and got[others].isfinite().all()
    labels[:] = -100
    assert (run(hidden, labels, weight, weight, filter_eps=EPS)[2] == 0).all()
