"""Preference tuning with the plain `transformers.Trainer`, LoRA and DIL.

python examples/plain_trainer.py --model DIR_OR_HUB_ID --data examples/data/preferences.jsonl
"""

import argparse

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from dilkern.integrations.collators import PreferenceCollator
from dilkern.integrations.data import read_preferences
from dilkern.integrations.transformers import PreferenceMixin


class PreferenceTrainer(PreferenceMixin, Trainer):
    pass


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="examples/data/preferences.jsonl")
    parser.add_argument("--loss", default="lsif")
    parser.add_argument("--output-dir", default="out/plain_trainer")
    parser.add_argument("--max-steps", type=int, default=50)
    options = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    args = TrainingArguments(
        options.output_dir,
        max_steps=options.max_steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = PreferenceTrainer(
        get_peft_model(model, config),
        args,
        train_dataset=read_preferences(options.data),
        data_collator=PreferenceCollator(tokenizer),
        preference={"loss": options.loss},
    )
    trainer.train()
    trainer.save_model()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
