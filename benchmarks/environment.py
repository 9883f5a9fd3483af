"""Result files: where they lie, their rows, and what they must say about where they came from.

A result file is called by its stem, results/<cpu or GPU>/<date>-<commit>[-dirty][-<study>]; a JSON
beside its CSV or Markdown names hardware, versions, commit and load of every call that added to it.
"""

from __future__ import annotations

import csv
import datetime
import hashlib
import json
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

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACK = ROOT / ".whl"  # wheels and the commit, for a machine without network


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def cpu_model() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor()


def fingerprint() -> str:
    """A digest of every source file that a result depends on."""
    digest = hashlib.sha256()
    for folder in ("benchmarks", "dilkern", "kernels", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def identity() -> dict[str, Any]:
    """Commit and whether tracked or new files differ from it, results of benchmarks aside.

    In a copy without git, what `tools.gpu pack` noted; dirty if the sources have changed since.
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
    load, here = Path("/proc/loadavg"), identity()
    found: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": here["commit"],
        "dirty": here["dirty"],
        "device": device.type,
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "load_average": load.read_text().split()[:3] if load.exists() else [],
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
    here, day = identity(), datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    marks = ("dirty" if here["dirty"] else "", study)
    return RESULTS / folder / "-".join([day, here["commit"], *filter(None, marks)])


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


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a result file, none if there is no file; also of the JSON files of old claims."""
    if not path.exists():
        return []
    if path.suffix == ".json":
        rows = json.loads(path.read_text())["rows"]
        return [{name: str(value) for name, value in row.items()} for row in rows]
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_rows(path: Path, rows: Sequence[dict[str, Any]], fields: Sequence[str]) -> None:
    """Add rows in one write, with the header if the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def markdown(header: str, rows: Iterable[Sequence[object]]) -> str:
    """A table; bars part the names of `header`, and rows may end early."""
    names = header.split("|")
    lines = [names, *([*map(str, row), *[""] * (len(names) - len(row))] for row in rows)]
    text = ["".join(f"| {cell} " if cell else "| " for cell in line) + "|" for line in lines]
    text.insert(1, "|" + "---|" * len(names))
    return "\n".join(text) + "\n"
