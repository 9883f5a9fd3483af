"""The triton backend at real sizes on a CUDA GPU: `pytest -m gpu tests/gpu`.

TRITON_INTERPRET=1 runs the same tests at small sizes on the CPU, all but what is said of the device
itself: its memory (the peak in test_real_size) and which backend serves it (gpu_only).

Memory errors and races: `python -m tools.gpu sanitize --out FOLDER`, at small sizes on the GPU.
"""

import hashlib

import pytest
import torch
from naive import gather_logps
from peers import DEVICE, gpu_only, on_gpu_or_interpreter, sized, wide_product

from dilkern import DenseHead, filter_report, linear_logps
from dilkern.backends import base
from dilkern.kernels import configs, h_functions
from dilkern.kernels.nf4_dequant import Packed4bit, nf4_dequant
from dilkern.kernels.sequence_loss import sequence_loss

pytestmark = [pytest.mark.gpu, on_gpu_or_interpreter]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# T, V, D: ragged everywhere; D no multiple of a tile; D no multiple of 16 bytes.
SMALL = sized(
    [(1, 1, 8), (1, 300, 64), (130, 1003, 200), (300, 5000, 1030), (257, 777, 33)],
    [(1, 1, 8), (37, 140, 33)],
)
OPTIONS = {"plain": {}, "all": {"bias": True, "scale": 0.5, "softcap": 20.0}}
WORKSPACE = 256


@pytest.fixture(params=["library", "own"])
def product(request, monkeypatch):
    monkeypatch.setattr(configs, "own_product", lambda *_: request.param == "own")


def make(shape, dtype, bias=False, scale=1.0, softcap=0.0):
    torch.manual_seed(0)
    t, v, d = shape
    h = torch.randn(t, d, device=DEVICE).to(dtype)
    w = torch.randn(v, d, device=DEVICE).mul_(2 / d**0.5).to(dtype)
    b = torch.randn(v, device=DEVICE).to(dtype) if bias else None
    labels = torch.randint(0, v, (t,), device=DEVICE)
    if t > 8:
        labels[::7] = -100
    return h, w, b, labels, {"scale": scale, "softcap": softcap}


def eager(h, w, b, labels, scale, softcap):
    return from_product(torch.nn.functional.linear(h, w, b), labels, scale, softcap)


def eager_wide(h, w, b, labels, scale, softcap):
    """The logits of 16-bit inputs in fp32, as they are in our kernels."""
    z = wide_product(h, w)
    return from_product(z if b is None else z + b.float(), labels, scale, softcap)


def from_product(z, labels, scale, softcap):
    z = z * scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    z = z if z.dtype is torch.float64 else z.float()
    return gather_logps(z, labels)


def gradients(fn, tensors, g):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    logps = fn(*leaves)
    return logps.detach(), torch.autograd.grad(logps, [t for t in leaves if t is not None], g)


class Peak:
    """Device memory taken since it was made; none on a CPU."""

    def __init__(self):
        self.before = 0
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def mib(self):
        most = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
        return (most - self.before) / 2**20


def in_row_blocks(h, w, b, labels, options, rows=256):
    """fp64 log-probs and hidden gradients (for g = 1) of a problem whose logits would not fit."""
    logps, grads = [], []
    for a in range(0, h.shape[0], rows):
        leaf = h[a : a + rows].double().requires_grad_()
        part = eager(leaf, w, b, labels[a : a + rows], **options)
        grads += torch.autograd.grad(part.sum(), leaf)
        logps.append(part.detach())
    return torch.cat(logps), torch.cat(grads)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_against_fp64(dtype, shape, option, product, budget):
    h, w, b, labels, options = make(shape, dtype, **OPTIONS[option])
    g = torch.randn(labels.shape, device=DEVICE)
    doubles = [None if x is None else x.double() for x in (h, w, b)]
    truth, truth_grads = gradients(lambda *x: eager(*x, labels, **options), doubles, g.double())
    _, peer_grads = gradients(lambda *x: eager(*x, labels, **options), (h, w, b), g)
    run = {"backend": "triton", "workspace_mib": 2}
    got, grads = gradients(
        lambda h, w, b: linear_logps(h, DenseHead(w, b, **options), labels, **run), (h, w, b), g
    )
    budget.check("logps", got, eager_wide(h, w, b, labels, **options), truth)
    for name, mine, peer, true in zip(("h", "w", "b"), grads, peer_grads, truth_grads):
        budget.check(f"grad {name}", mine, peer, true)
    assert torch.equal(got, linear_logps(h, DenseHead(w, b, **options), labels, **run))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_real_size(dtype, product, budget):
    """T=4096, V=151936, D=2048: error, memory, and the same bits twice and without gradient."""
    shape = sized((4096, 151936, 2048), (70, 150, 72))
    h, w, b, labels, options = make(shape, dtype)
    leaf = h.clone().requires_grad_()
    run = {"backend": "triton", "workspace_mib": WORKSPACE}
    peak = Peak()
    got = linear_logps(leaf, w, labels, **run)
    got.sum().backward()
    # u and the gradient are the O(T D) of the promise; lists of O(T) and cuBLAS's own workspace.
    rows = h.numel() * (4 if dtype is torch.float16 else 2)
    assert peak.mib() <= WORKSPACE + (3 * rows) / 2**20 + 64
    again = h.clone().requires_grad_()
    second = linear_logps(again, w, labels, **run)
    second.sum().backward()
    assert torch.equal(second, got) and torch.equal(again.grad, leaf.grad)
    assert torch.equal(linear_logps(h, w, labels, **run), got)
    some = slice(0, sized(512, 20))
    truth, truth_grad = in_row_blocks(h[some], w.double(), b, labels[some], options)
    peer_leaf = h[some].clone().requires_grad_()
    eager(peer_leaf, w, b, labels[some], **options).sum().backward()
    peer = eager_wide(h[some], w, b, labels[some], **options)
    budget.check("logps", got[some].detach(), peer, truth)
    budget.check("grad h", leaf.grad[some], peer_leaf.grad, truth_grad)


@pytest.mark.parametrize("filter_eps", [None, 1e-4])
def test_thirty_runs_have_one_hash(product, filter_eps):
    shape = sized((4096, 128256, 1024), (70, 150, 72))
    h, w, _, labels, _ = make(shape, torch.bfloat16)
    run = {"backend": "triton", "workspace_mib": sized(WORKSPACE, 1), "filter_eps": filter_eps}
    g = torch.randn(labels.shape, device=DEVICE)
    hashes = set()
    for _ in range(sized(30, 3)):
        got, grads = gradients(lambda h, w: linear_logps(h, w, labels, **run), (h, w), g)
        digest = hashlib.sha256()
        for tensor in (got, *grads):
            digest.update(tensor.view(torch.uint8).cpu().numpy().tobytes())
        hashes.add(digest.hexdigest())
    assert len(hashes) == 1


def test_more_logits_than_int32_counts(product, monkeypatch):
    """A block of more than 2^31 logits: the last rows must be those of a run of their own."""
    shape, last = sized((20000, 128256, 512), (90, 150, 40)), sized(64, 9)
    h, w, _, labels, _ = make(shape, torch.bfloat16)
    assert shape[0] * shape[1] > sized(2**31, 0)

    def run(h, labels):
        return gradients(lambda h: linear_logps(h, w, labels, backend="triton"), (h,), g[-len(h) :])

    g = torch.randn(shape[0], device=DEVICE)
    tail, (tail_grad,) = run(h[-last:], labels[-last:])
    one = base.Blocks(kept=shape[0], rows=shape[0], vocab=shape[1])
    monkeypatch.setattr(base.load("triton"), "plan", lambda *_, **__: one)
    whole, (grad,) = run(h, labels)
    torch.testing.assert_close(whole[-last:], tail, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad[-last:], tail_grad, rtol=2e-2, atol=1e-3)  # rounded to bf16


def test_confident_tokens_keep_their_gradient(product):
    torch.manual_seed(0)
    words, width, tokens = sized((32000, 1024, 512), (130, 1024, 9))
    w = torch.randn(words, width, device=DEVICE).bfloat16()
    labels = torch.randint(0, words, (tokens,), device=DEVICE)
    leaf = (w[labels].float() * 0.03).bfloat16().requires_grad_()
    got = linear_logps(leaf, w, labels, backend="triton")
    got.sum().backward()
    options = {"scale": 1.0, "softcap": 0.0}
    truth, grad = in_row_blocks(leaf.detach(), w.double(), None, labels, options)
    assert (got.detach() - truth).abs().max() < 1e-4
    error = (leaf.grad.double() - grad).norm(dim=1) / grad.norm(dim=1)
    assert error.max() < 0.02, f"{error.max():.3g}"


@gpu_only
def test_auto_is_triton_and_fp64_goes_to_torch():
    device = torch.device("cuda")
    assert base.resolve("auto", device, torch.bfloat16) is base.load("triton")
    assert base.resolve("auto", device, torch.float64) is base.load("torch")


def test_compiled_function(product):
    h, w, _, labels, _ = make(sized((128, 1000, 256), (12, 70, 24)), torch.bfloat16)

    def fn(h):
        return linear_logps(h, w, labels, backend="triton").sum()

    a, b = h.clone().requires_grad_(), h.clone().requires_grad_()
    fn(a).backward()
    torch.compile(fn, fullgraph=True, backend=sized("inductor", "aot_eager"))(b).backward()
    assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("name", ["lsif", "ukl", "bce"])
def test_sequence_loss_against_autograd(name, budget):
    torch.manual_seed(0)
    sequences = sized(64, 6)
    lengths = torch.randint(1, sized(700, 80), (sequences,))
    bounds = torch.cat((torch.zeros(1), lengths)).cumsum(0).long().to(DEVICE)
    logps = -torch.rand(int(bounds[-1]), device=DEVICE)
    ref = logps + 0.3 * torch.randn_like(logps)
    scored = torch.rand_like(logps) < 0.9
    chosen = torch.arange(sequences, device=DEVICE) < sequences // 2
    factor = torch.full((sequences,), 2 / sequences, device=DEVICE)  # a mean of either side
    got = sequence_loss(
        logps, scored, bounds, chosen, factor, h=getattr(h_functions, name), ref_token_logps=ref
    )

    def plain(x):
        owner = torch.bucketize(torch.arange(x.numel(), device=DEVICE), bounds[1:], right=True)
        zero = x.new_zeros(sequences)
        f = zero.index_add(0, owner, torch.where(scored, x - ref.to(x.dtype), 0))
        f = f / zero.index_add(0, owner, scored.to(x.dtype)).clamp_min(1)
        e, sp = f.exp(), torch.nn.functional.softplus
        values = {
            "lsif": (-e, e * e / 2),
            "ukl": (-f, e),
            "bce": (sp(-f), sp(f)),
        }[name]
        return values[0][chosen].mean() + values[1][~chosen].mean()

    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = logps.to(dtype, copy=True).requires_grad_()
        loss = plain(leaf)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    (peer_loss, peer_grad), (loss, grad) = results
    budget.check("loss", got.loss, peer_loss, loss)
    budget.check("grad", got.grad, peer_grad, grad)


@pytest.mark.parametrize("name", ["lsif", "ukl", "bce", "nce", "brier", "power"])
def test_a_sequence_of_nan_has_a_gradient_of_nan(name):
    """And no other has: on a GPU the minimum of NaN and a number is the number."""
    length, sequences = 5, 4
    bounds = torch.arange(0, length * sequences + 1, length, device=DEVICE)
    scored = torch.ones(length * sequences, dtype=torch.bool, device=DEVICE)
    chosen = torch.tensor([True, True, False, False], device=DEVICE)
    ref = torch.tensor([0.0, float("nan"), float("nan"), 0.0], device=DEVICE)
    options = {"h": getattr(h_functions, name), "ref_logps": ref, "param": 0.5}
    one = torch.ones(sequences, device=DEVICE)
    got = sequence_loss(
        -torch.rand(scored.shape, device=DEVICE), scored, bounds, chosen, one, **options
    )
    lost = got.grad.view(sequences, length).isnan()
    # The slope of -f is -1, whatever f is.
    want = [False, name != "ukl", True, False]
    assert lost.all(1).tolist() == lost.any(1).tolist() == want


def test_a_bias_of_nan_leaves_no_gradient(product):
    """Of the row whose label has it neither, where it is no wrong word."""
    h, w, b, labels, _ = make(sized((300, 5000, 1030), (9, 40, 33)), torch.bfloat16, bias=True)
    labels.copy_(torch.arange(len(labels), device=DEVICE))
    b[2] = float("nan")
    leaf = h.requires_grad_()
    got = linear_logps(leaf, DenseHead(w, b), labels, backend="triton")
    got.sum().backward()
    assert got.isnan().all() and leaf.grad.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nf4_bits(dtype):
    torch.manual_seed(0)
    v, d, blocksize = sized((4096, 1000, 64), (48, 100, 64))
    blocks = v * d // blocksize
    packed = torch.randint(0, 256, (v * d // 2,), dtype=torch.uint8, device=DEVICE)
    code, inner = torch.randn(16, device=DEVICE), torch.randn(256, device=DEVICE)
    index = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=DEVICE)
    outer, offset = torch.rand(-(-blocks // 256), device=DEVICE), torch.tensor(0.3, device=DEVICE)
    weight = Packed4bit(packed, code, index, blocksize, d, inner, outer, 256, offset)
    absmax = inner[index.long()] * outer.repeat_interleave(256)[:blocks] + offset
    nibbles = torch.stack((packed >> 4, packed & 15), 1).reshape(-1).long()
    truth = (code[nibbles] * absmax.repeat_interleave(blocksize)).to(dtype).view(v, d)
    assert torch.equal(nf4_dequant(weight, dtype, start=0, end=v), truth)
    ids = torch.randint(0, v, (100,), device=DEVICE)
    assert torch.equal(nf4_dequant(weight, dtype, ids=ids), truth[ids])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_word_filter(dtype, product):
    """Rows that agree on which words are frequent, as text does: a tenth of them is loud."""
    t, v, d = sized((4096, 32768, 1024), (40, 600, 32))
    torch.manual_seed(0)
    h = (0.5 * torch.randn(t, d, device=DEVICE) + torch.randn(d, device=DEVICE)).to(dtype)
    w = torch.randn(v, d, device=DEVICE).mul_(3 / d**0.5).to(dtype)
    labels = torch.randint(0, v, (t,), device=DEVICE)
    options = {"filter_eps": 2 / v, "workspace_mib": sized(256, 1)}

    def run(**options):
        def score(h, w):
            return linear_logps(h, w, labels, backend="triton", **options)

        return gradients(score, [h, w], torch.ones(t, device=DEVICE))

    want, (dh, dw) = run(workspace_mib=options["workspace_mib"])
    for _ in range(2):
        got, (fh, fw) = run(**options)
        assert torch.equal(got, want)  # log-probs keep their bits
    report = filter_report(h, w, labels, **options)
    off = (fh.float() - dh.float()).norm(dim=1)
    # The report's backend may take a word on the threshold for loud that this one does not.
    rounded = 4 * torch.finfo(dtype).eps * dh.float().norm(dim=1)
    assert report.loud < 0.5 and (off <= 1.2 * report.error_bound + rounded).all()
    assert off.max() > 0 and (fw.float() - dw.float()).norm() < 0.1 * dw.float().norm()
