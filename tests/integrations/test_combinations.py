"""Every kind of training with every reference, per model family, on real preference pairs."""

from pathlib import Path

import pytest
import tiny_models as tiny
from training_runs import four_bit, lora, losses, same_steps

from dilkern.integrations.data import read_preferences

PAIRS = Path(__file__).resolve().parents[3] / "shared" / "data" / "preferences_en_300.jsonl"
# Multiples of 64: bitsandbytes 0.50.2 decodes other rows wrongly on a CPU.
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}

pytestmark = pytest.mark.skipif(not PAIRS.exists(), reason=f"needs {PAIRS}")


@pytest.fixture(scope="module")
def pairs():
    return read_preferences(str(PAIRS))


def references(kind, model):
    """Options of DILTrainer for each way to the same reference: the model at the start."""
    from transformers import AutoModelForCausalLM

    loaded = {"quantization_config": four_bit()} if kind == "qlora" else {}
    second = AutoModelForCausalLM.from_pretrained(model, dtype="float32", **loaded)
    # Left out, it is the disabled adapter; without an adapter, a second model that TRL loads.
    return {
        "left out": ({}, {}),
        "second model": ({"ref_model": second}, {}),
        "precomputed": ({}, {"precompute_ref_log_probs": True}),
    }


@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_all_references_train_alike(quick, pairs, tmp_path, family, kind):
    model = tiny.save(tmp_path / family, family, **SHAPE)
    runs = {}
    for name, (init, options) in references(kind, model).items():
        if kind != "full":
            init["peft_config"] = lora()
        if kind == "qlora":
            pytest.importorskip("bitsandbytes")
            init["quantization_config"] = four_bit()
        trainer = quick(model, pairs, init=init, max_steps=4, max_length=192, **options)
        assert len(trainer.train_dataset) > 50  # prompts alone beyond max_length are dropped
        runs[name] = losses(trainer)
    first = runs.pop("left out")
    assert first[0] == pytest.approx(-0.5, abs=1e-6)
    assert first[-1] != first[0]
    for values in runs.values():
        same_steps(values, first, 1e-5)
