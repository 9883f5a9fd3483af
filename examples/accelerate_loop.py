"""Preference tuning in a loop of one's own with accelerate, LoRA and DIL.

accelerate launch examples/accelerate_loop.py --model DIR_OR_HUB_ID
"""

import argparse

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from dilkern.integrations.collators import PreferenceCollator
from dilkern.integrations.data import read_preferences
from dilkern.integrations.packing import check_packing
from dilkern.integrations.transformers import compute_loss, install_head


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="examples/data/preferences.jsonl")
    parser.add_argument("--loss", default="lsif")
    parser.add_argument("--output-dir", default="out/accelerate_loop")
    parser.add_argument("--max-steps", type=int, default=50)
    options = parser.parse_args(argv)

    accelerator = Accelerator(gradient_accumulation_steps=1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    install_head(model)
    check_packing(model, answers=2)  # can it run each prompt once for its two answers?
    rows = read_preferences(options.data).to_list()
    loader = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=PreferenceCollator(tokenizer))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    losses = []
    while len(losses) < options.max_steps:
        for batch in loader:
            with accelerator.accumulate(model):
                # Reference: adapter off. Both passes run each prompt once.
                output = compute_loss(model, batch, loss=options.loss, answers=2)
                accelerator.backward(output.loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(output.loss.item())
            margin = (output.chosen_log_ratios.mean() - output.rejected_log_ratios.mean()).item()
            accelerator.print(f"step {len(losses)} loss {losses[-1]:.4f} margin {margin:.4f}")
            if len(losses) == options.max_steps:
                break
    accelerator.unwrap_model(model).save_pretrained(options.output_dir)
    return losses


if __name__ == "__main__":
    main()
