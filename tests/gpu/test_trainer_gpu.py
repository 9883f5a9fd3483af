"""DILTrainer on a CUDA GPU: packed batches under every attention, 16-bit training, a 4-bit model.

TRITON_INTERPRET=1 runs it on the CPU, all but what has no CPU form (gpu_only): flash attention, fp16
with a gradient scaler.
"""

import pytest
import torch
from interpreter import INTERPRET
from peers import gpu_only, on_gpu_or_interpreter, sized

tiny = pytest.importorskip("tiny_models")
runs = pytest.importorskip("training_runs")
trl = pytest.importorskip("dilkern.integrations.trl")

pytestmark = [
    pytest.mark.gpu,
    on_gpu_or_interpreter,
    pytest.mark.filterwarnings("ignore"),  # of the trainer libraries
]


@pytest.fixture
def train(tmp_path):
    """Losses of a few steps of a tiny Llama, bf16 autocast unless told otherwise."""
    # Heads of 64: flash attention takes no fewer than 8 channels, bitsandbytes blocks of 64.
    shape = {"hidden_size": sized(256, 64), "intermediate_size": sized(512, 64), "head_dim": 64}
    folder = tiny.save(tmp_path / "model", **shape)

    def run(attn="sdpa", init=None, **options):
        where = {"use_cpu": INTERPRET, "max_steps": sized(5, 2), "bf16": True}
        settings = {**runs.COMMON, **where, "learning_rate": 1e-4, **options}
        args = trl.DILConfig(
            str(tmp_path / "out"), model_init_kwargs={"attn_implementation": attn}, **settings
        )
        torch.manual_seed(0)
        trainer = trl.DILTrainer(
            folder,
            args=args,
            train_dataset=tiny.dataset(),
            processing_class=tiny.tokenizer(),
            **(init or {}),
        )
        return runs.losses(trainer)

    return run


@pytest.mark.parametrize(
    "attn",
    [
        "sdpa",
        pytest.param("flash_attention_2", marks=gpu_only),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_equal_padded(train, attn, checkpointing):
    if attn == "flash_attention_2":
        pytest.importorskip("flash_attn")
    padded = train()
    for way in ("padding_free", "shared_prompts"):
        packed = train(attn, gradient_checkpointing=checkpointing, **{way: True})
        assert packed[0] == -0.5
        runs.same_steps(packed, padded, 2e-2)  # bf16 attention


@gpu_only
def test_fp16_training_follows_fp32(train):
    half = train(bf16=False, fp16=True)
    runs.same_steps(half, train(bf16=False), 2e-2)


@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "lm_head"]], ids=str)
def test_four_bit_model_and_head_train(train, target):
    pytest.importorskip("bitsandbytes")
    adapter, quantization = runs.lora(), runs.four_bit()
    adapter.target_modules = target
    quantization.llm_int8_skip_modules = []
    init = {"peft_config": adapter, "quantization_config": quantization}
    values = train(init=init, learning_rate=1e-3)
    assert values[0] == pytest.approx(-0.5, abs=1e-6)
    assert values[-1] < -0.501
