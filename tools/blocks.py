"""How many rows and words the op has in work at once: `python -m tools.blocks`.

The whole op with other block shapes than its own plan's, in interleaved rounds. On a CPU it is the
torch backend, and after it the elementwise part of one block (online log-sum-exp, exp, sum) done over
the whole block or over strips of rows that fit a cache; the figures of docs/dev/log.md come from
here. On a GPU (`--device cuda`) it is the triton backend, with P from the library's product (a) and
from our own (b), beside the torch backend.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest import mock

import torch
import typer
from torch import Tensor

from benchmarks.cases import BY_WIDTH, Case, case_of, make_inputs
from benchmarks.environment import begin, beside, default_stem, markdown
from benchmarks.measure import BareGemm, Plan, execute, interleave, peak_mib, spread
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
GPU_CASES = ",".join(case_of(head, 8192, dtype="bfloat16").key for head in BY_WIDTH[::-1])
STRIPS = (32, 64, 128, 256, 1024)
Job = Callable[[], Any]


def fold(z: Tensor, reference: Tensor, total: Tensor, strip: int) -> None:
    """The backend's elementwise work on one block of logits, `strip` rows at a time."""
    for start in range(0, z.shape[0], strip):
        part = slice(start, start + strip)
        top = z[part].amax(1)
        moved = torch.where(top > reference[part] + 8.0, top, reference[part])
        total[part].mul_((reference[part] - moved).exp_())
        reference[part] = moved
        total[part].add_(z[part].sub_(moved.unsqueeze(1)).exp_().sum(1))


class Usage(NamedTuple):
    """Of one call: wall seconds, CPU seconds, page faults."""

    total: float
    cpu: float
    faults: int


def used(job: Job) -> Usage:
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    wall, cpu = time.perf_counter(), time.process_time()
    job()
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    return Usage(*seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)


def replaced(
    module: object, name: str, answer: object, job: Callable[[], Any]
) -> Callable[[], Any]:
    """`job` with a function of the package giving `answer`."""

    def run() -> Any:
        with mock.patch.object(module, name, lambda *_, **unused: answer):
            return job()

    return run


def whole_op(case: Case, device: torch.device | str = "cpu", name: str = "torch") -> dict[str, Job]:
    """naive, the bare GEMM, the op of backend `name` with its own plan and with every other shape."""
    inputs = make_inputs(case, device).require_grads()
    backend, op = (
        import_module(base.BACKENDS[name]),
        partial(execute, PEERS[f"dilkern-{name}"], inputs),
    )
    shared: dict[str, Job] = {
        "bare GEMM": BareGemm(inputs).run,
        "naive": partial(execute, PEERS["naive"], inputs),
    }
    fit = {(min(r, case.tokens), min(v, case.vocab)) for r, v in SHAPES[name]}
    jobs: dict[str, Job] = {"own plan": op} | {
        f"{r} x {v}": replaced(backend, "plan", base.Blocks(r, r, v), op) for r, v in sorted(fit)
    }
    if name == "torch":
        return shared | jobs
    shared["torch backend"] = partial(execute, PEERS["dilkern-torch"], inputs)
    configs = import_module("dilkern.kernels.configs")
    return shared | {
        f"({path}) {name}": replaced(configs, "own_product", path == "b", job)
        for path in "ab"
        for name, job in jobs.items()
    }


def strips(rows: int = 1024, words: int = 4096) -> dict[str, Job]:
    logits = torch.randn(rows, words)
    z = torch.empty_like(logits)

    def job(strip: int) -> None:
        z.copy_(logits)
        fold(z, torch.full((rows,), -torch.inf), torch.zeros(rows), strip)

    return {f"strips of {s}": lambda s=s: job(s) for s in STRIPS if s <= rows}


def report(title: str, jobs: dict[str, Job], rounds: int, device: str = "cpu") -> str:
    # Which warms every job up as well.
    peaks = {name: peak_mib(job, torch.device(device)) for name, job in jobs.items()}
    samples, _ = interleave({n: partial(used, job) for n, job in jobs.items()}, Plan(rounds))
    lines = []
    for name, mine in samples.items():
        wall = spread([usage.total for usage in mine], "wall")
        cpu = 1000 * min(usage.cpu for usage in mine)
        times = (f"{ms:.2f}" for ms in (wall["wall_ms_min"], wall["wall_ms"], cpu))
        lines.append([name, *times, mine[-1].faults, f"{peaks[name]:.0f}"])
    header = "|wall min ms|wall median|CPU min|page faults|peak of the first call, MiB"
    return f"{title}, {rounds} rounds\n\n{markdown(header, lines)}"


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
    stem = out or default_stem(where, "blocks")
    begin(stem, where)
    text, table = "", beside(stem, ".md")
    for case in chosen:
        title = f"{case.key}, V={case.vocab} D={case.hidden}"
        text += report(title, whole_op(case, where, name), rounds, device) + "\n"
        table.write_text(text)
    if device == "cpu" and name == "torch":
        text += report("elementwise part of a 1024 x 4096 block", strips(), rounds * 3)
        table.write_text(text)
    print(f"{text}{table}")


if __name__ == "__main__":
    typer.run(main)
