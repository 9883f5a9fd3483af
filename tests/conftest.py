"""Shared test helpers: small cases, and the one error budget."""

import pytest
import torch
from budget import Budget

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def budget():
    return Budget()
