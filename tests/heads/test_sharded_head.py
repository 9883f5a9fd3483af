"""Heads spread over two processes (FSDP2, vocabulary-parallel), ZeRO-3 by its hooks.

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
    leaf,
    naive_logits,
    problem,
    results,
)
from head_ranks import (
    fsdp_lora,
    fsdp_own_unit,
    fsdp_quantised,
    run,
    vocab_parallel,
    vocab_parallel_four_bit,
)
from naive import gather_logps
from torch import nn

from dilkern import linear_logps
from dilkern.lm_head import DenseHead, VocabParallelHead


@pytest.mark.parametrize("scenario", [fsdp_own_unit, vocab_parallel])
def test_two_processes(scenario, tmp_path, device):
    # FSDP needs NCCL on GPUs, and NCCL a GPU for each process: one process there.
    run(scenario, tmp_path, device, 1 if device == "cuda" and scenario is fsdp_own_unit else 2)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [fsdp_lora, fsdp_quantised, vocab_parallel_four_bit])
def test_two_processes_with_peft_and_bitsandbytes(scenario, tmp_path, device):
    pytest.importorskip("peft" if scenario is fsdp_lora else "bitsandbytes")
    one = device == "cuda" and scenario is not vocab_parallel_four_bit
    run(scenario, tmp_path, device, 1 if one else 2)


def test_vocabulary_parallel_group_of_one(tmp_path, device):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        weight = leaf(V, D)
        check_exact(VocabParallelHead(DenseHead(weight)), lambda: (weight, None), [weight])
    finally:
        dist.destroy_process_group()


def test_vocabulary_parallel_needs_a_process_group():
    with pytest.raises(ValueError, match="init_process_group"):
        VocabParallelHead(DenseHead(torch.randn(V, D)))


class _Zero3:
    """What ZeRO-3 does to a module: parameters are whole only inside its hooks, empty outside.

    The real thing is tested in test_zero3.py, where DeepSpeed is installed.
    """

    def __init__(self):
        self.external, self.gathered = [], 0

    def register_external_parameter(self, module, parameter):
        if not any(parameter is p for p in self.external):
            self.external.append(parameter)

    def shard(self, module):
        for number, p in enumerate(module.parameters()):
            p.ds_id, p.ds_shape, p.ds_whole = number, p.shape, p.data
            p.data = p.data.new_empty(0)
        module.ds_id = 0
        own = list(module.parameters(recurse=False))

        def gather(*call):
            self.gathered += 1
            for p in (*own, *self.external):
                p.data = p.ds_whole

        def release(*call):
            for p in (*own, *self.external):
                p.data = p.data.new_empty(0)

        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        module.register_full_backward_pre_hook(gather)
        module.register_full_backward_hook(release)


@pytest.fixture
def zero3(monkeypatch):
    zero = _Zero3()
    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(zero=zero))
    return zero


@pytest.mark.parametrize("train", [True, False])
def test_zero3_parameters_are_gathered_in_forward_and_backward(zero3, train):
    linear = nn.Linear(D, V).double().requires_grad_(train)
    plain = [p.detach().clone().requires_grad_() for p in linear.parameters()]
    zero3.shard(linear)
    hidden, labels, g = problem()
    params = list(linear.parameters()) if train else []
    logps = linear_logps(hidden, linear, labels)
    assert linear.weight.numel() == 0 and zero3.gathered == 1 and "forward" not in vars(linear)
    (logps * g).sum().backward()  # onto the parameters themselves, which must be whole for that
    assert linear.weight.numel() == 0
    logits = naive_logits(hidden, *plain, 1.0, 0.0)
    want = results(gather_logps(logits, labels), g, [hidden, *(plain if train else [])])
    assert_exact([logps.detach(), hidden.grad, *(p.grad for p in params)], want)


def test_zero3_with_lora(zero3):
    peft = pytest.importorskip("peft")
    linear = nn.Linear(D, V, bias=False).double()
    config = peft.LoraConfig(r=4, target_modules=["lm_head"])
    model = peft.get_peft_model(nn.ModuleDict({"lm_head": linear}), config)
    layer = model.base_model.model["lm_head"]
    params = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    for p in params:
        p.data = torch.randn(p.shape, dtype=torch.float64)
    weight, plain = linear.weight.detach().clone(), [p.detach().clone() for p in params]
    zero3.shard(layer)
    hidden, labels, g = problem()
    logps = linear_logps(hidden, layer, labels)
    (logps * g).sum().backward()
    a, b = (p.requires_grad_() for p in plain)
    full = gather_logps(hidden @ (weight + layer.scaling["default"] * b @ a).T, labels)
    want = results(full, g, [hidden, a, b])
    assert_exact([logps.detach(), hidden.grad, *(p.grad for p in params)], want)


def test_zero3_weights_without_their_module_are_refused(zero3):
    linear = nn.Linear(D, V).double()
    zero3.shard(linear)
    hidden, labels, _ = problem()
    with pytest.raises(ValueError, match=r"shape \(0,\) in place of \(301, 64\).*the module"):
        linear_logps(hidden, linear.weight, labels)
