"""A head on the CPU under hidden states elsewhere: what is moved is one block, never the weight."""

import subprocess
import sys
from pathlib import Path

import head_cases
import pytest
import torch
from head_cases import D, V, check_exact, eight_bit_linear, four_bit_linear, leaf, placed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dilkern.lm_head import Adapter, DenseHead, LoRAHead, as_head, rebuild

META = torch.device("meta")


class Moved(TorchDispatchMode):
    """Record the elements of every tensor that is copied from elsewhere to the meta device."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device != out.device == META:
            self.sizes.append(args[0].numel())
        return out


@pytest.mark.parametrize("kind", ["dense", "four_bit", "lora"])
def test_blocks_and_rows_move_one_at_a_time(kind):
    """The meta device stands in for the accelerator: it tells what is moved, not the numbers."""
    if kind == "four_bit":
        pytest.importorskip("bitsandbytes")
        head = as_head(four_bit_linear())
    else:
        head = DenseHead(torch.randn(V, D), torch.randn(V))
    if kind == "lora":
        # PEFT keeps adapters on the device of the hidden states.
        head = LoRAHead(head, [Adapter(torch.randn(4, D), torch.randn(V, 4, device=META), 2.0)])
    remote = rebuild(head.spec(), head.tensors(), META)
    ids = torch.zeros(5, dtype=torch.int64)
    with Moved() as moved:
        block = remote.block(10, 30, torch.bfloat16)
        rows = remote.gather(ids, torch.bfloat16)
    assert block.device == rows.device == META
    assert block.shape == (20, head.width) and rows.shape == (5, head.width)
    assert [size for size in moved.sizes if size != ids.numel()] == [20 * D, 5 * D]
    bias = remote.bias()
    assert bias is None or bias.device == META


def test_no_operation_mixes_devices():
    """Every kind of head, on a made-up device and on the CPU under hidden states there."""
    pytest.importorskip("bitsandbytes")
    script = Path(__file__).parents[1] / "helpers" / "head_devices.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.stdout.strip() == "8 heads", done.stderr


def linear_on_the_cpu(kind):
    """Return a linear that stays on the CPU and its fp64 weight."""
    if kind != "dense":
        pytest.importorskip("bitsandbytes")
    with head_cases.made_on("cpu"):
        if kind == "dense":
            linear = nn.Linear(D, V).double()
            return linear, linear.weight
        linear = four_bit_linear() if kind == "four_bit" else eight_bit_linear()
    return linear, as_head(linear).block(0, V, torch.float64)


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["dense", "four_bit", "eight_bit"])
def test_gradients_of_a_streamed_head(kind, lora, train, pinned, device):
    if pinned and device == "cpu":
        pytest.skip("memory is pinned for a GPU")
    if train and kind != "dense":
        pytest.skip("quantised weights are not trained")
    linear, weight = linear_on_the_cpu(kind)
    linear.requires_grad_(train)
    if pinned:
        for p in linear.parameters():
            p.data = p.data.pin_memory()
    a, b = leaf(4, D), leaf(V, 4)  # PEFT keeps adapters on the device of the hidden states
    head = LoRAHead(as_head(linear), [Adapter(a, b, 2.0)]) if lora else linear

    def dense():
        bias = None if linear.bias is None else placed(linear.bias)
        return placed(weight) + 2.0 * b @ a if lora else placed(weight), bias

    params = [*(linear.parameters() if train else ()), *((a, b) if lora else ())]
    check_exact(head, dense, params)
    assert all(p.device.type == "cpu" for p in linear.parameters())
