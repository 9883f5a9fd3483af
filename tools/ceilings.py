"""What the GPU at hand can do at most: `python -m tools.ceilings`.

Copy bandwidth (bytes read and written), and the library's products at the shapes of the op: H W^T of
a row block against a vocabulary block, and P W, each rounded to the input's dtype and with fp32
results (`out_dtype`), with and without accumulation. A row of the suite is judged against these.
Random data, buffers beyond the L2 cache, medians of rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.cases import BY_WIDTH, HEADS
from benchmarks.environment import append_rows, begin, beside, default_stem, markdown
from benchmarks.measure import Plan, interleave, spread, timed


def measure(
    calls: dict[str, Callable[[], object]], device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    for call in [*calls.values()] * 2:  # warm
        call()
    samples, _ = interleave({n: partial(timed, device, c) for n, c in calls.items()}, Plan(rounds))
    found = {name: spread([t.total for t in mine], "x") for name, mine in samples.items()}
    return [{"what": n, "ms": s["x_ms"], "ms_min": s["x_ms_min"]} for n, s in found.items()]


def copy(device: torch.device, elements: int, rounds: int) -> dict[str, Any]:
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    (found,) = measure({"copy": lambda: target.copy_(source)}, device, rounds)
    moved = 2 * source.numel() * source.element_size()
    return found | {"gb_per_s": moved / found["ms"] / 1e6}


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
    calls: dict[str, Callable[[], object]] = {"H W^T": lambda: h @ w.T, "P W": lambda: p @ w}
    if wide:
        calls |= {
            "H W^T into fp32": lambda: torch.mm(h, w.T, out_dtype=torch.float32),
            "P W into fp32": lambda: torch.mm(p, w, out_dtype=torch.float32),
            "U + P W in fp32": lambda: torch.addmm(u, p, w, out_dtype=torch.float32),
        }
    shape = {"head": head, "n": n, "v": v, "d": d}
    found = measure(calls, device, rounds)
    return [row | shape | {"tflops": 2 * n * v * d / row["ms"] / 1e9} for row in found]


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for r in rows:
        shape = f"{r['n']} x {r['v']} x {r['d']}" if "n" in r else ""
        rates = (f"{r[name]:.0f}" if name in r else "" for name in ("tflops", "gb_per_s"))
        lines.append([r["what"], shape, f"{r['ms']:.3f} ({r['ms_min']:.3f})", *rates])
    return markdown("what|n x v x D|ms (min)|TFLOP/s|GB/s", lines)


def main(
    rounds: Annotated[int, typer.Option(help="repetitions")] = 20,
    tiny: Annotated[bool, typer.Option(help="small sizes, one round")] = False,
    out: Annotated[Path | None, typer.Option(help="result file without suffix")] = None,
) -> None:
    """Measure bandwidth and products."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stem = out or default_stem(device, "ceilings")
    if beside(stem, ".csv").exists():
        print(f"{beside(stem, '.csv')} is there already")
        return
    begin(stem, device)
    rows = [copy(device, 1 << (16 if tiny else 30), 1 if tiny else rounds)]
    for name in BY_WIDTH:
        vocab, width = HEADS[name].vocab, HEADS[name].hidden
        for n, v in ((2048, 32768), (4096, 16384), (8192, vocab)):
            if tiny:
                rows += products(name, 16, 64, 32, device, 1)
                break
            rows += products(name, n, v, width, device, rounds)
    append_rows(beside(stem, ".csv"), rows)
    beside(stem, ".md").write_text(table(rows))
    print(f"{table(rows)}{beside(stem, '.csv')}")


if __name__ == "__main__":
    typer.run(main)
