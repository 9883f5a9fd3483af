"""Micro rows under pytest-benchmark: `pytest benchmarks/test_micro.py`.

Small enough for a quick look at a change; the claims of the README come from `benchmarks.run`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from benchmarks.cases import MODES, Case, Inputs, make_inputs
from benchmarks.measure import execute
from benchmarks.peers import PEERS
from dilkern import LOSSES, linear_logps, preference_loss

CASE = Case("micro", 512, 8192, 256)


def _inputs(mode: str) -> Inputs:
    return make_inputs(replace(CASE, mode=mode)).require_grads()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("peer", ["naive", "dilkern-torch"])
def test_op(benchmark: Callable[..., object], peer: str, mode: str) -> None:
    benchmark(execute, PEERS[peer], _inputs(mode))


@pytest.mark.parametrize("workspace_mib", [2, 16, 256])
def test_workspace(benchmark: Callable[..., object], workspace_mib: float) -> None:
    x = _inputs("frozen")
    benchmark(linear_logps, x.hidden, x.weight, x.labels, workspace_mib=workspace_mib)


@pytest.mark.parametrize("tokens", [0, 1, 64])
def test_overhead(benchmark: Callable[..., object], tokens: int) -> None:
    """Few tokens against few words: what the call itself costs."""
    x = _inputs("frozen")
    benchmark(linear_logps, x.hidden[:tokens], x.weight[:64], x.labels[:tokens] % 64)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_sequence_loss(benchmark: Callable[..., object], loss: str) -> None:
    """The small op: log-probs of 64 sequences to loss and their gradient."""
    ref, lengths = -100 * torch.rand(64), torch.full((64,), 100)
    logps = (-100 * torch.rand(64)).requires_grad_()
    options = {"kl_log_ratios": torch.rand(8)} if LOSSES[loss].baseline else {}

    def step() -> None:
        logps.grad = None
        ratios = logps - ref if LOSSES[loss].reference else None
        found = preference_loss(logps, lengths, log_ratios=ratios, loss=loss, **options)
        found.loss.backward()

    benchmark(step)
