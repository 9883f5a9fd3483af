"""Heads under real DeepSpeed ZeRO-3, in two processes (`make zero3` installs DeepSpeed aside)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from head_ranks import run
from zero3_ranks import all_kinds

pytest.importorskip("deepspeed", reason="`make zero3` installs DeepSpeed aside")
pytestmark = pytest.mark.slow

HELPERS = Path(__file__).resolve().parents[1] / "helpers"


def test_losses_and_gradients_of_every_kind_of_head(tmp_path):
    run(all_kinds, tmp_path)


def test_trainer_gives_the_losses_of_one_process(tmp_path):
    for package in ("trl", "peft"):
        pytest.importorskip(package)
    script = [str(HELPERS / "zero3_trainer.py"), str(tmp_path)]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    path = os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", str(HELPERS.parents[1]))])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    for command in (script, [*torchrun, "--rdzv_endpoint", "localhost:0", *script]):
        command = [sys.executable, "-W", "ignore", *command]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    for kind in ("full", "lora"):
        one, two = (json.loads((tmp_path / f"{kind}-{n}.json").read_text()) for n in (1, 2))
        assert len(one) == len(two) == 4 and one[0]["loss"] == pytest.approx(-0.5, abs=1e-6)
        for have, want in zip(two, one):
            for name in {"loss", "logps/chosen", "logps/rejected"} & set(want):
                assert have[name] == pytest.approx(want[name], rel=1e-4), (kind, name)
        assert one[2]["loss"] < one[1]["loss"] < one[0]["loss"]
