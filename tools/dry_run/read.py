"""A recorded launch compiled for its architecture, and what its machine code says."""

from __future__ import annotations

import collections
import contextlib
import io
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.compiler import ASTSource, make_backend

from tools.dry_run.capture import ARCHITECTURES, Launch, driver


class Access(NamedTuple):
    """A kind of access to global memory, per thread."""

    kind: str  # ld, st, or cp for an asynchronous copy
    bytes: int


class Compiled(NamedTuple):
    hash: str
    warps: int
    registers: int
    spills: int  # bytes, stores and loads
    shared: int  # bytes
    warnings: list[str]  # of ptxas
    product: str  # operand type of the matrix product, if it has one: bf16, f16 or f32
    accesses: dict[str, dict[Access, int]]  # pointer -> access -> how often in the code
    operations: dict[str, int]


_INSTRUCTION = re.compile(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+(.*?);?\s*$")
_GLOBAL = re.compile(r"^(?:(ld|st)\.(?:\w+\.)*global|cp\.async\.c[ag]\.shared\.global)")


def read_accesses(ptx: str, pointers: Iterable[str]) -> dict[str, dict[Access, int]]:
    """Count a kernel's accesses to global memory by the pointer that each address comes from."""
    entry, _, body = ptx[ptx.index(".entry") :].partition(")")
    owner = dict(zip(re.findall(r"\.ptr\s+\.global.*?(\w+_param_\d+)", entry), pointers))
    matches = (_INSTRUCTION.match(line.partition("//")[0]) for line in body.splitlines())
    found = [match.groups() for match in matches if match]
    origin: dict[str, set[str]] = collections.defaultdict(set)
    grown = True
    while grown:  # addresses go round loops
        grown = False
        for operation, operands in found:
            target, _, sources = operands.partition(",")
            if operation.startswith("ld.param"):
                names = {owner[x] for x in re.findall(r"\w+_param_\d+", sources) if x in owner}
            elif operation.startswith(("ld", "st", "cp", "atom", "red")):
                continue
            else:
                names = {x for r in re.findall(r"%rd\d+", sources) for x in origin[r]}
            if target.startswith("%rd") and not names <= origin[target]:
                origin[target] |= names
                grown = True
    counts: dict[str, dict[Access, int]] = collections.defaultdict(collections.Counter)
    for operation, operands in found:
        if not (match := _GLOBAL.match(operation)):
            continue
        if match[1]:
            vector, bits = re.search(r"(?:\.v(\d))?\.[bufs](\d+)$", operation).groups()
            access = Access(match[1], int(vector or 1) * int(bits) // 8)
        else:
            size = re.search(r"(0x[0-9a-f]+|\d+)", operands.rpartition("]")[2])[1]
            access = Access("cp", int(size, 0))
        registers = re.findall(r"%rd\d+", " ".join(re.findall(r"\[.*?\]", operands)))
        for name in {x for r in registers for x in origin[r]} or {"?"}:
            counts[name][access] += 1
    return {name: dict(count) for name, count in counts.items()}


def read_ptxas(log: str) -> dict[str, Any]:
    """What `ptxas -v` says of a kernel; its performance warnings carry numbers C75xx."""
    lines = [line.strip() for line in log.splitlines()]
    return {
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "spills": sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log))),
        "warnings": [line for line in lines if re.search(r"\bC75\d\d\b", line)],
    }


def read_sass(sass: str) -> dict[str, int]:
    pattern = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)"
    return dict(collections.Counter(re.findall(pattern, sass)))


def _disassemble(cubin: bytes) -> str:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools / "cuobjdump"), "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read_amd(asm: str) -> dict[str, Any]:
    registers, spills = (
        int(re.search(rf"\.vgpr_{what}:\s*(\d+)", asm)[1]) for what in ("count", "spill_count")
    )
    operations = collections.Counter(re.findall(r"^\s+([a-z]\w+)\s", asm, re.M))
    operations["v_mfma"] = sum(n for x, n in operations.items() if x.startswith("v_mfma_"))
    return {
        "registers": registers,
        "spills": 4 * spills,
        "warnings": [],
        "accesses": {},
        "operations": dict(operations),
    }


def compile_launch(launch: Launch) -> Compiled | str:
    """Compile one specialisation; return what it became, or the error in one line."""
    target, said = ARCHITECTURES[launch.arch].target, io.StringIO()
    triton.runtime.driver.set_active(driver(launch.arch))
    try:
        source = ASTSource(launch.function, *launch.source)
        with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(said):
            triton.knobs.nvidia.dump_ptxas_log = True
            built = triton.compile(source, target=target, options=launch.options.__dict__)
            if target.backend == "cuda" and not said.getvalue():  # it came from Triton's cache
                make_backend(target).make_cubin(
                    built.asm["ptx"], built.metadata._asdict(), launch.options, target.arch
                )
        if target.backend == "hip":
            found = _read_amd(built.asm["amdgcn"])
        else:
            found = read_ptxas(said.getvalue())
            found["operations"] = read_sass(_disassemble(built.asm["cubin"]))
            found["accesses"] = read_accesses(built.asm["ptx"], launch.pointers)
    except Exception as error:  # of any kind: it is this launch's result
        lines = str(error).strip().splitlines() or [repr(error)]
        return f"{type(error).__name__}: {lines[0][:300]}"
    product = re.search(r"tt\.dot\b.*?: tensor<[\dx]*x(\w+)", built.asm["ttir"])
    return Compiled(
        hash=built.hash,
        warps=built.metadata.num_warps,
        shared=built.metadata.shared,
        product=product[1] if product else "",
        **found,
    )


def _compile_apart(launch: Launch) -> Compiled | str:
    """In a forked process: a crash of the compiler loses one launch and not the run."""
    context = multiprocessing.get_context("fork")  # launches hold functions that do not pickle
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send(compile_launch(launch)))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return "the compiler process died"
    finally:
        process.join()


def compile_all(launches: Iterable[Launch]) -> list[Compiled | str]:
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(_compile_apart, launches))
