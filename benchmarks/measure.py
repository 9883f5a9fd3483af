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
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, make_inputs
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


def _status_mib(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def trim_heap() -> None:
    """Give freed heap back to the system, or it stays resident."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_mib(call: Callable[[], object], device: torch.device) -> float:
    """Peak memory of one call above what is resident at its start."""
    trim_heap()  # it would hide a peak
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - start) / MIB
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
    resident = _status_mib("VmRSS")
    call()
    return _status_mib("VmHWM") - resident


def timed(device: torch.device, *calls: Callable[[], object]) -> Timing:
    """Run the calls in turn; on a GPU events of its stream take the time, so that nothing stops it."""
    cuda, marks = device.type == "cuda", []
    if cuda:
        torch.cuda.synchronize()
    for call in (lambda: None, *calls):
        call()
        marks.append(torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter())
        if cuda:
            marks[-1].record()
    first, *later = marks
    if cuda:
        torch.cuda.synchronize()
        return Timing(*(first.elapsed_time(mark) / 1000 for mark in (later[0], later[-1])))
    return Timing(later[0] - first, later[-1] - first)


def execute(peer: Peer, inputs: Inputs) -> tuple[Tensor, Timing]:
    """Run what the case's mode asks for, once, and time it; gradients are left in `.grad`."""
    inputs.clear_grads()
    mode, found = inputs.case.mode, []

    def forward() -> None:
        if mode == "step" and peer.output == "token_logps":
            with torch.no_grad():
                peer.call(inputs)
        with torch.set_grad_enabled(mode != "score"):
            found.append(peer.call(inputs))

    def backward() -> None:
        (out,) = found
        out.backward(inputs.grad.to(out.dtype) if out.dim() else None)

    timing = timed(inputs.device, forward, *([] if mode == "score" else [backward]))
    return found[0].detach(), timing


class BareGemm:
    """The bare product H W^T (2 T V D), in blocks over one buffer."""

    def __init__(self, inputs: Inputs) -> None:
        self.hidden = inputs.hidden.detach()
        tokens, limit = len(self.hidden), GEMM_BUFFER_MIB[inputs.device.type] * MIB
        self.blocks = inputs.weight.detach().split(
            max(1, limit // (tokens * self.hidden.element_size()))
        )
        self.buffer = self.hidden.new_empty(tokens, len(self.blocks[0]))

    def product(self) -> None:
        for part in self.blocks:
            torch.mm(self.hidden, part.T, out=self.buffer[:, : len(part)])

    def run(self) -> Timing:
        return timed(self.hidden.device, self.product)


class Task:
    """One peer with the tensors of one case."""

    def __init__(self, peer: Peer, inputs: Inputs) -> None:
        self.peer, self.inputs = peer, inputs.require_grads()

    def first(self) -> dict[str, float]:
        """Warm the libraries up (on a small problem, or by compiling), then watch one run."""
        found: dict[str, float] = {}
        on_gpu = self.inputs.device.type == "cuda"
        if self.peer.compiles or (self.peer.compiles_on_gpus and on_gpu):
            found["compile_s"] = self.run().total
            self.inputs.clear_grads()
        else:
            case = self.inputs.case
            small = replace(case, head="tiny", tokens=2 * case.sequences, vocab=64)
            execute(self.peer, make_inputs(small, self.inputs.device).require_grads())
        return found | {"peak_mib": peak_mib(self.run, self.inputs.device)}

    def check(self, truth: Truth | Path) -> dict[str, float]:
        """Errors of the run that `first` watched. The caller decides with `refusal`."""
        x = self.inputs
        if isinstance(truth, Path):  # a pipe would leave a copy in the heap
            truth = load(truth)
        grads = [tensor.grad for tensor in x.trained] if x.case.mode == "trainable" else []
        found = errors(self.peer.output, self.out, x.hidden.grad, grads, x, truth)
        return found | (self.peer.about(x) if self.peer.about else {})

    def run(self) -> Timing:
        self.out, timing = execute(self.peer, self.inputs)
        return timing

    def close(self) -> None:
        self.inputs.clear_grads()


def is_out_of_memory(message: str) -> bool:
    text = message.lower()
    # -9: the kernel's out-of-memory killer
    return any(s in text for s in ("out of memory", "can't allocate", "memoryerror", "code -9"))


def failure(error: object) -> dict[str, str]:
    """What the row of a failed measurement says instead of figures."""
    reason = str(error)[:300]
    return {"status": "OOM" if is_out_of_memory(reason) else "error", "reason": reason}


class WorkerFailed(RuntimeError):
    """A request raised in its task, or the process is gone."""


class DeviceLost(RuntimeError):
    """A task has left the GPU in a state in which nothing runs in this process any more."""

    task = ""  # its name


def device_is_lost() -> bool:
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


load = partial(torch.load, weights_only=False)


def _task(path: Path, threads: int, peer_name: str) -> Task | BareGemm:
    """Build a task inside its process (peers are found by name: closures do not pickle)."""
    torch.set_num_threads(threads)
    inputs = load(path, mmap=True)  # one copy for all
    for tensor in (inputs.hidden, inputs.weight):
        tensor.sum()  # resident from the start
    return Task(PEERS[peer_name], inputs) if peer_name else BareGemm(inputs)


class Local:
    """A task in this process; calls are methods of the task by name."""

    def __init__(self, factory: Callable[..., Any], *arguments: Any) -> None:
        self.factory, self.task = partial(factory, *arguments), None

    def call(self, name: str, *values: Any) -> Any:
        try:
            if self.task is None:
                self.task = self.factory()
            return getattr(self.task, name)(*values)
        except Exception as error:
            failed = WorkerFailed(f"{type(error).__name__}: {error}")
        if device_is_lost():
            raise DeviceLost(str(failed))
        # Outside the except block: the traceback holds the tensors of the failed call.
        self.close()
        raise failed

    def close(self) -> None:
        if hasattr(self.task, "close"):
            self.task.close()
        self.task = None
        gc.collect()
        with contextlib.suppress(RuntimeError):  # of a lost device
            torch.cuda.empty_cache()


def _serve(connection: Any, factory: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    task = Local(factory, *arguments)
    while (request := connection.recv()) is not None:
        try:
            connection.send((task.call(*request), None))
        except WorkerFailed as failed:
            connection.send((None, str(failed)))


class Worker:
    """The interface of `Local` around a task in a fresh process (CPU)."""

    def __init__(self, factory: Callable[..., Any], *arguments: Any) -> None:
        # Forked from a server that has only imported: a fresh process without its seconds of imports.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTS)
        self.connection, theirs = context.Pipe()
        arguments = (theirs, factory, arguments)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def call(self, *request: Any) -> Any:
        try:
            self.connection.send(request)
            answer, failed = self.connection.recv()
        except (EOFError, ConnectionError) as gone:
            self.process.join(5)
            raise WorkerFailed(f"process ended with code {self.process.exitcode}") from gone
        if failed is not None:
            raise WorkerFailed(failed)
        return answer

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it may be gone already
            self.connection.send(None)
        self.process.join(10)
        if self.process.is_alive():
            self.process.terminate()
        self.connection.close()


@dataclass
class Plan:
    """How long to measure."""

    rounds: int = 7
    seconds: float = math.inf  # of rounds per group; at least MIN_ROUNDS are made
    deadline: float = math.inf  # time.monotonic() after which no second round begins


def interleave(
    jobs: Mapping[Any, Callable[[], Any]],
    plan: Plan,
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
        names = list(times)
        turn = number % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            mine = times[name]
            spent = sum(sample.total for sample in mine)
            if len(mine) >= MIN_ROUNDS and name != yardstick and spent > share:
                continue
            try:
                mine.append(jobs[name]())
            except DeviceLost as lost:
                lost.task = name
                raise
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
    truth: Any,  # what `check` takes
    refuse: Callable[[str, dict[str, float]], str | None],
    plan: Plan,
    gemm: Worker | Local | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, list[Timing]]]:
    """Per task its memory and errors, or why it has no figures; then the timings, gemm's among them."""
    rows: dict[str, dict[str, Any]] = {name: {} for name in tasks}
    jobs: dict[str, Callable[[], Timing]] = {}
    try:
        for name, task in tasks.items():
            try:
                rows[name] |= task.call("first")
                rows[name] |= (found := task.call("check", truth))
                if (reason := refuse(name, found)) is None:
                    jobs[name] = partial(task.call, "run")
                    continue
                rows[name] |= {"status": "refused", "reason": reason}
            except DeviceLost as lost:
                lost.task = name
                raise
            except WorkerFailed as failed:
                rows[name] |= failure(failed)
            task.close()
        if gemm is not None:
            jobs["gemm"] = partial(gemm.call, "run")
            jobs["gemm"]()  # warm
        times, lost = interleave(jobs, plan, yardstick="gemm")
    finally:
        for task in [*tasks.values(), *filter(None, [gemm])]:
            task.close()
    for name, row in rows.items():
        if name in times:
            row |= {"status": "ok", "rounds": len(times[name])}
            continue
        row |= failure(lost[name]) if name in lost else {}
        row.pop("peak_mib", None)
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
    remote: bool | None = None,
) -> list[dict[str, Any]]:
    """Measure all peers on one case and return one row per peer, refused and failed ones too.

    `remote`: one process per peer; by default on the CPU and not on a GPU.
    """
    remote = device.type == "cpu" if remote is None else remote
    unable = {peer.name: peer.why_not(case, device) for peer in peers}
    able = [peer for peer in peers if unable[peer.name] is None]
    trained = case.mode == "trainable"
    outputs = tuple(sorted({peer.output for peer in able} | {"token_logps"})) if trained else ()
    plain = replace(case, mode="trainable" if trained else "frozen", workspace_mib=0)
    inputs, truth = problem(plain, device, outputs)
    inputs = replace(inputs, case=case)
    if device.type == "cuda":
        # All cases compile the same functions: past Dynamo's limit of variants they would run eagerly.
        torch.compiler.reset()
    # What is alive now is no garbage: looking through it takes half a second for every peer.
    gc.collect()
    gc.freeze()

    with tempfile.TemporaryDirectory(prefix="dilkern-bench-") as folder:
        tasks: dict[str, Worker | Local]
        if remote:
            files = Path(folder, "inputs.pt"), Path(folder, "truth.pt")
            for value, file in zip((inputs.detached(), truth), files):
                torch.save(value, file)
            start = partial(Worker, _task, files[0], torch.get_num_threads())
            tasks, gemm = {p.name: start(p.name) for p in able}, start("")
        else:
            tasks = {p.name: Local(Task, p, inputs.detached()) for p in able}
            gemm = Local(BareGemm, inputs)
        filtered = {peer.name: peer.filtered for peer in able}

        def refuse(name: str, found: dict[str, float]) -> str | None:
            return refusal(found, truth.budget, case.torch_dtype, filtered=filtered[name])

        rows, times = contest(tasks, files[1] if remote else truth, refuse, plan, gemm)

    shared = {"case": case.key} | asdict(case) | spread([t.total for t in times["gemm"]], "gemm")
    shared |= truth.sharpness()
    shared |= {f"budget_{name}": value for name, value in truth.budget.items()}
    for name in times.keys() & rows.keys():
        rows[name] |= spread([t.forward for t in times[name]], "forward")
        rows[name] |= spread([t.total for t in times[name]], "total")
        rows[name]["gemm_multiple"] = rows[name]["total_ms"] / shared["gemm_ms"]
        rows[name]["gemm_multiple_min"] = rows[name]["total_ms_min"] / shared["gemm_ms_min"]
    for peer in peers:
        row = rows.setdefault(peer.name, {"status": "unsupported", "reason": unable[peer.name]})
        row |= {"peer": peer.name, "output": peer.output, "note": peer.note}
        row |= {"filtered": 1} if peer.filtered else {}
    return [shared | rows[peer.name] for peer in peers]
