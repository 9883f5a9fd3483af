"""Where heads put what they compute, on a machine without a GPU; see heads/test_offloaded_head.py.

Fake tensors on a made-up device: they have no numbers, but refuse any operation that mixes devices.
The made-up device stays for the life of a process, hence a script.
"""

from itertools import product

import torch
from head_cases import D, T, V, eight_bit_linear, four_bit_linear
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from dilkern.backends import torch as backend
from dilkern.lm_head import Adapter, DenseHead, LoRAHead, as_head, rebuild


def heads():
    dense = DenseHead(torch.randn(V, D), torch.randn(V), softcap=3.0)
    bases = [dense, as_head(four_bit_linear(bias=True)), as_head(four_bit_linear(nested=False))]
    bases.append(as_head(eight_bit_linear(bias=True)))
    adapter = Adapter(torch.randn(4, D), torch.randn(V, 4), 2.0, torch.randn(V))
    return [*bases, *(LoRAHead(base, [adapter]) for base in bases)]


def check(head, stored_on, device, dtype):
    """Run both passes over `head` with its tensors on `stored_on`, hidden states on `device`."""
    tensors = [torch.empty(t.shape, dtype=t.dtype, device=stored_on) for t in head.tensors()]
    if head.kind == "lora":  # PEFT keeps adapters on the device of the hidden states
        tensors[:2] = [t.to(device) for t in tensors[:2]]
    there = rebuild(head.spec(), tensors, device)
    hidden = torch.empty(T, there.width, dtype=dtype, device=device)
    rows = labels = torch.empty(T - 2, dtype=torch.int64, device=device)
    result = backend.forward(hidden, rows, labels, there, workspace_bytes=100_000, need_u=True)
    assert {x.device for x in result[:3]} == {device}
    needed = [i < 2 and head.kind in ("dense", "lora") for i in range(len(tensors))]
    needed[-1] = head.bias() is not None  # it is the last one
    gradients = backend.head_backward(
        hidden, rows, labels, there, result.logps, result.lse, result.logps,
        needed=needed, workspace_bytes=100_000,
    )  # fmt: skip
    assert [None if g is None else g.device for g in gradients] == [
        t.device if n else None for t, n in zip(tensors, needed)
    ]


if __name__ == "__main__":
    made = heads()
    _setup_privateuseone_for_python_backend("elsewhere")
    there = torch.device("elsewhere", 0)
    with FakeTensorMode(allow_non_fake_inputs=False):
        for head, stored_on in product(made, (there, torch.device("cpu"))):
            for dtype in (torch.bfloat16, torch.float32):
                check(head, stored_on, there, dtype)
    print(len(made), "heads")
