"""How many rows and words the op has in work at once: `python -m benchmarks.blocks`.

The whole op with other block shapes than its own plan's, in interleaved rounds. On a CPU it is the
torch backend, and after it the elementwise part of one block (online log-sum-exp, exp, sum) done over
the whole block or over strips of rows that fit a cache; the figures of docs/log.md come from here. On
a GPU (`--device cuda`) it is the triton backend, with P from the library's product (a) and from our
own (b), beside the torch backend.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import typer
from torch import Tensor

from benchmarks import environment
from benchmarks.cases import Case, case_of, make_inputs
from benchmarks.measure import BareGemm, PeakMemory, execute, spread
from benchmarks.peers import PEERS
from benchmarks.run import select_cases
from dilkern.backends import base

SHAPES = {
    "torch": (
        *((256, 4096), (512, 4096), (1024, 2048), (1024, 4096), (1024, 8192)),
        *((2048, 1024), (2048, 2048), (2048, 4096)),
    ),
    "triton": tuple((r, v) for r in (1024, 2048, 4096, 8192) for v in (8192, 16384, 32768, 65536)),
}
GPU_CASES = ",".join(
    f"{head}@8192-bfloat16-frozen" for head in ("qwen3-0.6b", "llama-3.2-1b", "llama-3-8b")
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


def whole_op(
    case: Case, device: torch.device | str = "cpu", name: str = "torch"
) -> dict[str, Callable[[], object]]:
    """naive, the bare GEMM, the op of backend `name` with its own plan and with every other shape."""
    inputs = make_inputs(case, device).require_grads()
    backend, peer = import_module(base.BACKENDS[name]), PEERS[f"dilkern-{name}"]

    def with_shape(shape: tuple[int, int]) -> object:
        with mock.patch.object(backend, "_plan", lambda *_, **unused: base.Blocks(*shape)):
            return execute(peer, inputs)

    jobs: dict[str, Callable[[], object]] = {
        "bare GEMM": BareGemm(inputs).run,
        "naive": lambda: execute(PEERS["naive"], inputs),
        "own plan": lambda: execute(peer, inputs),
    }
    jobs |= {f"{r} x {v}": lambda shape=(r, v): with_shape(shape) for r, v in SHAPES[name]}
    if name == "torch":
        return jobs
    jobs["torch backend"] = lambda: execute(PEERS["dilkern-torch"], inputs)
    configs = import_module("dilkern.kernels.configs")

    def by(own: bool, job: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with mock.patch.object(configs, "own_product", lambda *unused: own):
                return job()

        return run

    shared = ("bare GEMM", "naive", "torch backend")
    both = {f"(a) {name}": by(False, job) for name, job in jobs.items() if name not in shared}
    both |= {f"(b) {name}": by(True, job) for name, job in jobs.items() if name not in shared}
    return {name: jobs[name] for name in shared} | both


def strips(rows: int = 1024, words: int = 4096) -> dict[str, Callable[[], object]]:
    logits = torch.randn(rows, words)
    z = torch.empty_like(logits)

    def job(strip: int) -> None:
        z.copy_(logits)
        fold(z, torch.full((rows,), -torch.inf), torch.zeros(rows), strip)

    return {f"strips of {s}": lambda s=s: job(s) for s in STRIPS if s <= rows}


def report(
    title: str,
    jobs: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device | str = "cpu",
) -> str:
    peaks = {}
    for name, job in jobs.items():  # which warms every job up as well
        with PeakMemory(torch.device(device)) as peak:
            job()
        peaks[name] = peak.mib
    lines = [
        f"{title}, {rounds} rounds",
        "",
        "| | wall min ms | wall median | CPU min | page faults | peak of the first call, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, (wall, cpu, faults) in interleaved(jobs, rounds).items():
        walls, cpus = spread(wall, "wall"), spread(cpu, "cpu")
        lines.append(
            f"| {name} | {walls['wall_ms_min']:.2f} | {walls['wall_ms']:.2f} "
            f"| {cpus['cpu_ms_min']:.2f} | {faults} | {peaks[name]:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    cases: Annotated[str, typer.Option(help="parts of case keys; default: the claim's")] = "",
    backend: Annotated[str, typer.Option(help="torch or triton; default: the device's own")] = "",
    rounds: Annotated[int, typer.Option(help="interleaved rounds")] = 7,
    out: Annotated[Path | None, typer.Option(help="result file without suffix")] = None,
) -> None:
    """Measure the block shapes of every case and print the tables."""
    name = backend or ("triton" if device == "cuda" else "torch")
    chosen = select_cases(cases or (GPU_CASES if device == "cuda" else case_of("claim", 2048).key))
    where = torch.device(device)
    stem = environment.default_stem(where)
    stem = out or stem.with_name(f"{stem.name}-blocks")
    environment.record(stem.with_name(stem.name + ".json"), where)
    text = ""
    for case in chosen:
        title = f"{case.key}, V={case.vocab} D={case.hidden}"
        text += report(title, whole_op(case, where, name), rounds, where) + "\n"
        stem.with_name(stem.name + ".md").write_text(text)
    if device == "cpu" and name == "torch":
        text += report("elementwise part of a 1024 x 4096 block", strips(), rounds * 3)
        stem.with_name(stem.name + ".md").write_text(text)
    print(text + str(stem.with_name(stem.name + ".md")))


if __name__ == "__main__":
    typer.run(main)
