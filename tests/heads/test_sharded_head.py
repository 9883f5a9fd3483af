"""Heads spread over two gloo processes (FSDP2, vocabulary-parallel), ZeRO-3 with a stand-in.

Each scenario is a function run by both ranks; what it asserts, it asserts on each.
"""

import sys
import types

import pytest
import torch
import torch.distributed as dist
from head_cases import (
    D,
    V,
    assert_exact,
    check_exact,
    gather_logps,
    naive_logits,
    problem,
    results,
)
from head_ranks import adapters_and_four_bit, fsdp_own_unit, run, vocab_parallel
from torch import nn

from dilkern import linear_logps
from dilkern.lm_head import DenseHead, VocabParallelHead


@pytest.mark.parametrize("scenario", [fsdp_own_unit, vocab_parallel])
def test_two_processes(scenario, tmp_path):
    run(scenario, tmp_path)


@pytest.mark.slow
def test_two_processes_with_peft_and_bitsandbytes(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    run(adapters_and_four_bit, tmp_path)


def test_vocabulary_parallel_group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
        check_exact(VocabParallelHead(DenseHead(weight)), lambda: (weight, None), [weight])
    finally:
        dist.destroy_process_group()


def test_vocabulary_parallel_needs_a_process_group():
    with pytest.raises(ValueError, match="init_process_group"):
        VocabParallelHead(DenseHead(torch.randn(V, D)))


class _GatheredParameters:
    """A stand-in for deepspeed.zero.GatheredParameters: `.data` is whole inside, empty outside."""

    open = 0

    def __init__(self, params):
        self.params = params

    def __enter__(self):
        type(self).open += 1
        for p in self.params:
            p.data = p.ds_whole

    def __exit__(self, *error):
        for p in self.params:
            p.data = torch.empty(0, dtype=p.dtype)


def _partition(p):
    p.ds_id, p.ds_whole = 0, p.data
    p.data = torch.empty(0, dtype=p.dtype)


@pytest.fixture
def fake_deepspeed(monkeypatch):
    zero = types.SimpleNamespace(GatheredParameters=_GatheredParameters)
    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(zero=zero))
    monkeypatch.setattr(_GatheredParameters, "open", 0)


@pytest.mark.parametrize("train", [True, False])
def test_zero3_parameters_are_gathered_in_forward_and_backward(fake_deepspeed, train):
    linear = nn.Linear(D, V).double().requires_grad_(train)
    plain = [p.detach().clone().requires_grad_() for p in linear.parameters()]
    for p in linear.parameters():
        _partition(p)
    hidden, labels, g = problem()
    params = list(linear.parameters()) if train else []
    logps = linear_logps(hidden, linear, labels)
    assert linear.weight.numel() == 0 and _GatheredParameters.open == 1
    got = results(logps, g, [hidden, *params])
    assert linear.weight.numel() == 0 and _GatheredParameters.open == (2 if train else 1)
    logits = naive_logits(hidden, *plain, 1.0, 0.0)
    want = results(gather_logps(logits, labels), g, [hidden, *(plain if train else [])])
    assert_exact(got, want)


def test_zero3_with_lora(fake_deepspeed):
    peft = pytest.importorskip("peft")
    linear = nn.Linear(D, V, bias=False).double()
    config = peft.LoraConfig(r=4, target_modules=["lm_head"])
    model = peft.get_peft_model(nn.ModuleDict({"lm_head": linear}), config)
    layer = model.base_model.model["lm_head"]
    params = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    for p in params:
        p.data = torch.randn(p.shape, dtype=torch.float64)
    weight, plain = linear.weight.detach().clone(), [p.detach().clone() for p in params]
    for p in layer.parameters():
        _partition(p)
    hidden, labels, g = problem()
    got = results(linear_logps(hidden, layer, labels), g, [hidden, *params])
    a, b = (p.requires_grad_() for p in plain)
    logps = gather_logps(hidden @ (weight + layer.scaling["default"] * b @ a).T, labels)
    assert_exact(got, results(logps, g, [hidden, a, b]))
