"""Each kernel of the vocabulary pass by itself: against fp64, nothing written outside, int64."""

import numpy as np
import pytest
import torch
from guard import guarded

from dilkern.kernels import configs
from dilkern.kernels.dz_tile import dz_tile
from dilkern.kernels.finish_rows import finish_rows
from dilkern.kernels.fold_block import fold_block
from dilkern.kernels.nf4_dequant import Packed4bit, nf4_dequant
from dilkern.kernels.softmax_tile import softmax_tile

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPTIONS = [{}, {"scale": 0.6, "softcap": 4.0}]
CPU = torch.device("cpu")
# The last: every element of a row in a masked part of a block.
SHAPES = [(1, 1, 8), (3, 70, 24), (45, 190, 64), (32, 64, 130)]


def logits_of(h, w, bias, scale=1.0, softcap=0.0):
    z = h @ w.T + (0 if bias is None else bias)
    z = z * scale
    return softcap * torch.tanh(z / softcap) if softcap else z


def make(shape, dtype, bias=True):
    torch.manual_seed(sum(shape))
    n, v, d = shape
    h, w = torch.randn(n, d).to(dtype), torch.randn(v, d).to(dtype)
    start = 40
    labels = torch.randint(0, v + 2 * start, (n,))  # some outside the block on both sides
    return h, w, torch.randn(v).to(dtype) if bias else None, labels, start


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "capped"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_p_and_statistics(dtype, shape, options, path):
    own = configs.own_product()
    n, v, _ = shape
    h, w, bias, labels, start = make(shape, dtype)
    tile = configs.tile(CPU, dtype).block_v if own else configs.rows("chunk", CPU).block
    tiles = -(-v // tile)
    partial, intact_s = guarded(2, n, tiles)
    exponents, sums = partial
    p, intact_p = guarded(n, v, dtype=dtype)
    # Rows whose anchor is unset, too low, near enough, and too high.
    anchor = torch.tensor([-float("inf"), -40.0, 3.0, 60.0]).repeat(n)[:n]
    settings = {"start": start, "bias": bias, **options}

    def launch(p):
        source = (h, w) if own else (h.float() @ w.float().T, None)
        softmax_tile(*source, labels, anchor, partial, p, **settings)

    launch(p)
    for intact in (intact_s, intact_p):
        intact()
    z = logits_of(h.double(), w.double(), bias.double(), **options)
    slope = 1 - (z / options["softcap"]).square() if options else torch.ones_like(z)
    local = labels - start
    rows = ((local >= 0) & (local < v)).nonzero().squeeze(1)
    z[rows, local[rows]] = -float("inf")
    for k in range(tiles):
        part = slice(k * tile, (k + 1) * tile)
        peak = z[:, part].amax(1)
        empty = peak == -float("inf")
        assert (exponents[empty, k] == -float("inf")).all() and (sums[empty, k] == 0).all()
        assert (p[empty][:, part] == 0).all()
        some = ~empty
        e = exponents[some, k].double()
        assert (e == e.round()).all() and ((e - peak[some] / 0.6931471805599453).abs() < 1.01).all()
        truth = z[some][:, part].exp().sum(1)
        torch.testing.assert_close(sums[some, k].double() * e.exp2(), truth, rtol=3e-5, atol=0)
        low = e > anchor[some] + 11
        used = torch.where(low, e, anchor[some].double())
        expected = z[some][:, part].exp() * slope[some][:, part] * (-used).exp2()[:, None]
        tolerance = {"rtol": 2 * torch.finfo(dtype).eps + 3e-5, "atol": 1e-7}
        torch.testing.assert_close(p[some][:, part].double(), expected, **tolerance)
    # Without P: the same bits.
    before = exponents.clone(), sums.clone()
    launch(p.new_empty(0, v))
    assert torch.equal(exponents, before[0]) and torch.equal(sums, before[1])


@pytest.mark.parametrize("size", [1.0, 30.0, 1e3])
def test_exponentials_keep_their_digits_at_large_logits(size):
    """z log2 e rounded in fp32 would be off by 6e-8 z: the sums and P must not."""
    torch.manual_seed(0)
    n, v = 64, 100
    z = size * (1 + torch.rand(n, 1)) + torch.randn(n, v)
    exact, labels = z.double(), torch.full((n,), v)
    partial = torch.zeros(2, n, 1)
    exponents, sums = partial
    p, anchor = torch.zeros(n, v), torch.full((n,), -float("inf"))
    softmax_tile(z, None, labels, anchor, partial, p, start=0)
    base = exponents.double() * 0.6931471805599453
    tolerance = {"rtol": 2e-6, "atol": 1e-9}
    torch.testing.assert_close(p.double(), (exact - base).exp(), **tolerance)
    torch.testing.assert_close(sums.double(), (exact - base).exp().sum(1, True), **tolerance)
    lse = exact.logsumexp(1)
    parts = torch.stack((lse.float(), (lse - lse.float().double()).float()))
    ones = torch.ones(n)
    dz_tile(z, None, labels, parts, ones, ones, p, start=0)
    torch.testing.assert_close(-p.double(), exact.softmax(1), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "capped"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dz(dtype, shape, options, path):
    n, v, _ = shape
    h, w, bias, labels, start = make(shape, dtype)
    z = logits_of(h.double(), w.double(), bias.double(), **options)
    lse, miss, g = z.logsumexp(1) + torch.rand(n), torch.rand(n), torch.randn(n)
    high = (lse + torch.rand(n)).float()  # the second part matters as much as the first
    parts = torch.stack((high, (lse - high).float()))
    dz, intact = guarded(n, v, dtype=dtype)
    settings = {"start": start, "bias": bias, **options}
    source = (h, w) if configs.own_product() else (h.float() @ w.float().T, None)
    dz_tile(*source, labels, parts, miss, g, dz, **settings)
    intact()
    expected = -(z - lse[:, None]).exp()
    local = labels - start
    rows = ((local >= 0) & (local < v)).nonzero().squeeze(1)
    expected[rows, local[rows]] = miss[rows].double()
    expected *= g.double()[:, None]
    expected *= 1 - (z / options["softcap"]).square() if options else 1
    tolerance = {
        "rtol": 2 * torch.finfo(dtype).eps + 3e-5,
        "atol": 1e-7 + expected.abs().max().item() * 1e-6,
    }
    torch.testing.assert_close(dz.double(), expected, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "capped"])
@pytest.mark.parametrize("shape", [(5, 1), (7, 7), (65, 64), (70, 200)], ids=str)
def test_finished_rows(dtype, shape, options, budget):
    """Labels far below, near and far above the wrong words, whose sum is total 2^top."""
    n, d = shape
    torch.manual_seed(n)
    h, w = torch.randn(n, d).to(dtype), torch.randn(n, d).to(dtype)
    labels, bias = torch.randint(0, 5, (n,)), torch.randn(5).to(dtype)
    top = torch.tensor([-60.0, -3.0, 0.0, 4.0, 50.0]).repeat(n)[:n]
    state = torch.stack((top, 0.5 + 90 * torch.rand(n), top - torch.randint(0, 12, (n,))))
    sums = torch.randn(n, d)
    scale, cap = options.get("scale", 1.0), options.get("softcap")

    def reference(h, w, bias, state, sums):
        raw = ((h * w).sum(1) + bias[labels]) * scale
        z = cap * torch.tanh(raw / cap) if cap else raw
        top, total, at = state
        rest = top * 0.6931471805599453 + total.log()
        lse = torch.logaddexp(z, rest)
        slope = 1 - (z / cap).square() if cap else torch.ones_like(z)
        wrong = sums * (at * 0.6931471805599453 - lse).exp()[:, None]
        u = (w * ((rest - lse).exp() * slope)[:, None] - wrong) * scale
        return z - lse, lse, u

    inputs = (h, w, bias, state, sums)
    truth = reference(*(x.double() for x in inputs))
    peer = reference(*(x.float() for x in inputs))
    u_dtype = torch.float32 if dtype is torch.float16 else dtype
    (logps, intact), (lse, _), (u, intact_u) = (
        guarded(n),
        guarded(2, n),
        guarded(n, d, dtype=u_dtype),
    )
    settings = {"bias": bias, **options}
    finish_rows(h, w, labels, state, sums, logps, lse, u, **settings)
    intact()
    intact_u()
    budget.check("logps", logps, peer[0], truth[0])
    budget.check("lse", lse.double().sum(0).float(), peer[1], truth[1])
    budget.check("u", u, peer[2].to(u_dtype), truth[2])
    before = logps.clone(), lse.clone()
    finish_rows(h, w, labels, state, sums[:0], logps, lse, u[:0], **settings)
    assert torch.equal(logps, before[0]) and torch.equal(lse, before[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 8), (5, 150, 40), (70, 300, 24)], ids=str)
def test_fold_brings_p_and_u_to_one_anchor(dtype, shape):
    """Whatever tiles P was written against, P 2^anchor and U 2^anchor keep their values."""
    torch.manual_seed(0)
    n, v, d = shape
    tile = 32
    tiles = -(-v // tile)
    exponents = torch.randint(-20, 20, (n, tiles)).float()
    exponents[torch.rand(n, tiles) < 0.1] = -float("inf")
    sums = torch.rand(n, tiles) * (exponents > -float("inf"))
    old = torch.tensor([-float("inf"), -3.0, 5.0, 30.0]).repeat(n)[:n]
    state = torch.stack((old, torch.rand(n) * (old > -float("inf")), old))
    top, total, anchor = state
    local = torch.where(exponents > old[:, None] + 11, exponents, old[:, None])
    wide = local.repeat_interleave(tile, 1)[:, :v]
    p, intact_p = guarded(n, v, dtype=dtype)
    p.copy_(torch.rand(n, v) * (wide > -float("inf")))
    u, intact_u = guarded(n, d)
    u.copy_(torch.randn(n, d) * (old > -float("inf"))[:, None])
    value_p = p.double() * torch.where(wide > -float("inf"), wide, 0).double().exp2()
    value_u = u.double() * torch.where(old > -float("inf"), old, 0).double()[:, None].exp2()
    value = total.double() * top.double().exp2() + (sums.double() * exponents.double().exp2()).sum(
        1
    )
    alone, partial = state.clone(), torch.stack((exponents, sums))
    fold_block(partial, state, p, u, tile=tile)
    intact_p()
    intact_u()
    assert torch.equal(top, torch.maximum(old, exponents.amax(1)))
    torch.testing.assert_close(total.double() * top.double().exp2(), value, rtol=1e-6, atol=0)
    assert ((top - anchor) <= 11).all() and (anchor <= top).all()
    scale = anchor.double().exp2()[:, None]
    # fp16 loses what falls under its smallest subnormal, 2^-24 of the anchor; so atol.
    torch.testing.assert_close(
        p.double() * scale, value_p, rtol=1e-6, atol=2**-24 * scale.max().item()
    )
    torch.testing.assert_close(u.double() * scale, value_u, rtol=1e-6, atol=0)
    fold_block(partial, alone, p.new_empty(0, v), u.new_empty(0, d), tile=tile)
    assert torch.equal(alone[0], top) and torch.equal(alone[1], total)


def untouched(size, dtype):
    """Zeros whose pages come into being when they are used (torch.zeros writes to all of them)."""
    return torch.from_numpy(np.zeros(size, dtype))


def far_rows(rows, width):
    """(rows, width) in fp16 with 2^30 elements from row to row."""
    stride = 1 << 30
    storage = untouched((rows - 1) * stride + width, np.float16)
    return storage.as_strided((rows, width), (stride, 1))


def test_offsets_past_2_to_the_31(form):
    """Rows 2 and 3 lie past 2^31 elements: an int32 product would wrap and read elsewhere."""
    torch.manual_seed(0)
    near_h, near_w = torch.randn(4, 16).half(), torch.randn(4, 16).half()
    h, w, p = (far_rows(4, 16) for _ in range(3))
    h.copy_(near_h)
    w.copy_(near_w)
    p = p[:, :4]
    labels, anchor = torch.tensor([0, 1, 2, 3]), torch.zeros(4)
    (partial, other), other_p = torch.zeros(2, 2, 4, 1).unbind(), torch.zeros(4, 4).half()
    softmax_tile(h, w, labels, anchor, partial, p, start=0)
    softmax_tile(near_h, near_w, labels, anchor, other, other_p, start=0)
    assert torch.equal(partial, other) and torch.equal(p, other_p) and other_p.abs().sum() > 0
    state, (far, near) = torch.ones(3, 4), torch.zeros(2, 3, 4).unbind()
    u_far, u_near = torch.zeros(2, 4, 16).unbind()
    finish_rows(h, w, labels, state, u_far, far[0], far[1:], u_far)
    finish_rows(near_h, near_w, labels, state, u_near, near[0], near[1:], u_near)
    assert torch.equal(far, near) and torch.equal(u_far, u_near) and u_near.abs().sum() > 0
    lse = torch.full((4,), 5.0)
    parts = torch.stack((lse, torch.zeros(4)))
    dz_tile(h, w, labels, parts, lse, lse, p, start=0)
    dz_tile(near_h, near_w, labels, parts, lse, lse, other_p, start=0)
    assert torch.equal(p, other_p)
    p.zero_()
    dz_tile((near_h @ near_w.T).float(), None, labels, parts, lse, lse, p, start=0)
    torch.testing.assert_close(p, other_p)


def test_4bit_offsets_past_2_to_the_31():
    d, blocksize = 4096, 4096
    v = (1 << 31) // d + 3
    packed = untouched(v * d // 2, np.uint8)
    packed[-d // 2 :] = torch.randint(0, 256, (d // 2,), dtype=torch.uint8)
    absmax = torch.ones(v * d // blocksize)
    absmax[-1] = 2.0
    weight = Packed4bit(packed, torch.arange(16.0), absmax, blocksize, d)
    last = torch.stack((packed[-d // 2 :] >> 4, packed[-d // 2 :] & 15), 1).reshape(-1) * 2.0
    assert torch.equal(nf4_dequant(weight, torch.float32, start=v - 1, end=v)[0], last)
    assert torch.equal(nf4_dequant(weight, torch.float32, ids=torch.tensor([v - 1]))[0], last)
