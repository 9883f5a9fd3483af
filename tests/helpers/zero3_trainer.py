"""Short DILTrainer runs; see heads/test_zero3.py. One process trains plainly, torchrun with ZeRO-3."""

import json
import os
import sys
from pathlib import Path

import tiny_models as tiny
import torch
from peft import LoraConfig
from zero3_ranks import SETTINGS, deepspeed

from dilkern.integrations.trl import DILConfig, DILTrainer

KINDS = ("full", "lora")


def run(kind, folder, out, world):
    torch.manual_seed(0)
    args = DILConfig(
        f"{out}/{kind}-{world}",
        loss_type="lsif",
        use_cpu=True,
        bf16=False,
        report_to="none",
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0.0,
        max_steps=3,
        per_device_train_batch_size=8 // world,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        deepspeed=SETTINGS | {"train_micro_batch_size_per_gpu": "auto"} if world > 1 else None,
    )
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = DILTrainer(
        folder,
        args=args,
        train_dataset=tiny.dataset(16),
        processing_class=tiny.tokenizer(),
        peft_config=adapter if kind == "lora" else None,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        Path(f"{out}/{kind}-{world}.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    torch.set_num_threads(1)
    (out,) = sys.argv[1:]
    folder = f"{out}/model"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        tiny.save(folder)
    else:
        deepspeed().init_distributed("gloo")  # otherwise from_pretrained takes the world for one
    for kind in KINDS:
        run(kind, folder, out, world)
    if world > 1:
        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # as in head_ranks.py
