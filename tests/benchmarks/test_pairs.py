"""Steps on preference pairs, by trainer: the same losses from all, and a row for who cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch

from benchmarks import filter_training, pairs, report, tables
from benchmarks.environment import read_rows
from benchmarks.measure import Plan

pytest.importorskip("trl")
EXACT = [name for name in pairs.VARIANTS if "filter" not in name]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of random weights, its tokenizer, and pairs."""
    folder = Path(tiny_models.save(tmp_path_factory.mktemp("model")))
    rows = map(json.dumps, tiny_models.pairs(12))
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    return folder


def setup(model: Path, **options: object) -> pairs.Setup:
    options = {"pairs": 2, "steps": 2, "max_length": 200, "lora_r": 4} | options
    return pairs.Setup(str(model), str(model / "pairs.jsonl"), **options)


@pytest.mark.filterwarnings("ignore")
def test_all_trainers_take_the_same_steps(model: Path, tmp_path: Path) -> None:
    """And what they process differs; the tables and the picture come from the file."""
    rows = pairs.measure_setup(setup(model), EXACT, Plan(1), remote=False)
    found = {row["variant"]: row for row in rows}
    assert {row["status"] for row in rows} == {"ok"}, rows
    for row in rows:
        assert row["loss_0"] != row["loss_2"] and row["loss_err"] < 1e-5, row
        assert row["pairs_per_s"] > 0
    tokens = {name: row["tokens"] for name, row in found.items()}
    assert tokens["trl"] == tokens["trl-logits"] == tokens["padded"] > tokens["padding-free"]
    assert tokens["padding-free"] > tokens["shared"] == 2 * tokens["shared+precomputed"]
    pairs.append_rows(tmp_path / "r.csv", rows)
    text, picture, sharing = report.draw_file(tmp_path / "r.csv")
    best = tables.best_of_trl(rows)
    assert f"({found['shared']['pairs_per_s'] / best['pairs_per_s']:.2f} x)" in text.read_text()
    assert picture.stat().st_size > 0 and sharing.stat().st_size > 0
    assert [row["variant"] for row in read_rows(tmp_path / "r.csv")] == EXACT


@pytest.mark.filterwarnings("ignore")
def test_a_big_model_is_checkpointed(model: Path, tmp_path: Path) -> None:
    """As in training, which its trainer's own loop sees to and a step alone does not."""
    for name in ("small", "of-8b"):
        folder = shutil.copytree(model, tmp_path / name)
        asked = setup(folder, steps=1)
        trainer = pairs.make_trainer(
            "shared", asked, pairs.draw_pairs(asked), str(tmp_path / "out")
        )
        assert trainer.model.is_gradient_checkpointing == asked.is_big == (name == "of-8b")


@pytest.mark.filterwarnings("ignore")
def test_another_loss_is_refused_and_trl_has_no_lsif(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pairs.VARIANTS, "other", {"length_normalize": False})
    names = ["trl", "trl-logits", "padded", "other"]
    rows = pairs.measure_setup(setup(model, loss="lsif"), names, Plan(1), remote=False)
    assert [row["status"] for row in rows] == ["unsupported", "ok", "ok", "refused"], rows
    assert "LSIF" in rows[0]["reason"] and "losses differ" in rows[3]["reason"]
    text = tables.pairs_table(rows)
    assert "| other | refused: losses differ" in text and "(1.00 x)" in text


def test_pairs_are_whole_seeded_and_enough(model: Path) -> None:
    drawn = pairs.draw_pairs(setup(model))
    assert drawn == pairs.draw_pairs(setup(model)) and len(drawn) == 6
    longest = max(len(str(row)) for row in drawn)
    with pytest.raises(ValueError, match="must have 6 pairs"):
        pairs.draw_pairs(setup(model, max_length=longest // 100))
    with pytest.raises(ValueError, match="a prompt share near 0"):
        pairs.draw_pairs(setup(model, prompt_share=0.9))


def test_models_without_weights_get_random_ones_and_large_ones_four_bits(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    bare = pairs.Setup(str(tmp_path))
    assert bare.name.endswith(" (random weights)") and not setup(model).name.endswith(")")
    first, second = (pairs.make_model(bare).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    bitsandbytes = pytest.importorskip("bitsandbytes")
    monkeypatch.setitem(pairs.MODELS, "micro-8b", pairs.MODELS["micro"])
    kinds = [type(m) for m in pairs.make_model(pairs.Setup("micro-8b")).modules()]
    assert kinds.count(bitsandbytes.nn.Linear4bit) == 7 and kinds.count(torch.nn.Linear) == 1


@pytest.mark.filterwarnings("ignore")
def test_training_with_a_filter_goes_on_where_it_stopped_and_is_drawn(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DILKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(filter_training, "DROP_EPS", 0.02)
    shape = {"steps": 4, "pairs": 2, "held_out": 3, "every": 2, "longest": 200}
    files = {"model": str(model), "data": str(model / "pairs.jsonl"), "out": tmp_path / "r"}
    filter_training.main(losses="lsif,dpo", ways="exact,filter,drop", **files, **shape)
    runs = {
        way: json.loads((tmp_path / f"r-dpo-{way}.json").read_text())
        for way in filter_training.WAYS
    }
    assert [look["step"] for look in runs["exact"]["held_out"]] == [0, 2, 4]
    first = {way: run["steps"][0] for way, run in runs.items()}
    for way, step in first.items():
        assert step["loss"] == pytest.approx(0.6931472, abs=1e-6), way
        assert (abs(step["grad_norm"] - first["exact"]["grad_norm"]) > 1e-4) == (way == "drop")
    text = (tmp_path / "r.md").read_text()
    assert text.count("| lsif |") == text.count("| dpo |") == 3
    assert (tmp_path / "r.png").stat().st_size > 0
    # Same seeds, same bits; what is there is left alone.
    kept = (tmp_path / "r-dpo-filter.json").stat().st_mtime_ns
    (tmp_path / "r-dpo-drop.json").unlink()
    filter_training.main(losses="lsif,dpo", ways="exact,filter,drop", **files, **shape)
    assert (tmp_path / "r-dpo-filter.json").stat().st_mtime_ns == kept
    again = json.loads((tmp_path / "r-dpo-drop.json").read_text())
    assert again["steps"] == runs["drop"]["steps"] != runs["exact"]["steps"]
    with pytest.raises(ValueError, match="--longest"):
        filter_training.train(filter_training.Setup(files["model"], files["data"]), "dpo", "exact")
