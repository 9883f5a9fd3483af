"""Result files: where they lie, their rows, and what they must say about where they came from.

A result file is called by its stem, results/<cpu or GPU>/<date>-<commit>[-dirty][-<study>]; a JSON
beside its CSV or Markdown names hardware, versions, commit and load of every call that added to it.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import dilkern
from benchmarks import cases
from benchmarks.peers import PEERS
from benchmarks.real_models import PACK, ROOT

RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def fingerprint() -> str:
    """A digest of every source file that a result depends on."""
    digest = hashlib.sha256()
    for folder in ("benchmarks", "dilkern", "kernels", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def identity() -> dict[str, Any]:
    """Commit and whether tracked or new files differ from it, results of benchmarks aside.

    In a copy without git, what `tools.pack` noted; dirty if the sources have changed since.
    """
    head = _output("git", "rev-parse", "--short=9", "HEAD")
    if head:
        changed = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
        return {"commit": head, "dirty": bool(changed), "fingerprint": fingerprint()}
    noted = PACK / "commit.json"
    if not noted.exists():
        return {"commit": "unknown", "dirty": True, "fingerprint": fingerprint()}
    found = json.loads(noted.read_text())
    found["dirty"] |= found["fingerprint"] != fingerprint()
    return found


def versions() -> dict[str, str]:
    """The version of every package that has a peer, and of those they stand on."""
    found = {}
    for name in sorted({p.package for p in PEERS.values()} | {"triton", "transformers", "numpy"}):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["torch"] = torch.__version__  # with its build, which the metadata may not have
    if found["dilkern"] == "not installed":
        found["dilkern"] = f"{dilkern.__version__} (checkout)"
    return found


def describe(device: torch.device) -> dict[str, Any]:
    """Versions, hardware, commit and how the inputs were made."""
    here, model = identity(), re.search("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())
    found: dict[str, Any] = {
        "time": _now().isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": here["commit"],
        "dirty": here["dirty"],
        "device": device.type,
        "cpu": model[1] if model else platform.processor(),
        "threads": torch.get_num_threads(),
        "load_average": [f"{load:.2f}" for load in os.getloadavg()],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
        "inputs": {
            name: getattr(cases, name)
            for name in ("NOISE", "LIFT_MEAN", "LIFT_STD", "ZIPF_OFFSET", "SEED")
        },
    }
    if device.type == "cuda":
        query = ("--query-gpu=driver_version", "--format=csv,noheader")
        found["gpu"], found["cuda"] = torch.cuda.get_device_name(), torch.version.cuda
        found["driver"] = _output("nvidia-smi", *query).partition("\n")[0]
    return found


def default_stem(device: torch.device, study: str = "") -> Path:
    folder = "cpu"
    if device.type == "cuda":
        folder = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    here = identity()
    parts = (f"{_now():%Y-%m-%d}", here["commit"], "dirty" if here["dirty"] else "", study)
    return RESULTS / folder / "-".join(filter(None, parts))


def beside(stem: Path, rest: str) -> Path:
    """A file of the result: stems have dots, so that `with_suffix` would cut them."""
    return stem.with_name(stem.name + rest)


def begin(stem: Path, device: torch.device) -> None:
    """Add this call to the JSON of a result file.

    Raises:
        ValueError: the file was begun at another commit, so that its rows would not be comparable.
    """
    path = beside(stem, ".json")
    calls = json.loads(path.read_text())["calls"] if path.exists() else []
    now = describe(device)
    if calls and calls[0]["commit"] != now["commit"]:
        raise ValueError(
            f"{path} was begun at commit {calls[0]['commit']}, this is {now['commit']}: "
            "pass another --out"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"calls": [*calls, now]}, indent=1) + "\n")


def _value(text: str) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def read_rows(path: Path) -> list[Row]:
    """The rows of a result file without their empty cells; also of the JSON files of old claims."""
    if not path.exists():
        return []
    if path.suffix == ".json":
        return json.loads(path.read_text())["rows"]
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [{name: _value(text) for name, text in line.items() if text} for line in lines]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a file with a column for whatever one of the rows says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = beside(path, ".new")  # a call that is cut off leaves the old rows
    with unfinished.open("w", newline="") as file:
        fields = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(path)


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    write_rows(path, [*read_rows(path), *rows])


def markdown(header: str, rows: Iterable[Sequence[object]]) -> str:
    """A table; bars part the names of `header`, and rows may end early."""
    names = header.split("|")
    lines = [names, *([*map(str, row), *[""] * (len(names) - len(row))] for row in rows)]
    text = ["".join(f"| {cell} " if cell else "| " for cell in line) + "|" for line in lines]
    text.insert(1, "|" + "---|" * len(names))
    return "\n".join(text) + "\n"


def insert(text: str, block: str, markers: tuple[str, str]) -> str:
    """Put `block` between the markers of `text`.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    begin, end = markers
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    if text.count(begin) != 1 or text.count(end) != 1 or end in before:
        raise ValueError(f"the file needs one {begin} and after it one {end}")
    return f"{before}{begin}\n{block.strip()}\n{end}{after}"
