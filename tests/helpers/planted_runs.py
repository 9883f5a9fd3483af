"""Short runs of `DILTrainer` with one planted fault each, and healthy ones.

Run by hand, `python tests/helpers/planted_runs.py --write` counts what `dilkern report` says of them,
in the table of docs/guide.md.
"""

import contextlib
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import tiny_models as tiny
import torch
from datasets import Dataset
from training_runs import COMMON

from dilkern.cli.findings import findings
from dilkern.cli.run_folder import Run
from dilkern.integrations.trl import DILConfig, DILTrainer

GOOD = ["I am glad to say more about the {}.", "A {} is close to it.", "The {} is a good number."]
BAD = ["No idea, look up the {} yourself.", "Really, a {}.", "What is it with the {} again?"]


def rows(count, seed, longer=False, alike=False, turned=0.0):
    """Pairs of a kind and an unkind answer of one or two sentences.

    Chosen ones may be longer by one to four; `alike`: both are kind, with another word in the end;
    `turned` is the share of pairs the wrong way round.
    """
    draw = random.Random(seed)
    result = []
    for i in range(count):
        prompt = f"What is a {draw.choice(tiny.NOUNS)} number {i}?"
        sides = [
            " ".join(draw.choice(kind).format(draw.choice(tiny.NOUNS)) for _ in range(number))
            for kind, number in (
                (GOOD, draw.randint(1, 2) + (draw.randint(1, 4) if longer else 0)),
                (BAD, draw.randint(1, 2)),
            )
        ]
        if alike:
            sides = [f"{sides[0]} {last}" for last in draw.sample(tiny.NOUNS, 2)]
        chosen, rejected = sides[::-1] if draw.random() < turned else sides
        result.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(result)


def train(seed=0, *, pairs=32, held_out=24, warm_up=False, data=None, of_held_out=None, **options):
    """Train a tiny Llama from a seed and return the run as `dilkern report` reads it.

    `data` and `of_held_out` go to `rows`; `warm_up` is supervised, on the chosen answers.
    """
    data, of_held_out = data or {}, of_held_out or {}
    settings = {
        **COMMON, "max_steps": 24, "seed": seed, "eval_strategy": "steps", "eval_steps": 8, **options
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        init = {
            "train_dataset": rows(pairs, seed, **data),
            "eval_dataset": rows(held_out, seed + 100, **of_held_out),
            "processing_class": tiny.tokenizer(),
        }
        model = tiny.save(f"{folder}/model", seed=seed)
        if warm_up:
            config = DILConfig(
                folder, **{**COMMON, "max_steps": 60, "learning_rate": 5e-3}, loss_type="sft"
            )
            trainer = DILTrainer(model, args=config, **init)
            trainer.train()
            trainer.save_model(model)
        trainer = DILTrainer(model, args=DILConfig(folder, **settings), **init)
        trainer.train()
    return Run("", trainer.state.log_history, {"loss": settings.get("loss_type", "lsif")})


def _both(**data):
    return {"data": data, "of_held_out": data}


# Anchor in docs/guide.md: what plants the fault.
FAULTS = {
    "nan": {"learning_rate": 1e30, "max_grad_norm": 0},
    "nothing-moves": {"learning_rate": 1e-7},
    "chosen-falls": {"loss_type": "dpo", "warm_up": True, **_both(alike=True)},
    "linear-extension": {"max_log_ratio": 0.02},
    "flat-curve": {"loss_type": "dpo", "learning_rate": 1e-2, "max_steps": 48, "pairs": 8},
    "length": {"loss_type": "dpo", **_both(longer=True)},
    "swapped": {"data": {"turned": 1.0}},
    "not-told-apart": {"loss_type": "dpo", **_both(turned=0.5)},
}
HEALTHY = {
    loss: {"loss_type": loss}
    for loss in ("lsif", "ukl", "bce", "dpo", "dpo_norm", "ipo_norm", "kto", "simpo")
} | {
    "dpo, a fifth of the labels wrong": {"loss_type": "dpo", **_both(turned=0.2)},
    "lsif, a fifth of the labels wrong": _both(turned=0.2),
    "lsif, chosen longer": _both(longer=True),
    "dpo_norm, chosen longer": {"loss_type": "dpo_norm", **_both(longer=True)},
    "lsif after a warm-up": {"warm_up": True, "learning_rate": 3e-4},
    "dpo after a warm-up": {"loss_type": "dpo", "warm_up": True, "learning_rate": 3e-4},
}
# The thresholds were settled while looking at seed 0.
SEEDS = (1, 2, 3)


def count():
    """Return the rows of the table: what was planted, in how many runs, hits, what else was said."""
    lines = ["| planted | runs | found | also said |", "|---|---|---|---|"]
    for fault, options in FAULTS.items():
        said = [[found.anchor for found in findings(train(seed, **options))] for seed in SEEDS]
        others = Counter(anchor for anchors in said for anchor in anchors if anchor != fault)
        also = ", ".join(f"{anchor} ({number})" for anchor, number in others.items()) or "-"
        hits = sum(fault in anchors for anchors in said)
        lines.append(f"| [{fault}](#{fault}) | {len(SEEDS)} | {hits} | {also} |")
        print(lines[-1], file=sys.stderr)
    for name, options in HEALTHY.items():
        said = ", ".join(found.anchor for found in findings(train(SEEDS[0], **options)))
        lines.append(f"| nothing: {name} | 1 | - | {said or '-'} |")
        print(lines[-1], file=sys.stderr)
    return lines


def main():
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):
        table = "\n".join(count())
    print(table)
    if "--write" in sys.argv:
        begin, end = "<!-- planted:begin -->", "<!-- planted:end -->"
        guide = Path(__file__).parents[2] / "docs" / "guide.md"
        before, _, rest = guide.read_text().partition(begin)
        after = rest.partition(end)[2]
        guide.write_text(f"{before}{begin}\n{table}\n{end}{after}")


if __name__ == "__main__":
    main()
