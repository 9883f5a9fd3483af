"""Where the time of one peer goes, kernel by kernel: `python -m tools.breakdown CASE PEER`.

torch's profiler over a few runs of one case; the same command is what to wrap in a hardware profiler:

    ncu --clock-control none --set full -k regex:softmax_tile -c 4 -o out \\
        python -m tools.breakdown llama-3-8b@8192-bfloat16-frozen dilkern-triton --runs 1 --plain

`python -m tools.breakdown pairs shared` does the same with training steps of a trainer of
`benchmarks.pairs` (SmolLM2, DPO, 4 pairs of HH per step).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import make_inputs
from benchmarks.environment import begin, beside, default_stem
from benchmarks.measure import execute
from benchmarks.pairs import VARIANTS, PairsTask, Setup, draw_pairs
from benchmarks.peers import PEERS
from benchmarks.run import select_cases


def task_of(case: str, peer: str, kind: str) -> Callable[[], Any]:
    """What is to be profiled, as a call."""
    if case == "pairs":
        setup = Setup(steps=1, device=kind, dtype="bfloat16" if kind == "cuda" else "float32")
        return PairsTask(setup, torch.get_num_threads(), peer, draw_pairs(setup)).round
    (chosen,) = [found for found in select_cases(case) if found.key == case]
    return partial(execute, PEERS[peer], make_inputs(chosen, kind).require_grads())


def main(
    case: Annotated[str, typer.Argument(help="a case's key, as in the result files, or pairs")],
    peer: Annotated[str, typer.Argument(help=f"of {', '.join((*PEERS, *VARIANTS))}")],
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto")] = "auto",
    runs: Annotated[int, typer.Option(help="profiled runs, after two to warm up")] = 3,
    plain: Annotated[bool, typer.Option(help="no torch profiler: another one is around")] = False,
    out: Annotated[Path | None, typer.Option(help="result file without suffix")] = None,
) -> None:
    """Profile one peer on one case and print its kernels by time."""
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    task = task_of(case, peer, kind)
    for _ in range(2):
        task()
    if plain:
        for _ in range(runs):
            task()
        return
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if kind == "cuda" else []
    with profile(activities=activities) as found:
        for _ in range(runs):
            task()
    key = "self_device_time_total" if kind == "cuda" else "self_cpu_time_total"
    text = found.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=70)
    text = f"{case}, {peer}, {runs} runs\n{text}\n"
    stem = out or default_stem(torch.device(kind), "breakdown")
    begin(stem, torch.device(kind))
    with beside(stem, ".txt").open("a") as file:
        file.write(text)
    print(f"{text}{beside(stem, '.txt')}")


if __name__ == "__main__":
    typer.run(main)
