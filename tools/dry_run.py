"""A dry run of the GPU without a GPU: the launchers' own launches, compiled and read.

    python tools/dry_run.py --arch sm_90
    PYTHONPATH=/tmp/dryrun-aside/triton-3.6.0 python tools/dry_run.py --arch sm_90

Run it without TRITON_INTERPRET: the interpreter replaces the compiler in a process that sets it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


class Arch(NamedTuple):
    """A target, and what one of its SMs holds (CUDA C++ Programming Guide, compute capabilities)."""

    capability: int
    warps: int
    programs: int
    shared_kib: int  # per SM; a program gets all of it but one KiB at most


ARCHITECTURES = {
    "sm_80": Arch(80, 64, 32, 164),
    "sm_86": Arch(86, 48, 16, 100),
    "sm_89": Arch(89, 48, 24, 100),
    "sm_90": Arch(90, 64, 32, 228),
    "sm_100": Arch(100, 64, 32, 228),
    "sm_120": Arch(120, 48, 24, 100),
}
MMA = ("HMMA", "HGMMA", "UTCHMMA")
COPIES = ("LDGSTS", "UTMALDG")


def programs_per_sm(arch: str, registers: int, warps: int, shared: int) -> int:
    """How many programs of a kernel share one SM."""
    limit = ARCHITECTURES[arch]
    per_warp = -(-registers * 32 // 256) * 256  # registers are handed out in 256 per warp
    per_program = -(-(shared + 1024) // 128) * 128  # the system takes 1 KiB of each
    by_registers = (65536 // per_warp) // warps
    return min(
        limit.programs,
        limit.warps // warps,
        by_registers,
        (limit.shared_kib << 10) // per_program,
    )


# --- capture ---------------------------------------------------------------------------------


class Pretend(TorchFunctionMode):
    """Tensors on `meta` that say they lie on a GPU: shapes, strides and alignment without memory."""

    GPU = torch.device("cuda", 0)
    ANSWERS = {  # noqa: RUF012
        torch.Tensor.is_cuda.__get__: True,  # type: ignore[attr-defined]
        torch.Tensor.device.__get__: GPU,  # type: ignore[attr-defined]
    }

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in self.ANSWERS:
            return self.ANSWERS[func]
        meta = torch.device("meta")
        swap = lambda x: meta if isinstance(x, torch.device) else x  # noqa: E731
        kwargs = {k: swap(x) for k, x in (kwargs or {}).items()}
        return func(*map(swap, args), **kwargs)


class Stub:
    """Triton's driver: a target without a device."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCHITECTURES[self.arch].capability, 32)

    def get_current_device(self) -> str:
        return self.arch  # each target has its own binders and caches

    def get_current_stream(self, _: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Launch(NamedTuple):
    """One specialisation of one kernel, as its launcher asked for it."""

    arch: str
    function: JITFunction
    key: str
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attrs: dict[Any, Any]
    options: Any


class Captured(NamedTuple):
    launch: Launch
    wide: frozenset[str]  # matrix arguments whose rows divide by 16: they must move as vectors
    dtypes: frozenset[str]
    scenarios: list[str]


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The arguments within an argument: Triton flattens tuples in order."""
    if isinstance(value, tuple):
        names = getattr(value, "_fields", range(len(value)))
        for field, item in zip(names, value):
            yield from leaves(f"{name}.{field}", item)
    else:
        yield name, value


def wide_arguments(arguments: dict[str, Any]) -> frozenset[str]:
    """The matrices of a launch that matter and whose rows all start on a multiple of 16 elements."""
    found = [leaf for item in arguments.items() for leaf in leaves(*item)]
    matrices = {n: x for n, x in found if isinstance(x, Tensor) and x.dim() == 2}
    largest = max((x.numel() for x in matrices.values()), default=0)
    return frozenset(
        name
        for name, x in matrices.items()
        if x.numel() * 16 >= largest > 0
        and x.shape[1] % 16 == x.stride(0) % 16 == x.data_ptr() % 16 == 0
        and x.stride(1) == 1
    )


_RUN = JITFunction.run


class Recorder:
    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.captured: dict[tuple[str, str], Captured] = {}
        self.scenario = ""
        self.sequence: list[tuple[str, str]] = []  # the launches of the scenario in work
        self._pending: dict[str, Any] = {}

    def run(self, function: JITFunction, *args: Any, **kwargs: Any) -> None:
        named = {k: v for k, v in kwargs.items() if k in function.arg_names}
        self._pending = function.signature.bind(*args, **named).arguments
        kwargs["warmup"] = False
        _RUN(function, *args, **kwargs)

    def compile(self, function, key, signature, device, constants, options, attrs, warmup):  # type: ignore[no-untyped-def]
        """Takes the place of JITFunction._do_compile; without a kernel nothing is launched."""
        launch = Launch(
            self.arch, function, key, signature, constants, attrs, options
        )
        identity = (function.__name__, key)
        seen = self.captured.get(identity) or Captured(launch, frozenset(), frozenset(), [])
        kinds = {
            str(x.dtype).removeprefix("torch.")
            for item in self._pending.items()
            for _, x in leaves(*item)
            if isinstance(x, Tensor)
        }
        self.captured[identity] = seen._replace(
            wide=seen.wide | wide_arguments(self._pending), dtypes=seen.dtypes | kinds
        )
        if self.scenario not in seen.scenarios:
            self.captured[identity].scenarios.append(self.scenario)
        self.sequence.append(identity)


@contextlib.contextmanager
def recording(arch: str) -> Iterator[Recorder]:
    recorder = Recorder(arch)
    capability = divmod(ARCHITECTURES[arch].capability, 10)
    triton.runtime.driver.set_active(Stub(arch))  # type: ignore[arg-type]
    with (
        mock.patch.object(
            JITFunction, "run", lambda *a, **k: recorder.run(*a, **k)
        ),
        mock.patch.object(
            JITFunction, "_do_compile", lambda *a, **k: recorder.compile(*a, **k)
        ),
        mock.patch("torch.cuda.get_device_capability", lambda *_: capability),
        mock.patch("torch.cuda.device_of", lambda *_: contextlib.nullcontext()),
        Pretend(),
    ):
        yield recorder


# --- what is launched ------------------------------------------------------------------------

SHAPES = [  # T, V, D
    (1, 1, 8),
    (2, 1003, 33),
    (300, 1003, 200),
    (300, 32000, 1030),
    (4096, 128256, 1024),
    (2048, 128256, 4096),
]
VARIANTS = {
    "plain": {},
    "all": {"bias": True, "scale": 0.5, "softcap": 30.0},
    "bias": {"bias": True},
    "softcap": {"softcap": 30.0},
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WORKSPACE = 256 << 20


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def heads(v: int, d: int, dtype: torch.dtype, variant: str, kind: str) -> Any:
    from dilkern import lm_head

    settings = dict(VARIANTS[variant])
    bias = meta(v, dtype=dtype) if settings.pop("bias", False) else None
    head = lm_head.DenseHead(meta(v, d, dtype=dtype), bias, **settings)
    if kind == "lora":
        adapter = lm_head.Adapter(meta(8, d, dtype=dtype), meta(v, 8, dtype=dtype), 2.0)
        return lm_head.LoRAHead(head, [adapter])
    return head


def op(recorder: Recorder, shape: tuple[int, int, int], dtype: torch.dtype, variant: str, kind: str) -> list[str]:
    """Forward with and without gradient, and the head's backward; returns what is wrong."""
    from dilkern.backends import triton as backend

    t, v, d = shape
    name = f"{kind} {variant} {str(dtype).removeprefix('torch.')} T={t} V={v} D={d}"
    head = heads(v, d, dtype, variant, kind)
    hidden = meta(t, head.width, dtype=dtype)
    rows, labels = meta(t, dtype=torch.int64), meta(t, dtype=torch.int64)
    passes = []
    for need_u in (True, False):
        recorder.scenario, recorder.sequence = f"{name} need_u={need_u}", []
        out = backend.forward(
            hidden, rows, labels, head, workspace_bytes=WORKSPACE, need_u=need_u
        )
        passes.append(recorder.sequence)
    recorder.scenario, recorder.sequence = f"{name} head_backward", []
    needed = [True] * len(head.tensors())
    if kind == "lora":
        needed = [True] + [False] * (len(needed) - 1)
    backend.head_backward(
        hidden, rows, labels, head, out.logps, out.lse, meta(t),
        needed=needed, workspace_bytes=WORKSPACE,
    )  # fmt: skip
    if passes[0] != passes[1]:
        return [f"{name}: other kernels with gradient than without"]
    return []


def sequence(recorder: Recorder) -> None:
    from dilkern.kernels import h_functions
    from dilkern.kernels.sequence_loss import sequence_loss
    from dilkern.losses import LOSSES

    twins = sorted({entry.triton for entry in LOSSES.values() if entry.triton})
    for twin in twins:
        for reference in ("token", "sequence", "none"):
            if reference != "token" and twin != twins[0]:
                continue
            for by_length in (True, False):
                recorder.scenario = f"sequence loss {twin} {reference} {by_length}"
                t, s = 1000, 16
                sequence_loss(
                    meta(t),
                    meta(t, dtype=torch.bool),
                    meta(s + 1, dtype=torch.int64),
                    meta(s, dtype=torch.bool),
                    meta(s),
                    h=getattr(h_functions, twin),
                    ref_token_logps=meta(t) if reference == "token" else None,
                    ref_logps=meta(s) if reference == "sequence" else None,
                    length_normalize=by_length,
                )


def decode(recorder: Recorder) -> None:
    from dilkern.kernels.nf4_dequant import Packed4bit, nf4_dequant

    v = 128
    for dtype in DTYPES:
        for d in (33, 200, 4096):
            for blocksize in (64, 128):
                for nested in (False, True):
                    for gather in (False, True):
                        if dtype is not torch.bfloat16 and (gather or blocksize != 64):
                            continue
                        recorder.scenario = f"decode {dtype} {d} {blocksize} {nested} {gather}"
                        blocks = -(-v * d // blocksize)
                        weight = Packed4bit(
                            meta(-(-v * d // 2), dtype=torch.uint8),
                            meta(16),
                            meta(blocks, dtype=torch.uint8 if nested else torch.float32),
                            blocksize,
                            d,
                            meta(256) if nested else None,
                            meta(-(-blocks // 256)) if nested else None,
                            256,
                            meta() if nested else None,
                        )
                        ids = meta(40, dtype=torch.int64) if gather else None
                        nf4_dequant(weight, dtype, start=0 if gather else 3, end=None if gather else 100, ids=ids)


def capture(arch: str) -> tuple[list[Captured], list[str]]:
    wrong: list[str] = []
    with recording(arch) as recorder:
        for dtype in DTYPES:
            for shape in SHAPES:
                for variant in VARIANTS:
                    wrong += op(recorder, shape, dtype, variant, "dense")
        wrong += op(recorder, (300, 32000, 1024), torch.bfloat16, "plain", "lora")
        sequence(recorder)
        decode(recorder)
    return list(recorder.captured.values()), wrong


# --- compile and read ------------------------------------------------------------------------


class Access(NamedTuple):
    kind: str  # ld, st or cp
    bytes: int


class Compiled(NamedTuple):
    hash: str
    warps: int
    registers: int
    spills: int  # bytes
    shared: int
    warnings: list[str]  # of ptxas
    accesses: dict[str, dict[Access, int]]  # pointer argument -> how often which access
    ops: dict[str, int]  # SASS


_INSTRUCTION = re.compile(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+(.*?);?\s*$")
_GLOBAL = re.compile(r"^(ld|st)\.(?:\w+\.)*?global|^cp\.async\.c[ag]\.shared\.global")


def accesses(ptx: str, pointers: list[str]) -> dict[str, dict[Access, int]]:
    """Count the global accesses of a kernel by pointer argument, kind and bytes per thread.

    An address belongs to the argument that it was computed from, through any 64-bit arithmetic.
    """
    body = ptx[ptx.index(".entry") :]
    entry = body[: body.index(")")]
    parameters = re.findall(r"\.ptr\s+\.global.*?(\w+_param_\d+)", entry)
    owner = dict(zip(parameters, pointers))
    found = []
    for line in body.splitlines():
        if match := _INSTRUCTION.match(line.split("//")[0]):
            found.append(match.groups())
    origin: dict[str, set[str]] = collections.defaultdict(set)
    changed = True
    while changed:
        changed = False
        for opcode, rest in found:
            if opcode.startswith("ld.param"):
                sources = {owner[x] for x in re.findall(r"\w+_param_\d+", rest) if x in owner}
            elif opcode.startswith(("ld", "st", "cp", "atom", "red")):
                continue
            else:
                sources = set()
                for register in re.findall(r"%rd\d+", rest.partition(",")[2]):
                    sources |= origin[register]
            target = re.match(r"(%rd\d+)", rest)
            if target and not sources <= origin[target[1]]:
                origin[target[1]] |= sources
                changed = True
    counts: dict[str, dict[Access, int]] = collections.defaultdict(collections.Counter)
    for opcode, rest in found:
        if not (match := _GLOBAL.match(opcode)):
            continue
        registers = [x for group in re.findall(r"\[([^\]]*)\]", rest) for x in re.findall(r"%rd\d+", group)]
        if match[1]:
            vector = re.search(r"\.v(\d)", opcode)
            bits = int(re.search(r"\.[bufs](\d+)$", opcode)[1])  # type: ignore[index]
            access = Access(match[1], bits * int(vector[1] if vector else 1) // 8)
        else:
            access = Access("cp", int(re.search(r",\s*(0x[0-9a-f]+|\d+)", rest.rpartition("]")[2])[1], 0))  # type: ignore[index]
        names = set().union(*(origin[r] for r in registers))
        for name in names or {"?"}:
            counts[name][access] += 1
    return {name: dict(count) for name, count in counts.items()}


def pointer_names(launch: Launch) -> list[str]:
    """The pointers that the compiled kernel is given, in order."""
    return [
        name
        for item in launch.signature.items()
        for name, kind in leaves(*item)
        if isinstance(kind, str) and kind.startswith("*")
    ]


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def read_ptxas(log: str) -> tuple[int, int, list[str]]:
    """Registers, bytes spilled, and warnings with a number, of what `ptxas -v` says."""
    registers = int(re.search(r"Used (\d+) registers", log)[1])  # type: ignore[index]
    spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log)))
    warnings = [line.strip() for line in log.splitlines() if re.search(r"\bC75\d\d\b", line)]
    return registers, spills, warnings


def compile_launch(launch: Launch) -> Compiled | str:
    triton.runtime.driver.set_active(Stub(launch.arch))  # type: ignore[arg-type]
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    target = Stub(launch.arch).get_current_target()
    source = ASTSource(launch.function, launch.signature, launch.constants, launch.attrs)
    try:
        built = triton.compile(source, target=target, options=launch.options.__dict__)
    except Exception as error:  # a compiler error of any kind is this launch's result
        lines = str(error).strip().splitlines() or [repr(error)]
        return f"{type(error).__name__}: {lines[0][:300]}"
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(built.asm["ptx"])
        command = [get_ptxas(target.arch).path, "-v", "-lineinfo"]
        command += [] if launch.options.enable_fp_fusion else ["--fmad=false"]
        # What Triton 3.9 adds; 3.6 does not.
        if "regAllocOptLevel" in Path(triton.__file__).parent.joinpath("backends/nvidia/compiler.py").read_text():
            command.append("--regAllocOptLevel=2")
        command += [f"--gpu-name={sm_arch_from_capability(target.arch)}", str(ptx), "-o", str(cubin)]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        registers, spills, warnings = read_ptxas(log)
        sass = subprocess.run(
            [tool("cuobjdump"), "-sass", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
    pattern = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"
    ops: collections.Counter[str] = collections.Counter()
    for full in re.findall(pattern, sass):
        ops[full.partition(".")[0]] += 1
        if full.startswith(("LDG.", "STG.")):
            width = re.search(r"\.(U?[SU]?8|U?[SU]?16|64|128|256)\b", full)
            ops[f"{full[:3]}.{width[1] if width else '32'}"] += 1
    return Compiled(
        built.hash,
        built.metadata.num_warps,
        registers,
        spills,
        built.metadata.shared,
        warnings,
        accesses(built.asm["ptx"], pointer_names(launch)),
        dict(ops),
    )


_WORK: list[Launch] = []


def _compile_numbered(number: int) -> Compiled | str:
    return compile_launch(_WORK[number])


def compile_all(launches: list[Launch], jobs: int) -> list[Compiled | str]:
    """Compile in forked processes: a compiler crash loses one launch and not the run."""
    _WORK[:] = launches
    context = multiprocessing.get_context("fork")
    results: dict[int, Compiled | str] = {}
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = {i: pool.submit(_compile_numbered, i) for i in range(len(launches))}
        for i, future in futures.items():
            with contextlib.suppress(BrokenProcessPool):
                results[i] = future.result()
    for i in range(len(launches)):
        if i not in results:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                try:
                    results[i] = pool.submit(_compile_numbered, i).result()
                except BrokenProcessPool:
                    results[i] = "the compiler process died"
    return [results[i] for i in range(len(launches))]


def judge(captured: Captured, compiled: Compiled | str) -> list[str]:
    """What is wrong with one compiled launch."""
    if isinstance(compiled, str):
        return [compiled]
    wrong = [f"ptxas: {line}" for line in compiled.warnings]
    if compiled.spills:
        wrong.append(f"{compiled.spills} bytes spilled")
    for name in sorted(captured.wide):
        item = captured.launch.signature
        kinds = dict(leaf for pair in item.items() for leaf in leaves(*pair))
        size = {"fp32": 4, "bf16": 2, "fp16": 2}.get(str(kinds.get(name)).lstrip("*k"), 0)
        for access, count in sorted(compiled.accesses.get(name, {}).items()):
            if access.bytes <= size:
                wrong.append(f"{name}: {count} accesses `{access.kind}` of {access.bytes} bytes")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--arch", action="append", choices=list(ARCHITECTURES))
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    for arch in args.arch or ["sm_90"]:
        captured, wrong = capture(arch)
        captured = [c for c in captured if (args.kernel or "") in c.launch.function.__name__]
        print(f"# {arch}, Triton {triton.__version__}: {len(captured)} specialisations", flush=True)
        results = compile_all([c.launch for c in captured], args.jobs)
        for c, r in sorted(zip(captured, results), key=lambda x: x[0].launch.function.__name__):
            name = c.launch.function.__name__
            types = ",".join(sorted(c.dtypes & {"bfloat16", "float16", "float32"}))
            print(f"{name} [{types}] first in: {c.scenarios[0]} ({len(c.scenarios)} scenarios)")
            if isinstance(r, Compiled):
                ops = {k: v for k, v in sorted(r.ops.items()) if k in MMA + COPIES or k.startswith(("LDG.", "STG."))}
                programs = programs_per_sm(arch, r.registers, r.warps, r.shared)
                print(f"    {r.hash[:12]} registers={r.registers} shared={r.shared} spills={r.spills} "
                      f"programs/SM={programs} instructions={sum(n for k, n in r.ops.items() if '.' not in k)} {ops}")
                for pointer, counts in r.accesses.items():
                    text = " ".join(f"{n} x {a.kind}{a.bytes}" for a, n in sorted(counts.items()))
                    print(f"    {pointer}{' (wide)' if pointer in c.wide else ''}: {text}")
            for line in judge(c, r):
                print(f"    WRONG {line}")
                wrong.append(f"{arch} {name}: {line}")
        print(f"# {arch}: {len(wrong)} wrong", flush=True)


if __name__ == "__main__":
    main()
