"""The one measuring loop: errors first, then memory, then time in interleaved rounds.

What is measured is a task: `first` (warm up, watch the memory of one run), `check` (errors against the
truth), `run` (one timed run). On the CPU every task lives in a fresh process of its own, driven over a
pipe: its peak memory is VmHWM above the resident set with the inputs loaded and the libraries warm,
and rounds stay interleaved because the parent calls the processes in turn. On CUDA the same tasks run
in this process (a second process would hold the same GPU memory twice) and torch counts the bytes.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, load_inputs, make_inputs, vocab_blocks
from benchmarks.peers import PEERS, Peer
from benchmarks.truth import Truth, compute_truth, errors, refusal

atexit.register(gc.unfreeze)  # what `measure_group` freezes would count as leaked
MIB = 2**20
GEMM_BUFFER_MIB = {"cpu": 64, "cuda": 1024}
MIN_ROUNDS = 3
# What workers need; a package that is missing here costs its peer's row and nothing else.
IMPORTS = ["trl.kernels.chunked_logprob", "liger_kernel.chunked_loss", "dilkern", __name__]


class Timing(NamedTuple):
    """Seconds of one run."""

    forward: float
    total: float


Tick = Callable[[str], None]


def silent(text: str) -> None:
    """No progress shown."""


def _status_mib(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


class PeakMemory:
    """Peak memory inside a `with`, above what was resident at its start."""

    mib: float

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated() / MIB
        else:
            # Freed heap that stays resident would hide a peak: give it back first.
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
            self.start = _status_mib("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        peak = torch.cuda.max_memory_allocated() / MIB if self.cuda else _status_mib("VmHWM")
        self.mib = peak - self.start


class Clock:
    """Marks in time: events of the stream on a GPU, so that no mark stops it; else perf_counter."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.synchronize()
        self.marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From the start to each mark."""
        first, *later = self.marks
        if not self.cuda:
            return [mark - first for mark in later]
        later[-1].synchronize()
        return [first.elapsed_time(mark) / 1000 for mark in later]


def timed(call: Callable[[], object], device: torch.device) -> Timing:
    clock = Clock(device)
    call()
    clock.mark()
    return Timing(*clock.seconds() * 2)


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

    def product(self) -> None:
        for part in self.blocks:
            out = self.buffer[:, : part.stop - part.start]
            torch.mm(self.inputs.hidden, self.inputs.weight[part].T, out=out)

    def run(self) -> Timing:
        return timed(self.product, self.inputs.device)


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


def is_out_of_memory(message: str) -> bool:
    text = message.lower()
    # -9: the kernel's out-of-memory killer
    return any(s in text for s in ("out of memory", "can't allocate", "memoryerror", "code -9"))


def failure(message: str) -> dict[str, str]:
    """What the row of a failed measurement says instead of figures."""
    return {"status": "OOM" if is_out_of_memory(message) else "error", "reason": message[:300]}


class WorkerFailed(RuntimeError):
    """A request raised in its task, or the process is gone."""

    def row(self) -> dict[str, str]:
        return failure(str(self))


def _task(peer_name: str, case: Case, path: Path, threads: int) -> Task | BareGemm:
    """Build a task inside its process (peers are found by name: closures do not pickle)."""
    torch.set_num_threads(threads)
    inputs = load_inputs(case, torch.load(path))
    return Task(PEERS[peer_name], inputs) if peer_name else BareGemm(inputs)


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
            answer = ("error", f"{type(error).__name__}: {error}")
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
        with contextlib.suppress(OSError):  # it may be gone already
            self.connection.send(None)
        self.process.join(10)
        if self.process.is_alive():
            self.process.terminate()
        self.connection.close()


class Local:
    """The interface of `Worker` around a task in this process (CUDA)."""

    def __init__(self, factory: Callable[..., Any], *arguments: Any) -> None:
        self.factory, self.task = partial(factory, *arguments), None

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
        self.task = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass
class Plan:
    """How long to measure."""

    rounds: int = 7
    seconds: float = math.inf  # of rounds per group; at least MIN_ROUNDS are made
    threads: int = 0  # 0: torch's default
    deadline: float = math.inf  # time.monotonic() after which no second round begins


def interleave(
    jobs: Mapping[Any, Callable[[], Any]],
    plan: Plan,
    tick: Tick = silent,
    yardstick: str = "",
) -> tuple[dict[Any, list[Any]], dict[Any, WorkerFailed]]:
    """The loop: call all jobs in turn, the order rotated each round; each has already run once.

    Returns the samples, and what failed. A job that has used more than twice its share of
    `plan.seconds` leaves after MIN_ROUNDS, so that one slow job does not eat the rounds of the others;
    not so the yardstick of all.
    """
    times: dict[Any, list[Any]] = {name: [] for name in jobs}
    failed: dict[str, WorkerFailed] = {}
    share = 2 * plan.seconds / max(1, len(jobs))
    start = time.monotonic()
    for number in range(plan.rounds):
        now = time.monotonic()
        enough = number >= MIN_ROUNDS and now - start > plan.seconds
        if enough or (number and now > plan.deadline):
            break
        tick(f"round {number + 1} of {plan.rounds}")
        names = list(times)
        turn = number % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            mine = times[name]
            spent = sum(sample.total for sample in mine)
            if len(mine) >= MIN_ROUNDS and name != yardstick and spent > share:
                continue
            try:
                mine.append(jobs[name]())
            except WorkerFailed as error:
                if name == yardstick:
                    raise
                failed[name] = error
                del times[name]
    return times, failed


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


def contest(
    tasks: Mapping[str, Worker | Local],
    truth: Any,  # what `check` takes: a file for a worker
    refuse: Callable[[dict[str, float]], str | None],
    plan: Plan,
    tick: Tick = silent,
    gemm: Worker | Local | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, list[Timing]]]:
    """Per task its memory and errors, or why it has no figures; then the timings, gemm's among them."""
    rows: dict[str, dict[str, Any]] = {name: {} for name in tasks}
    jobs: dict[str, Callable[[], Timing]] = {}
    open_tasks = dict(tasks)
    try:
        for name, task in tasks.items():
            tick(name)
            row = rows[name]
            try:
                row |= task.call("first")
                found = task.call("check", truth)
            except WorkerFailed as failed:
                row |= failed.row()
            else:
                row |= found
                reason = refuse(found)
                if reason is None:
                    jobs[name] = partial(task.call, "run")
                    continue
                row |= {"status": "refused", "reason": reason}
            row.pop("peak_mib", None)
            open_tasks.pop(name).close()
        if gemm is not None:
            jobs["gemm"] = partial(gemm.call, "run")
            jobs["gemm"]()  # warm
        times, lost = interleave(jobs, plan, tick, yardstick="gemm")
    finally:
        for task in [*open_tasks.values(), *filter(None, [gemm])]:
            task.close()
    for name, failed in lost.items():
        rows[name] |= failed.row()
        rows[name].pop("peak_mib")
    for name in times.keys() & rows.keys():
        rows[name] |= {"status": "ok", "rounds": len(times[name])}
    return rows, times


@lru_cache(1)  # the modes of one case share them
def problem(case: Case, device: torch.device, outputs: tuple[str, ...]) -> tuple[Inputs, Truth]:
    inputs = make_inputs(case, device)
    return inputs, compute_truth(inputs, outputs)


def measure_group(
    case: Case,
    peers: Sequence[Peer],
    device: torch.device,
    plan: Plan,
    tick: Tick = silent,
    remote: bool | None = None,
) -> list[dict[str, Any]]:
    """Measure all peers on one case and return one row per peer, refused and failed ones too.

    `remote`: one process per peer; by default on the CPU and not on a GPU.
    """
    remote = device.type == "cpu" if remote is None else remote
    about = {p.name: {"peer": p.name, "output": p.output, "note": p.note} for p in peers}
    unable = {peer.name: peer.why_not(case, device) for peer in peers}
    able = [peer for peer in peers if unable[peer.name] is None]
    tick("truth in fp64")
    trained = case.mode == "trainable"
    outputs = tuple(sorted({peer.output for peer in able} | {"token_logps"})) if trained else ()
    plain = replace(case, mode="trainable" if trained else "frozen", workspace_mib=0)
    inputs, truth = problem(plain, device, outputs)
    inputs = replace(inputs, case=case)
    threads = plan.threads or torch.get_num_threads()
    if device.type == "cuda":
        # All cases compile the same functions: past Dynamo's limit of variants they would run eagerly.
        torch.compiler.reset()
    # What is alive now is no garbage: looking through it takes half a second for every peer.
    gc.collect()
    gc.freeze()

    with tempfile.TemporaryDirectory(prefix="dilkern-bench-") as folder:
        tensors, truth_file = Path(folder, "inputs.pt"), Path(folder, "truth.pt")
        gemm: Worker | Local
        if remote:
            torch.save(inputs.detached().tensors(), tensors)
            torch.save(truth, truth_file)
            tasks = {p.name: Worker(_task, p.name, case, tensors, threads) for p in able}
            gemm = Worker(_task, "", case, tensors, threads)
        else:
            tasks = {p.name: Local(Task, p, inputs.detached()) for p in able}
            gemm = Local(BareGemm, inputs)
        rows, times = contest(
            tasks,
            truth_file if remote else truth,
            partial(refusal, budget=truth.budget, dtype=case.torch_dtype),
            plan,
            tick,
            gemm,
        )

    shared = {"case": case.key} | case.row() | spread([t.total for t in times["gemm"]], "gemm")
    shared |= truth.sharpness()
    shared |= {
        f"budget_{name}": value for name, value in truth.budget.items() if name != "loss_err"
    }
    for name in rows:
        if rows[name]["status"] != "ok":
            continue
        rows[name] |= spread([t.forward for t in times[name]], "forward")
        rows[name] |= spread([t.total for t in times[name]], "total")
        rows[name]["gemm_multiple"] = rows[name]["total_ms"] / shared["gemm_ms"]
        rows[name]["gemm_multiple_min"] = rows[name]["total_ms_min"] / shared["gemm_ms_min"]
    for name, reason in unable.items():
        rows.setdefault(name, {"status": "unsupported", "reason": reason})
    return [shared | about[name] | rows[name] for name in about]
