"""Preference tuning as a Lightning module, LoRA and DIL.

python examples/lightning_module.py --model DIR_OR_HUB_ID      (needs: pip install lightning)
"""

import argparse

import lightning
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from dilkern import preference_metrics
from dilkern.integrations.collators import PreferenceCollator
from dilkern.integrations.data import read_preferences
from dilkern.integrations.transformers import compute_loss, install_head


class PreferenceModule(lightning.LightningModule):
    def __init__(self, model, learning_rate=1e-3, **options):
        super().__init__()
        self.model, self.learning_rate, self.options = model, learning_rate, options
        install_head(model)

    def training_step(self, batch, index):
        output = compute_loss(self.model, batch, **self.options)  # reference: adapter off
        self.log("train/loss", output.loss, prog_bar=True)
        self.log_dict({f"train/{k}": v for k, v in preference_metrics(output).items()})
        return output.loss

    def configure_optimizers(self):
        trained = (p for p in self.model.parameters() if p.requires_grad)
        return torch.optim.AdamW(trained, lr=self.learning_rate)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="examples/data/preferences.jsonl")
    parser.add_argument("--loss", default="lsif")
    parser.add_argument("--output-dir", default="out/lightning_module")
    parser.add_argument("--max-steps", type=int, default=50)
    options = parser.parse_args(argv)

    lightning.seed_everything(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(options.model), config)
    rows = read_preferences(options.data).to_list()
    loader = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=PreferenceCollator(tokenizer))
    trainer = lightning.Trainer(
        max_steps=options.max_steps,
        logger=False,
        enable_checkpointing=False,
        default_root_dir=options.output_dir,
        gradient_clip_val=1.0,
    )
    trainer.fit(PreferenceModule(model, loss=options.loss), loader)
    model.save_pretrained(options.output_dir)
    return float(trainer.callback_metrics["train/loss"])


if __name__ == "__main__":
    main()
