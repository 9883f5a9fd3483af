"""Architectures, and the launches that the cases make on them, recorded on tensors without memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tools.dry_run.cases import RUN, Case


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


def driver(arch: str) -> SimpleNamespace:
    """Triton's driver: a target without a device."""
    return SimpleNamespace(
        get_current_target=lambda: ARCHITECTURES[arch].target,
        # Kernels keep binders and caches by device: each target has its own.
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )


class Launch(NamedTuple):
    """One specialisation of one kernel, as its launcher asked for it."""

    arch: str
    function: JITFunction[Any]
    key: str  # equal keys: the same machine code
    source: tuple[Any, ...]  # signature, constants, attributes
    options: Any
    pointers: dict[str, str]  # of what, by argument, in the compiled kernel's order


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
        pointers = {name: str(kind).lstrip("*k") for name, kind, _ in given}
        source = (signature, constants, attrs)
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
        mock.patch.object(triton.runtime.driver, "_active", driver(arch)),
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
            if not {*keys.get("forward without the filter", ())} <= {
                *keys.get("forward with the filter", ())
            }:
                wrong.append(f"{case}: other kernels with the filter than without")
    return list(recorder.seen.values()), wrong
