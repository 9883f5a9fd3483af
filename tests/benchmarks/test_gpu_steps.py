"""The GPU steps without a GPU: their command lines, their logic at tiny sizes, the goals."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from benchmarks import end_to_end, environment, goals, gpu, run, scaling, tune
from benchmarks.blocks import GPU_CASES
from benchmarks.cases import Case, case_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("step", gpu.STEPS)
def test_every_command_line_is_one_that_its_script_takes(step: str, tiny: bool) -> None:
    for command in gpu.commands(step, Path("/nowhere/stem"), tiny):
        if "-m" not in command or not command[command.index("-m") + 1].startswith("benchmarks."):
            continue
        at = command.index("-m") + 1
        app = typer.Typer()
        app.command()(importlib.import_module(command[at]).main)
        typer.main.get_command(app).make_context(command[at], command[at + 1 :])
    with pytest.raises(typer.BadParameter, match="known: tests"):
        gpu.commands("nothing", Path("stem"), tiny)


def test_the_named_cases_exist() -> None:
    keys = {case.key for case in run.select_cases("gpu")}
    assert set(gpu.PROFILED) <= keys and set(GPU_CASES.split(",")) <= keys
    wanted = {(4096, 8192), (2048, 8192), (1024, 8192)}
    assert wanted <= {(case.hidden, case.tokens) for case in run.select_cases("gpu")}


# The steps that launch kernels, in a process of their own: the interpreter is chosen before Triton.
@pytest.mark.slow
@pytest.mark.parametrize("step", ["tests", "suite", "tune", "profile"])
def test_a_step_runs_at_tiny_size(step: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "run", step, "--tiny", "--out", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    files = sorted(tmp_path.iterdir())
    assert len(files) <= 8 and all(path.stat().st_size > 0 for path in files), files
    assert (tmp_path / f"{step}.log").exists()
    (stem,) = {p.name.split("-tune")[0] for p in files if p.name.endswith("-tune.md")} or {""}
    if step == "tune":
        assert "_TILES_16:" in (tmp_path / f"{stem}-tune.md").read_text()
    if step == "suite":
        (table,) = (p for p in files if p.suffix == ".csv" and "ceilings" not in p.name)
        status = {(row["case"], row["peer"]): row["status"] for row in run.read_rows(table)}
        assert set(status.values()) == {"ok"}, status
        assert ("tiny+nf4@64-float32-frozen", "dilkern-triton") in status


def test_the_longest_step_and_the_scaling_study_write_their_files(tmp_path: Path) -> None:
    end_to_end.main(models="micro", cap_gib=24, unit=8, most=16, out=tmp_path / "a")
    rows = run.read_rows(tmp_path / "a.csv")
    assert [row["length"] for row in rows] == ["16"] * 3
    assert "longest sequence under 24 GiB: 16" in (tmp_path / "a.md").read_text()
    scaling.main(tiny=True, out=tmp_path / "b")
    assert len(run.read_rows(tmp_path / "b.csv")) == 8
    assert (tmp_path / "b.png").stat().st_size > 0


def test_a_step_continues_its_own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = tmp_path / "results" / "day-commit"
    known.parent.mkdir()
    for rest in (".csv", ".json", "-steps.csv", "-tune.json"):
        known.with_name(known.name + rest).write_text(rest)
    monkeypatch.setattr(environment, "default_stem", lambda device: known)
    calls: list[str] = []

    def execute(command: list[str], log: Path, limit: float) -> int:
        calls.append(command[2])
        return {"benchmarks.run": gpu.UNFINISHED}.get(command[2], 0)

    monkeypatch.setattr(gpu, "execute", execute)
    with pytest.raises(SystemExit) as stopped:
        gpu.run("suite", tmp_path / "out", tiny=False, limit=1)
    assert stopped.value.code == gpu.UNFINISHED
    assert calls == ["benchmarks.ceilings", "benchmarks.run", "benchmarks.goals"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"day-commit.csv", "day-commit.json"}


def test_a_command_that_outlasts_its_limit_is_stopped_and_logged(tmp_path: Path) -> None:
    script = "import time; print('begun', flush=True); time.sleep(60)"
    log = tmp_path / "x.log"
    assert gpu.execute([sys.executable, "-c", script], log, 2) == 124
    assert "begun" in log.read_text() and "[exit 124" in log.read_text()


def test_the_pack_is_pinned_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.pinned("trl") == "trl==1.16.0" and gpu.pinned("dill") == "dill"
    fetched: list[list[str]] = []
    real = subprocess.run

    def fake(command: list[str], **options: Any) -> Any:
        if "download" not in command:
            return real(command, **options)
        fetched.append(command)
        (tmp_path / "x.whl").write_bytes(bytes(1000))

    monkeypatch.setattr(gpu.subprocess, "run", fake)
    monkeypatch.setattr(gpu, "PACK", tmp_path)
    (tmp_path / "old.whl").write_bytes(b"")
    gpu.pack()
    assert "trl==1.16.0" in fetched[0] and not (tmp_path / "old.whl").exists()
    assert set(json.loads((tmp_path / "commit.json").read_text())) == {
        "commit",
        "dirty",
        "fingerprint",
    }
    monkeypatch.setattr(gpu, "TREE_MIB", 1e-3)
    with pytest.raises(typer.Exit):
        gpu.pack()


# --- tune -------------------------------------------------------------------------------------


def test_tune_refuses_wrong_numbers_and_failures() -> None:
    calls = {
        "good": lambda: torch.ones(4),
        "wrong": lambda: 1.1 * torch.ones(4),
        "nan": lambda: torch.ones(4) * float("nan"),
        "broken": lambda: torch.ones(2) @ torch.ones(3),
    }
    times, failed = tune.compare(calls, torch.device("cpu"), 2)
    assert set(times) == {"good"} and set(failed) == {"wrong", "nan", "broken"}
    assert "wrong numbers" in failed["nan"] and "RuntimeError" in failed["broken"]


def test_tune_proposes_the_fastest_row_over_all_sizes() -> None:
    def entry(kernel: str, row: str, d: int, ms: float | None) -> dict[str, Any]:
        return {"kernel": kernel, "row": row, "d": d, "ms": ms, "failed": "" if ms else "why"}

    found = [
        *(entry("logps_forward", "library", d, ms) for d, ms in ((1024, 2.0), (2048, 3.0))),
        *(entry("logps_forward", "x", d, ms) for d, ms in ((1024, 1.0), (2048, None))),
        *(entry("logps_forward", "y", d, ms) for d, ms in ((1024, 1.5), (2048, 4.0))),
        *(entry(name, "z", 1024, 1.0) for name in ("chunk", "fold", "decode")),
    ]
    assert tune.best(found, ("logps_forward",)) == "y"
    assert tune.own_ahead(found) == {1024: 0.5, 2048: pytest.approx(4 / 3)}
    text = tune.proposal(found, "sm_90")
    assert '"sm_90": y,' in text and '_TILES_UP_TO_D: "sm_90": 1024,' in text


# --- goals ------------------------------------------------------------------------------------


def row(case: Case, peer: str, **figures: Any) -> dict[str, str]:
    found = {"total_ms": 1.0, "gemm_multiple": 2.2, "peak_mib": 300.0, "status": "ok"}
    found |= case.row() | {"case": case.key, "peer": peer} | figures
    return {name: str(value) for name, value in found.items()}


def verdicts(rows: list[dict[str, str]]) -> dict[tuple[str, str], bool | None]:
    return {(v.goal, v.case): v.met for v in goals.judge(rows)}


def test_goals_are_met_missed_or_not_measured() -> None:
    big = case_of("llama-3-8b", 8192, dtype="bfloat16")
    small = case_of("qwen3-0.6b", 8192, dtype="bfloat16")
    short = case_of("qwen3-0.6b", 512, dtype="bfloat16")
    rows = [
        row(big, goals.OURS),
        row(big, "trl", total_ms=0.9),
        row(big, "liger-flce", status="OOM"),
        row(small, goals.OURS, gemm_multiple=2.9, peak_mib=5000),
        row(small, "trl", total_ms=1.1),
        row(short, goals.OURS),
        row(short, "naive", total_ms=0.5),
    ]
    met = verdicts(rows)
    frozen = "frozen head, forward + backward"
    assert met[frozen, big.key] is True and met[frozen, small.key] is False
    assert met[frozen, "D=2048"] is None and met["log-probs alone", "D=4096"] is None
    assert met["memory within its bound", big.key] is True  # 256 + 12 * 8192 * 4096 bytes
    assert met["memory within its bound", small.key] is False
    assert met["not slower than trl", big.key] is False
    assert met["not slower than trl", small.key] is True
    assert met["not slower than liger-flce", big.key] is None
    assert met["T=512 not slower than naive", short.key] is False
    text = goals.markdown(list(goals.judge(rows)))
    assert "**missed**" in text and "not measured" in text


def test_an_nf4_row_does_not_answer_for_the_dense_goal() -> None:
    nf4 = replace(case_of("llama-3-8b", 8192, dtype="bfloat16"), kind="nf4")
    assert verdicts([row(nf4, goals.OURS)])["frozen head, forward + backward", "D=4096"] is None
