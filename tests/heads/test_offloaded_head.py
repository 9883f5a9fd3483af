"""A head on the CPU under hidden states elsewhere: what is moved is one block, never the weight."""

import pytest
import torch
from head_cases import D, V, assert_exact, four_bit_linear, gather_logps, problem, results
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dilkern import linear_logps
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("pinned", [False, True])
def test_gradients_of_a_streamed_head(pinned):
    linear = nn.Linear(D, V).double()
    if pinned:
        for p in linear.parameters():
            p.data = p.data.pin_memory()
    params = list(linear.parameters())
    hidden, labels, g = problem()
    want = results(gather_logps(linear(hidden), labels), g, [hidden, *params])
    on_gpu = hidden.detach().cuda().requires_grad_()
    logps = linear_logps(on_gpu, linear, labels.cuda(), workspace_mib=0.1)
    got = results(logps, g.cuda(), [on_gpu, *params])
    assert got[2].device.type == "cpu"
    assert_exact([x.cpu() for x in got], want)
