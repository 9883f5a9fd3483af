"""`dilkern doctor`: versions, devices, and for each backend whether it can run and why not."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from dilkern import __version__
from dilkern.backends.base import BACKENDS, why_not
from dilkern.validation import reject

_PACKAGES = (
    "torch", "triton", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes",
    "flash-attn", "matplotlib",
)  # fmt: skip


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def run(words: list[str]) -> None:
    """Print what a bug report needs."""
    if words:
        reject("`dilkern doctor` takes no options", " ".join(words), "Leave them out.")
    print(f"dilkern {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in _PACKAGES:
        print(f"  {package:<14}{_version(package)}")
    print(f"CPU: {torch.get_num_threads()} threads")
    devices = [torch.device("cpu")]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        print(
            f"cuda:{index}: {found.name}, {found.total_memory / 2**30:.1f} GiB, "
            f"compute capability {found.major}.{found.minor}"
        )
        devices.append(torch.device("cuda", index))
    if len(devices) == 1:
        print(f"GPU: none that torch {torch.__version__} can use")
    for name in BACKENDS:
        for device in devices:
            reason = why_not(name, device)
            print(f"backend {name} on {device}: {'can run' if reason is None else reason}")
