"""From rows of text or token ids to padded batches, chosen sequences first.

S sequences, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dilkern.integrations.data import IGNORE_INDEX, check_eos
from dilkern.validation import reject


def kept(max_length: int | None, truncation_mode: str) -> slice:
    """Return what truncation leaves of a row: the first ("keep_start") or last ids."""
    end = max_length is not None and truncation_mode == "keep_end"
    return slice(-max_length, None) if end else slice(max_length)  # type: ignore[operator]


def _padded(rows: list[Tensor], value: int) -> Tensor:
    """Stack rows (l,) of ids as (S, L), filled up on the right."""
    return pad_sequence(rows, batch_first=True, padding_value=value)


@dataclass
class PreferenceCollator:
    """Turn rows of prompt, chosen, rejected into one padded batch, chosen first.

    Args:
        tokenizer: with a chat template where rows hold lists of messages.
        max_length: longer sequences lose their end; None keeps all.

    Returns of a call: input_ids, attention_mask, labels (S, L), labels -100 outside completions.

    Raises:
        ValueError: a tokenizer without an end-of-sequence token, a prompt that leaves no room for a
            token of its completion.

    Example:
        >>> from dilkern.integrations.collators import PreferenceCollator  # doctest: +SKIP
        >>> collator = PreferenceCollator(tokenizer)  # doctest: +SKIP
        >>> loader = DataLoader(rows, batch_size=4, collate_fn=collator)  # doctest: +SKIP
    """

    tokenizer: Any
    max_length: int | None = 1024

    def __post_init__(self) -> None:
        check_eos(self.tokenizer)

    def _ids(self, value: Any, **options: Any) -> list[int]:
        if not isinstance(value, str):
            value = self.tokenizer.apply_chat_template(value, tokenize=False, **options)
            options = {"add_special_tokens": False}
        ids: list[int] = self.tokenizer(value, **options)["input_ids"]
        return ids

    def encode(self, prompt: Any, completion: Any) -> tuple[list[int], list[int]]:
        """Return input_ids and labels of one completion."""
        if isinstance(prompt, str):
            start = self._ids(prompt)
            full = self._ids(prompt + completion + self.tokenizer.eos_token)
        else:
            start = self._ids(prompt, add_generation_prompt=True)
            full = self._ids(list(prompt) + list(completion))
        # Where they part, not the length of the prompt: tokens may merge across the boundary.
        same = [a == b for a, b in zip(start, full)]
        size = same.index(False) if False in same else len(same)
        if size >= len(full[: self.max_length]):
            reject(
                f"a prompt must be shorter than max_length={self.max_length} and its completion "
                "have a token",
                f"a prompt of {size} of {len(full)} tokens, {prompt!r:.60}",
                "Raise max_length, or drop the row.",
            )
        labels = [IGNORE_INDEX] * size + full[size:]
        return full[: self.max_length], labels[: self.max_length]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        pairs = [
            self.encode(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in rows
        ]
        pad = self.tokenizer.pad_token_id
        if pad is None:
            pad = self.tokenizer.eos_token_id

        ids = [torch.tensor(ids) for ids, _ in pairs]
        labels = [torch.tensor(labels) for _, labels in pairs]
        return {
            "input_ids": _padded(ids, pad),
            "attention_mask": _padded([torch.ones_like(row) for row in ids], 0),
            "labels": _padded(labels, IGNORE_INDEX),
        }


@dataclass
class UnpairedCollator:
    """Batch examples with prompt_ids, completion_ids and is_chosen, chosen ones first.

    Args:
        inner: TRL's `DataCollatorForPreference`, which cuts and pads.
    """

    inner: Any

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        examples = sorted(examples, key=lambda example: not example["is_chosen"])
        # Of pairs whose second half is the prompts alone.
        pairs = [{**e, "chosen_ids": e["completion_ids"], "rejected_ids": []} for e in examples]
        batch = {name: value[: len(examples)] for name, value in self.inner(pairs).items()}
        batch["is_chosen"] = torch.tensor([bool(e["is_chosen"]) for e in examples])
        return batch


@dataclass
class UnpairedVisionCollator:
    """Process examples with images, prompt, completion and label as they come, chosen ones first.

    Args:
        inner: TRL's `DataCollatorForVisionUnpairedPreference`.
    """

    inner: Any

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        # Copies: TRL's collator takes images out of its examples.
        examples = [dict(e) for e in sorted(examples, key=lambda example: not example["label"])]
        batch: dict[str, Tensor] = dict(self.inner(examples))
        batch["is_chosen"] = batch.pop("label").bool()
        return batch


def mismatched(
    inputs: dict[str, Any], pad_token_id: int, max_length: int | None, truncation_mode: str
) -> dict[str, Any]:
    """Pair each prompt with the completion of the next row: KTO's mismatched pairs.

    What the batch has per token (S, L) goes with the tokens; all else, as images, belongs to the
    prompts, whose order stays.

    Raises:
        ValueError: a batch with position_ids, which a mismatched pair has none of.
    """
    if "position_ids" in inputs:
        reject(
            "a loss of mismatched pairs needs a batch without position_ids",
            "position_ids",
            "Leave them to the model, or take another loss than 'kto'.",
        )
    completion = inputs["completion_mask"] == 1
    prompt = (inputs["attention_mask"] == 1) & ~completion

    cut = kept(max_length, truncation_mode)

    def joined(values: Tensor, fill: int) -> Tensor:
        halves = zip(values, prompt, values.roll(-1, 0), completion.roll(-1, 0))
        return _padded([torch.cat([a[of_a], b[of_b]])[cut] for a, of_a, b, of_b in halves], fill)

    return {
        name: joined(value, pad_token_id if name == "input_ids" else 0)
        if getattr(value, "shape", None) == prompt.shape
        else value
        for name, value in inputs.items()
    }
