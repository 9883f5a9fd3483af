"""Block shapes and memory passes of the torch backend on a CPU: `python -m benchmarks.blocks`.

The figures of docs/log.md come from here. First the whole op with other block shapes than its own
plan's, in interleaved rounds; then the elementwise part of one block (online log-sum-exp, exp, sum)
done over the whole block or over strips of rows that fit a cache.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Annotated
from unittest import mock

import torch
import typer
from torch import Tensor

from benchmarks.cases import Case, case_of, make_inputs
from benchmarks.measure import BareGemm, execute, spread
from benchmarks.peers import PEERS
from dilkern.backends import base
from dilkern.backends import torch as backend

SHAPES = (
    *((256, 4096), (512, 4096), (1024, 2048), (1024, 4096), (1024, 8192)),
    *((2048, 1024), (2048, 2048), (2048, 4096)),
)
STRIPS = (32, 64, 128, 256, 1024)


def fold(z: Tensor, reference: Tensor, total: Tensor, strip: int) -> None:
    """The backend's elementwise work on one block of logits, `strip` rows at a time."""
    for start in range(0, z.shape[0], strip):
        part = slice(start, start + strip)
        top = z[part].amax(1)
        moved = torch.where(top > reference[part] + 8.0, top, reference[part])
        total[part].mul_((reference[part] - moved).exp_())
        reference[part] = moved
        total[part].add_(z[part].sub_(moved.unsqueeze(1)).exp_().sum(1))


def interleaved(
    jobs: dict[str, Callable[[], object]], rounds: int
) -> dict[str, tuple[list[float], list[float], int]]:
    """Wall seconds, CPU seconds and page faults of the last round per job, order rotated."""
    found: dict[str, tuple[list[float], list[float], int]] = {n: ([], [], 0) for n in jobs}
    names = list(jobs)
    for number in range(-1, rounds):
        turn = (number + 1) % len(names)
        for name in names[turn:] + names[:turn]:
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            wall, cpu = time.perf_counter(), time.process_time()
            jobs[name]()
            if number >= 0:
                found[name][0].append(time.perf_counter() - wall)
                found[name][1].append(time.process_time() - cpu)
                faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
                found[name] = (*found[name][:2], faults)
    return found


def whole_op(case: Case) -> dict[str, Callable[[], object]]:
    """naive, the bare GEMM, the op with its own plan and with every other shape."""
    inputs = make_inputs(case).require_grads()

    def with_shape(shape: tuple[int, int]) -> object:
        with mock.patch.object(backend, "_plan", lambda *unused: base.Blocks(*shape)):
            return execute(PEERS["dilkern-torch"], inputs)

    jobs: dict[str, Callable[[], object]] = {
        "bare GEMM": BareGemm(inputs).run,
        "naive": lambda: execute(PEERS["naive"], inputs),
        "own plan": lambda: execute(PEERS["dilkern-torch"], inputs),
    }
    return jobs | {f"{r} x {v}": lambda shape=(r, v): with_shape(shape) for r, v in SHAPES}


def strips(rows: int = 1024, words: int = 4096) -> dict[str, Callable[[], object]]:
    logits = torch.randn(rows, words)
    z = torch.empty_like(logits)

    def job(strip: int) -> None:
        z.copy_(logits)
        fold(z, torch.full((rows,), -torch.inf), torch.zeros(rows), strip)

    return {f"strips of {s}": lambda s=s: job(s) for s in STRIPS if s <= rows}


def report(title: str, jobs: dict[str, Callable[[], object]], rounds: int) -> str:
    lines = [f"{title}, {rounds} rounds", "", "| | wall min ms | wall median | CPU min | faults |"]
    lines.append("|---|---|---|---|---|")
    for name, (wall, cpu, faults) in interleaved(jobs, rounds).items():
        walls, cpus = spread(wall, "wall"), spread(cpu, "cpu")
        lines.append(
            f"| {name} | {walls['wall_ms_min']:.1f} | {walls['wall_ms']:.1f} "
            f"| {cpus['cpu_ms_min']:.1f} | {faults} |"
        )
    return "\n".join(lines) + "\n"


def main(rounds: Annotated[int, typer.Option(help="interleaved rounds")] = 7) -> None:
    """Print both tables."""
    case = case_of("claim", 2048)
    print(report(f"{case.key}, V={case.vocab} D={case.hidden}", whole_op(case), rounds))
    print(report("elementwise part of a 1024 x 4096 block", strips(), rounds * 3))


if __name__ == "__main__":
    typer.run(main)
