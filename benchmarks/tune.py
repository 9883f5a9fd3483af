"""Propose rows for kernels/configs.py on the GPU at hand, unattended.

    python benchmarks/tune.py                                # real heads; most of it is compiling
    python benchmarks/tune.py --tokens 64 --vocab 256 --hidden 64 --quick    # a smoke run

For each dtype and hidden size it times every candidate tile of the forward kernel and of dz_tile
(candidates that do not compile or do not fit are listed as such), the library path beside them,
and prints the fastest row and the largest D at which our own product is ahead. Nothing is written
into the package: a person reads the result and edits the table. Numbers are medians of interleaved
rounds. The interpreter runs it too (TRITON_INTERPRET=1), for its logic and not its times.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dilkern.kernels import configs  # noqa: E402
from dilkern.kernels.chunk_softmax import chunk_softmax  # noqa: E402
from dilkern.kernels.dz_tile import dz_tile  # noqa: E402
from dilkern.kernels.logps_forward import logps_forward  # noqa: E402

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def candidates(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[configs.Tile]:
    """The row in the table first, then its neighbours."""
    row = configs.tile(device, dtype)
    yield row
    if device.type == "cpu":
        yield row._replace(block_v=2 * row.block_v)
        return
    if quick:
        return
    shapes = [(128, 128), (128, 256), (256, 128), (128, 64), (64, 128), (64, 64)]
    for (t, v), d, warps, stages in itertools.product(shapes, (32, 64), (4, 8), (3, 4)):
        tile = configs.Tile(t, v, d, warps, stages, row.descriptors)
        if tile != row:
            yield tile


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type == "cpu":
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def interleaved(
    calls: dict[Any, Callable[[], Any]], device: torch.device, rounds: int
) -> tuple[dict[Any, float], dict[Any, str]]:
    """Median milliseconds per call, and what failed; rounds run through all calls in turn."""
    failed: dict[Any, str] = {}
    for name, call in calls.items():
        try:
            timed(call, device)
        except Exception as error:  # a row that does not compile or fit is a result
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    alive = {name: call for name, call in calls.items() if name not in failed}
    samples: dict[Any, list[float]] = {name: [] for name in alive}
    for _ in range(rounds):
        for name, call in alive.items():
            samples[name].append(timed(call, device))
    return {name: statistics.median(times) for name, times in samples.items()}, failed


def tune_one(
    device: torch.device, dtype: torch.dtype, n: int, v: int, d: int, rounds: int, quick: bool
) -> dict[str, Any]:
    """Time every candidate for one block of n tokens x v words at hidden size d."""
    torch.manual_seed(0)
    h = torch.randn(n, d, device=device).to(dtype)
    w = torch.randn(v, d, device=device).to(dtype)
    labels = torch.randint(0, v, (n,), device=device)
    row_of_zeros = torch.zeros(n, device=device)
    p = torch.empty(n, v, device=device, dtype=dtype)

    def statistics_for(words: int) -> torch.Tensor:
        return torch.empty(2, n, -(-v // words), device=device)

    def with_tile(tile: configs.Tile, call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            kept = configs.tile
            configs.tile = lambda *_: tile
            try:
                call()
            finally:
                configs.tile = kept

        return run

    def library() -> None:
        wide = dtype.itemsize == 2 and device.type == "cuda" and torch.version.hip is None
        z = torch.mm(h, w.t(), out_dtype=torch.float32) if wide else h.float() @ w.float().t()
        chunk_softmax(z, labels, row_of_zeros, *chunk_statistics, p, start=0)

    chunk_statistics = statistics_for(configs.chunk(device).block)
    state = (row_of_zeros, row_of_zeros, row_of_zeros, row_of_zeros)
    forward: dict[Any, Callable[[], Any]] = {"library": library}
    backward: dict[Any, Callable[[], Any]] = {}
    for tile in candidates(device, dtype, quick):
        stats = statistics_for(tile.block_v)
        forward[tile] = with_tile(
            tile, lambda s=stats: logps_forward(h, w, labels, row_of_zeros, *s, p, start=0)
        )
        backward[tile] = with_tile(tile, lambda: dz_tile(h, w, labels, *state, p, start=0))
    report: dict[str, Any] = {"n": n, "v": v, "d": d, "dtype": str(dtype).removeprefix("torch.")}
    for name, calls in (("logps_forward", forward), ("dz_tile", backward)):
        times, failed = interleaved(calls, device, rounds)
        own = {tile: ms for tile, ms in times.items() if tile != "library"}
        report[name] = {
            "library_ms": times.get("library"),
            "ranking": [(str(t), round(own[t], 4)) for t in sorted(own, key=own.__getitem__)[:5]],
            "failed": {str(tile): why for tile, why in failed.items()},
        }
        best = min(own.values(), default=float("inf"))
        if name == "logps_forward":
            report["own_ahead"] = best < times.get("library", float("inf"))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32768, help="words of one block")
    parser.add_argument("--hidden", type=int, nargs="*", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--dtype", nargs="*", default=["bfloat16", "float32"], choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="only the rows in the table")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reports = []
    for dtype, d in itertools.product(args.dtype, args.hidden):
        report = tune_one(
            device, DTYPES[dtype], args.tokens, args.vocab, d, args.rounds, args.quick
        )
        reports.append(report)
        print(json.dumps(report, indent=1), flush=True)
    for dtype in args.dtype:
        ahead = [r["d"] for r in reports if r["dtype"] == dtype and r["own_ahead"]]
        print(f"{dtype} on {configs.arch(device)}: own product ahead at D in {ahead}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            json.dumps({"arch": configs.arch(device), "reports": reports}, indent=1)
        )


if __name__ == "__main__":
    main()
