"""The steps for a GPU machine, one command each, unattended and without network (docs/dev/gpu.md).

    python -m tools.gpu pack               # here: wheels into .whl/, and the lines to run there
    python -m tools.gpu run suite --out $OUT    # there: one step, its log and results in $OUT

A step ends within its limit: a command that would outlast it is stopped, and what it has written by
then counts. Results of an earlier call that lie under benchmarks/results/<gpu>/ are continued. With
`--tiny` a step runs its commands at small sizes on a CPU (kernels in Triton's interpreter), so that a
typing error shows before the GPU is there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.environment import PACK, ROOT, beside, default_stem, identity
from benchmarks.real_models import HH, model_folder
from benchmarks.run import UNFINISHED

app = typer.Typer(add_completion=False, help="Steps for a GPU machine without network.")

LIMIT_S = 470  # a call to the lent machine ends at 600 s, its install and start included
TREE_MIB = 64  # what may travel: the working tree and the wheels
# What the machine lacks or may have in another version; versions come from constraints.txt.
WHEELS = (
    *("trl", "datasets", "dill", "multiprocess", "peft", "bitsandbytes", "liger-kernel"),
    "cut-cross-entropy",
)
PLATFORMS = ("2_28", "2_27", "2_24", "2_17")
INSTALL = (
    "python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade "
    "--target /tmp/site .whl/*.whl && export PYTHONPATH=/tmp/site:$PWD PYTHONUNBUFFERED=1 || exit;"
)
KERNELS = "regex:^_.*_kernel$"  # ours are called so, the library's are not
PROFILED = (
    "qwen3-0.6b@8192-bfloat16-frozen",
    "llama-3-8b@8192-bfloat16-frozen",
    "llama-3-8b@8192-bfloat16-trainable",
)
# Result files that a repeated call continues, by step: what follows the stem.
CONTINUED = {
    "suite": (".csv", ".json", "-ceilings.csv", "-ceilings.json", "-ceilings.md"),
    "steps": ("-steps.csv", "-steps.json"),
    "longest": ("-longest.csv", "-longest.json"),
    "scaling": ("-scaling.csv", "-scaling.json"),
    "pairs": ("-pairs.csv", "-pairs.json"),
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

    if step == "tests":
        pytest = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu"]
        return [[*pytest, *by_size("-q -k nf4_bits"), "tests/gpu", "tests/heads"]]
    if step == "suite":
        which = by_size(
            "--cases tiny --peers naive,dilkern-triton --rounds 1 --no-processes",
            "--cases gpu --budget 400 --group-seconds 15",
        )
        return [
            module("tools.ceilings", *small, *out("ceilings")),
            module("benchmarks.run", *here, *which, "--out", str(stem)),
            module("benchmarks.report", "goals", f"{stem}.csv", "--out", f"{stem}-goals.md"),
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
        return [module("benchmarks.train_step", *here, "--cap-gib", "24", *which, *out("longest"))]
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
        packed = PACK / HH.name
        data = ("--data", str(packed)) if packed.exists() else ()
        which = by_size(
            "--models smollm2 --losses dpo --pairs 2 --steps 1 --rounds 1 --max-length 200 "
            "--variants trl,shared --no-processes",
            "--models smollm2,llama-3.2-1b,qwen3-8b --losses dpo,lsif --pairs 8",
        )
        return [module("benchmarks.pairs", *here, *data, *which, *out("pairs"))]
    if step == "profile":
        found = []
        profiled = ("tiny@64-float32-frozen",) if tiny else PROFILED
        wrapped = [module("tools.breakdown", c, "dilkern-triton", *here) for c in profiled]
        for command in wrapped:
            found.append([*command, *out("breakdown")])
        for number, command in enumerate(wrapped):
            report = f"{stem}-ncu{number}"
            counters = ["ncu", "--clock-control", "none", "--set", "full", "-k", KERNELS]
            counters += ["-s", "4", "-c", "4", "-f", "-o", report]
            found.append([*(() if tiny else counters), *command, "--runs", "1", "--plain"])
            found += [] if tiny else [["ncu", "-i", f"{report}.ncu-rep", "--page", "details"]]
        return found
    raise typer.BadParameter(f"unknown step {step!r}; known: {', '.join(STEPS)}")


# What each is for, in the order in which a lease of 30 minutes is best spent.
STEPS = {
    "tests": "GPU tests at real sizes",
    "suite": "ceilings, then the comparison with every rival, and the goals; repeat until it exits 0",
    "tune": "tiles and rows for kernels/configs.py; rows x words; library product or our own",
    "steps": "one training step, 1B and 8B in 4 bit: time and memory",
    "pairs": "preference pairs per second: TRL's DPOTrainer, padded, padding-free, shared prompts",
    "longest": "the longest sequence that fits under 24 GiB",
    "scaling": "exponents in T, V, D and workspace",
    "profile": "kernels by time, and hardware counters",
}


def execute(command: list[str], log: Path, limit: float) -> int:
    """Run one command with its output here and in `log`; 124 if the limit ended it."""
    settings = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if (PACK / "cache").exists():
        settings["DILKERN_CACHE"] = str(PACK / "cache")
    with log.open("a") as file:

        def say(text: str) -> None:
            print(text, end="", flush=True)
            file.write(text)
            file.flush()

        say(f"$ {' '.join(command)}\n")
        start = time.monotonic()
        with subprocess.Popen(
            ["timeout", "-k", "5", f"{max(1, limit):.0f}", *command],
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


@app.command()
def run(
    step: Annotated[str, typer.Argument(help=", ".join(STEPS))],
    out: Annotated[Path, typer.Option(help="folder for the log and the results")],
    tiny: Annotated[bool, typer.Option(help="small sizes on a CPU")] = False,
    limit: Annotated[float, typer.Option(help="seconds for the whole step")] = LIMIT_S,
) -> None:
    """Run one step; exit status 0: done, 75: repeat it, else that of the first failure."""
    device = torch.device("cpu" if tiny else "cuda")
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


def travelling_mib() -> float:
    """MiB of the working tree, as the lent machine receives it, and of the wheels."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [ROOT / name for name in listed.stdout.splitlines()] + list(PACK.rglob("*"))
    return sum(path.stat().st_size for path in files if path.is_file()) / 2**20


def pinned(name: str) -> str:
    """NAME==VERSION where constraints.txt names the package, else the name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next((line for line in lines if line.startswith(f"{name}==")), name)


@app.command()
def pack() -> None:
    """Fetch wheels, a tokenizer and pairs, note the commit, check the size, print the calls."""
    shutil.rmtree(PACK, ignore_errors=True)
    PACK.mkdir()
    tags = [f"--platform=manylinux_{version}_x86_64" for version in PLATFORMS]
    tags += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    fetch += ["--python-version=3.12", "--implementation=cp", *tags, "-d", str(PACK)]
    subprocess.run([*fetch, *map(pinned, WHEELS)], cwd=ROOT, check=True)
    heavy = shutil.ignore_patterns("*.safetensors")  # the shape and the tokenizer can travel
    shutil.copytree(model_folder("smollm2"), PACK / "cache" / "smollm2", ignore=heavy)
    shutil.copy(HH, PACK)
    (PACK / "commit.json").write_text(json.dumps(identity()) + "\n")
    size = travelling_mib()
    print(f"{size:.1f} MiB would travel, at most {TREE_MIB} may")
    if size > TREE_MIB:
        raise typer.Exit(1)
    for step, what in STEPS.items():
        print(f"\n# {step}: {what}\n{INSTALL} python3 -m tools.gpu run {step} --out $OUT")


if __name__ == "__main__":
    app()
