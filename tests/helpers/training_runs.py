"""Short training runs for the trainer tests: settings, what to read off them, and a twin."""

import torch
from naive import gather_logps
from peft import LoraConfig
from trl import DPOTrainer

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "learning_rate": 1e-3,
    "max_steps": 5,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
}


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def column(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def lora(**options):
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)


def four_bit():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )


def same_steps(have, want, tolerance=1e-5):
    assert len(have) == len(want) > 0
    assert max(abs(a - b) for a, b in zip(have, want)) <= tolerance


class FullLogitsLSIF(DPOTrainer):
    """The same objective the obvious way: full logits, autograd, the paper's formula."""

    def _sequence_logps(self, model, inputs):
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        picked = gather_logps(logits[:, :-1], inputs["input_ids"][:, 1:])
        mask = inputs["completion_mask"][:, 1:]
        return (picked * mask).sum(1), mask.sum(1)

    def _compute_loss(self, model, inputs, return_outputs):
        logps, lengths = self._sequence_logps(model, inputs)
        with torch.no_grad():
            ref_logps, _ = self._sequence_logps(self.ref_model, inputs)
        f = (logps - ref_logps) / lengths
        chosen, rejected = f.chunk(2)
        return (-chosen.exp()).mean() + (0.5 * (2 * rejected).exp()).mean()
