"""Compile every kernel of every config row ahead of time, without a GPU, and list its resources.

    python benchmarks/kernel_resources.py                      # table to stdout, CSV to results/
    python benchmarks/kernel_resources.py --arch sm_90 --jobs 2
    python benchmarks/kernel_resources.py --docs               # and the table of docs/kernels.md

tests/aot gates on the same rows. Run it without TRITON_INTERPRET: the interpreter replaces the
compiler in a process that sets it.
"""

from __future__ import annotations

import argparse
import collections
import csv
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SHARED_LIMIT = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
MMA = ("HMMA", "HGMMA", "UTCHMMA")
COPIES = ("LDGSTS", "UTMALDG")
POINTER = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}


class Case(NamedTuple):
    """One kernel specialisation on one architecture."""

    kernel: str
    arch: str
    dtype: str
    variant: str


class Resources(NamedTuple):
    kernel: str
    arch: str
    dtype: str
    variant: str
    tile: str
    registers: int
    stack: int
    shared: int
    instructions: int
    tensor_core: int  # HMMA, HGMMA, UTCHMMA or mfma
    async_copies: int  # LDGSTS or UTMALDG
    notable: str  # which of these instructions


def cases(arch: str | None = None) -> Iterator[Case]:
    """Every row of configs.py, plain and with all of bias, scale and softcap."""
    from dilkern.kernels import configs

    for name in configs.ARCHITECTURES:
        if arch not in (None, name):
            continue
        for dtype in ("bfloat16", "float16", "float32"):
            for variant in ("plain", "all"):
                yield Case("logps_forward", name, dtype, variant)
                yield Case("dz_tile", name, dtype, variant)
                if dtype != "float16":
                    yield Case("chunk_softmax", name, dtype, variant)
                    yield Case("chunk_dz", name, dtype, variant)
        for dtype in ("bfloat16", "float32"):
            yield Case("target_logit", name, dtype, "all")
            yield Case("fold_block", name, dtype, "plain")
            yield Case("nf4_dequant", name, dtype, "nested")
        yield Case("nf4_dequant", name, "bfloat16", "gather")
        for variant in ("lsif", "ukl", "bce", "nce", "brier", "power"):
            yield Case("sequence_loss", name, "float32", variant)


def _describe(case: Case) -> tuple[Any, dict[str, str], dict[str, Any], tuple[str, ...], Any]:
    """Kernel, signature, constants, arguments divisible by 16, and config row of a case."""
    import torch

    from dilkern.kernels import configs

    device = torch.device("meta")
    configs.arch = lambda _: case.arch  # type: ignore[assignment]
    dtype = getattr(torch, case.dtype)
    pointer = POINTER[case.dtype]
    full = case.variant == "all"
    flags = {"SCALED": full, "CAPPED": full}
    no_bias = {} if full else {"bias_ptr": None}
    if case.kernel in ("logps_forward", "dz_tile"):
        row = configs.tile(device, dtype)
        short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[case.dtype]
        if row.descriptors:
            operands = {
                "h": f"tensordesc<{short}[{row.block_t}, {row.block_d}]>",
                "w": f"tensordesc<{short}[{row.block_v}, {row.block_d}]>",
            }
        else:
            operands = {"h": pointer, "w": pointer}
        constants = {
            "BLOCK_T": row.block_t,
            "BLOCK_V": row.block_v,
            "BLOCK_D": row.block_d,
            "DESCRIPTORS": row.descriptors,
            "EVEN_D": True,
            "PRECISION": "ieee",
            **flags,
            **no_bias,
        }
        scalars = {"n": "i32", "v": "i32", "d": "i32", "start": "i32", "tiles": "i32"}
        scalars |= {"stride_h": "i32", "stride_w": "i32", "stride_p": "i32", "stride_dz": "i32"}
        scalars |= {"scale": "fp32", "softcap": "fp32", "store_p": "i32"}
        statistics = (
            "reference_ptr",
            "exponents_ptr",
            "sums_ptr",
            "lse_ptr",
            "lost_ptr",
            "miss_ptr",
            "g_ptr",
        )
        signature = {**operands, "bias_ptr": pointer, "labels_ptr": "*i64", "p_ptr": pointer}
        signature |= {"dz_ptr": pointer, **dict.fromkeys(statistics, "*fp32"), **scalars}
        aligned = ("d", "stride_h", "stride_w", "stride_p", "stride_dz", "p_ptr", "dz_ptr")
        aligned += ("bias_ptr", "labels_ptr", *statistics)
        aligned += () if row.descriptors else ("h", "w")
        if case.kernel == "logps_forward":
            from dilkern.kernels.logps_forward import _logps_forward_kernel as kernel
        else:
            from dilkern.kernels.dz_tile import _dz_tile_kernel as kernel
        return kernel, signature, constants, aligned, row
    if case.kernel in ("chunk_softmax", "chunk_dz"):
        if case.kernel == "chunk_softmax":
            from dilkern.kernels.chunk_softmax import _chunk_softmax_kernel as kernel
        else:
            from dilkern.kernels.chunk_dz import _chunk_dz_kernel as kernel

        row = configs.chunk(device)
        constants = {"BLOCK_T": row.block_t, "BLOCK_V": row.block, **flags, **no_bias}
    elif case.kernel == "target_logit":
        from dilkern.kernels.target_logit import _target_logit_kernel as kernel

        row = configs.dot(device)
        constants = {"BLOCK_T": row.block_t, "BLOCK_D": row.block, **flags}
    elif case.kernel == "fold_block":
        from dilkern.kernels.fold_block import _fold_block_kernel as kernel

        row = configs.fold(device)
        constants = {"TILE_V": 128, "BLOCK_T": row.block_t, "BLOCK": row.block}
    elif case.kernel == "nf4_dequant":
        from dilkern.kernels.nf4_dequant import _nf4_dequant_kernel as kernel

        row = configs.decode(device)
        constants = {"BLOCK_T": row.block_t, "BLOCK": row.block, "NESTED": True, "PAIRS": True}
        constants |= {"ids_ptr": None} if case.variant != "gather" else {}
    else:
        from dilkern.kernels import h_functions
        from dilkern.kernels.sequence_loss import _sequence_loss_kernel as kernel

        row = configs.sequence(device)
        constants = {"H": getattr(h_functions, case.variant), "BLOCK": row.block}
        constants |= {"BY_LENGTH": True, "ref_ptr": None}
    kinds = {
        "h_ptr": pointer,
        "w_ptr": pointer if case.kernel == "target_logit" else "*u8",
        "bias_ptr": pointer,
        "p_ptr": pointer,
        "dz_ptr": pointer,
        "out_ptr": pointer,
        "packed_ptr": "*u8",
        "absmax_ptr": "*u8",
        "scored_ptr": "*i1",
        "is_chosen_ptr": "*i1",
        "labels_ptr": "*i64",
        "ids_ptr": "*i64",
        "bounds_ptr": "*i64",
    }
    floats = ("scale", "softcap", "beta", "limit", "param")
    signature = {}
    for name in kernel.arg_names:
        if name.endswith("_ptr"):
            signature[name] = kinds.get(name, "*fp32")
        else:
            signature[name] = "fp32" if name in floats else "i32"
    skip = {*floats, "n", "v", "start", "tiles", "store_p", "rescale", "numel"}
    skip |= {"blocksize", "nested_blocksize", "packed_ptr"}
    aligned = tuple(name for name in kernel.arg_names if name not in skip and name not in constants)
    return kernel, signature, constants, aligned, row


def compile_case(case: Case) -> Resources | str:
    """Compile one case; return its resources, or the error in one line."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    try:
        kernel, signature, constants, aligned, row = _describe(case)
        signature = {**signature, **dict.fromkeys(constants, "constexpr")}
        signature = {name: signature[name] for name in kernel.arg_names}
        attrs = {
            (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
            for name in aligned
            if name in kernel.arg_names and signature[name] != "constexpr"
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
        hip = case.arch.startswith("gfx")
        number = case.arch if hip else int(case.arch[3:])
        target = GPUTarget("hip" if hip else "cuda", number, 64 if hip else 32)
        options = dict(row.launch)
        if case.kernel == "nf4_dequant":
            options["enable_fp_fusion"] = False
        built = triton.compile(source, target=target, options=options)
    except Exception as error:  # a compiler error of any kind is this case's result
        lines = str(error).strip().splitlines() or [repr(error)]
        return f"{type(error).__name__}: {lines[0][:300]}"
    if hip:
        asm = built.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", asm)[1])  # type: ignore[index]
        spills = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", asm)[1])  # type: ignore[index]
        body = re.findall(r"^\s+([a-z]\w+)\s", asm, re.M)
        mma = sum(op.startswith("v_mfma") for op in body)
        notable = "v_mfma" if mma else ""
        found = (registers, 4 * spills, built.metadata.shared, len(body), mma, 0, notable)
    else:
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()

            def dump(flag: str) -> str:
                command = [str(tools / "cuobjdump"), flag, file.name]
                return subprocess.run(command, capture_output=True, text=True, check=True).stdout

            usage = {k: int(n) for k, n in re.findall(r"(REG|STACK):(\d+)", dump("-res-usage"))}
            pattern = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)"
            ops = collections.Counter(re.findall(pattern, dump("-sass")))
        mma = sum(ops[op] for op in MMA)
        copies = sum(ops[op] for op in COPIES)
        notable = " ".join(op for op in MMA + COPIES if ops[op])
        shared, total = built.metadata.shared, ops.total()
        found = (usage["REG"], usage["STACK"], shared, total, mma, copies, notable)
    tile = "x".join(str(x) for x in row[:3] if not isinstance(x, bool)) if len(row) > 3 else ""
    tile = tile or f"{row.block_t}x{row.block}"
    tile += f" w{row.warps}" + (f" s{row.stages}" if hasattr(row, "stages") else "")
    return Resources(*case, tile, *found)


def compile_all(chosen: list[Case], jobs: int) -> dict[Case, Resources | str]:
    """Compile in worker processes: a compiler crash loses one case and not the run."""
    results: dict[Case, Resources | str] = {}
    context = multiprocessing.get_context("spawn")
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = {case: pool.submit(compile_case, case) for case in chosen}
        for case, future in futures.items():
            try:
                results[case] = future.result()
            except BrokenProcessPool:
                results[case] = "the compiler process died"
    return results


def markdown(rows: list[Resources], version: str) -> str:
    """The table of docs/kernels.md: one line per kernel, dtype and variant, one column per arch."""
    arches = list(dict.fromkeys(r.arch for r in rows))
    cells = {(r.kernel, r.dtype, r.variant, r.arch): r for r in rows}
    lines = [f"Triton {version}.", "", "| kernel | dtype | variant | " + " | ".join(arches) + " |"]
    lines.append("|---" * (3 + len(arches)) + "|")
    for key in dict.fromkeys((r.kernel, r.dtype, r.variant) for r in rows):
        found = [cells[(*key, arch)] for arch in arches]
        text = [f"{r.registers} / {r.shared / 1024:.3g}" for r in found]
        lines.append("| " + " | ".join([*key, *text]) + " |")
    return "\n".join(lines)


def write_docs(table: str) -> None:
    """Put the table between its two markers."""
    path = ROOT / "docs" / "kernels.md"
    head, _, rest = path.read_text().partition("<!-- resources: begin -->")
    tail = rest.partition("<!-- resources: end -->")[2]
    marked = f"<!-- resources: begin -->\n{table}\n<!-- resources: end -->"
    path.write_text(head + marked + tail)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--arch")
    parser.add_argument("--kernel")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--out", type=Path, help="CSV file (default: results/kernel_resources-*.csv)"
    )
    parser.add_argument("--docs", action="store_true", help="write the table of docs/kernels.md")
    args = parser.parse_args()
    import triton

    chosen = [c for c in cases(args.arch) if args.kernel in (None, c.kernel)]
    results = compile_all(chosen, args.jobs)
    fields = Resources._fields
    rows = [r for r in results.values() if isinstance(r, Resources)]
    for case, result in results.items():
        if isinstance(result, str):
            print(*case, "FAILED", result, file=sys.stderr)
    print(" | ".join(fields))
    for r in rows:
        print(" | ".join(str(x) for x in r))
    default = ROOT / "benchmarks" / "results" / f"kernel_resources-triton{triton.__version__}.csv"
    if args.out or (args.arch is None and args.kernel is None):
        path = args.out or default
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([fields, *rows])
        print(f"wrote {path}")
    if args.docs:
        write_docs(markdown(rows, triton.__version__))


if __name__ == "__main__":
    main()
