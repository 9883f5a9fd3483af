"""What a pass over the vocabulary costs beside its products: words decoded, memory; in a fixed order.

On the triton backend: `TRITON_INTERPRET=1 pytest --backend triton tests/core/test_passes.py`.
"""

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dilkern.backends import base
from dilkern.lm_head import Adapter, DenseHead, LoRAHead

N, V, D = 512, 1024, 64
WORKSPACE = 1 << 20


class Decoded(DenseHead):
    """A head without a block in memory, which counts the words that it is asked to make."""

    words = 0

    def block(self, start, end, dtype):
        self.words += end - start
        return super().block(start, end, dtype).clone()


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made under it held at once.

    Args:
        given: tensors from before, which the interpreter hands out as new ones of the same memory.
    """

    def __init__(self, *given):
        super().__init__()
        self.held, self.peak = {}, 0
        self.given = {tensor.untyped_storage()._cdata for tensor in given}

    def __enter__(self):
        gc.collect()
        gc.freeze()  # what is there already need not be looked through at every new peak
        return super().__enter__()

    def __exit__(self, *error):
        gc.unfreeze()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {x.untyped_storage()._cdata for x in tree_leaves(args) if torch.is_tensor(x)}
        before |= self.given
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and tensor.untyped_storage()._cdata not in before:
                storage = tensor.untyped_storage()
                self.held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if self._live() > self.peak:
            gc.collect()  # Triton's interpreter leaves cycles
            self.peak = max(self.peak, self._live())
        return out

    def _live(self):
        self.held = {k: (ref, size) for k, (ref, size) in self.held.items() if not ref.expired()}
        return sum(size for _, size in self.held.values())


def problem(kind, dtype, n=N, v=V, d=D):
    torch.manual_seed(0)
    weight = torch.randn(v, d).to(dtype)
    if kind == "lora":
        adapter = Adapter(torch.randn(4, d).to(dtype), torch.randn(v, 4).to(dtype), 2.0)
        head = LoRAHead(DenseHead(weight), [adapter])
    else:
        head = (Decoded if kind == "decoded" else DenseHead)(weight, softcap=20.0)
    hidden = torch.randn(n, head.width).to(dtype)
    return hidden, torch.arange(n), torch.randint(0, v, (n,)), head


def backend():
    return base.resolve("auto", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_words_are_decoded_once_per_pass(dtype):
    *inputs, head = problem("decoded", dtype)
    options = {"workspace_bytes": WORKSPACE}
    out = backend().forward(*inputs, head, need_u=True, **options)
    assert head.words == V
    backend().forward(*inputs, head, need_u=False, **options)
    assert head.words == 2 * V
    backend().head_backward(
        *inputs, head, out.logps, out.lse, torch.ones(N), needed=[True], **options
    )
    assert head.words == 3 * V


# What takes the most of the workspace: logits, or rows and words; fewer of these in the interpreter.
SIZES = {"logits": (N, V, D), "rows and words": (512, 1024, 512), "interpreted": (64, 192, 512)}


@pytest.mark.parametrize("filter_eps", [0.0, 1e-4])
@pytest.mark.parametrize("kind", ["dense", "decoded", "lora"])
@pytest.mark.parametrize("most", ["logits", "rows and words"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_workspace_is_kept(dtype, most, kind, filter_eps):
    if most != "logits" and backend().__name__.endswith("triton"):
        most = "interpreted"
    *inputs, head = problem(kind, dtype, *SIZES[most])
    n, given = len(inputs[1]), (*inputs, *head.tensors())
    needed = [True] * len(head.tensors())
    with LiveBytes(*given) as forward:
        out = backend().forward(
            *inputs, head, workspace_bytes=WORKSPACE, need_u=True,
            filter_eps=filter_eps, need_quiet=filter_eps > 0,
        )  # fmt: skip
    results = sum(x.nbytes for x in (*out[:3], *(out.quiet or ())))
    assert WORKSPACE / 4 < forward.peak <= WORKSPACE + results
    with LiveBytes(*given) as backward:
        gradients = backend().head_backward(
            *inputs, head, out.logps, out.lse, torch.ones(n), out.quiet, needed=needed,
            workspace_bytes=WORKSPACE,
        )  # fmt: skip
    results = sum(x.nbytes for x in gradients)
    # Beside the gradients lists of a few numbers per row.
    assert WORKSPACE / 4 < backward.peak <= WORKSPACE + results + 32 * n


class Ordered(TorchDispatchMode):
    """Refuses what CUDA does under torch.use_deterministic_algorithms, of the likely operations."""

    REFUSED = ("cumsum", "put_", "histc", "bincount", "median", "nll_loss2d_forward")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        if name in self.REFUSED and any(torch.is_tensor(x) and x.is_floating_point() for x in args):
            raise RuntimeError(f"CUDA has no deterministic {name}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("filter_eps", [0.0, 1e-4])
@pytest.mark.parametrize("kind", ["dense", "lora"])
def test_deterministic_mode_takes_it_and_every_byte_is_written(kind, filter_eps):
    """The mode fills new memory with NaN and raises at operations that CUDA has in no fixed order."""
    *inputs, head = problem(kind, torch.float32, 130, 700, 24)
    needed, g = [True] * len(head.tensors()), torch.randn(130)

    def results():
        options = {"workspace_bytes": WORKSPACE // 8}
        out = backend().forward(
            *inputs, head, need_u=True, filter_eps=filter_eps, need_quiet=filter_eps > 0, **options
        )
        gradients = backend().head_backward(
            *inputs, head, out.logps, out.lse, g, out.quiet, needed=needed, **options
        )
        return *out[:3], *gradients

    want = results()
    torch.use_deterministic_algorithms(True)
    try:
        with Ordered():
            got = results()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(mine, asked) for mine, asked in zip(got, want, strict=True))
