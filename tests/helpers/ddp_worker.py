"""One rank of test_distributed.py: train, then write losses and weights. Run by torchrun."""

import json
import os
import sys

import tiny_models as tiny
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from dilkern.integrations.collators import PreferenceCollator
from dilkern.integrations.transformers import PreferenceMixin
from dilkern.integrations.trl import DILConfig, DILTrainer

KINDS = ("full", "lora", "unpaired", "shared", "mixin")


class PreferenceTrainer(PreferenceMixin, Trainer):
    pass


def plain_trainer(folder, out, batch):
    args = TrainingArguments(
        out, use_cpu=True, report_to="none", learning_rate=0.1, optim="sgd", max_steps=3,
        per_device_train_batch_size=batch, per_device_eval_batch_size=batch, logging_steps=1,
        save_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    return PreferenceTrainer(
        AutoModelForCausalLM.from_pretrained(folder),
        args,
        train_dataset=tiny.pairs(16),
        eval_dataset=tiny.pairs(5),
        data_collator=PreferenceCollator(tiny.tokenizer()),
        preference={"loss": "simpo"},
    )


def dil_trainer(kind, folder, out, batch):
    args = DILConfig(
        out,
        loss_type="bce" if kind == "unpaired" else "lsif",
        use_cpu=True,
        bf16=False,
        report_to="none",
        learning_rate=0.1,
        optim="sgd",  # Adam turns rounding of near-zero gradients into whole steps
        max_steps=3,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        gradient_checkpointing=kind == "lora",
        shared_prompts=kind == "shared",
        # Some batches of a rank are cut, and some are not.
        max_tokens_per_batch=120 if kind == "shared" else None,
    )
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return DILTrainer(
        folder,
        args=args,
        train_dataset=tiny.unpaired(24) if kind == "unpaired" else tiny.dataset(16),
        # No multiple of what all ranks take at once.
        eval_dataset=tiny.unpaired(5) if kind == "unpaired" else tiny.dataset(5),
        processing_class=tiny.tokenizer(),
        peft_config=adapter if kind == "lora" else None,
    )


def run(kind, folder, out, batch):
    torch.manual_seed(0)
    mixed = kind == "mixin"
    trainer = plain_trainer(folder, out, batch) if mixed else dil_trainer(kind, folder, out, batch)
    trainer.train()
    trainer.evaluate()
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        torch.save(weights, f"{out}/weights.pt")
        with open(f"{out}/log.json", "w") as file:
            json.dump(trainer.state.log_history, file)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, out, batch = sys.argv[1:]
    for kind in KINDS:
        run(kind, folder, f"{out}/{kind}", int(batch))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    # No teardown: gloo's threads abort the process now and then ("terminate called without an active
    # exception") when a peer is gone first. Everything is written, failures have been raised.
    sys.stdout.flush()
    os._exit(0)
