"""Two processes give the weights of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ddp_worker
import fsdp_worker
import pytest
import tiny_models as tiny
import torch

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"


def torchrun(worker, *arguments):
    """Run a worker on two processes of this machine."""
    path = os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", str(ROOT))])
    command = [
        sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node", "2",
        "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(HELPERS / worker), *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of the runs of two processes and of one, trained on the same batches."""
    top = tmp_path_factory.mktemp("ddp")
    folder = tiny.save(top / "model")
    for count in ("one", "two"):
        for kind in ddp_worker.KINDS:
            (top / count / kind).mkdir(parents=True)
    torchrun("ddp_worker.py", folder, str(top / "two"), "2")
    for kind in ddp_worker.KINDS:
        ddp_worker.run(kind, folder, str(top / "one" / kind), 4)
    return top


@pytest.mark.slow
@pytest.mark.parametrize("kind", ddp_worker.KINDS)
def test_two_processes_train_as_one(runs, kind):
    one, two = runs / "one" / kind, runs / "two" / kind
    have, want = torch.load(two / "weights.pt"), torch.load(one / "weights.pt")
    assert set(have) == set(want)
    for name, weight in want.items():
        torch.testing.assert_close(have[name], weight, rtol=1e-5, atol=1e-6, msg=name)
    start = {f"base_model.model.{n}": p for n, p in tiny.build().state_dict().items()}
    start.update(tiny.build().state_dict())
    moved = [(w - start[n]).abs().max() if n in start else w.abs().max() for n, w in want.items()]
    assert max(moved) > 1e-3
    logs = [json.loads((out / "log.json").read_text()) for out in (two, one)]
    names = {"logps/chosen", "logps/rejected", "rewards/margins", "length/rejected", "num_tokens"}
    names |= {f"eval_{name}" for name in names}
    for have, want in zip(*logs, strict=True):
        assert len(names & set(want)) > 1 or "train_runtime" in want
        for name in names & set(want):
            assert have[name] == pytest.approx(want[name], rel=1e-4, abs=1e-5), name


@pytest.mark.slow
def test_fsdp2_gradients_equal_one_process(tmp_path):
    torchrun("fsdp_worker.py", str(tmp_path))
    for arrangement in fsdp_worker.ARRANGEMENTS:
        have, want = torch.load(tmp_path / f"{arrangement}.pt"), fsdp_worker.gradients(arrangement)
        assert set(have) == set(want)
        assert any("embed" in name for name in have)
        for name, gradient in want.items():
            assert gradient.abs().max() > 0
            torch.testing.assert_close(
                have[name], gradient, rtol=1e-5, atol=1e-7, msg=f"{arrangement} {name}"
            )
