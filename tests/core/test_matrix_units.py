"""A GPU's matrix units, emulated: a right kernel passes beside its peer, a wrong one does not."""

import pytest
import torch

from dilkern import DenseHead, linear_logps
from dilkern.backends import torch as backend
from dilkern.lm_head import rebuild

N, V, D = 48, 96, 2048
STEP = 16  # products that a unit adds at once


def truncated(x):
    """fp64 cut to the 24 bits of fp32, towards zero."""
    return (x.contiguous().view(torch.int64) & -(1 << 29)).view(torch.float64)


def unit_product(h, w, *, until=D, rounded=truncated, backwards=False):
    """H W^T as Hopper is reported to form it: 16 products added exactly, then cut to 24 bits."""
    total = torch.zeros(h.shape[0], w.shape[0], dtype=torch.float64)
    steps = range(0, until, STEP)
    for k in reversed(steps) if backwards else steps:
        part = slice(k, k + STEP)
        total = rounded(total + h[:, part].double() @ w[:, part].double().t())
    return total.float()


def logps(z):
    return z.log_softmax(1)[:, 0]


@pytest.fixture(scope="module")
def operands():
    rng = torch.Generator().manual_seed(0)
    h = torch.randn(N, D, generator=rng).bfloat16()
    w = torch.randn(V, D, generator=rng).mul_(2 / D**0.5).bfloat16()
    return h, w, logps(h.double() @ w.double().t())


def test_a_right_kernel_passes_beside_the_same_units_and_fails_beside_fp32(operands, budget):
    h, w, truth = operands
    got = logps(unit_product(h, w))
    budget.check("logps", got, logps(unit_product(h, w, backwards=True)), truth)
    with pytest.raises(AssertionError, match="logps"):
        budget.check("logps", got, logps(h.float() @ w.float().t()), truth)


@pytest.mark.parametrize(
    "wrong",
    [
        {"until": D - 64},  # the last tile of D left out
        {"rounded": lambda x: x.bfloat16().double()},  # sums in 16 bits
    ],
    ids=["last tile", "bf16 sums"],
)
def test_a_wrong_kernel_fails_beside_the_same_units(operands, budget, wrong):
    h, w, truth = operands
    peer = logps(unit_product(h, w, backwards=True))
    with pytest.raises(AssertionError, match="logps"):
        budget.check("logps", logps(unit_product(h, w, **wrong)), peer, truth)


class OnCuda(torch.Tensor):
    """A CPU tensor that says it is on CUDA."""

    is_cuda = True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("allowed", [False, True])
def test_fp16_accumulation_widens_fp16_products(dtype, allowed, monkeypatch):
    """torch multiplies 16 bits into fp32 on CUDA, but not fp16 once it may accumulate in fp16."""
    asked = []

    def into_fp32(total, a, b, out_dtype):
        refused = allowed and a.dtype is torch.float16
        assert out_dtype is torch.float32 and not refused, "gemm input type at::Half and output"
        asked.append(a.dtype)
        return total + a.float() @ b.float()

    plain, plain_add = torch.mm, torch.addmm

    def mm(a, b, *, out_dtype=None):
        return plain(a, b) if out_dtype is None else into_fp32(0, a, b, out_dtype)

    def addmm(total, a, b, *, out_dtype=None, out=None):
        if out_dtype is None:
            return plain_add(total, a, b)
        return out.copy_(into_fp32(total, a, b, out_dtype))

    matmul = torch.backends.cuda.matmul
    monkeypatch.setattr(torch.version, "hip", None)
    before = matmul.allow_fp16_accumulation
    h, w = torch.randn(7, 24).to(dtype), torch.randn(40, 24).to(dtype)
    labels, rows = torch.randint(0, 40, (7,)), torch.arange(7)
    want = linear_logps(h, w, labels, backend="torch")
    head = rebuild(DenseHead(w).spec(), [w.as_subclass(OnCuda)], w.device)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    matmul.allow_fp16_accumulation = allowed
    try:
        got = backend.forward(
            h.as_subclass(OnCuda), rows, labels, head, workspace_bytes=1 << 20, need_u=True
        )
    finally:
        matmul.allow_fp16_accumulation = before
    torch.testing.assert_close(got.logps.as_subclass(torch.Tensor), want)
    assert bool(asked) == (dtype is torch.bfloat16 or not allowed)
