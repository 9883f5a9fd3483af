"""Shared test helpers: small cases, and the one error budget."""

import warnings

import interpreter
import numpy as np
import pytest
import torch
from budget import Budget

from dilkern import logps
from dilkern.backends import base, word_filter

torch.set_num_threads(1)  # pytest -n takes the other cores
if interpreter.INTERPRET:
    interpreter.repair_bf16()


def pytest_addoption(parser):
    parser.addoption(
        "--backend", default="auto", help='what backend="auto" means, where it takes the dtype'
    )
    parser.addoption(
        "--filter-eps", type=float, help="what filter_eps=None means; every block is filtered then"
    )


def pytest_collection_modifyitems(items):
    """A GPU machine has releases of its own; what they warn of must not end its short run."""
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(autouse=True)
def backend_under_test(request, monkeypatch):
    """The same tests for every backend: --backend triton puts it in the place of "auto"."""
    wanted, resolve = request.config.getoption("--backend"), base.resolve

    def choose(name, device, dtype=None):
        named = wanted if name == "auto" and dtype is not torch.float64 else name
        return resolve(named, device, dtype)

    monkeypatch.setattr(base, "resolve", choose)


@pytest.fixture(autouse=True)
def filter_under_test(request, monkeypatch):
    """The same tests with the word filter at work: --filter-eps 1e-30 leaves out next to nothing."""
    wanted = request.config.getoption("--filter-eps")
    if wanted is not None:
        asked = word_filter.threshold
        monkeypatch.setattr(logps, "threshold", lambda eps, dtype: asked(eps or wanted, dtype))
        monkeypatch.setattr(word_filter, "MOST_LOUD", 1.0)


@pytest.fixture(autouse=True)
def quiet_numpy():
    """NaN and Inf are inputs here; NumPy's warnings about them are the interpreter's, not ours."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
        yield


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def budget():
    return Budget()
