"""Measuring one peer on one case: errors first, then memory and time.

On the CPU every (peer, case) lives in a fresh process of its own, driven over a pipe: its peak
memory is VmHWM above the resident set with the inputs loaded and the libraries warm, and rounds stay
interleaved because the parent calls the processes in turn. On CUDA the same `Task` runs in this
process (a second process would hold the same GPU memory twice) and torch counts the bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import multiprocessing
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, load_inputs, make_inputs, vocab_blocks
from benchmarks.peers import Peer
from benchmarks.truth import Truth, compute_truth, errors, refusal

MIB = 2**20
GEMM_BUFFER_MIB = {"cpu": 64, "cuda": 1024}
MIN_ROUNDS = 3
# What workers need; a package that is missing here costs its peer's row and nothing else.
IMPORTS = [
    "benchmarks.measure",
    "trl.kernels.chunked_logprob",
    "liger_kernel.chunked_loss",
    "dilkern",
]


class Timing(NamedTuple):
    """Seconds of one run."""

    forward: float
    total: float


# --- memory -----------------------------------------------------------------------------------


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


class PeakMemory:
    """Peak memory inside a `with`, above what was resident at its start."""

    mib: float

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            # Freed heap that stays resident would hide a peak: give it back first.
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
            self.start = _status_kib("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.mib = (torch.cuda.max_memory_allocated() - self.start) / MIB
        else:
            self.mib = (_status_kib("VmHWM") - self.start) / 1024


# --- one peer on one case ---------------------------------------------------------------------


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Marks in time: events of the stream on a GPU, so that no mark stops it; else perf_counter."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        _synchronize(device)
        self.marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From the start to each mark."""
        first, *later = self.marks
        if self.device.type != "cuda":
            return [mark - first for mark in later]
        later[-1].synchronize()
        return [first.elapsed_time(mark) / 1000 for mark in later]


def execute(peer: Peer, inputs: Inputs) -> tuple[Tensor, Timing]:
    """Run what the case's mode asks for, once, and time it; gradients are left in `.grad`."""
    inputs.clear_grads()
    mode = inputs.case.mode
    clock = Clock(inputs.device)
    with torch.set_grad_enabled(mode != "score"):
        if mode == "step" and peer.output == "token_logps":
            with torch.no_grad():
                peer.call(inputs)
        out = peer.call(inputs)
    clock.mark()
    if mode != "score":
        out.backward(inputs.grad.to(out.dtype) if out.dim() else None)
    clock.mark()
    return out.detach(), Timing(*clock.seconds())


class BareGemm:
    """The bare product H W^T (2 T V D), in blocks over one buffer."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs.detached()
        limit = GEMM_BUFFER_MIB[inputs.device.type] * MIB
        width = max(1, limit // (inputs.case.tokens * inputs.hidden.element_size()))
        self.blocks = vocab_blocks(inputs.case.vocab, width)
        self.buffer = inputs.hidden.detach().new_empty(
            inputs.case.tokens, self.blocks[0].stop - self.blocks[0].start
        )

    def run(self) -> Timing:
        clock = Clock(self.inputs.device)
        for part in self.blocks:
            out = self.buffer[:, : part.stop - part.start]
            torch.mm(self.inputs.hidden, self.inputs.weight[part].T, out=out)
        clock.mark()
        return Timing(*clock.seconds() * 2)


class Task:
    """One peer with the tensors of one case."""

    def __init__(self, peer: Peer, inputs: Inputs) -> None:
        self.peer, self.inputs = peer, inputs.require_grads()

    def first(self) -> dict[str, float]:
        """Warm the libraries up (on a small problem, or by compiling), then watch one run."""
        found: dict[str, float] = {}
        if self.peer.compiles:
            start = time.perf_counter()
            execute(self.peer, self.inputs)
            found["compile_s"] = time.perf_counter() - start
            self.inputs.clear_grads()
        else:
            case = self.inputs.case
            small = replace(case, tokens=2 * case.sequences, vocab=64)
            execute(self.peer, make_inputs(small, self.inputs.device).require_grads())
        with PeakMemory(self.inputs.device) as peak:
            self.out, _ = execute(self.peer, self.inputs)
        return found | {"peak_mib": peak.mib}

    def check(self, truth: Truth) -> dict[str, float]:
        """Errors of the run that `first` watched. The caller decides with `refusal`."""
        x = self.inputs
        trained = x.trained if x.case.mode == "trainable" else []
        grads = [tensor.grad for tensor in trained]
        return errors(self.peer.output, self.out, x.hidden.grad, grads, x, truth)

    def run(self) -> Timing:
        return execute(self.peer, self.inputs)[1]

    def close(self) -> None:
        self.inputs.clear_grads()


# --- workers ----------------------------------------------------------------------------------


class WorkerFailed(RuntimeError):
    """A request raised in its process, or the process is gone."""


def peer_task(peer_name: str, case: Case, path: str, threads: int) -> Task:
    """Build a task inside a worker process (peers are found by name: closures do not pickle)."""
    from benchmarks.peers import PEERS

    torch.set_num_threads(threads)
    return Task(PEERS[peer_name], load_inputs(case, torch.load(path)))


def gemm_task(case: Case, path: str, threads: int) -> BareGemm:
    torch.set_num_threads(threads)
    return BareGemm(load_inputs(case, torch.load(path)))


def _serve(connection: Any, factory: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    task = None
    while (request := connection.recv()) is not None:
        name, *values = request
        try:
            if task is None:
                task = factory(*arguments)
            # Large tensors come as files: a pipe would leave a copy in the heap.
            loaded = [
                torch.load(v, weights_only=False) if isinstance(v, Path) else v for v in values
            ]
            answer = ("ok", getattr(task, name)(*loaded))
        except Exception as error:
            answer = ("error", f"{type(error).__name__}: {error}", traceback.format_exc())
        connection.send(answer)


class Worker:
    """A task in a fresh process; calls are methods of the task by name."""

    def __init__(self, factory: Callable[..., Any], *arguments: Any) -> None:
        # Forked from a server that has only imported: a fresh process without its seconds of imports.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTS)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, factory, arguments), daemon=True
        )
        self.process.start()
        theirs.close()

    def call(self, name: str, *values: Any) -> Any:
        try:
            self.connection.send((name, *values))
            answer = self.connection.recv()
        except (EOFError, ConnectionError) as gone:
            self.process.join(5)
            raise WorkerFailed(f"process ended with code {self.process.exitcode}") from gone
        if answer[0] == "error":
            raise WorkerFailed(answer[1])
        return answer[1]

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionError):  # it may be gone already
            self.connection.send(None)
        self.process.join(10)
        if self.process.is_alive():
            self.process.terminate()
        self.connection.close()


class Local:
    """The interface of `Worker` around a task in this process (CUDA)."""

    def __init__(self, factory: Callable[[], Any]) -> None:
        self.factory, self.task = factory, None

    def call(self, name: str, *values: Any) -> Any:
        try:
            if self.task is None:
                self.task = self.factory()
            return getattr(self.task, name)(*values)
        except Exception as error:
            failed = WorkerFailed(f"{type(error).__name__}: {error}")
        # Outside the except block: the traceback holds the tensors of the failed call.
        self.close()
        raise failed

    def close(self) -> None:
        if hasattr(self.task, "close"):
            self.task.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(message: str) -> bool:
    text = message.lower()
    # -9: the kernel's out-of-memory killer
    return any(s in text for s in ("out of memory", "can't allocate", "memoryerror", "code -9"))


# --- a group: all peers on one case -----------------------------------------------------------


def spread(seconds: Sequence[float], name: str) -> dict[str, float]:
    """Median, 20th and 80th percentile, and minimum in milliseconds."""
    ms = [1000 * s for s in seconds]
    fifths = statistics.quantiles(ms, n=5, method="inclusive") if len(ms) > 1 else ms * 4
    return {
        f"{name}_ms": statistics.median(ms),
        f"{name}_ms_p20": fifths[0],
        f"{name}_ms_p80": fifths[3],
        f"{name}_ms_min": min(ms),
    }


@dataclass
class Plan:
    """How long to measure."""

    rounds: int = 7
    seconds: float = 120.0  # of rounds per group; at least MIN_ROUNDS are made
    threads: int = 0  # 0: torch's default
    deadline: float = math.inf  # time.monotonic() after which no second round begins


class TruthCache:
    """Truth and inputs of the last problem: the modes of one case share them."""

    def __init__(self) -> None:
        self.key: tuple[object, ...] | None = None

    def get(
        self, case: Case, device: torch.device, outputs: tuple[str, ...]
    ) -> tuple[Inputs, Truth]:
        trained = case.mode == "trainable"
        plain = replace(case, mode="trainable" if trained else "frozen", workspace_mib=0)
        key = (plain, str(device), outputs if trained else ())
        if key != self.key:
            self.key = None
            self.inputs = make_inputs(plain, device)
            self.truth = compute_truth(self.inputs, outputs)
            self.key = key
        return replace(self.inputs, case=case), self.truth


def measure_group(
    case: Case,
    peers: Sequence[Peer],
    device: torch.device,
    plan: Plan,
    truths: TruthCache | None = None,
    tick: Callable[[str], None] = lambda text: None,
    remote: bool | None = None,
) -> list[dict[str, Any]]:
    """Measure all peers on one case and return one row per peer, refused and failed ones too.

    `remote`: one process per peer; by default on the CPU and not on a GPU.
    """
    remote = device.type == "cpu" if remote is None else remote
    rows: dict[str, dict[str, Any]] = {}
    able = []
    for peer in peers:
        reason = peer.why_not(case, device)
        rows[peer.name] = {"peer": peer.name, "output": peer.output, "note": peer.note}
        if reason is None:
            able.append(peer)
        else:
            rows[peer.name] |= {"status": "unsupported", "reason": reason}
    tick("truth in fp64")
    outputs = tuple(sorted({peer.output for peer in able} | {"token_logps"}))
    inputs, truth = (truths or TruthCache()).get(case, device, outputs)
    threads = plan.threads or torch.get_num_threads()
    if device.type == "cuda":
        # All cases compile the same functions: past Dynamo's limit of variants they would run eagerly.
        torch.compiler.reset()

    with tempfile.TemporaryDirectory(prefix="dilkern-bench-") as folder:
        tensors, truth_file = Path(folder, "inputs.pt"), Path(folder, "truth.pt")
        if remote:
            torch.save(inputs.detached().tensors(), tensors)
            torch.save(truth, truth_file)
        workers: dict[str, Worker | Local] = {}
        started: dict[str, Worker | Local] = {}
        try:
            for peer in able:  # all at once: importing takes longest
                mine = replace(inputs.detached(), case=case)
                started[peer.name] = (
                    Worker(peer_task, peer.name, case, str(tensors), threads)
                    if remote
                    else Local(partial(Task, peer, mine))
                )
            for peer in able:
                tick(peer.name)
                worker = started[peer.name]
                try:
                    rows[peer.name] |= worker.call("first")
                    found = worker.call("check", truth_file if remote else truth)
                except WorkerFailed as failed:
                    status = "OOM" if is_out_of_memory(str(failed)) else "error"
                    rows[peer.name] |= {"status": status, "reason": str(failed)[:300]}
                    started.pop(peer.name).close()
                    continue
                rows[peer.name] |= found
                reason = refusal(found, truth.budget, case.torch_dtype)
                if reason is not None:
                    rows[peer.name].pop("peak_mib")
                    rows[peer.name] |= {"status": "refused", "reason": reason}
                    started.pop(peer.name).close()
                    continue
                workers[peer.name] = started.pop(peer.name)
            gemm: Worker | Local = (
                Worker(gemm_task, case, str(tensors), threads)
                if remote
                else Local(partial(BareGemm, inputs))
            )
            workers["gemm"] = gemm
            gemm.call("run")  # warm
            times = _rounds(workers, rows, plan, tick)
        finally:
            for worker in [*started.values(), *workers.values()]:
                worker.close()

    gemm_times = spread([t.total for t in times.pop("gemm")], "gemm")
    for name, timings in times.items():
        rows[name] |= spread([t.forward for t in timings], "forward")
        rows[name] |= spread([t.total for t in timings], "total")
        rows[name] |= {"status": "ok", "rounds": len(timings)}
        rows[name]["gemm_multiple"] = rows[name]["total_ms"] / gemm_times["gemm_ms"]
        rows[name]["gemm_multiple_min"] = rows[name]["total_ms_min"] / gemm_times["gemm_ms_min"]
    shared = {"case": case.key} | case.row() | gemm_times | truth.sharpness()
    shared |= {f"budget_{name}": value for name, value in truth.budget.items()}
    return [shared | row for row in rows.values()]


def _rounds(
    workers: dict[str, Worker | Local],
    rows: dict[str, dict[str, Any]],
    plan: Plan,
    tick: Callable[[str], None],
) -> dict[str, list[Timing]]:
    """Call all workers in turn, the order rotated each round (each has already run once).

    A peer that has used more than twice its share of `plan.seconds` leaves after MIN_ROUNDS, so that
    one slow peer does not eat the rounds of the others; its row says how many rounds it had.
    """
    times: dict[str, list[Timing]] = {name: [] for name in workers}
    share = 2 * plan.seconds / len(workers)
    start = time.monotonic()
    for number in range(plan.rounds):
        now = time.monotonic()
        if (number >= MIN_ROUNDS and now - start > plan.seconds) or (
            number and now > plan.deadline
        ):
            break
        tick(f"round {number + 1} of {plan.rounds}")
        names = list(times)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            mine = times[name]
            if len(mine) >= MIN_ROUNDS and name != "gemm" and sum(t.total for t in mine) > share:
                continue
            try:
                mine.append(workers[name].call("run"))
            except WorkerFailed as failed:
                if name == "gemm":
                    raise
                status = "OOM" if is_out_of_memory(str(failed)) else "error"
                rows[name] |= {"status": status, "reason": str(failed)[:300]}
                rows[name].pop("peak_mib", None)
                del times[name]
    return times
