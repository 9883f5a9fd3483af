"""`dilkern report`: planted faults and healthy runs, what it reads, what it refuses, its picture."""

import json
from pathlib import Path

import pytest
from planted_runs import FAULTS, HEALTHY, train

from dilkern.cli.findings import RULES, findings
from dilkern.cli.report import run as report
from dilkern.cli.run_folder import Run, read_run, write_csv

STEPS = range(1, 21)


def history(**changes):
    """Twenty steps in which chosen rises, rejected falls; a metric's first and last value, or one."""
    ends = {
        "loss": (0.69, 0.5),
        "loss/pair": (0.69, 0.5),
        "learning_rate": (1e-4, 0.0),
        "grad_norm": 1.0,
        "log_ratio/chosen_avg": (0.0, 0.1),
        "log_ratio/rejected_avg": (0.0, -0.1),
        "log_ratio/chosen_std": (0.0, 0.05),
        "log_ratio/rejected_std": (0.0, 0.05),
        "rewards/margins": (0.0, 0.5),
        "rewards/accuracies": (0.5, 0.8),
        "length/chosen": 50.0,
        "length/rejected": 30.0,
        "length/margin_slope": 0.005,
        "length/margin_corr": 0.8,
        "clip_frac/chosen": 0.0,
        "clip_frac/rejected": 0.0,
        **{name: change for name, change in changes.items() if not name.startswith("eval_")},
    }
    rows = []
    for step in STEPS:
        row = {"step": step}
        for name, end in ends.items():
            first, last = end if isinstance(end, tuple) else (end, end)
            row[name] = first + (last - first) * (step - 1) / 19
        rows.append(row)
    held_out = {name: value for name, value in changes.items() if name.startswith("eval_")}
    if held_out:
        timing = {"eval_runtime": 2.0, "eval_samples_per_second": 50.0}
        rows.append({"step": 20, "eval_loss": 0.6, **timing, **held_out})  # 100 pairs
    return rows


def anchors(**changes):
    return [found.anchor for found in findings(Run("", history(**changes), {}))]


def test_a_run_in_order_has_no_findings():
    assert anchors() == anchors(**{"eval_rewards/accuracies": 0.6}) == []


def test_steps_that_fp16_leaves_out_are_in_order():
    rows = history()
    rows[0]["grad_norm"] = float("inf")
    assert findings(Run("", rows, {})) == []


def test_supervised_training_is_not_asked_to_tell_pairs_apart():
    faults = {"length/margin_slope": 0.02, "eval_rewards/accuracies": 0.3}
    rows = [{**row} for row in history(**faults)]
    assert len(findings(Run("", rows, {}))) == 1
    for row in rows:
        row.pop("loss/pair", None)
        row |= {"loss/chosen": 0.0, "loss/rejected": 0.0}
    assert findings(Run("", rows, {})) == []


def test_without_a_reference_length_counts_from_the_first_evaluation():
    def found(first, *, evaluated=True):
        ends = {"length/chosen": 30.0, "length/rejected": 50.0, "length/margin_corr": -0.8}
        ends |= {"length/margin_slope": -0.1, "rewards/margins": 3.0}  # 2 of them by length
        rows = history(**ends, **{f"eval_{name}": value for name, value in ends.items()})
        for row in rows:  # sums of log-probs: a short answer has more of them
            for name in [name for name in row if name.startswith("log_ratio/")]:
                del row[name]
        before = {name: value for name, value in rows[-1].items() if name.startswith("eval_")}
        before |= {f"eval_{name}": value for name, value in first.items()}
        rows = [{"step": 1, **before}, *rows] if evaluated else rows[:-1]
        return [(f.anchor, f.numbers[:46]) for f in findings(Run("", rows, {}))]

    there_before = {"length/margin_slope": -0.1, "rewards/margins": 2.0}
    learnt = {"length/margin_slope": -0.01, "rewards/margins": 0.2}
    assert found(there_before) == found(learnt, evaluated=False) == []
    assert found(learnt) == [("length", "64% of the margin won since the first evaluati")]


PLANTED = [
    ("nan", {"rewards/chosen": float("nan")}, {}),
    ("nan", {"eval_loss": float("inf")}, {}),
    (
        "nothing-moves",
        dict.fromkeys([f"log_ratio/{s}_{f}" for s in ("chosen", "rejected") for f in ("avg", "std")],
                      0.003),
        {"log_ratio/chosen_std": 0.02},
    ),
    (
        "chosen-falls",
        {"log_ratio/chosen_avg": -0.2, "log_ratio/rejected_avg": -0.3},
        {"log_ratio/rejected_avg": -0.45},
    ),
    ("linear-extension", {"clip_frac/rejected": 0.06}, {"clip_frac/rejected": 0.04}),
    ("flat-curve", {"loss/pair": (0.69, -0.07)}, {"loss/pair": (0.69, 0.0)}),
    ("flat-curve", {"loss/rejected": (0.5, -0.05)}, {"loss/rejected": (0.0, 0.0)}),
    ("length", {"length/margin_slope": 0.02}, {"length/margin_corr": 0.6}),
    ("length", {"length/margin_slope": 0.02}, {"length/rejected": 48.0}),
    ("swapped", {"eval_rewards/accuracies": 0.3}, {"rewards/accuracies": 0.4}),
    ("not-told-apart", {"eval_rewards/accuracies": 0.52}, {"eval_rewards/accuracies": 0.57}),
]  # fmt: skip


@pytest.mark.parametrize("anchor, fault, otherwise", PLANTED)
def test_every_rule_fires_on_its_fault_and_just_there(anchor, fault, otherwise):
    assert anchor in anchors(**fault)
    if otherwise:
        assert anchor not in anchors(**{**fault, **otherwise})


def test_every_rule_is_planted_and_explained(request):
    guide = (request.config.rootpath / "docs" / "guide.md").read_text()
    for anchor in {anchor for anchor, _, _ in PLANTED}:
        assert f'<a id="{anchor}"></a>' in guide
        assert anchor in FAULTS
    assert len(RULES) <= len({anchor for anchor, _, _ in PLANTED}) == len(FAULTS)


@pytest.mark.parametrize("fault", ["swapped", "length", "linear-extension"])
def test_faults_of_real_runs_are_seen(fault):
    assert [found.anchor for found in findings(train(1, **FAULTS[fault]))] == [fault]


def test_a_healthy_run_raises_no_alarm():
    assert findings(train(1, **HEALTHY["dpo"])) == []


def write(folder, rows, **summary):
    folder.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return str(folder)


def test_runs_are_described_and_drawn_over_each_other(tmp_path, capsys):
    good = write(tmp_path / "good", history(**{"eval_rewards/accuracies": 0.9}), loss="dpo")
    bad = write(tmp_path / "bad", history(**{"clip_frac/chosen": 0.25}), max_log_ratio=2.0)
    report([good, bad, "--output", str(tmp_path / "both.png")])
    first, second, picture = capsys.readouterr().out.split("\n\n")
    assert "loss dpo, 20 steps, learning rate up to 0.0001" in first
    assert "- nothing looks wrong" in first and "held out: loss 0.6, accuracy 0.9" in first
    said = " ".join(second.split())
    assert "chosen 25%, rejected 0% (max_log_ratio 2). Read docs/guide.md#linear-extension" in said
    assert picture.startswith("picture: ")
    assert (tmp_path / "both.png").read_bytes()[:4] == b"\x89PNG"


def test_whatever_holds_a_history_is_read_alike(tmp_path):
    rows = history(**{"eval_rewards/accuracies": 0.9})
    want = read_run(Path(write(tmp_path / "run", rows))).history
    state = tmp_path / "own" / "checkpoint-20" / "trainer_state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"log_history": [*rows, {"step": 20, "train_runtime": 3.0}]}))
    assert read_run(tmp_path / "own").history == want
    (tmp_path / "table").mkdir()
    write_csv(rows, tmp_path / "table" / "metrics.csv")
    table = read_run(tmp_path / "table")
    for name in ("loss", "eval_rewards/accuracies", "log_ratio/chosen_std"):
        assert table.points(name) == Run("", want, {}).points(name)


def test_what_is_no_run_is_refused(tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "metrics.jsonl").write_text("{")
    write(tmp_path / "empty", [])
    stepless = write(tmp_path / "stepless", [{"loss": 1.0}])
    wordy = write(tmp_path / "wordy", [{"loss": "1.0", "step": 1}])
    listed = write(tmp_path / "listed", [["loss"]])
    told = write(tmp_path / "told", history())
    (tmp_path / "told" / "summary.json").write_text("{")
    good = write(tmp_path / "good", history())
    for words, message in (
        ([], "required: RUN"),
        ([good, "--out", "x"], "unrecognized arguments: --out x"),
        ([str(tmp_path / "none")], "which is no folder"),
        ([str(tmp_path)], r"without metrics.jsonl.*trainer.save_state\(\)"),
        ([str(broken)], "must be a history of metrics"),
        ([str(tmp_path / "empty")], "must have logged a step"),
        ([stepless], r"must be a history of metrics.*KeyError\('step'\)"),
        ([wordy], "must be a history of metrics.*a loss that is no number"),
        ([listed], "must be a history of metrics"),
        ([told], "summary.json must be a JSON object"),
        ([good, "--output", str(tmp_path / "x.doc")], "--output must be a picture.*doc"),
    ):
        with pytest.raises(ValueError, match=message):
            report(words)


def drawn(runs, monkeypatch, tmp_path):
    """Return the axes of a picture by their titles."""
    from matplotlib.figure import Figure

    from dilkern.cli.picture import draw

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k)
    )
    draw(runs, tmp_path / "x.png")
    return {axis.get_title(loc="left"): axis for axis in figures[0].axes}


def test_the_picture_shows_ratios_with_zero_line_spread_markers_and_held_out(monkeypatch, tmp_path):
    rows = history(**{"eval_log_ratio/chosen_avg": 0.08})
    rows[0] |= {"rewards/margins": 0.0, "rewards/accuracies": 0.0}
    axes = drawn([Run("a", rows, {})], monkeypatch, tmp_path)
    ratios = axes["log-ratio to the reference, nats per token"]
    level, chosen, held_out = ratios.lines[:3]
    assert list(level.get_ydata()) == [0.0, 0.0]
    assert len(chosen.get_xdata()) == 20 and chosen.get_marker() == "."
    assert list(held_out.get_ydata()) == [0.08] and held_out.get_marker() == "o"
    assert len(ratios.collections) == 2, "a band for each of the two"
    accuracy = axes["accuracy: chosen above rejected"]
    assert list(accuracy.lines[1].get_xdata()) == [*STEPS][1:], "equals have no accuracy"
    assert {"loss", "margin, as the loss sees it", "share on the linear extension"} < set(axes)


def test_without_a_reference_the_picture_says_that_it_shows_log_probs(monkeypatch, tmp_path):
    rows = [{k: v for k, v in row.items() if "log_ratio" not in k} for row in history()]
    rows = [{**row, "logps/chosen_avg": -1.0, "logps/rejected_avg": float("nan")} for row in rows]
    axes = drawn([Run("a", rows, {}), Run("b", history(), {})], monkeypatch, tmp_path)
    shown = axes["log-prob, nats per token (no reference: it moves with the batch)"]
    assert len(shown.lines[0].get_xdata()) == 20
    assert all(len(line.get_xdata()) == 0 for line in shown.lines[1:])
