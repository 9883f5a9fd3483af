"""What `DILTrainer` refuses before it trains: data and options that do not go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from dilkern.integrations.collators import kept
from dilkern.integrations.data import check_differences
from dilkern.losses import Loss
from dilkern.validation import reject


def is_unpaired(dataset: Any) -> bool:
    columns = next(iter(dataset))
    return {"label", "completion"} <= set(columns) or "completion_ids" in columns


def has_images(dataset: Any) -> bool:
    return not {"image", "images"}.isdisjoint(next(iter(dataset)))


def brings_reference(dataset: Any) -> bool:
    return not is_unpaired(dataset) and "ref_chosen_logps" in next(iter(dataset))


def check_run(
    entry: Loss,
    args: Any,
    *,
    train: Any,
    evals: Sequence[Any],
    needs_reference: bool,
    ref_model: Any,
    peft_config: Any,
) -> None:
    """Refuse data, options and models that the loss, or one another, leave no meaning.

    Args:
        entry: the loss.
        args: a DILConfig.
        train, evals: the datasets as they were given.
        needs_reference: whether reference log-probs are computed here.
        ref_model, peft_config: as given.
    """
    unpaired, images, brought = is_unpaired(train), has_images(train), brings_reference(train)
    pairs = "an unpaired dataset (prompt, completion, label)"
    whole = getattr(peft_config, "modules_to_save", None) or ()
    unused = "the dataset brings ref_chosen_logps" if brought else f"loss {entry.name!r} uses none"
    batches = ["per_device_train_batch_size", *(["per_device_eval_batch_size"] if evals else [])]
    rules = [
        (
            ref_model is not None and not needs_reference,
            "`ref_model` must be left out",
            f"a ref_model, but {unused}",
            "Drop one of them.",
        ),
        *(
            (
                brought and clash,
                "reference log-probs come with text alone, for a reference of fixed pairs",
                f"columns ref_chosen_logps, and {what}",
                "Remove these columns, or leave out the other.",
            )
            for clash, what in (
                (args.precompute_ref_log_probs, "precompute_ref_log_probs=True"),
                (
                    entry.baseline,
                    f"loss {entry.name!r}, which scores pairs that change with the batch",
                ),
                (images, "images, whose collator drops them"),
            )
        ),
        (
            unpaired and (args.pairing or entry.pairing) == "pairwise",
            f"loss {entry.name!r} with pairwise pairing needs pairs",
            pairs,
            "Use prompt, chosen and rejected, or a pointwise loss such as 'lsif'.",
        ),
        (
            unpaired and args.precompute_ref_log_probs,
            "precompute_ref_log_probs needs a paired dataset",
            pairs,
            "Set precompute_ref_log_probs=False.",
        ),
        (
            args.quantize_lm_head and "lm_head" in whole,
            "an lm_head in 4 bits cannot be trained whole",
            "quantize_lm_head=True and modules_to_save=['lm_head']",
            "Drop one of them; an untied lm_head may go into target_modules.",
        ),
        (
            (args.padding_free or args.shared_prompts) and images,
            "padding_free and shared_prompts take text alone",
            "a train_dataset with images",
            "Set padding_free=False and shared_prompts=False.",
        ),
        (
            args.shared_prompts and unpaired,
            "shared_prompts needs pairs, whose two answers have one prompt",
            pairs,
            "Set padding_free=True instead.",
        ),
        (
            args.sampling == "group_by_length" and (unpaired or images),
            "'group_by_length' takes pairs of text: how many are chosen in an unpaired batch, "
            "and so its loss, would follow their lengths; those of images are not known",
            "an unpaired dataset" if unpaired else "a train_dataset with images",
            "Use train_sampling_strategy='random'.",
        ),
        (
            any(brought != ("ref_chosen_logps" in next(iter(data))) for data in evals),
            "train and eval dataset must both bring reference log-probs, or neither",
            f"ref_chosen_logps in the {'train' if brought else 'eval'} dataset alone",
            "Add the columns to the other one, or drop them.",
        ),
        (
            any(is_unpaired(data) != unpaired for data in evals),
            "train and eval dataset must both be paired or both unpaired",
            "one of each",
            "Convert one of them.",
        ),
        *(
            (
                entry.baseline and getattr(args, name) < 2,
                f"loss {entry.name!r} needs batches of at least 2 examples, to mismatch them",
                f"{name}={getattr(args, name)}",
                "Raise it; gradient_accumulation_steps may go down for it.",
            )
            for name in batches
        ),
    ]
    for clash, *words in rules:
        if clash:
            reject(*words)


def check_cutting(sharded: bool, aux_loss: bool) -> None:
    """Refuse `max_tokens_per_batch` where a batch cannot be cut; known once the trainer is set up."""
    for clash, rule, what in (
        (
            sharded,
            "max_tokens_per_batch gives each rank as many forwards as its pairs need",
            "DeepSpeed or FSDP, whose ranks go through the layers together",
        ),
        (
            aux_loss,
            "max_tokens_per_batch needs a loss that is a sum over pairs",
            "the load-balancing loss of a MoE model, which depends on which tokens meet",
        ),
    ):
        if clash:
            reject(
                rule,
                what,
                "Leave it out; per_device_train_batch_size may go down and "
                "gradient_accumulation_steps up for it.",
            )


def check_tokens(prepared: Dataset, args: Any, name: str, positions: int | None) -> str | None:
    """Refuse sequences beyond the model's positions, nothing to score, and pairs of equals alone.

    Args:
        prepared: tokenized rows, as they go to the collator.
        args: a DILConfig.
        name: of the dataset, for messages.
        positions: of the model.

    Returns:
        What to say of pairs whose answers are equal; None if nothing.
    """
    longest, equal = args.max_length, 0
    cut = kept(longest, args.truncation_mode)
    known = ("chosen_ids", "rejected_ids", "completion_ids")
    columns = [column for column in known if column in prepared.column_names]
    for number, row in enumerate(prepared.select_columns(["prompt_ids", *columns]), 1):
        prompt, sides = row["prompt_ids"], []
        for column in columns:
            ids, mask = prompt + row[column], [0] * len(prompt) + [1] * len(row[column])
            sides.append((ids[cut], mask[cut]))
            if positions is not None and len(ids[cut]) > positions:
                reject(
                    f"{name}, row {number} (tokenized): a sequence must fit into the "
                    f"{positions} positions of the model",
                    f"{len(ids)} tokens",
                    f"Set max_length={positions}, drop the row, or take a model with more.",
                )
            if not any(mask[cut][1:]):  # nothing predicts a first token
                reject(
                    f"{name}, row {number} (tokenized): {column} must have a token to score",
                    f"{len(row[column])} after a prompt of {len(prompt)}, max_length={longest}",
                    "Drop the row, or raise max_length.",
                )
        equal += len(sides) == 2 and sides[0] == sides[1]
    return check_differences(equal, len(prepared), name)
