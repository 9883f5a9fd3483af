"""The model card beside what a trainer saves: what it is, how it was made, how it did."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from dilkern import __version__
from dilkern.objective import Objective

TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ kind }} of {{ base }}{% if dataset %}, trained on {{ dataset }}{% endif %} with the preference loss
**{{ loss.name }}** by dilkern {{ version }}.

## Loss

`{{ loss.formula }}`

f is the {{ f }} of a sequence, `a | b` a loss of chosen and of rejected
sequences. {{ loss.source }}.{% if loss.note %} {{ loss.note }}.{% endif %} Settled options:

    {{ objective }}

## Training

| | |
|---|---|
{% for name, value in training.items() %}| {{ name }} | {{ value }} |
{% endfor %}
{% if results %}## Results

| | last step logged | held out |
|---|---|---|
{% for name, train, held_out in results %}| {{ name }} | {{ train }} | {{ held_out }} |
{% endfor %}
Margin and accuracy compare beta f of the chosen and of the rejected answer.

{% endif %}## Use

```python
{{ use }}
```

## Cite

The loss: {{ loss.source }}.{% if is_dil %}

```bibtex
@inproceedings{xiao2025connection,
  title     = {On a Connection Between Imitation Learning and {RLHF}},
  author    = {Xiao, Teng and Yuan, Yige and Li, Mingxiao and Chen, Zhengyu and Honavar, Vasant G.},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  url       = {https://arxiv.org/abs/2503.05079}
}
```{% endif %}

The trainer: TRL, https://github.com/huggingface/trl.
"""

ADAPTER = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{where}")
tokenizer = AutoTokenizer.from_pretrained("{where}")"""
WHOLE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{where}")
tokenizer = AutoTokenizer.from_pretrained("{where}")"""

_RESULTS = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "logps/chosen_avg": "log-prob per token, chosen",
    "logps/rejected_avg": "log-prob per token, rejected",
}
_VERSIONS = ("torch", "transformers", "trl", "peft")


def _adapter_line(config: Any) -> str:
    rank, targets = getattr(config, "r", None), getattr(config, "target_modules", None)
    words = [config.peft_type.value]  # prompt tuning has neither rank nor modules
    if rank is not None:
        words.append(f"r={rank}")
    if targets:
        names = targets if isinstance(targets, str) else ", ".join(sorted(targets))
        words.append(f"on {names}")
    return ", ".join(words)


def _results(history: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    def last(prefix: str) -> dict[str, Any]:
        return next((entry for entry in reversed(history) if prefix + "loss" in entry), {})

    def shown(value: Any) -> str:
        return "-" if value is None else f"{value:.4g}"

    train, held_out = last(""), last("eval_")
    return [
        (label, shown(train.get(name)), shown(held_out.get("eval_" + name)))
        for name, label in _RESULTS.items()
        if name in train or "eval_" + name in held_out
    ]


def model_card(
    objective: Objective,
    args: Any,
    state: Any,
    *,
    base: str,
    adapter: Any = None,
    where: str,
    name: str | None = None,
    dataset: str | None = None,
    tags: list[str] | None = None,
) -> ModelCard:
    """Return the card of a run.

    Args:
        objective: the loss with its options.
        args: the run's `DILConfig`.
        state: the trainer's state, with its history.
        base: name or folder of the model that training began with.
        adapter: the PEFT configuration of an adapter; None for a whole model.
        where: the name or folder to load the result from.
        name: heading; None for the last part of `where`.
        dataset: name or file of the pairs.
        tags: for the hub.
    """
    on_hub = [x for x in (base, dataset) if x and x.count("/") == 1 and not Path(x).exists()]
    data = ModelCardData(
        base_model=base if base in on_hub else None,
        datasets=[dataset] if dataset in on_hub else None,
        library_name="transformers" if adapter is None else "peft",
        pipeline_tag="text-generation",
        tags=tags,
    )
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    training = {
        "steps": f"{state.global_step} of {batch} examples, {state.epoch or 0:.3g} epochs",
        "trained weights": "all" if adapter is None else _adapter_line(adapter),
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler_type.value}",
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "as loaded",
        "longest sequence": f"{args.max_length} tokens" if args.max_length else "not cut",
        "seed": args.seed,
        "versions": ", ".join(f"{p} {importlib.metadata.version(p)}" for p in _VERSIONS),
    }
    card: ModelCard = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=name or Path(where).name,
        kind="A fine-tuned version" if adapter is None else "An adapter",
        base=f"[{base}](https://huggingface.co/{base})" if base in on_hub else f"`{base}`",
        dataset=f"`{dataset}`" if dataset else "",
        loss=objective.loss,
        f="log-ratio of policy to reference"
        if objective.loss.reference and not args.reference_free
        else "log-prob",
        is_dil="(DIL)" in objective.loss.source,
        objective=objective,
        version=__version__,
        training=training,
        results=_results(state.log_history),
        use=(WHOLE if adapter is None else ADAPTER).format(where=where),
    )
    return card
