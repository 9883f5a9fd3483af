"""What each of several processes runs and asserts; see heads/test_sharded_head.py."""

import os

import head_cases
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from head_cases import (
    D,
    T,
    V,
    assert_exact,
    eight_bit_linear,
    four_bit_linear,
    leaf,
    naive_logits,
    placed,
    problem,
    results,
)
from naive import gather_logps
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dilkern import linear_logps
from dilkern.lm_head import Adapter, DenseHead, LoRAHead, VocabParallelHead, as_head

CUT = 140  # uneven on purpose


def _enter(rank, scenario, path, device, world):
    torch.set_num_threads(1)
    head_cases.DEVICE.set(device)
    # NCCL takes one process per GPU; gloo lets two share one, but has no all-gather of GPU tensors.
    backend = "nccl" if device == "cuda" and world == 1 else "gloo"
    dist.init_process_group(backend, init_method=f"file://{path}", rank=rank, world_size=world)
    scenario(rank)
    dist.barrier()
    # No teardown: when one rank is gone, gloo's threads in the other abort the process now and then
    # ("terminate called without an active exception"). Failures have been raised before this line.
    os._exit(0)


def run(scenario, tmp_path, device="cpu", world=2):
    mp.spawn(_enter, (scenario, tmp_path / "store", device, world), nprocs=world)


def rank_problem(rank):
    torch.manual_seed(100 + rank)
    return problem()


def shard(module):
    """FSDP2 over all ranks; without a mesh it would take a GPU wherever there is one."""
    fully_shard(module, mesh=init_device_mesh(head_cases.DEVICE.get(), (dist.get_world_size(),)))


def averaged(rank, make):
    """The mean over the ranks of `make(problem of that rank)`, computed here without any shard."""
    parts = [make(*rank_problem(r)) for r in range(dist.get_world_size())]
    return [sum(p) / len(parts) for p in zip(*parts)]


def fsdp_own_unit(rank):
    for train in (True, False):
        _fsdp_own_unit(rank, train)


def _fsdp_own_unit(rank, train):
    torch.manual_seed(0)
    linear = placed(nn.Linear(D, V).double()).requires_grad_(train)
    plain = [p.detach().clone().requires_grad_() for p in linear.parameters()]
    shard(linear)
    assert type(linear.weight).__name__ == "DTensor"
    hidden, labels, g = rank_problem(rank)
    (linear_logps(hidden, linear, labels) * g).sum().backward()

    def naive(hidden, labels, g):
        logps = gather_logps(naive_logits(hidden, *plain, 1.0, 0.0), labels)
        return results(logps, g, plain)[1:]

    if train:
        got = [p.grad.full_tensor() for p in linear.parameters()]
        assert_exact(got, averaged(rank, naive))
    # Only this rank's tokens reach this rank's hidden states.
    logps = gather_logps(naive_logits(hidden, *plain, 1.0, 0.0), labels)
    assert_exact([hidden.grad], results(logps, g, [hidden])[1:])


def fsdp_lora(rank):
    import peft

    torch.manual_seed(0)
    linear = placed(nn.Linear(D, V, bias=False).double())
    config = peft.LoraConfig(r=4, target_modules=["lm_head"])
    layer = peft.get_peft_model(nn.ModuleDict({"lm_head": linear}), config).base_model.model[
        "lm_head"
    ]
    adapters = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    for p in adapters:
        p.data = leaf(*p.shape, grad=False)
    weight = linear.weight.detach().clone()
    plain = [p.detach().clone().requires_grad_() for p in adapters]
    shard(layer)
    assert isinstance(as_head(layer), LoRAHead)
    hidden, labels, g = rank_problem(rank)
    (linear_logps(hidden, layer, labels) * g).sum().backward()

    def naive(hidden, labels, g):
        effective = weight + layer.scaling["default"] * plain[1] @ plain[0]
        logps = gather_logps(hidden @ effective.T, labels)
        return results(logps, g, plain)[1:]

    sharded = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    got = [p.grad.full_tensor() for p in sharded]
    assert_exact(got, averaged(rank, naive))


def fsdp_quantised(rank):
    torch.manual_seed(0)
    linear = four_bit_linear(300, storage=torch.float32, bias=True)
    want, bias = as_head(linear).block(0, 300, torch.float32), linear.bias.detach().clone()
    shard(linear)
    assert type(linear.weight).__name__ == type(linear.bias).__name__ == "DTensor"
    head = as_head(linear)
    assert torch.equal(head.block(0, 300, torch.float32), want)
    assert torch.equal(head.bias(), bias)
    if torch.__version__ < "2.12":  # FSDP2 there shards no integers
        return
    linear = eight_bit_linear()
    shard(linear)
    with pytest.raises(ValueError, match=r"Linear8bitLt without SCB. FSDP2 loses them"):
        as_head(linear)


def vocab_parallel_four_bit(rank):
    """Frozen 4-bit rows with a trainable bias; both ranks know all shards, to compare."""
    torch.manual_seed(0)
    shards = [four_bit_linear(rows, bias=True) for rows in (CUT, V - CUT)]
    for shard in shards:
        shard.bias = nn.Parameter(leaf(shard.out_features, grad=False))
    hidden, labels, g = problem()
    mine = shards[rank]
    head = VocabParallelHead(as_head(mine, softcap=5.0))
    got = results(linear_logps(hidden, head, labels), g, [hidden, mine.bias])
    weight = torch.cat([as_head(s).block(0, s.out_features, torch.float64) for s in shards])
    logits = naive_logits(hidden, weight, torch.cat([s.bias for s in shards]), 1.0, 5.0)
    assert_exact(got, results(gather_logps(logits, labels), g, [hidden, mine.bias]))


def _rows(rank):
    return slice(0, CUT) if rank == 0 else slice(CUT, V)


def vocab_parallel(rank):
    for scale, softcap in ((1.0, 0.0), (0.5, 4.0)):
        for shift in (False, True):
            _vocab_parallel_dense(rank, scale, softcap, shift)
    _vocab_parallel_lora(rank)
    _vocab_parallel_confident(rank)
    _vocab_parallel_edges(rank)
    _vocab_parallel_filtered(rank)


def _vocab_parallel_dense(rank, scale, softcap, shift):
    torch.manual_seed(0)
    full = [leaf(V, D, grad=False), leaf(V, grad=False)]
    hidden, labels, g = problem()
    local = [p[_rows(rank)].clone().requires_grad_() for p in full]
    head = VocabParallelHead(DenseHead(*local, scale=scale, softcap=softcap))
    logps = linear_logps(hidden, head, labels, shift=shift, workspace_mib=0.1)
    got = results(logps, g, [hidden, *local])
    full = [p.requires_grad_() for p in full]
    logits = naive_logits(hidden, *full, scale, softcap)
    if shift:
        labels = labels.clone()
        labels[0], logits = -100, logits.roll(1, 0)
    want = results(gather_logps(logits, labels), g, [hidden, *full])
    assert_exact(got, [*want[:2], *(x[_rows(rank)] for x in want[2:])])


def _vocab_parallel_lora(rank):
    torch.manual_seed(0)
    weight, a, b = leaf(V, D, grad=False), leaf(3, D), leaf(V, 3, grad=False)
    hidden, labels, g = problem()
    local_b = b[_rows(rank)].clone().requires_grad_()
    local = LoRAHead(DenseHead(weight[_rows(rank)]), [Adapter(a, local_b, 2.0)])
    got = results(linear_logps(hidden, VocabParallelHead(local), labels), g, [hidden, a, local_b])
    b = b.requires_grad_()
    logps = gather_logps(hidden @ (weight + 2 * b @ a).T, labels)
    want = results(logps, g, [hidden, a, b])
    assert_exact(got, [*want[:3], want[3][_rows(rank)]])


def _vocab_parallel_confident(rank):
    """fp32, log p about -1e-6: forward and gradient keep their digits."""
    torch.manual_seed(0)
    weight = placed(torch.randn(V, D))
    labels = placed(torch.randint(0, V, (T,)))
    hidden = (weight[labels] * 0.55).requires_grad_()
    head = VocabParallelHead(DenseHead(weight[_rows(rank)]))
    g = torch.ones_like(labels)
    got = results(linear_logps(hidden, head, labels), g, [hidden])
    wide = hidden.detach().double().requires_grad_()
    want = results(gather_logps(wide @ weight.double().T, labels), g, [wide])
    assert want[0].abs().median() < 1e-4
    for a, b in zip(got, want):
        rows = b.reshape(T, -1).norm(dim=1)
        assert ((a - b).reshape(T, -1).norm(dim=1) / rows).median() < 1e-4


def _vocab_parallel_filtered(rank):
    """Each rank filters its own rows by its own probabilities; log-probs keep their bits."""
    torch.manual_seed(0)
    weight, common = leaf(V, D, grad=False), 0.4 * leaf(D, grad=False)
    hidden = (0.2 * leaf(T, D, grad=False) + common).requires_grad_()
    labels = placed(torch.randint(0, V, (T,)))
    local = weight[_rows(rank)].clone().requires_grad_()
    head = VocabParallelHead(DenseHead(local))

    def run(**options):
        return results(linear_logps(hidden, head, labels, **options), labels, [hidden, local])

    want, got = run(), run(filter_eps=2**-9)
    assert torch.equal(want[0], got[0])
    for a, b in zip(want[1:], got[1:]):
        assert 1e-6 * a.norm() < (a - b).norm() < 0.05 * a.norm()


def _vocab_parallel_edges(rank):
    torch.manual_seed(0)
    weight = leaf(V, D, grad=False)
    head = VocabParallelHead(DenseHead(weight[_rows(rank)].clone().requires_grad_()))
    hidden, labels, g = problem()
    nothing = linear_logps(hidden, head, torch.full_like(labels, -100))
    assert results(nothing, g, [hidden])[1].abs().max() == 0
    labels[3] = V
    with pytest.raises(ValueError, match=rf"in \[0, {V}\)"):
        linear_logps(hidden, head, labels)
