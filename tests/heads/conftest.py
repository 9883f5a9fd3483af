"""What must be set before the first import of transformers; the device under test."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import head_cases
import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The same test on the CPU and on a GPU: only where heads and problems are made differs."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    with head_cases.made_on(request.param):
        yield request.param
