"""A dry run of the GPU without a GPU: the launchers' own launches, compiled, read and judged.

    python tools/dry_run.py                     # every architecture; status 1 if anything is wrong
    python tools/dry_run.py --arch sm_90 --kernel softmax_tile
    python tools/dry_run.py --write             # the table and that of docs/kernels.md anew
    python tools/dry_run.py --docs              # that of docs/kernels.md alone

The backend and the small ops run on tensors without memory that say they lie on a GPU. Their
launches go through Triton's own binder, which sees what it will see on a GPU: which integers are 1 or
divide by 16, which pointers are aligned, which arguments are None. Each specialisation is compiled
for its target and its PTX, SASS and ptxas report are read. Nothing is launched, no GPU is needed.

Run it without TRITON_INTERPRET: the interpreter replaces the compiler in a process that sets it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import io
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs" / "kernels.md"
sys.path.insert(0, str(ROOT))


class Arch(NamedTuple):
    """A target, and what one of its SMs holds (CUDA C++ Programming Guide, compute capabilities)."""

    target: GPUTarget
    warps: int = 0
    programs: int = 0
    shared_kib: int = 0  # one KiB of it is lost to each program
    instructions: frozenset[str] = frozenset()  # what a 16-bit matrix product must be made of


def _nvidia(capability: int, *limits: int, product: str = "HMMA LDGSTS") -> Arch:
    return Arch(GPUTarget("cuda", capability, 32), *limits, frozenset(product.split()))


ARCHITECTURES = {
    "sm_80": _nvidia(80, 64, 32, 164),
    "sm_86": _nvidia(86, 48, 16, 100),
    "sm_89": _nvidia(89, 48, 24, 100),
    "sm_90": _nvidia(90, 64, 32, 228, product="HGMMA UTMALDG"),
    "sm_100": _nvidia(100, 64, 32, 228, product="UTCHMMA UTMALDG"),
    "sm_120": _nvidia(120, 48, 24, 100),
    "gfx942": Arch(GPUTarget("hip", "gfx942", 64), instructions=frozenset(["v_mfma"])),
}
NOTABLE = ("HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "UTMALDG", "v_mfma")
# ptxas at times keeps a few bytes on the stack to reach a round number of registers.
SPILLS_ALLOWED = 16


def programs_per_sm(arch: str, registers: int, warps: int, shared: int) -> int:
    """How many programs of a kernel share one SM; 0 if not even one fits."""
    limit = ARCHITECTURES[arch]
    per_warp = -(-registers * 32 // 256) * 256  # registers are handed out in 256 per warp
    by_registers = 16384 // per_warp * 4 // warps  # by each of the SM's four parts
    per_program = -(-(shared + 1024) // 128) * 128
    by_shared = (limit.shared_kib << 10) // per_program
    return min(limit.programs, limit.warps // warps, by_registers, by_shared)


# --- What is run ------------------------------------------------------------------------------

WORKSPACE = 256 << 20
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 30.0},
    "all": {"bias": True, "scale": 0.5, "softcap": 30.0},
}
# T, V, D: one of each; odd D; D that divides by 8 and not by 16; a ragged last block; own product
# and library product at a real size.
RAGGED = [(1, 1, 8), (2, 1003, 33), (300, 1003, 200), (300, 50257, 1030)]
EVEN = [(4096, 128256, 1024), (2048, 128256, 4096)]


class Case(NamedTuple):
    """One call of the backend or of a small op."""

    kind: str  # dense, own (dense, with our own product in any case), tile (own, with the
    # candidates of 256 words), lora, decode or sequence
    dtype: str
    variant: str
    shape: tuple[int, ...]  # (T, V, D), (V, D, blocksize) or (S, T)
    reference: str = ""  # of a sequence loss: token, sequence or none
    quick: bool = False  # part of `make test`

    def __str__(self) -> str:
        parts = (*self[:3], "x".join(map(str, self.shape)), self.reference)
        return " ".join(filter(None, parts))


def cases() -> Iterator[Case]:
    from dilkern.losses import LOSSES

    for variant in VARIANTS:
        both = variant in ("plain", "all")
        for shape in RAGGED + EVEN if both else EVEN:
            yield Case("dense", "bfloat16", variant, shape, quick=both)
        for shape in EVEN if both else ():
            yield Case(
                "dense", "float16", variant, shape, quick=variant == "plain" and shape == EVEN[0]
            )
        for shape in (RAGGED[0], RAGGED[2], EVEN[1]) if both else ():
            yield Case("dense", "float32", variant, shape, quick=shape in EVEN)
        # An architecture may leave our own product to those who measured it: it must be fit to run.
        for shape in (RAGGED[2], EVEN[0]):
            yield Case("own", "bfloat16", variant, shape, quick=both)
    yield Case("tile", "bfloat16", "plain", EVEN[0])
    for dtype in ("bfloat16", "float32"):
        yield Case("lora", dtype, "plain", (300, 32000, 1024), quick=dtype == "bfloat16")
    for variant in ("flat", "nested"):
        for width in (33, 200, 4096):
            quick = width != 200
            yield Case("decode", "bfloat16", variant, (128, width, 64), quick=quick)
        yield Case("decode", "bfloat16", variant, (128, 4096, 128))
        for dtype in ("float16", "float32"):
            yield Case("decode", dtype, variant, (128, 4096, 64))
    twins = sorted({entry.triton for entry in LOSSES.values() if entry.triton})
    for twin in twins:
        yield Case("sequence", "float32", twin, (16, 1000), "token", quick=True)
    for reference in ("sequence", "none"):
        yield Case("sequence", "float32", "lsif", (16, 1000), reference, quick=True)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _run_op(case: Case) -> Iterator[str]:
    """Forward with and without gradient, then the head's backward; yields what each was."""
    from dilkern import lm_head
    from dilkern.backends import triton as backend

    (t, v, d), dtype = case.shape, getattr(torch, case.dtype)
    settings = dict(VARIANTS[case.variant])
    bias = _meta(v, dtype=dtype) if settings.pop("bias", False) else None
    head: Any = lm_head.DenseHead(_meta(v, d, dtype=dtype), bias, **settings)
    needed = [True] * len(head.tensors())
    if case.kind == "lora":
        adapter = lm_head.Adapter(_meta(8, d, dtype=dtype), _meta(v, 8, dtype=dtype), 2.0)
        head = lm_head.LoRAHead(head, [adapter])
        needed = [True, False]  # B alone: its base is frozen
    hidden = _meta(t, head.width, dtype=dtype)
    rows, labels = (_meta(t, dtype=torch.int64) for _ in range(2))
    sizes = {"workspace_bytes": WORKSPACE}
    for need_u in (True, False):
        out = backend.forward(hidden, rows, labels, head, need_u=need_u, **sizes)
        yield "forward with gradient" if need_u else "forward without gradient"
    grad = _meta(t)
    results = (out.logps, out.lse, grad)
    backend.head_backward(hidden, rows, labels, head, *results, needed=needed, **sizes)
    yield "head backward"


def _run_decode(case: Case) -> Iterator[str]:
    from dilkern.lm_head import FourBit, FourBitHead

    v, d, blocksize = case.shape
    blocks = -(-v * d // blocksize)
    nested = [_meta(256), _meta(-(-blocks // 256)), _meta()] if case.variant == "nested" else []
    packed = _meta(-(-v * d // 2), dtype=torch.uint8)
    absmax = _meta(blocks, dtype=torch.uint8 if nested else torch.float32)
    dtype = getattr(torch, case.dtype)
    head = FourBitHead(FourBit(packed, _meta(16), absmax, nested, blocksize, 256, dtype), v, d)
    head.block(3, 100, dtype)
    yield "range"
    head.gather(_meta(40, dtype=torch.int64), dtype)
    yield "rows"


def _run_sequence(case: Case) -> Iterator[str]:
    from dilkern.kernels import h_functions
    from dilkern.kernels.sequence_loss import sequence_loss

    s, t = case.shape
    # The sum is not of the curve: one of them shows it, with every kind of reference.
    for by_length in (True, False) if case.variant == "lsif" else (True,):
        sequence_loss(
            _meta(t),
            _meta(t, dtype=torch.bool),
            _meta(s + 1, dtype=torch.int64),
            _meta(s, dtype=torch.bool),
            _meta(s),
            h=getattr(h_functions, case.variant),
            ref_token_logps=_meta(t) if case.reference == "token" else None,
            ref_logps=_meta(s) if case.reference == "sequence" else None,
            length_normalize=by_length,
        )
        yield "mean" if by_length else "sum"


def _run_own(case: Case) -> Iterator[str]:
    from dilkern.kernels import configs

    with mock.patch.object(configs, "own_product", lambda *_: True):
        yield from _run_op(case)


def _run_tiles(case: Case) -> Iterator[str]:
    """The candidates that load least per product, where a program may take a whole SM."""
    from dilkern.kernels import configs

    row = configs.tile(torch.device("cuda"), torch.bfloat16)
    for tile in configs.CANDIDATES if row.descriptors else ():
        if tile.block_v == 256:
            chosen = tile._replace(descriptors=True)
            with mock.patch.object(configs, "tile", lambda *_, tile=chosen: tile):
                for part in _run_own(case):
                    yield f"{part} {tile}"


RUN = {
    "dense": _run_op,
    "own": _run_own,
    "tile": _run_tiles,
    "lora": _run_op,
    "decode": _run_decode,
    "sequence": _run_sequence,
}


# --- Capture ----------------------------------------------------------------------------------


class Pretend(TorchFunctionMode):
    """Tensors on `meta` say that they lie on a GPU: shapes, strides, alignment, but no memory.

    data_ptr() of a meta tensor is its offset: as aligned as the view in an allocation of its own.
    """

    ANSWERS = {  # noqa: RUF012
        torch.Tensor.is_cuda.__get__: True,
        torch.Tensor.device.__get__: torch.device("cuda", 0),
    }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.ANSWERS:
            return self.ANSWERS[func]

        def on_meta(x: Any) -> Any:
            return torch.device("meta") if isinstance(x, torch.device) else x

        kwargs = {name: on_meta(x) for name, x in (kwargs or {}).items()}
        return func(*map(on_meta, args), **kwargs)


class Stub:
    """Triton's driver: a target without a device."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return ARCHITECTURES[self.arch].target

    def get_current_device(self) -> str:
        return self.arch  # kernels keep binders and caches by device: each target has its own

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Launch(NamedTuple):
    """One specialisation of one kernel, as its launcher asked for it."""

    arch: str
    function: JITFunction[Any]
    key: str  # equal keys: the same machine code
    source: tuple[Any, ...]  # signature, constants, attributes
    options: Any
    pointers: tuple[str, ...]  # the arguments that the compiled kernel is given as pointers


class Seen(NamedTuple):
    """A specialisation, and what its launches have shown of it."""

    launch: Launch
    matrices: frozenset[str]  # the pointers to matrices
    wide: dict[str, Case]  # those that once had rows of a multiple of 16 elements, and where:
    # they must move as vectors
    cases: list[Case]


def _leaves(name: str, kind: Any, value: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, kind and value of everything in an argument: Triton flattens tuples in order."""
    if isinstance(kind, tuple):
        for field, a, b in zip(getattr(value, "_fields", range(len(kind))), kind, value):
            yield from _leaves(f"{name}.{field}", a, b)
    else:
        yield name, kind, value


def _is_wide(x: Tensor) -> bool:
    sizes = (x.shape[1], x.stride(0), x.data_ptr())
    return x.stride(1) == 1 and x.numel() > 0 and not any(size % 16 for size in sizes)


class Recorder:
    """Takes the place of two methods of JITFunction while a backend runs."""

    _run = JITFunction.run

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.seen: dict[str, Seen] = {}
        self.case = Case("", "", "", ())
        self.keys: list[str] = []  # of the launches since it was last emptied
        self.arguments: dict[str, Any] = {}

    def run(self, function: JITFunction[Any], *args: Any, **kwargs: Any) -> None:
        named = {name: x for name, x in kwargs.items() if name in function.arg_names}
        bound = function.signature.bind(*args, **named)
        bound.apply_defaults()
        self.arguments = bound.arguments
        Recorder._run(function, *args, **kwargs)

    def compile(self, function, key, signature, device, constants, options, attrs, warmup):
        """Record; JITFunction.run ends without a launch where it gets no kernel."""
        pairs = [(name, kind, self.arguments[name]) for name, kind in signature.items()]
        given = [leaf for pair in pairs for leaf in _leaves(*pair) if str(leaf[1]).startswith("*")]
        matrices = {name: x for name, _, x in given if isinstance(x, Tensor) and x.dim() == 2}
        longest = max((x.shape[1] for x in matrices.values()), default=0)
        # Not the statistics of tiles: a number per row and tile.
        matrices = {name: x for name, x in matrices.items() if x.shape[1] * 64 >= longest}
        wide = {name: self.case for name, x in matrices.items() if _is_wide(x)}
        key = f"{function.__name__} {key}"
        source, pointers = (signature, constants, attrs), tuple(name for name, *_ in given)
        launch = Launch(self.arch, function, key, source, options, pointers)
        old = self.seen.get(key) or Seen(launch, frozenset(), {}, [])
        if self.case not in old.cases:
            old.cases.append(self.case)
        self.seen[key] = old._replace(matrices=old.matrices | {*matrices}, wide=wide | old.wide)
        self.keys.append(key)


@contextlib.contextmanager
def recording(arch: str) -> Iterator[Recorder]:
    """Within it launches are recorded, and tensors on `meta` say that they lie on a GPU of `arch`."""
    recorder, target = Recorder(arch), ARCHITECTURES[arch].target
    hip = target.backend == "hip"
    capability = (9, 4) if hip else divmod(int(target.arch), 10)
    with (
        mock.patch.object(triton.runtime.driver, "_active", Stub(arch)),
        mock.patch.object(JITFunction, "run", lambda *a, **k: recorder.run(*a, **k)),
        mock.patch.object(JITFunction, "_do_compile", lambda *a: recorder.compile(*a)),
        mock.patch("torch.cuda.get_device_capability", lambda *_: capability),
        mock.patch("torch.cuda.device_of", lambda *_: contextlib.nullcontext()),
        mock.patch("torch.version.hip", "6.0" if hip else None),
        Pretend(),
    ):
        yield recorder


def capture(arch: str, chosen: Iterable[Case]) -> tuple[list[Seen], list[str]]:
    """Run the cases; return every specialisation they launch, and what went wrong on the way."""
    wrong = []
    with recording(arch) as recorder:
        for case in chosen:
            recorder.case, recorder.keys, keys = case, [], {}
            try:
                for part in RUN[case.kind](case):
                    keys[part], recorder.keys = recorder.keys, []
            except Exception as error:  # of any kind: a launch that does not bind is a result
                wrong.append(f"{case}: {type(error).__name__}: {error}")
                continue
            if not all(keys.values()):
                wrong.append(f"{case}: launches nothing")
            if keys.get("forward with gradient") != keys.get("forward without gradient"):
                wrong.append(f"{case}: other kernels with gradient than without")
    return list(recorder.seen.values()), wrong


# --- Compile and read -------------------------------------------------------------------------


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


class Report(NamedTuple):
    registers: int
    spills: int
    warnings: list[str]


def read_ptxas(log: str) -> Report:
    """What `ptxas -v` says of a kernel; its performance warnings carry numbers C75xx."""
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log)))
    lines = [line.strip() for line in log.splitlines()]
    return Report(registers, spills, [x for x in lines if re.search(r"\bC75\d\d\b", x)])


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


def _read_amd(asm: str) -> tuple[Report, dict[str, int]]:
    registers, spills = (
        int(re.search(rf"\.vgpr_{what}:\s*(\d+)", asm)[1]) for what in ("count", "spill_count")
    )
    operations = collections.Counter(re.findall(r"^\s+([a-z]\w+)\s", asm, re.M))
    operations["v_mfma"] = sum(n for x, n in operations.items() if x.startswith("v_mfma_"))
    return Report(registers, 4 * spills, []), dict(operations)


def compile_launch(launch: Launch) -> Compiled | str:
    """Compile one specialisation; return what it became, or the error in one line."""
    target, said = ARCHITECTURES[launch.arch].target, io.StringIO()
    triton.runtime.driver.set_active(Stub(launch.arch))
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
            report, operations = _read_amd(built.asm["amdgcn"])
            accesses = {}
        else:
            report = read_ptxas(said.getvalue())
            operations = read_sass(_disassemble(built.asm["cubin"]))
            accesses = read_accesses(built.asm["ptx"], launch.pointers)
    except Exception as error:  # of any kind: it is this launch's result
        lines = str(error).strip().splitlines() or [repr(error)]
        return f"{type(error).__name__}: {lines[0][:300]}"
    product = re.search(r"tt\.dot\b.*?: tensor<[\dx]*x(\w+)", built.asm["ttir"])
    return Compiled(
        built.hash,
        built.metadata.num_warps,
        report.registers,
        report.spills,
        built.metadata.shared,
        report.warnings,
        product[1] if product else "",
        accesses,
        operations,
    )


_WORK: list[Launch] = []


def _compile_numbered(number: int) -> Compiled | str:
    return compile_launch(_WORK[number])


def compile_all(launches: list[Launch], jobs: int) -> list[Compiled | str]:
    """Compile in forked processes: a crash of the compiler loses one launch and not the run."""
    _WORK[:] = launches
    context = multiprocessing.get_context("fork")  # launches hold functions that do not pickle
    results: dict[int, Compiled | str] = {}
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = [pool.submit(_compile_numbered, i) for i in range(len(launches))]
        for i, future in enumerate(futures):
            with contextlib.suppress(BrokenProcessPool):
                results[i] = future.result()
    for i in range(len(launches)):
        if i not in results:  # it crashed, or was in the way of one that did
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                try:
                    results[i] = pool.submit(_compile_numbered, i).result()
                except BrokenProcessPool:
                    results[i] = "the compiler process died"
    return [results[i] for i in range(len(launches))]


# --- Judge ------------------------------------------------------------------------------------


def judge(seen: Seen, compiled: Compiled | str) -> list[str]:
    """What is wrong with one specialisation."""
    if isinstance(compiled, str):
        return [compiled]
    arch = seen.launch.arch
    nvidia = ARCHITECTURES[arch].target.backend == "cuda"
    wrong = [f"ptxas: {line}" for line in compiled.warnings]
    if compiled.spills > SPILLS_ALLOWED:
        wrong.append(f"{compiled.spills} bytes of spills")
    if nvidia and not programs_per_sm(arch, compiled.registers, compiled.warps, compiled.shared):
        wrong.append(f"{compiled.shared} bytes of shared memory do not fit")
    if compiled.product in ("bf16", "f16"):
        missing = sorted(
            x for x in ARCHITECTURES[arch].instructions if not compiled.operations.get(x)
        )
        wrong += [f"its matrix product has no {x}" for x in missing]
    if nvidia:
        kinds = dict(zip(seen.launch.pointers, _pointer_kinds(seen.launch)))
        for name in sorted(seen.wide):
            element = 4 if kinds[name] == "fp32" else 2
            for access, count in sorted(compiled.accesses.get(name, {}).items()):
                if access.bytes <= element:
                    what = f"{name}: {count} x {access.kind} of {access.bytes} bytes"
                    wrong.append(f"{what}, with even rows in {seen.wide[name]}")
        if "?" in compiled.accesses:
            wrong.append(f"addresses of unknown origin: {compiled.accesses['?']}")
    return wrong


def _pointer_kinds(launch: Launch) -> list[str]:
    def flat(kind: Any) -> Iterator[str]:
        for item in kind if isinstance(kind, tuple) else ():
            yield from flat(item)
        if str(kind).startswith("*"):
            yield str(kind).lstrip("*k")

    return [x for kind in launch.source[0].values() for x in flat(kind)]


class Row(NamedTuple):
    """The worst of a kernel's specialisations in one dtype and variant."""

    arch: str
    kernel: str
    dtype: str
    variant: str
    rows: str  # even: all matrices have rows of a multiple of 16 elements; else ragged
    specialisations: int
    registers: int
    spills: int
    shared: int
    programs: int  # per SM; 0 for AMD
    instructions: int
    notable: str  # which of NOTABLE every one has

    @property
    def identity(self) -> tuple[str, ...]:
        return self[:5]


def tabulate(found: Iterable[tuple[Seen, Compiled | str]]) -> list[Row]:
    groups: dict[tuple[str, ...], dict[str, Compiled]] = collections.defaultdict(dict)
    for seen, compiled in found:
        if isinstance(compiled, str):
            continue
        launch = seen.launch
        kernel = launch.function.__name__.strip("_").removesuffix("_kernel")
        if "w" in launch.source[0]:  # a tile kernel: whose products it takes
            kernel += " (library)" if launch.source[0]["w"] == "constexpr" else " (own)"
        rows = "even" if seen.matrices <= seen.wide.keys() else "ragged"
        for case in seen.cases:
            variant = "256 words" if case.kind == "tile" else case.variant
            key = (launch.arch, kernel, case.dtype, variant, rows)
            groups[key][launch.key] = compiled
    table = []
    for key, group in groups.items():
        all_of_it = group.values()
        programs = [
            programs_per_sm(key[0], x.registers, x.warps, x.shared)
            for x in all_of_it
            if ARCHITECTURES[key[0]].warps
        ]
        row = Row(
            *key,
            len(group),
            max(x.registers for x in all_of_it),
            max(x.spills for x in all_of_it),
            max(x.shared for x in all_of_it),
            min(programs, default=0),
            max(sum(x.operations.values()) for x in all_of_it),
            " ".join(op for op in NOTABLE if all(x.operations.get(op) for x in all_of_it)),
        )
        table.append(row)
    order = list(ARCHITECTURES)
    return sorted(table, key=lambda row: (order.index(row.arch), row.identity))


def compare(rows: list[Row], table: Iterable[Row], *, complete: bool) -> list[str]:
    """What fell behind the committed table; `complete`: every case of these architectures was run."""
    arches, now = {row.arch for row in rows}, {row.identity for row in rows}
    before = {row.identity: row for row in table if row.arch in arches}
    wrong = []
    for row in rows:
        old, name = before.get(row.identity), " ".join(row.identity)
        if old is None:
            wrong.append(f"{name}: not in the table (make dry-run WRITE=1)")
        elif row.programs < old.programs:
            fall = f"{old.programs} to {row.programs}"
            wrong.append(f"{name}: from {fall} programs per SM ({row.registers} registers)")
    for identity in before if complete else ():
        if identity not in now:
            wrong.append(f"{' '.join(identity)}: in the table, and no longer launched")
    return wrong


# --- Tables -----------------------------------------------------------------------------------


def table_path(version: str = triton.__version__) -> Path:
    return RESULTS / f"dry_run-triton{version}.csv"


def read_table(path: Path) -> list[Row]:
    kinds = get_type_hints(Row)
    with path.open(newline="") as file:
        return [Row(**{k: kinds[k](x) for k, x in line.items()}) for line in csv.DictReader(file)]


def write_table(rows: list[Row], path: Path) -> None:
    """Write the rows of the architectures that were run, and keep those of the others."""
    run = {row.arch for row in rows}
    kept = [row for row in read_table(path) if row.arch not in run] if path.exists() else []
    order = list(ARCHITECTURES)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(sorted([*kept, *rows], key=lambda row: order.index(row.arch)))


def markdown(version: str, rows: list[Row]) -> str:
    """One line per kernel, dtype and variant, one column per architecture."""
    variants = ("plain", "all", "nested", "lsif")
    shown = [row for row in rows if row.rows == "even" and row.variant in variants]
    shown = [row for row in shown if row.dtype != "float16"]  # the same code as bfloat16
    arches = [arch for arch in ARCHITECTURES if any(row.arch == arch for row in shown)]
    cells = {row.identity: row for row in shown}
    lines = [f"Triton {version}:", "", "| kernel | dtype | variant | " + " | ".join(arches) + " |"]
    lines.append("|---" * (3 + len(arches)) + "|")
    for key in dict.fromkeys(row.identity[1:] for row in shown):
        text = []
        for arch in arches:
            row = cells.get((arch, *key))
            programs = f" / {row.programs}" if row and row.programs else ""
            text.append(f"{row.registers} / {row.shared / 1024:.3g}{programs}" if row else "")
        lines.append("| " + " | ".join([*key[:3], *text]) + " |")
    return "\n".join(lines)


def docs_with_tables() -> str:
    """docs/kernels.md with the tables of the oldest and of the newest Triton between its markers."""
    found = {
        path.stem.partition("-triton")[2]: path for path in RESULTS.glob("dry_run-triton*.csv")
    }
    versions = sorted(found, key=lambda x: [int(n) for n in x.split(".")])
    tables = [markdown(x, read_table(found[x])) for x in dict.fromkeys((versions[0], versions[-1]))]
    head, begin, rest = DOCS.read_text().partition("<!-- resources: begin -->\n")
    _, end, tail = rest.partition("\n<!-- resources: end -->")
    return head + begin + "\n\n".join(tables) + end + tail


def describe(seen: Seen, compiled: Compiled) -> str:
    operations = compiled.operations
    lines = [
        f"    {compiled.hash[:12]} registers={compiled.registers} spills={compiled.spills} "
        f"shared={compiled.shared} warps={compiled.warps} "
        f"instructions={sum(operations.values())} "
        + " ".join(f"{x}={operations[x]}" for x in NOTABLE if operations.get(x))
    ]
    for name, counts in compiled.accesses.items():
        text = " ".join(f"{n} x {a.kind}{a.bytes}" for a, n in sorted(counts.items()))
        lines.append(f"    {name}{' (even)' if name in seen.wide else ''}: {text}")
    return "\n".join(lines)


def dry_run(
    arch: str, *, quick: bool = False, kernel: str = "", jobs: int = 2, show: bool = False
) -> tuple[list[Row], list[str]]:
    """Capture, compile and judge for one architecture."""
    seen, wrong = capture(arch, [case for case in cases() if case.quick or not quick])
    seen = [one for one in seen if kernel in one.launch.function.__name__]
    compiled = compile_all([one.launch for one in seen], jobs)
    found = sorted(zip(seen, compiled), key=lambda pair: pair[0].launch.function.__name__)
    for one, result in found:
        title = f"{arch} {one.launch.function.__name__}, {len(one.cases)} cases, as {one.cases[0]}"
        complaints = judge(one, result)
        wrong += [f"{title}: {complaint}" for complaint in complaints]
        if show:
            print(title)
            if isinstance(result, Compiled):
                print(describe(one, result))
            for complaint in complaints:
                print(f"    WRONG {complaint}")
    return tabulate(found), wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", choices=list(ARCHITECTURES), help="default: all")
    parser.add_argument(
        "--kernel", default="", help="only kernels with this in their name; show all"
    )
    parser.add_argument("--quick", action="store_true", help="the cases of `make test` alone")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write the table instead of comparing")
    parser.add_argument(
        "--docs", action="store_true", help="only put the tables in docs/kernels.md"
    )
    args = parser.parse_args()
    if args.docs:
        DOCS.write_text(docs_with_tables())
        return
    if args.write and (args.quick or args.kernel):
        parser.error("--write needs every case: leave out --quick and --kernel")
    if not args.write and not table_path().exists():
        print(f"no {table_path().name}: programs per SM are compared with nothing")
    total = 0
    for arch in args.arch or ARCHITECTURES:
        rows, wrong = dry_run(
            arch, quick=args.quick, kernel=args.kernel, jobs=args.jobs, show=bool(args.kernel)
        )
        if args.write:
            write_table(rows, table_path())
        elif table_path().exists():
            complete = not (args.quick or args.kernel)
            wrong += compare(rows, read_table(table_path()), complete=complete)
        for complaint in wrong:
            print(f"WRONG {complaint}")
        what = f"{arch}, Triton {triton.__version__}"
        print(f"{what}: {len(rows)} rows, {len(wrong)} complaints", flush=True)
        total += len(wrong)
    if args.write:
        DOCS.write_text(docs_with_tables())
    sys.exit(1 if total else 0)


if __name__ == "__main__":
    main()
