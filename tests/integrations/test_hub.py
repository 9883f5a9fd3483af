"""Models and datasets by their id, from a hub on this machine."""

import json
import os
import subprocess
import sys

import local_hub
import pytest
import tiny_models as tiny

ERRORS = """
import json, sys
from dilkern.cli.model import model_config
from dilkern.integrations.data import read_preferences
messages = []
for call in (
    lambda: read_preferences("me/pairs", split="nope"),
    lambda: read_preferences("me/none"),
    lambda: model_config("me/none"),
):
    try:
        call()
    except ValueError as error:
        messages.append(str(error))
json.dump([read_preferences("me/pairs", split="test").num_rows, messages], sys.stdout)
"""


@pytest.fixture
def python(tmp_path):
    """Run Python with a hub that holds the model me/tiny and the dataset me/pairs."""
    tiny.save(tmp_path / "hub" / "models" / "me" / "tiny")
    for split, rows in {"train": 8, "test": 4}.items():
        file = tmp_path / "hub" / "datasets" / "me" / "pairs" / "data" / f"{split}-0.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        tiny.dataset(rows).to_parquet(str(file))
    with local_hub.serve(tmp_path / "hub") as (address, asked):
        own = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}

        def run(*words):
            done = subprocess.run(
                [sys.executable, "-W", "ignore", *words],
                env={**os.environ, **own}, capture_output=True, text=True, timeout=300, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout

        yield run, asked


@pytest.mark.slow
def test_train_by_ids(python, tmp_path):
    run, asked = python
    out = tmp_path / "out"
    run(
        "-m", "dilkern", "train", "--model", "me/tiny", "--dataset", "me/pairs",
        "--output-dir", str(out), "--cpu", "--max-steps", "1", "--lora-r", "4",
        "--eval_strategy", "steps", "--eval_steps", "1",
    )  # fmt: skip
    assert json.loads((out / "summary.json").read_text())["examples"] == 8
    assert '"eval_loss"' in (out / "metrics.jsonl").read_text(), "the split test, as in TRL"
    assert any(line.startswith("GET /datasets/me/pairs/resolve") for line in asked)
    assert any(line.endswith("model.safetensors") for line in asked)


def test_splits_and_what_is_not_there(python):
    run, _ = python
    rows, (split, dataset, model) = json.loads(run("-c", ERRORS))
    assert rows == 4
    assert "Unknown split" in split and "['train', 'test']" in split and "--dataset-split" in split
    assert "me/none" in dataset and "doesn't exist on the Hub" in dataset and "HF_TOKEN" in dataset
    assert "me/none" in model and "HF_TOKEN" in model
