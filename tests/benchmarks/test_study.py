"""The study on a tiny model: grid, choice, final runs, tables; nothing twice, nothing of others."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
import typer

from benchmarks import study, study_plan, study_report
from benchmarks.environment import describe
from dilkern import LOSSES

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> study_plan.Setup:
    """A model of random weights and 12 pairs, in files."""
    folder = Path(tiny_models.save(tmp_path_factory.mktemp("model")))
    data = folder / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, tiny_models.pairs(12))))
    sizes = {"pairs": 4, "batch": 2, "validation": 3, "test": 3, "texts": 2, "prompts": 2}
    lengths = {"max_length": 200, "text_length": 200, "answer": 4}
    return study_plan.Setup(str(folder), str(data), str(data), lora_r=4, **sizes, **lengths)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DILKERN_CACHE", str(tmp_path_factory.getbasetemp() / "study-cache"))


@pytest.mark.filterwarnings("ignore")
def test_grid_choice_finals_and_tables(
    setup: study_plan.Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = ["lsif", "sft", "kto"]
    monkeypatch.setattr(study_plan, "RATES", (0.01, 0.1))
    monkeypatch.setattr(study_plan, "TWO_RATES", (0.1,))
    work = study_plan.Study(setup, tmp_path / "r", methods, seeds=1)
    where = {"environment": describe(torch.device("cpu"))}

    def do(*given: Any) -> dict[str, Any]:
        return study.train(*given) | where

    assert "0 of 9 runs" in study.report(work)
    assert work.work(do) == []
    for method in methods:
        (final,) = work.finals(method)
        grid = work.grid(method)
        best = min(grid, key=lambda run: study_plan.criterion(method, run))
        assert final["options"] == best["options"] and final["seed"] == 1
        assert [len(run["change"]) for run in (*grid, final)] == [3, 3, 3]
        assert final["kl"] > 0 and len(final["lengths"]) == 2
        assert final["perplexity"] != pytest.approx(final["perplexity_before"], rel=1e-6)
    study.draw_all(work)
    text = (work.folder / "study.md").read_text()
    assert "**9 of 9 runs are finished**." in text and "missing" not in text
    assert text.count("| chosen |") == 3 and "DIL, LSIF" in text
    for name in ("change.png", "price.png"):
        assert (work.folder / name).stat().st_size > 0
    page = tmp_path / "page.md"
    page.write_text("before\n{}\n{}\nafter".format(*study.MARKERS))
    study.draw(work.folder, "lsif,sft,kto", 1, page)
    assert "(r/price.png)" in page.read_text() and text.strip() in page.read_text()
    # Again: nothing is done. A file that is gone: only that run, to the same figures.
    work.work(lambda *_: pytest.fail("done twice"))
    gone = work.path(study_plan.Run("lsif", "final", 1))
    before = json.loads(gone.read_text())
    gone.unlink()
    assert "8 of 9 runs are finished**; runs are missing of: DIL, LSIF" in study.report(work)
    assert work.work(do) == []
    after = json.loads(gone.read_text())
    assert after["change"] == before["change"] and after["lengths"] == before["lengths"]
    with pytest.raises(ValueError, match="same pairs"):
        work.check_drawn("other")
    with pytest.raises(ValueError, match="--out"):
        study_plan.Study(study_plan.Setup(pairs=1), work.folder, ["lsif"], 1)


def test_a_run_in_other_hands_is_left_to_them(setup: study_plan.Setup, tmp_path: Path) -> None:
    work, done = study_plan.Study(setup, tmp_path / "r", ["lsif"], seeds=2), []

    def do(
        unused: study_plan.Study, run: study_plan.Run, options: dict[str, Any]
    ) -> dict[str, Any]:
        done.append(run.name)
        known = {"loss": "lsif", "options": options, "nll": 1.0, "drawn": "a"}
        return known | {"change": [[run.number + 1.0, 0.0, 2, 2], [-1.0, 0.0, 2, 2]]}

    taken = study_plan.Run("lsif", "grid", 1)
    with study_plan.claimed(f"r-{taken.name}") as mine:
        assert mine
        left = work.work(do)
    assert done == ["lsif-grid-0", "lsif-grid-2", "lsif-grid-3"]
    assert [run.name for run in left] == [taken.name, "lsif-final-1", "lsif-final-2"]
    assert work.work(do) == []
    assert done[3:] == [run.name for run in left]
    assert work.finals("lsif")[0]["options"] == study_plan.METHODS["lsif"].points()[3]


def test_every_method_has_as_many_settings_and_its_options_exist() -> None:
    from dilkern.integrations.trl import DILConfig

    assert set(study_plan.DIL) <= set(study_plan.METHODS)
    for method in study_plan.METHODS.values():
        assert len(method.points()) == len(study_plan.RATES) and method.loss in LOSSES
        for point in method.points():
            config = DILConfig("out", loss_type=method.loss, use_cpu=True, **point)
            objective = config.objective()
            assert objective.length_normalize == method.per_token
            if method.knob:
                known = {"beta": objective.beta, **objective.params}
                assert known[method.knob] in method.values
    assert study_plan.METHODS["bpo"].points()[0]["pairing"] == "pairwise"


def test_the_criterion_does_not_know_the_size_of_margins() -> None:
    torch.manual_seed(0)
    margins = torch.randn(50, dtype=torch.float64) + 0.7
    found = study_plan.log_loss(margins)
    assert found == pytest.approx(study_plan.log_loss(1000 * margins), abs=1e-12)
    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS([scale], max_iter=100, tolerance_grad=1e-10)

    def loss() -> torch.Tensor:
        descent.zero_grad()
        value = torch.nn.functional.softplus(-scale * margins).mean()
        value.backward()
        return value

    descent.step(loss)
    assert found == pytest.approx(loss().item(), abs=1e-5) and found < math.log(2)
    assert study_plan.log_loss(-margins) == study_plan.log_loss(0 * margins) == math.log(2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("layers", "adapted"), [(0, {0, 1}), (1, {1}), (10, {0, 1})])
def test_so_many_of_the_last_layers_are_adapted(
    setup: study_plan.Setup, tmp_path: Path, layers: int, adapted: set[int]
) -> None:
    given = replace(setup, lora_layers=layers)
    trainer = study.make_trainer(given, study.draw_data(given), (), str(tmp_path))
    trained = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in trained} == adapted


def test_figures_are_those_of_the_pairs() -> None:
    run = {"nll": 1.0, "change": [[-2.0, -1.5, 4, 1], [1.0, -1.0, 2, 2]], "options": {"beta": 0.5}}
    found = study_plan.figures("lsif", run)
    assert found["largest"] == 0.75 and study_plan.figures("dpo", run)["largest"] == 1.0
    assert "largest" not in study_plan.figures("simpo", run)  # no log-ratio
    assert found["chosen"] == 0.0 and found["rejected"] == -1.0 and found["margin"] == 1.0
    assert found["accuracy"] == found["accuracy_per_token"] == 1.0
    assert found["accuracy_sum"] == study_plan.figures("dpo", run)["accuracy"] == 0.5


def test_a_claim_needs_all_pairs_and_all_seeds() -> None:
    def runs(*changes: float) -> list[dict[str, Any]]:
        return [{"change": [[c, 0.0, 1, 1], [c + 0.02, 0.0, 1, 1]]} for c in changes]

    found = {"lsif": runs(0.1, 0.3), "dpo": runs(0.0, 0.1), "ipo": runs(0.0, 0.31), "kto": runs(0)}
    told = SimpleNamespace(methods=list(found), seeds=2, finals=found.__getitem__)
    table = study_report.claims_table(told)  # type: ignore[arg-type]
    assert "| DPO | +0.150 ± 0.000 (+0.100 .. +0.200): higher |" in table
    assert "(-0.010 .. +0.100): undecided" in table and "KTO" not in table


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(typer.BadParameter, match="no method 'dop'"):
        study.parse_methods("lsif,dop")
