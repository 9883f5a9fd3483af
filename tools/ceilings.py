"""What the GPU at hand can do at most: `python -m benchmarks.ceilings`.

Copy bandwidth (bytes read and written), and the library's products at the shapes of the op: H W^T of
a row block against a vocabulary block, and P W, each rounded to the input's dtype and with fp32
results (`out_dtype`), with and without accumulation. A row of the suite is judged against these.
Random data, buffers beyond the L2 cache, medians of rounds.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import environment
from benchmarks.cases import HEADS
from benchmarks.measure import Clock

FIELDS = ("what", "head", "n", "v", "d", "ms", "ms_min", "tflops", "gb_per_s")
NAMES = ("qwen3-0.6b", "llama-3.2-1b", "llama-3-8b")  # D = 1024, 2048, 4096


def timed(call: Callable[[], Any], device: torch.device, rounds: int) -> dict[str, float]:
    call()
    call()
    samples = []
    for _ in range(rounds):
        clock = Clock(device)
        call()
        clock.mark()
        samples.append(1000 * clock.seconds()[0])
    return {"ms": statistics.median(samples), "ms_min": min(samples)}


def copy(device: torch.device, elements: int, rounds: int) -> dict[str, Any]:
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    found = timed(lambda: target.copy_(source), device, rounds)
    moved = 2 * source.numel() * source.element_size()
    return {"what": "copy"} | found | {"gb_per_s": moved / found["ms"] / 1e6}


def products(
    head: str, n: int, v: int, d: int, device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """H (n, D) W^T and P (n, v) W for one vocabulary block."""
    wide = device.type == "cuda"  # the library multiplies 16-bit matrices into fp32 there only
    dtype = torch.bfloat16 if wide else torch.float32
    h = torch.randn(n, d, device=device).to(dtype)
    w = torch.randn(v, d, device=device).to(dtype)
    p = torch.rand(n, v, device=device).to(dtype)
    u = torch.zeros(n, d, device=device)
    calls: dict[str, Callable[[], Any]] = {"H W^T": lambda: h @ w.T, "P W": lambda: p @ w}
    if wide:
        calls |= {
            "H W^T into fp32": lambda: torch.mm(h, w.T, out_dtype=torch.float32),
            "P W into fp32": lambda: torch.mm(p, w, out_dtype=torch.float32),
            "U + P W in fp32": lambda: torch.addmm(u, p, w, out_dtype=torch.float32),
        }
    rows = []
    for what, call in calls.items():
        found = timed(call, device, rounds)
        shape = {"head": head, "n": n, "v": v, "d": d}
        rows.append({"what": what} | shape | found | {"tflops": 2 * n * v * d / found["ms"] / 1e9})
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| what | n x v x D | ms (min) | TFLOP/s | GB/s |", "|---|---|---|---|---|"]
    for r in rows:
        shape = f"{r['n']} x {r['v']} x {r['d']}" if "n" in r else ""
        flops = f"{r['tflops']:.0f}" if "tflops" in r else ""
        rate = f"{r['gb_per_s']:.0f}" if "gb_per_s" in r else ""
        lines.append(
            f"| {r['what']} | {shape} | {r['ms']:.3f} ({r['ms_min']:.3f}) | {flops} | {rate} |"
        )
    return "\n".join(lines) + "\n"


def main(
    rounds: Annotated[int, typer.Option(help="repetitions")] = 20,
    tiny: Annotated[bool, typer.Option(help="small sizes, one round")] = False,
    out: Annotated[Path | None, typer.Option(help="result file without suffix")] = None,
) -> None:
    """Measure bandwidth and products."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stem = environment.default_stem(device)
    stem = out or stem.with_name(f"{stem.name}-ceilings")
    table = stem.with_name(stem.name + ".csv")
    if table.exists():
        print(f"{table} is there already")
        return
    environment.record(stem.with_name(stem.name + ".json"), device)
    rows = [copy(device, 1 << (16 if tiny else 30), 1 if tiny else rounds)]
    for name in NAMES:
        vocab, width = HEADS[name].vocab, HEADS[name].hidden
        for n, v in ((2048, 32768), (4096, 16384), (8192, vocab)):
            if tiny:
                rows += products(name, 16, 64, 32, device, 1)
                break
            rows += products(name, n, v, width, device, rounds)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    stem.with_name(stem.name + ".md").write_text(markdown(rows))
    print(markdown(rows) + str(table))


if __name__ == "__main__":
    typer.run(main)
