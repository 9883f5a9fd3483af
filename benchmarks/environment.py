"""What a result file must say about where it came from."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases
from benchmarks.peers import versions

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
    for folder in ("benchmarks", "dilkern", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def identity() -> dict[str, Any]:
    """Commit and whether tracked or new files differ from it, results of benchmarks aside.

    In a copy without git, what `benchmarks.gpu pack` noted; dirty if the sources have changed since.
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


def commit() -> str:
    return identity()["commit"]


def dirty() -> bool:
    return identity()["dirty"]


def describe(device: torch.device) -> dict[str, Any]:
    """Versions, hardware, commit and how the inputs were made."""
    load = Path("/proc/loadavg")
    found: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": commit(),
        "dirty": dirty(),
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
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
        found["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        ).partition("\n")[0]
    return found


def record(path: Path, device: torch.device) -> None:
    """Add this call to the JSON beside a result file.

    Raises:
        ValueError: the file was begun at another commit, so that its rows would not be comparable.
    """
    calls = json.loads(path.read_text())["calls"] if path.exists() else []
    now = describe(device)
    if calls and calls[0]["commit"] != now["commit"]:
        raise ValueError(
            f"{path} was begun at commit {calls[0]['commit']}, this is {now['commit']}: "
            "pass another --out"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"calls": [*calls, now]}, indent=1) + "\n")


def device_folder(device: torch.device) -> str:
    if device.type != "cuda":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def default_stem(device: torch.device) -> Path:
    """results/<cpu or GPU>/<date>-<commit>[-dirty], without suffix."""
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    mark = "-dirty" if dirty() else ""
    return RESULTS / device_folder(device) / f"{day}-{commit()}{mark}"
