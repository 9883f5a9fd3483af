"""Peak memory of linear_logps with a 4-bit head at V=128256, D=1024, T=512, each case in a process.

    python benchmarks/quantized_head.py [--out FILE]

Peak is the resident high-water mark (VmHWM, reset after set-up) of forward and backward over what
is resident before: head, hidden states, labels. The limit is workspace + 24 T D bytes (hidden
states gathered, u, its gradient and their fp32 copies). Linux only. The result is a JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import bitsandbytes as bnb
import torch
from torch import Tensor

from dilkern import linear_logps

V, D, T = 128256, 1024, 512
# glibc otherwise keeps freed blocks resident, which hides later use from the high-water
# mark. Returning them at once is slow, so nothing is timed here.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
ROOT = Path(__file__).resolve().parent.parent
CASES = [
    {"method": method, "dtype": dtype, "workspace_mib": workspace_mib}
    for method, workspaces in (("dilkern", (32, 64, 256)), ("bitsandbytes", (None,)))
    for dtype in ("float32", "bfloat16")
    for workspace_mib in workspaces
]


def head(dtype: torch.dtype) -> bnb.nn.Linear4bit:
    """A packed NF4 head with double quantisation; built from bytes, as loading a checkpoint is."""
    blocks = V * D // 64
    small = bnb.nn.Params4bit(torch.randn(64, D, dtype=dtype), quant_type="nf4").to("cpu")
    state = small.quant_state
    state.shape = torch.Size((V, D))
    state.absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
    state.state2.absmax = torch.rand(-(-blocks // 256)) + 0.5
    linear = bnb.nn.Linear4bit(8, 8, bias=False, compute_dtype=dtype)
    packed = torch.randint(0, 256, (V * D // 2, 1), dtype=torch.uint8)
    linear.weight = bnb.nn.Params4bit(packed, quant_state=state, bnb_quantized=True, module=linear)
    linear.in_features, linear.out_features = D, V
    return linear.train()  # in eval mode bitsandbytes repacks on some CPUs


def memory_mib(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    assert match is not None
    return int(match[1]) / 1024


def score(case: dict, lm_head: bnb.nn.Linear4bit, hidden: Tensor, labels: Tensor) -> Tensor:
    if case["method"] == "dilkern":
        return linear_logps(hidden, lm_head, labels, workspace_mib=case["workspace_mib"])
    logps = lm_head(hidden).float().log_softmax(-1)
    return logps.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def measure(case: dict) -> dict:
    torch.manual_seed(0)
    dtype = getattr(torch, case["dtype"])
    lm_head = head(dtype)
    hidden = (torch.randn(T, D) / D**0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (T,))
    # Library buffers and thread pools are not the method's.
    small = torch.nn.Linear(D, 4096, bias=False, dtype=dtype)
    linear_logps(hidden[:64], small, labels[:64] % 4096).sum().backward()
    hidden.grad = None
    del small
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = memory_mib("VmRSS")
    score(case, lm_head, hidden, labels).sum().backward()
    peak = memory_mib("VmHWM") - before
    row = case | {"peak_mib": round(peak, 1)}
    if case["workspace_mib"] is not None:
        row["limit_mib"] = case["workspace_mib"] + 24 * T * D / 2**20
        row["within"] = peak <= row["limit_mib"]
    return row


def environment() -> dict:
    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    return {
        "date": date.today().isoformat(),
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", "dilkern", "benchmarks/*.py")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bitsandbytes": bnb.__version__,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/cpu)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(json.loads(args.case))))
        return
    env, rows = environment(), []
    for case in CASES:
        command = [sys.executable, __file__, "--case", json.dumps(case)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | ALLOCATOR
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    name = f"quantized-head-{env['date']}-{env['commit']}.json"
    out = args.out or ROOT / "benchmarks" / "results" / "cpu" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    shapes = {"V": V, "D": D, "T": T, "weight_mib_4bit": V * D / 2 / 2**20}
    out.write_text(json.dumps({"environment": env, "case": shapes, "rows": rows}, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
