"""What `--help` prints: the options that matter, without loading a library to say so."""

from __future__ import annotations

import textwrap

from dilkern.losses import LOSSES

_NAMES = textwrap.fill(
    ", ".join(LOSSES), 79, initial_indent=" " * 22, subsequent_indent=" " * 22
).lstrip()

HELP = {
    "dilkern": """\
Direct Imitation Learning and its rivals, without the logits.

  dilkern train     preference-tune a causal LM
  dilkern report    say what runs show, and draw them over each other
  dilkern plan      predict the memory of a run from the model's config
  dilkern doctor    versions, devices, backends

Each has --help. dilkern --version prints the version.""",
    "train": f"""\
Usage: dilkern train --model MODEL --dataset DATA [options]

Preference-tunes a causal LM; writes the model or adapter, metrics and a plot.
Flags and YAML files of `trl dpo` run as they are, or are refused by name;
dashes and underscores are the same, and --no-NAME turns a switch off.

What
  --model MODEL       folder or hub id
  --gguf-file NAME    of a GGUF file there: dequantised, into DIR/_base
  --dataset DATA      .jsonl, .parquet, a folder of them, or hub id
  --eval-dataset DATA held-out data; or --eval-split 0.1 of the data
  --output-dir DIR    where everything goes; default out
  --config FILE       YAML file with any of these options; flags win over it
  --resume            go on from the newest whole checkpoint in --output-dir

Loss
  --loss NAME         default lsif; one of
                      {_NAMES}
  --loss-param K=X    parameter of the loss, e.g. lam=-0.5
  --beta X            temperature; default of the loss
  --max-log-ratio X   exponentials are linear beyond; default 10, or none
  --ref-model MODEL   reference; default: the model as it starts
  --precompute-ref-log-probs
                      score the reference once, before training
  --reference-free    use no reference

What is trained: all weights, or with any of these an adapter
  --lora-r N          LoRA of rank N, alpha 2N; --use-peft takes 16
  --lora-target NAME ...
                      module names; default all-linear, which leaves out lm_head
  --load-in-4bit      NF4 base weights (QLoRA)
  --quantize-lm-head  NF4 lm_head too

How
  --learning-rate X   default 1e-4 with an adapter, 1e-6 without
  --epochs X          passes over the data; default 3
  --max-steps N       updates, instead of --epochs
  --batch-size N      examples per device and step; default 8
  --gradient-accumulation N
                      steps per update
  --max-length N      tokens; default 1024, or what the model has
  --shared-prompts    no padding, each prompt once for its two answers
  --padding-free      no padding, both answers with their prompt
  --max-tokens-per-batch N
                      of these two: rows of at most N tokens, the same gradient
  --precision NAME    fp32, bf16 or fp16; default bf16 if the hardware has it
  --cpu               use no GPU
  --logging-steps N, --eval-steps N, --save-steps N

--help-all lists every option.""",
    "report": """\
Usage: dilkern report RUN... [--output FILE.png]

Reads the metrics of one or several runs, says in words what they show, each
with its figures and the section of docs/guide.md that explains it, and draws
the runs over each other.

  RUN                 --output-dir of `dilkern train`, or a folder with the
                      trainer_state.json of any trainer
  --output FILE       the picture, .png, .svg or .pdf; default report.png""",
    "plan": """\
Usage: dilkern plan --model MODEL [options]

Predicts the memory of a run with three loss heads, and the longest sequence
that fits, from the config alone.

  --model MODEL       folder with a config.json, or hub id
  --gguf-file NAME    of a GGUF file there
  --seq-len N         tokens per sequence; default 2048
  --batch-size N      pairs per device and step; default 1
  --vram X            memory of the GPU in GiB; default 24
  --reserve X         GiB left to the driver and to fragments; default 1
  --lora-r N          LoRA of rank N; default: all weights are trained
  --load-in-4bit      NF4 base weights (QLoRA), LoRA of rank 16 by default
  --quantize-lm-head  NF4 lm_head too; of a tied one, a copy
  --workspace-mib X   temporary memory of the loss head; default 256
  --trust-remote-code run code that comes with a model""",
    "doctor": """\
Usage: dilkern doctor

Prints versions, devices, and for each backend whether it can run and why not.""",
}
