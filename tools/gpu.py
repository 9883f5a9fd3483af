"""The steps for a GPU machine, one command each, unattended and without network (docs/dev/gpu.md).

    python -m tools.gpu suite --out $OUT    # one step, its log and results in $OUT

A step ends within its limit: a command that would outlast it is stopped, and what it has written by
then counts. Results of an earlier call that lie under benchmarks/results/<gpu>/ are continued. With
`--tiny` a step runs its commands at small sizes on a CPU (kernels in Triton's interpreter), so that a
typing error shows before the GPU is there. What such a machine lacks is brought by `tools.pack`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.cases import CASE_SETS
from benchmarks.environment import beside, default_stem
from benchmarks.peers import select
from benchmarks.real_models import PACK, ROOT, SOURCES, WEIGHTS, cache
from benchmarks.run import UNFINISHED

LIMIT_S = 470  # a call to the lent machine ends at 600 s, its install and start included
KERNELS = "^_.*_kernel$"  # ours are called so, the library's are not
# Of the tests at small sizes, with no allocation inside another: what runs out of its own is seen.
SANITIZED = ("DILKERN_SMALL_TESTS=1", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")
PROFILED = (
    "qwen3-0.6b@8192-bfloat16-frozen",
    "llama-3-8b@8192-bfloat16-frozen",
    "llama-3-8b@8192-bfloat16-trainable",
)
LOCKS = ("cce", "cce-unfiltered")  # spin locks: should one hang, the others' rows are there
# Result files that a repeated call continues, by step: what follows the stem.
CONTINUED = {
    "suite": (".csv", ".json", "-ceilings.csv", "-ceilings.json", "-ceilings.md"),
    "steps": ("-steps.csv", "-steps.json"),
    "longest": ("-longest.csv", "-longest.json"),
    "scaling": ("-scaling.csv", "-scaling.json"),
    "pairs": ("-pairs.csv", "-pairs.json"),
    "filter": ("-filter.csv", "-filter.json"),
}


def commands(step: str, stem: Path, tiny: bool) -> list[list[str]]:
    """The commands of a step; `stem` is its result file without suffix."""
    here = ("--device", "cpu" if tiny else "cuda")
    small = ("--tiny",) if tiny else ()

    def module(name: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", name, *arguments]

    def out(what: str) -> tuple[str, str]:
        return ("--out", f"{stem}-{what}")

    def by_size(at_tiny: str, full: str = "") -> list[str]:
        return at_tiny.split() if tiny else full.split()

    def without_locks(names: str) -> str:
        return f"--peers {','.join(p.name for p in select(names) if p.name not in LOCKS)}"

    def with_locks(cases: str, result: str) -> list[list[str]]:
        """cut-cross-entropy's kernels wait for one another: in a process and a time of their own."""
        which = f"{cases} --peers {','.join(LOCKS)} --budget 90 --group-seconds 5 --out {result}"
        return [] if tiny else [module("benchmarks.run", *here, *which.split())]

    pytest = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu"]
    # Hundreds of kernels are compiled, each once for all processes.
    at_once = by_size("-q", "-n 8")
    if step == "tests":
        return [[*pytest, *at_once, *by_size("-k nf4_bits"), "tests/gpu", "tests/heads"]]
    if step == "sanitize":
        which = ["tests/gpu/test_gpu.py", "-k", "nf4_bits" if tiny else "not compiled"]
        small, checker = ["env", *SANITIZED], ["compute-sanitizer", "--kernel-name"]
        checker += [f"regex={KERNELS}", "--error-exitcode", "9", "--print-limit", "10", "--tool"]
        return [
            [*(() if tiny else small), *pytest, *at_once, *which],  # compiles them
            *(
                [*small, *checker, tool, *pytest, *which]
                for tool in by_size("", "memcheck racecheck")
            ),
        ]
    if step == "suite":
        which = by_size(
            "--cases tiny --peers naive,dilkern-triton --rounds 1 --no-processes",
            f"--cases gpu {without_locks('all')} --budget 290 --group-seconds 15",
        )
        return [
            module("tools.ceilings", *small, *out("ceilings")),
            module("benchmarks.run", *here, *which, "--out", str(stem)),
            *with_locks("--cases gpu", str(stem)),
            module("benchmarks.report", "goals", f"{stem}.csv", "--out", f"{stem}-goals.md"),
        ]
    if step == "weights":
        return [module("tools.pack", "unpack", *by_size("smollm2"))]
    if step == "filter":
        found = [name for name in SOURCES if any((cache() / name).glob("*.safetensors"))]
        cases = ",".join(f"{name}@8192" for name in found) or "filter-gpu"
        peers = without_locks(CASE_SETS["filter-gpu"].peers)
        which = by_size(
            "--cases tiny@64-float32-frozen --peers naive,filter-auto --rounds 1 --no-processes",
            f"--cases {cases} {peers} --budget 290 --group-seconds 15",
        )
        return [
            module("benchmarks.run", *here, *which, *out("filter")),
            *with_locks(f"--cases {cases}", f"{stem}-filter"),
            module("benchmarks.report", "goals", f"{stem}-filter.csv", *out("filter-goals.md")),
        ]
    if step == "tune":
        which = by_size("--cases tiny@64-float32-frozen --backend triton --rounds 1")
        return [
            module("tools.tune", *small, *out("tune")),
            module("tools.blocks", *here, *which, *out("blocks")),
        ]
    if step == "steps":
        which = by_size("--models micro --rounds 1 --no-processes")
        return [module("benchmarks.train_step", *here, *which, *out("steps"))]
    if step == "longest":
        which = by_size("--models micro --unit 8 --most 16")
        return [
            module("benchmarks.train_step", *here, "--cap-gib", "24", *which, *out("longest")),
            module("benchmarks.report", "goals", f"{stem}-longest.csv"),
        ]
    if step == "scaling":
        which = by_size(
            "--cases scaling-tiny --rounds 1 --no-processes",
            "--cases scaling-gpu --rounds 5 --budget 420 --group-seconds 10",
        )
        return [
            module("benchmarks.run", *here, *which, *out("scaling")),
            module("benchmarks.report", "draw", f"{stem}-scaling.csv"),
        ]
    if step == "pairs":
        few = "--steps 1 --variants trl,trl-logits,shared,shared+filter"
        runs = [  # 8k tokens per step, TRL's padding not counted
            f"--models {model} --losses {loss} --pairs 20 {few if model == 'qwen3-8b' else ''}"
            for model in ("smollm2", "qwen3-8b", "llama-3.2-1b")
            for loss in ("dpo", "lsif")
        ]
        if tiny:
            runs = [
                "--models smollm2 --losses dpo --pairs 2 --steps 1 --rounds 1 --max-length 200 "
                "--variants trl,shared --no-processes"
            ]
        return [
            *(module("benchmarks.pairs", *here, *r.split(), *out("pairs")) for r in runs),
            module("benchmarks.report", "goals", f"{stem}-pairs.csv"),
        ]
    if step == "profile":
        found = []
        profiled = ("tiny@64-float32-frozen",) if tiny else PROFILED
        wrapped = [module("tools.breakdown", c, "dilkern-triton", *here) for c in profiled]
        for command in wrapped:
            found.append([*command, *out("breakdown")])
        for number, command in enumerate(wrapped):
            report = f"{stem}-ncu{number}"
            counters = ["ncu", "--clock-control", "none", "--set", "full", "-k", f"regex:{KERNELS}"]
            counters += ["-s", "4", "-c", "4", "-f", "-o", report]
            found.append([*(() if tiny else counters), *command, "--runs", "1", "--plain"])
            found += [] if tiny else [["ncu", "-i", f"{report}.ncu-rep", "--page", "details"]]
        return found
    raise typer.BadParameter(f"unknown step {step!r}; known: {', '.join(STEPS)}")


# What each is for, in the order in which a lease of 30 minutes is best spent.
STEPS = {
    "tests": "GPU tests at real sizes",
    "sanitize": "memcheck and racecheck of our kernels, in the same tests at small sizes",
    "suite": "ceilings, then the comparison with every rival, and the goals; repeat until it exits 0",
    "weights": "folders of real models, from the parts that have come",
    "filter": "the word filter on real models, and its goals; repeat until it exits 0",
    "tune": "tiles and rows for kernels/configs.py; rows x words; library product or our own",
    "pairs": "preference pairs per second: TRL's DPOTrainer, padded, padding-free, shared prompts",
    "steps": "one training step, 1B and 8B in 4 bit: time and memory",
    "longest": "the longest sequence that fits under 24 GiB",
    "scaling": "exponents in T, V, D and workspace",
    "profile": "kernels by time, and hardware counters",
}


def execute(command: list[str], log: Path, limit: float) -> int:
    """Run one command with its output here and in `log`; 124 if the limit ended it, 75 if before."""
    if limit < 1:
        print(f"no time is left for {' '.join(command)}")
        return UNFINISHED
    settings = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("a") as file:

        def say(text: str) -> None:
            print(text, end="", flush=True)
            file.write(text)
            file.flush()

        say(f"$ {' '.join(command)}\n")
        start = time.monotonic()
        with subprocess.Popen(
            ["timeout", "-k", "5", f"{limit:.0f}", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=os.environ | settings,
        ) as process:
            for line in process.stdout:
                say(line)
        status = process.returncode
        say(f"[exit {status} after {time.monotonic() - start:.0f} s]\n")
    return status


def main(
    step: Annotated[str, typer.Argument(help=", ".join(STEPS))],
    out: Annotated[Path, typer.Option(help="folder for the log and the results")],
    tiny: Annotated[bool, typer.Option(help="small sizes on a CPU")] = False,
    limit: Annotated[float, typer.Option(help="seconds for the whole step")] = LIMIT_S,
) -> None:
    """Run one step; exit status 0: done, 75: repeat it, else that of the first failure."""
    device = torch.device("cpu" if tiny else "cuda")
    brought = [place / "cache" for place in (WEIGHTS, PACK) if (place / "cache").exists()]
    if brought:
        os.environ["DILKERN_CACHE"] = str(brought[0])
    begin, known = time.monotonic(), default_stem(device)
    stem = out / known.name
    out.mkdir(parents=True, exist_ok=True)
    todo = commands(step, stem, tiny)
    if not tiny:
        for rest in CONTINUED.get(step, ()):
            if beside(known, rest).exists():
                shutil.copy(beside(known, rest), out)
    else:
        os.environ["TRITON_INTERPRET"] = "1"
    statuses = [
        execute(command, out / f"{step}.log", limit - (time.monotonic() - begin))
        for command in todo
    ]
    failures = [status for status in statuses if status not in (0, UNFINISHED)]
    sys.exit(next(iter(failures), UNFINISHED if UNFINISHED in statuses else 0))


if __name__ == "__main__":
    typer.run(main)
