"""Propose rows for kernels/configs.py on the GPU at hand: `python -m tools.tune`.

For 16-bit inputs it times every candidate tile of `softmax_tile` and `dz_tile` at real sizes (tiles
of which two fit an SM beside larger ones, with and without tensor descriptors), and the library path
beside them: by hidden size, whether our own product with its fused epilogue (b) beats streaming fp32
logits from the library's (a). Then the rows of the elementwise kernels. A candidate that does not
compile, does not fit, or differs from the others in its numbers is listed with its reason and never
proposed. Nothing is written into the package: a person pastes the printed rows and runs the tests.

Times are medians of interleaved rounds. `--tiny` is a smoke run; Triton's interpreter runs it too
(TRITON_INTERPRET=1), for its logic and not its times.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.environment import begin, beside, default_stem, markdown
from benchmarks.measure import Plan, interleave, spread, timed
from dilkern.kernels import configs
from dilkern.kernels.configs import Rows, Tile
from dilkern.kernels.dz_tile import dz_tile
from dilkern.kernels.fold_block import fold_block
from dilkern.kernels.nf4_dequant import Packed4bit, nf4_dequant
from dilkern.kernels.softmax_tile import softmax_tile
from tools.blocks import replaced

ROWS = {
    "chunk": [Rows(1, 2048, 4), Rows(1, 4096, 4), Rows(1, 8192, 8), Rows(1, 8192, 16)],
    "fold": [Rows(1, 512, 4), Rows(1, 2048, 4), Rows(1, 2048, 8)],
    "decode": [Rows(1, 1024, 4), Rows(4, 1024, 4), Rows(8, 512, 4), Rows(8, 512, 8)],
}
Call = Callable[[], Tensor | None]  # the result by which candidates are compared


def tiles(device: torch.device, dtype: torch.dtype) -> list[Tile]:
    """The row in the table first, then its rivals."""
    row = configs.tile(device, dtype)
    if device.type == "cpu":
        return [row, row._replace(block_v=2 * row.block_v)]
    found = [tile._replace(descriptors=row.descriptors) for tile in configs.CANDIDATES]
    if row.descriptors:
        found.append(row._replace(descriptors=False))
    return [row, *(tile for tile in found if tile != row)]


def rows(name: str, device: torch.device) -> list[Rows]:
    row = configs.rows(name, device)
    if device.type == "cpu":
        return [row, row._replace(block=2 * row.block)]
    return [row, *(other for other in ROWS[name] if other != row)]


def compare(
    calls: dict[Any, Call], device: torch.device, rounds: int
) -> tuple[dict[Any, float], dict[Any, str]]:
    """Median milliseconds per call, and why others have none; rounds run through all in turn."""
    failed: dict[Any, str] = {}
    want = None
    for name, call in calls.items():
        try:
            got = call()
            got = None if got is None else got.float().clone()
            if device.type == "cuda":  # so that an error of the launch is this candidate's
                torch.cuda.synchronize()
        except Exception as error:  # a row that does not compile or fit is a result
            first = str(error).splitlines()[0] if str(error) else ""
            failed[name] = f"{type(error).__name__}: {first[:120]}"
            continue
        want = got if want is None else want
        if want is not None and not (got - want).norm() <= 1e-2 * want.norm():
            failed[name] = f"wrong numbers: {(got - want).norm() / want.norm():.3g} from the first"
    alive = {n: partial(timed, device, call) for n, call in calls.items() if n not in failed}
    samples, _ = interleave(alive, Plan(rounds))
    times = {n: spread([t.total for t in mine], "x")["x_ms"] for n, mine in samples.items()}
    return times, failed


def entries(
    kernel: str,
    calls: dict[Any, Call],
    shape: tuple[int, int, int],
    device: torch.device,
    rounds: int,
) -> list[dict[str, Any]]:
    """What became of every candidate of one kernel."""
    times, failed = compare(calls, device, rounds)
    sizes = dict(zip("nvd", shape))
    return [
        {"kernel": kernel, "row": row, **sizes, "ms": times.get(row), "failed": failed.get(row, "")}
        for row in calls
    ]


def log_sums(exponents: Tensor, sums: Tensor) -> Tensor:
    """The logarithm (n,) of the sum that tiles stand for, whatever their width."""
    return torch.logsumexp(exponents * 0.6931471805599453 + sums.log(), 1)


def tune_tiles(
    device: torch.device, dtype: torch.dtype, n: int, v: int, d: int, rounds: int
) -> list[dict[str, Any]]:
    """Every candidate tile on one block of n tokens x v words at hidden size d."""
    torch.manual_seed(0)
    h = torch.randn(n, d, device=device).to(dtype)
    w = torch.randn(v, d, device=device).div_(d**0.5).to(dtype)
    labels = torch.randint(0, v, (n,), device=device)
    zeros = torch.zeros(n, device=device)
    g = torch.randn(n, device=device)
    p = torch.empty(n, v, device=device, dtype=dtype)

    def statistics_of(words: int) -> Tensor:
        return torch.empty(2, n, -(-v // words), device=device)

    def library() -> Tensor:
        stats = statistics_of(configs.rows("chunk", device).block)
        wide = dtype.itemsize == 2 and device.type == "cuda" and torch.version.hip is None
        z = torch.mm(h, w.t(), out_dtype=torch.float32) if wide else h.float() @ w.float().t()
        softmax_tile(z, None, labels, zeros, stats, p, start=0)
        return log_sums(*stats)

    def own(tile: Tile) -> Tensor:
        stats = statistics_of(tile.block_v)
        softmax_tile(h, w, labels, zeros, stats, p, start=0)
        return log_sums(*stats)

    def recompute() -> Tensor:
        dz_tile(h, w, labels, torch.stack((zeros + 10, zeros)), zeros + 1, g, p, start=0)
        return p

    candidates, shape = tiles(device, dtype), (n, v, d)
    ours = {tile: replaced(configs, "tile", tile, partial(own, tile)) for tile in candidates}
    again = {tile: replaced(configs, "tile", tile, recompute) for tile in candidates}
    found = entries("softmax_tile", {"library": library} | ours, shape, device, rounds)
    return found + entries("dz_tile", again, shape, device, rounds)


def tune_rows(device: torch.device, n: int, v: int, d: int, rounds: int) -> list[dict[str, Any]]:
    """The elementwise kernels: softmax of a block, fold of its tiles, decode of a 4-bit block."""
    torch.manual_seed(0)
    labels = torch.randint(0, v, (n,), device=device)
    zeros = torch.zeros(n, device=device)
    z = torch.randn(n, v, device=device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    p = torch.empty(n, v, device=device, dtype=dtype)
    u = torch.zeros(n, d, device=device)
    code, absmax = torch.randn(16, device=device), torch.rand(v * d // 64, device=device)
    packed = torch.randint(0, 256, (v * d // 2,), dtype=torch.uint8, device=device)
    weight = Packed4bit(packed, code, absmax, 64, d)

    def chunk(row: Rows) -> Tensor:
        stats = torch.empty(2, n, -(-v // row.block), device=device)
        softmax_tile(z, None, labels, zeros, stats, p, start=0)
        return log_sums(*stats)

    def fold(row: Rows) -> Tensor:
        stats = torch.ones(2, n, -(-v // 128), device=device)
        state = torch.stack((zeros - torch.inf, zeros, zeros - torch.inf))
        fold_block(stats, state, p, u, tile=128)
        return state[1]

    calls = {
        "chunk": chunk,
        "fold": fold,
        "decode": lambda row: nf4_dequant(weight, dtype, start=0, end=v),
    }
    found = []
    for name, call in calls.items():
        p.zero_()
        # Each call launches the one kernel.
        mine = {
            row: replaced(configs, "rows", row, partial(call, row)) for row in rows(name, device)
        }
        found += entries(name, mine, (n, v, d), device, rounds)
    return found


def best(found: list[dict[str, Any]], kernels: tuple[str, ...]) -> Any:
    """The row with the least sum of times over `kernels` and hidden sizes; None if none ran."""
    sums: dict[Any, float] = {}
    for entry in found:
        if entry["kernel"] in kernels and entry["row"] != "library":
            ms = float("inf") if entry["ms"] is None else entry["ms"]
            sums[entry["row"]] = sums.get(entry["row"], 0.0) + ms
    row = min(sums, key=sums.__getitem__)
    return None if sums[row] == float("inf") else row


def own_ahead(found: list[dict[str, Any]]) -> dict[int, float]:
    """By hidden size: our best product's time over the library path's."""
    ratios = {}
    for d in dict.fromkeys(e["d"] for e in found if e["kernel"] == "softmax_tile"):
        mine = [e for e in found if e["kernel"] == "softmax_tile" and e["d"] == d]
        library = next(e["ms"] for e in mine if e["row"] == "library")
        own = [e["ms"] for e in mine if e["row"] != "library" and e["ms"] is not None]
        if own and library is not None:
            ratios[d] = min(own) / library
    return ratios


def proposal(found: list[dict[str, Any]], arch: str) -> str:
    """Lines to paste into kernels/configs.py."""
    ratios = own_ahead(found)
    ahead = [d for d in sorted(ratios) if all(ratios[e] < 1 for e in ratios if e <= d)]
    lines = [f'_TILES_16:      "{arch}": {best(found, ("softmax_tile", "dz_tile"))},']
    for name in ("chunk", "fold", "decode"):
        lines.append(f'_ROWS:          "{name}": ({best(found, (name,))}, ...')
    lines.append(f'_TILES_UP_TO_D: "{arch}": {ahead[-1] if ahead else 0},')
    shown = ", ".join(f"{d}: {ratio:.3f}" for d, ratio in ratios.items())
    return "\n".join([*lines, f"# own product over library path by D: {shown}"])


def table(found: list[dict[str, Any]]) -> str:
    ranked = sorted(found, key=lambda e: (e["kernel"], e["d"], e["ms"] or float("inf")))
    lines = []
    for e in ranked:
        ms = e["failed"] if e["ms"] is None else f"{e['ms']:.4f}"
        lines.append([e["kernel"], f"{e['n']} x {e['v']} x {e['d']}", e["row"], ms])
    return markdown("kernel|n x v x D|row|ms", lines)


def main(
    tokens: Annotated[int, typer.Option(help="tokens of one block")] = 2048,
    vocab: Annotated[int, typer.Option(help="words of one block")] = 32768,
    hidden: Annotated[str, typer.Option(help="hidden sizes, by commas")] = "1024,2048,4096,8192",
    rounds: Annotated[int, typer.Option(help="interleaved rounds")] = 9,
    tiny: Annotated[bool, typer.Option(help="small sizes, one round")] = False,
    out: Annotated[Path | None, typer.Option(help="result file without suffix")] = None,
) -> None:
    """Time the candidates and print rows for kernels/configs.py."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    widths = [int(d) for d in hidden.split(",")]
    if tiny:
        tokens, vocab, widths, rounds = 64, 256, [64], 1
    stem = out or default_stem(device, "tune")
    begin(stem, device)
    found: list[dict[str, Any]] = []
    for d in widths:
        found += tune_tiles(device, dtype, tokens, vocab, d, rounds)
        found += tune_rows(device, tokens, vocab, d, rounds)
        # After each size, so that a call that is cut off leaves its rows.
        text = f"{table(found)}\n```\n{proposal(found, configs.arch(device))}\n```\n"
        beside(stem, ".md").write_text(text)
        printable = [entry | {"row": str(entry["row"])} for entry in found]
        beside(stem, "-rows.json").write_text(json.dumps(printable, indent=1))
    print(f"{text}{beside(stem, '.md')}")


if __name__ == "__main__":
    typer.run(main)
