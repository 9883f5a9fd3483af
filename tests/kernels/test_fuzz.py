"""Random cases of the op on the triton backend: `TRITON_INTERPRET=1 pytest tests/kernels -m fuzz`.

Each pool of cases is held to the one budget; a case that is plainly wrong names its seed.
"""

import random

import pytest
import torch
from naive import gather_logps

from dilkern import DenseHead, linear_logps
from dilkern.kernels import configs

CASES, POOL = 2000, 25
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = pytest.mark.fuzz


def full_logits(h, w, b, labels, scale, softcap):
    z = torch.nn.functional.linear(h, w, b) * scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    z = z if z.dtype is torch.float64 else z.float()
    return gather_logps(z, labels)


def gradients(fn, tensors, g):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    logps = fn(*leaves)
    inputs = [t for t in leaves if t is not None]
    return logps.detach(), torch.autograd.grad(logps, inputs, g.to(logps.dtype))


def one_case(seed, dtype, monkeypatch):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    t, v, d = rng.choice([0, 1, 2, 7, 31, 35]), rng.randint(1, 150), rng.randint(1, 90)
    own, descriptors = rng.choice([(False, False), (True, False), (True, True)])
    tile = configs._TILES_16["interpreter"]._replace(
        block_t=32,
        block_v=rng.choice([32, 64]),
        block_d=rng.choice([32, 64]),
        descriptors=descriptors,
    )
    monkeypatch.setattr(configs, "own_product", lambda *_: own)
    monkeypatch.setattr(configs, "tile", lambda *_: tile)
    # In fp32 the budget is a few roundings of the result, so logits stay near 1, where theirs count
    # no more; test_any_finite_logit has the large ones.
    sharp = dtype is not torch.float32
    h = torch.randn(t, d) * rng.choice([0.3, 1, 4] if sharp else [0.3, 1])
    w = torch.randn(v, d) / d**0.5
    if rng.random() < 0.3:  # rows that find larger and larger logits, far past the slack
        w *= torch.linspace(0, rng.choice([5, 40]) if sharp else 2, v).unsqueeze(1)
    b = torch.randn(v) if rng.random() < 0.5 else None
    h, w, b = (None if x is None else x.to(dtype) for x in (h, w, b))
    labels = torch.randint(0, v, (t,))
    labels[torch.rand(t) < rng.choice([0, 0.3, 1])] = -100
    options = {"scale": rng.choice([1.0, 0.3]), "softcap": rng.choice([0.0, 0.0, 6.0])}
    run = {"backend": "triton", "workspace_mib": rng.choice([0.03, 0.1, 64])}
    g = torch.randn(t, dtype=torch.float64)
    tensors = (h, w, b)
    doubles = [None if x is None else x.double() for x in tensors]
    floats = [None if x is None else x.float() for x in tensors]
    truth, truth_grads = gradients(lambda *x: full_logits(*x, labels, **options), doubles, g)
    _, peer_grads = gradients(lambda *x: full_logits(*x, labels, **options), tensors, g)
    peer = full_logits(*floats, labels, **options)
    got, grads = gradients(
        lambda h, w, b: linear_logps(h, DenseHead(w, b, **options), labels, **run), tensors, g
    )
    frozen = linear_logps(h, DenseHead(w, b, **options), labels, **run)
    assert torch.equal(frozen, got), f"seed {seed}: the gradient changed the log-probs"
    assert torch.allclose(got.double(), truth, rtol=1e-4, atol=1e-4), f"seed {seed}: log-probs"
    for mine, true in zip(grads, truth_grads):
        size = true.abs().max().item() if true.numel() else 0
        wrong = f"seed {seed}: gradient"
        assert torch.allclose(mine.double(), true, rtol=0.05, atol=0.05 * size + 1e-6), wrong
    return [(got, peer, truth), *zip(grads, peer_grads, truth_grads)]


@pytest.mark.parametrize("pool", range(CASES // POOL))
def test_pool(pool, budget, monkeypatch):
    dtype = DTYPES[pool % 3]
    print(f"seeds {pool * POOL} to {pool * POOL + POOL - 1}, {dtype}")
    results = [one_case(seed, dtype, monkeypatch) for seed in range(pool * POOL, (pool + 1) * POOL)]
    for index, name in enumerate(("logps", "grad h", "grad w", "grad b")):
        parts = [case[index] for case in results if len(case) > index]
        triple = [torch.cat([part[k].flatten() for part in parts]) for k in range(3)]
        budget.check(name, *triple)
