"""Trainers launch the fused sequence-loss kernel, and get the numbers of the torch path."""

import pytest
import tiny_models
import torch
import training_runs

from dilkern import preference
from dilkern.integrations.transformers import compute_loss, install_head
from dilkern.integrations.trl import DILConfig, DILTrainer

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainer libraries


@pytest.fixture
def launches(monkeypatch):
    calls, run = [], preference.pointwise_loss
    monkeypatch.setattr(
        preference, "pointwise_loss", lambda *a, **k: calls.append(1) or run(*a, **k)
    )
    return calls


def test_the_trainer_launches_the_kernel_and_follows_the_torch_path(launches, tmp_path):
    def losses(backend):
        args = DILConfig(
            str(tmp_path / backend), backend=backend, **{**training_runs.COMMON, "max_steps": 2}
        )
        torch.manual_seed(0)
        trainer = DILTrainer(
            tiny_models.build(),
            ref_model=tiny_models.build(seed=3),
            args=args,
            train_dataset=tiny_models.dataset(),
            processing_class=tiny_models.tokenizer(),
        )
        values = training_runs.losses(trainer)
        return values, [p.detach().clone() for p in trainer.model.parameters()]

    (mine, weights), own = losses("triton"), len(launches)
    (theirs, others), none = losses("torch"), len(launches) - own
    assert own >= 2 and none == 0
    assert mine == pytest.approx(theirs, rel=1e-5)
    for a, b in zip(weights, others):
        torch.testing.assert_close(
            a, b, rtol=1e-4, atol=2e-5
        )  # Adam takes small gradients for large


@pytest.mark.parametrize("unpaired", [False, True])
def test_compute_loss_launches_the_kernel(launches, unpaired):
    torch.manual_seed(0)
    batch = {
        "input_ids": torch.randint(3, 40, (4, 9)),
        "attention_mask": torch.ones(4, 9, dtype=torch.long),
        "completion_mask": (torch.arange(9) > 3).long().expand(4, 9),
        "ref_logps": torch.tensor([-20.0, -18.0, -22.0, -19.0]),
    }
    if unpaired:
        batch["is_chosen"] = torch.tensor([True, False, False, False])
    results = []
    for backend in ("triton", "torch"):
        torch.manual_seed(1)
        model = tiny_models.build().eval()
        install_head(model, backend=backend)
        out = compute_loss(model, batch, loss="bce")
        out.loss.backward()
        results.append((out.loss.detach(), model.model.embed_tokens.weight.grad))
    assert launches == [1]
    (loss, grad), (other, other_grad) = results
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, other_grad, rtol=1e-3, atol=1e-7)
