"""One thread, no network, and the warnings of third parties that we cannot mend."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

for _package in ("transformers", "trl", "peft", "datasets", "accelerate"):
    pytest.importorskip(_package)

# Each with its origin; anything else is an error (pyproject.toml).
THIRD_PARTY_WARNINGS = (
    # TRL's own use of names that transformers renamed; the category is FutureWarning or UserWarning.
    "ignore:.*gradient_checkpointing.* is deprecated",
    # accelerate / torch DataLoader on a machine without a GPU.
    "ignore:.*pin_memory.*:UserWarning",
    # peft, about its own conversion of LoRA for fused experts.
    "ignore:The following .*_pattern keys:RuntimeWarning",
    # peft, about saving the frozen embeddings beside an adapter on the lm_head.
    "ignore:Setting `save_embedding_layers`:UserWarning",
    # peft, about an adapter on a tied layer, which DILTrainer then refuses or which is right.
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
    "ignore:Input and output embeddings are no longer tied:UserWarning",
)


def pytest_collection_modifyitems(items):
    here = Path(__file__).resolve().parent
    for item in items:
        if here in Path(item.path).parents:
            for warning in THIRD_PARTY_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with its tokenizer, saved."""
    import tiny_models as tiny

    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def quick(tmp_path, folder):
    """Build a DILTrainer with few words."""
    import tiny_models as tiny
    import training_runs

    from dilkern.integrations.trl import DILConfig, DILTrainer

    def make(model=None, data=None, *, trainer=None, config=None, init=None, **options):
        args = (config or DILConfig)(str(tmp_path / "out"), **{**training_runs.COMMON, **options})
        data = tiny.dataset() if data is None else data
        torch.manual_seed(0)  # TRL before 1.15 leaves the start of an adapter to the caller's seed
        return (trainer or DILTrainer)(
            model or folder,
            args=args,
            train_dataset=data,
            **{"processing_class": tiny.tokenizer(), **(init or {})},
        )

    return make
