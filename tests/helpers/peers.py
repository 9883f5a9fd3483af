"""Where the GPU's tests run, and what their results are held against.

On a GPU at real sizes or, under TRITON_INTERPRET=1, on the CPU at small ones: so their Python has run
before a GPU is there to find out that it does not. DILKERN_SMALL_TESTS=1: small ones on a GPU, for a
memory checker.
"""

import os

import pytest
import torch
from interpreter import INTERPRET
from torch import Tensor

DEVICE = "cpu" if INTERPRET else "cuda"
SMALL = INTERPRET or os.environ.get("DILKERN_SMALL_TESTS") == "1"

on_gpu_or_interpreter = pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()), reason="no CUDA GPU, and no TRITON_INTERPRET=1"
)
gpu_only = pytest.mark.skipif(INTERPRET, reason="there is no such thing on a CPU")


def sized(real, small):
    """What a test takes on a GPU, and in the interpreter or under a memory checker."""
    return small if SMALL else real


def wide_product(h: Tensor, w: Tensor) -> Tensor:
    """H W^T of 16-bit matrices in fp32, by the units that our kernels use.

    Tensor cores are reported to truncate where they add (arXiv 2512.07004); fp32 units round. Held
    against those, a right kernel would fail its budget.
    """
    if h.is_cuda and h.dtype.itemsize == 2 and torch.version.hip is None:
        return torch.mm(h, w.t(), out_dtype=torch.float32)
    return h.float() @ w.float().t()
