"""Kernel tests run in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/kernels.

The variable must be set before Triton is imported, hence the environment and not a fixture.
"""

import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_ignore_collect(collection_path, config):
    return True if collection_path.name.startswith("test_") and not INTERPRET else None


if INTERPRET:
    import triton.language as tl
    from triton.runtime import interpreter

    # Triton keeps bf16 as raw uint16 in the interpreter: its dot multiplies bit patterns and its
    # cast truncates (3.6 to 3.9). These two functions make both right.
    _builder, _handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    _dot, _cast = _builder.create_dot, _builder.cast_impl

    def _widen(bits):
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def _round(values):
        values = np.asarray(values, np.float32)
        bits = values.view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)

    def _cast_impl(self, source, target):
        old, new = source.dtype.scalar, target.scalar
        if old == tl.bfloat16 and new == tl.float32:
            return _handle(_widen(source.data), new)
        if old == tl.float32 and new == tl.bfloat16:
            return _handle(_round(source.data), new)
        return _cast(self, source, target)

    def _create_dot(self, a, b, d, *rest):
        def up(x):
            return _handle(_widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

        return _dot(self, up(a), up(b), d, *rest)

    _builder.cast_impl, _builder.create_dot = _cast_impl, _create_dot


@pytest.fixture(autouse=True)
def quiet_numpy():
    """NaN and Inf are inputs here; NumPy's warnings about them are the interpreter's, not ours."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
        yield


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
    """Every way to P: the library product with chunk_softmax, and our own product in both forms."""
    from dilkern.kernels import configs

    monkeypatch.setattr(configs, "own_product", lambda *_: request.param != "library")
    _set_form(monkeypatch, request.param.rpartition("-")[2])


def _set_form(monkeypatch, form):
    from dilkern.kernels import configs

    tile = configs.tile
    monkeypatch.setattr(
        configs, "tile", lambda *a: tile(*a)._replace(descriptors=form == "descriptors")
    )


sys.path.insert(0, str(HERE))
