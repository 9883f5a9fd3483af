"""Preference data from a file or the hub, every row checked before any training starts.

Formats are TRL's: paired (prompt, chosen, rejected; prompt may be left to the common beginning of
both) or unpaired (prompt, completion, label), each as text or as lists of messages.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dilkern.validation import is_number, nearest, reject

PAIRED = ("prompt", "chosen", "rejected")
UNPAIRED = ("prompt", "completion", "label")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
IGNORE_INDEX = -100  # the label that is not scored
_KNOWN = {*PAIRED, *UNPAIRED, *REFERENCE, "tools", "chat_template_kwargs"}


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}, line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            text = line.strip()
            reject(
                f"{path}, line {number}: every line must be one JSON object",
                f"{error.msg.removesuffix(' at')} at column {error.colno} of {len(text)}",
                "The file is one JSON array: write its objects one per line, e.g. by "
                f"`jq -c '.[]' {path.name} > lines.jsonl`."
                if number == 1 and text.startswith("[")
                else "The line breaks off: copy the file again, or delete the line."
                if not text.endswith("}")
                else "Correct or delete this line.",
            )
        except UnicodeDecodeError as error:
            reject(
                f"{path}, after line {number}: the file must be UTF-8 text",
                f"{error.reason} at byte {error.start} of the block",
                "Convert the file to UTF-8.",
            )


def _load_dataset(source: str, split: str, name: str | None) -> Any:
    """Load a folder or a dataset of the hub, as `datasets` finds the files of a split in it."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(source, name, split=split)
    except (DatasetsError, FileNotFoundError, ConnectionError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        reject(
            f"{source}: must be a folder of .jsonl or .parquet files or a dataset id of the hub, "
            f"with a split {split!r}",
            f"{type(error).__name__}: {reason}",
            "Check the id or path, the split (`split=`, --dataset-split), the network, and HF_TOKEN.",
        )


def _rows(source: str, split: str, name: str | None) -> Iterator[tuple[str, Any]]:
    path = Path(source)
    if path.suffix in (".jsonl", ".json", ".ndjson") and path.is_file():
        yield from _jsonl_rows(path)
        return
    import datasets

    if path.suffix == ".parquet" and path.is_file():
        table = datasets.Dataset.from_parquet(str(path))
    elif path.is_file() or path.suffix in (".jsonl", ".json", ".ndjson", ".parquet"):
        reject(
            "the dataset must be a .jsonl or .parquet file, a folder of them, or a hub id",
            f"{source}, which {'is something else' if path.exists() else 'does not exist'}",
            "Check the path.",
        )
    else:
        table = _load_dataset(source, split, name)
    for number, row in enumerate(table, 1):
        yield f"{source}, row {number}", {k: v for k, v in row.items() if v is not None}


def _check_filled(where: str, key: str, value: Any) -> None:
    """Refuse empty text, no messages, and messages whose last one is empty."""
    last = value
    if isinstance(value, list) and value and isinstance(value[-1], dict) and key != "prompt":
        last = value[-1].get("content")
    if last == [] or (isinstance(last, str) and not last.strip()):
        reject(f"{where}: {key!r} must not be empty", repr(last), "Fill it in or drop the row.")


def _check_text(where: str, key: str, value: Any) -> bool:
    """Check one of prompt, chosen, rejected, completion; return whether it is conversational."""
    _check_filled(where, key, value)
    if isinstance(value, str):
        return False
    if not isinstance(value, list):
        reject(
            f"{where}: {key!r} must be text or a list of messages",
            f"{type(value).__name__} {value!r:.60}",
            'Write "..." or [{"role": "user", "content": "..."}].',
        )
    for i, message in enumerate(value):
        for part in ("role", "content"):
            found = message.get(part) if isinstance(message, dict) else message
            if not isinstance(message, dict) or not isinstance(found, str):
                reject(
                    f"{where}: {part!r} of message {i} of {key!r} must be text",
                    f"{type(found).__name__} {found!r:.60}",
                    'Write {"role": "user", "content": "..."}; models of text alone are trained.',
                )
    if key != "prompt" and value[-1]["role"] != "assistant":
        reject(
            f"{where}: {key!r} must end with a message of the role 'assistant'",
            repr(value[-1]["role"]),
            "Put the user's turns into 'prompt'.",
        )
    return True


def _check_keys(where: str, keys: set[str]) -> bool:
    """Refuse rows that lack a column of their format; return whether they are unpaired."""
    unpaired = bool(keys & {"completion", "label"})
    if unpaired and keys & {"chosen", "rejected"}:
        reject(
            f"{where}: a row is either paired ({', '.join(PAIRED)}) or unpaired "
            f"({', '.join(UNPAIRED)})",
            f"the keys {', '.join(sorted(keys))}",
            "Keep the columns of one format.",
        )
    brought = [key for key in REFERENCE if key in keys]
    if len(brought) == 1 or (brought and unpaired):
        reject(
            f"{where}: {' and '.join(REFERENCE)} come together, in paired rows",
            f"{', '.join(brought)} in {'an unpaired' if unpaired else 'a paired'} row",
            "Add the other one, or drop them and let the reference be computed.",
        )
    needed = UNPAIRED if unpaired else ("chosen", "rejected")
    missing = [key for key in needed if key not in keys]
    if missing:
        near = nearest(missing[0], sorted(keys - _KNOWN))
        reject(
            f"{where}: key {missing[0]!r} is required",
            f"the keys {', '.join(sorted(keys)) or 'none'}",
            f"Rename {near!r} to {missing[0]!r}."
            if near
            else f"A paired row has {', '.join(PAIRED)}; an unpaired one {', '.join(UNPAIRED)}.",
        )
    return unpaired


def _check_row(where: str, row: Any) -> str:
    """Check a row; return its format in words, the same ones for rows that go together."""
    if not isinstance(row, dict):
        reject(f"{where}: a row must be a JSON object", type(row).__name__, "See the formats.")
    unpaired = _check_keys(where, set(row))
    if unpaired and not isinstance(row["label"], bool):
        reject(
            f"{where}: 'label' must be true (chosen) or false (rejected)",
            repr(row["label"]),
            "Convert it to a boolean.",
        )
    for key in REFERENCE:
        if key in row and not is_number(row[key]):
            reject(
                f"{where}: {key!r} must be a finite number, the sum of the token log-probs",
                repr(row[key]),
                "Correct it, or drop both columns and let the reference be computed.",
            )
    texts = [key for key in (*PAIRED, "completion") if key in row]
    kinds = {key: _check_text(where, key, row[key]) for key in texts}
    if len(set(kinds.values())) > 1:
        reject(
            f"{where}: all of {', '.join(texts)} must be text, or all lists of messages",
            ", ".join(f"{k} is {'messages' if c else 'text'}" for k, c in kinds.items()),
            "Convert them to one form.",
        )
    form = f"{'unpaired' if unpaired else 'paired'} {'messages' if any(kinds.values()) else 'text'}"
    reference = " and with reference log-probs" if REFERENCE[0] in row else ""
    return f"{form} {'with' if 'prompt' in row else 'without'} a prompt{reference}"


def read_preferences(source: str, *, split: str = "train", name: str | None = None) -> Any:
    """Read and check a preference dataset.

    Args:
        source: a .jsonl or .parquet file, a folder of them, or a dataset id of the hub.
        split: split of a folder or of a hub dataset.
        name: configuration of a hub dataset that has several.

    Returns:
        datasets.Dataset with the columns of TRL's formats; other columns are dropped.

    Raises:
        ValueError: with file, line, key and remedy for the first row that cannot be trained on.
    """
    from datasets import Dataset

    rows: list[dict[str, Any]] = []
    start = first = ""
    for where, row in _rows(source, split, name):
        form = _check_row(where, row)
        if not rows:
            start, first = where, form
        if form != first:
            reject(
                f"{where}: all rows must have one format",
                f"{form}, while {start} is {first}",
                "Split the file, or convert the rows.",
            )
        rows.append({key: row[key] for key in row if key in _KNOWN})
    if not rows:
        reject(f"{source}: a dataset needs at least one row", "none", "Check the file.")
    # Not Dataset.from_list, which knows only the columns of the first row. TRL unpacks the kwargs.
    absent: dict[str, Any] = {"chat_template_kwargs": {}}
    names = dict.fromkeys(key for row in rows for key in row)
    return Dataset.from_dict({k: [row.get(k, absent.get(k)) for row in rows] for k in names})


def check_completions(dataset: Any, name: str) -> tuple[int, int]:
    """Check columns and completions of a dataset that somebody else has read.

    Args:
        dataset: rows of TRL's formats. Of one without a length only the first row is looked at.
        name: how messages call it.

    Returns:
        Pairs whose completions are equal, and all rows; for `check_differences`.

    Raises:
        ValueError: a column is missing, or a completion is empty; with row and remedy.
    """
    row = next(iter(dataset))
    _check_keys(f"{name}, row 1", set(row))
    completions = [key for key in ("chosen", "rejected", "completion") if key in row]
    whole = hasattr(dataset, "select_columns") and hasattr(dataset, "__len__")
    rows = dataset.select_columns(completions) if whole else [row]
    equal = number = 0
    for number, row in enumerate(rows, 1):
        for key in completions:
            _check_filled(f"{name}, row {number}", key, row[key])
        equal += whole and "chosen" in row and row["chosen"] == row["rejected"]
    return equal, number


def check_differences(equal: int, rows: int, name: str) -> str | None:
    """Refuse pairs that are all the same twice; return a line about it where some are.

    Args:
        equal: pairs whose chosen and rejected completions are equal.
        rows: all pairs.
        name: how messages call the dataset.
    """
    if rows and equal == rows:
        reject(
            f"{name}: chosen and rejected completions must differ",
            f"the same twice in every row of {rows}",
            "Check the columns, and max_length: cut before they part, two completions are one.",
        )
    what = "chosen and rejected are the same completion (as cut to max_length) and teach nothing"
    return f"{name}: in {equal} of {rows} rows {what}" if equal else None


def model_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a batch the model's forward takes."""
    ours = {"labels", "completion_mask", "is_chosen", "ref_logps", *REFERENCE}
    return {key: value for key, value in inputs.items() if key not in ours}


def check_eos(tokenizer: Any) -> None:
    """Refuse a tokenizer without the token that ends a completion."""
    if tokenizer.eos_token is None:
        rule = "the tokenizer must have an end-of-sequence token"
        reject(rule, "none", "Set tokenizer.eos_token and save it.")


def check_against_tokenizer(dataset: Any, tokenizer: Any, source: str) -> None:
    """Refuse conversational data where the tokenizer cannot render it.

    Raises:
        ValueError: no chat template, or no end-of-sequence token.
    """
    row = dataset[0]
    value = row.get("chosen", row.get("completion"))
    if isinstance(value, list) and getattr(tokenizer, "chat_template", None) is None:
        reject(
            f"{source}, row 1: conversational data needs a tokenizer with a chat template",
            f"{type(tokenizer).__name__} without one",
            "Use an instruction-tuned model, set tokenizer.chat_template and save it, or write "
            "prompt, chosen and rejected as text.",
        )
    check_eos(tokenizer)
