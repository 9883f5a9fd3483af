"""Kernel tests run in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/kernels.

The variable must be set before Triton is imported, hence the environment and not a fixture.
"""

import os

import pytest
import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_ignore_collect(collection_path, config):
    return True if collection_path.name.startswith("test_") and not INTERPRET else None


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Uninitialised memory is NaN: what a kernel forgets to write shows."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


def _poisoned(make):
    def poisoned(*args, **kwargs):
        out = make(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() and out.numel() else out

    return poisoned


@pytest.fixture(params=["pointers", "descriptors"])
def form(request, monkeypatch):
    """Both forms of the matrix-product kernels."""
    _set_form(monkeypatch, request.param)


@pytest.fixture(params=["library", "own-pointers", "own-descriptors"])
def path(request, monkeypatch):
    """Every way to P: the library product in memory, and our own product in both forms."""
    from dilkern.kernels import configs

    monkeypatch.setattr(configs, "own_product", lambda *_: request.param != "library")
    _set_form(monkeypatch, request.param.rpartition("-")[2])


def _set_form(monkeypatch, form):
    from dilkern.kernels import configs

    tile = configs.tile
    monkeypatch.setattr(
        configs, "tile", lambda *a: tile(*a)._replace(descriptors=form == "descriptors")
    )
