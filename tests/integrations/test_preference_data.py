"""A dataset with one bad row fails before training, with file, line, key and remedy."""

import copy
import json

import pytest
import tiny_models as tiny

from dilkern.integrations.data import check_against_tokenizer, read_preferences

GOOD = tiny.pairs(3)
TEXT = tiny.pairs(3, conversational=False)


def write(tmp_path, lines, name="pairs.jsonl"):
    path = tmp_path / name
    path.write_text("".join(line if line.endswith("\n") else line + "\n" for line in lines))
    return str(path)


def dump(rows):
    return [json.dumps(row) for row in rows]


def test_good_files(tmp_path):
    for rows in (GOOD, TEXT):
        read = read_preferences(write(tmp_path, [*dump(rows), "\n"]))
        assert read.to_list() == rows
    unpaired = read_preferences(write(tmp_path, dump(tiny.unpaired(4))))
    assert unpaired.column_names == ["prompt", "completion", "label"]
    extra = [{**row, "score": 3} for row in GOOD]
    assert "score" not in read_preferences(write(tmp_path, dump(extra))).column_names
    later = [GOOD[0], {**GOOD[1], "tools": [{"name": "f"}], "chat_template_kwargs": {"a": 1}}]
    first, second = read_preferences(write(tmp_path, dump(later)))
    assert second["tools"] == [{"name": "f"}]
    assert second["chat_template_kwargs"] == {"a": 1}
    assert dict(**first["chat_template_kwargs"]) in ({}, {"a": None})
    implicit = [{k: "Q: hi A: " + row[k] for k in ("chosen", "rejected")} for row in TEXT]
    assert len(read_preferences(write(tmp_path, dump(implicit)))) == 3


def test_parquet(tmp_path):
    path = str(tmp_path / "pairs.parquet")
    tiny.dataset(3).to_parquet(path)
    assert read_preferences(path).to_list() == GOOD
    path = str(tmp_path / "other.parquet")
    tiny.dataset(3).rename_column("rejected", "refused").to_parquet(path)
    with pytest.raises(ValueError, match="row 1: key 'rejected' is required"):
        read_preferences(path)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_folder(tmp_path, suffix):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for split, rows in {"train": GOOD, "test": tiny.pairs(2)}.items():
        if suffix == "parquet":
            tiny.dataset(len(rows)).to_parquet(str(folder / f"{split}.parquet"))
        else:
            write(folder, dump(rows), f"{split}.jsonl")
    assert read_preferences(str(folder)).to_list() == GOOD
    assert len(read_preferences(str(folder), split="test")) == 2
    with pytest.raises(ValueError, match=r"Unknown split .nope.*--dataset-split"):
        read_preferences(str(folder), split="nope")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="doesn't contain any data files"):
        read_preferences(str(tmp_path / "empty"))


def changed(**values):
    return json.dumps({k: v for k, v in {**GOOD[1], **values}.items() if v is not None})


BAD = {
    "cut off": ('{"prompt": [', "every line must be one JSON object; received Expecting value"),
    "cut off in a word": ('{"prompt": "a', "The line breaks off"),
    "not an object": ("[1, 2]", "must be a JSON object"),
    "missing": (changed(rejected=None), "'rejected' is required"),
    "misspelt": (changed(rejected=None, rejectd="x"), "Rename 'rejectd' to 'rejected'"),
    "empty text": (json.dumps({**TEXT[0], "chosen": " "}), "'chosen' must not be empty"),
    "empty list": (changed(rejected=[]), "'rejected' must not be empty"),
    "empty message": (
        changed(chosen=[{"role": "assistant", "content": ""}]),
        "'chosen' must not be empty",
    ),
    "number": (changed(chosen=3), "'chosen' must be text or a list of messages"),
    "no role": (changed(prompt=[{"content": "hi"}]), "message 0 of 'prompt'"),
    "content": (changed(prompt=[{"role": "user", "content": None}]), "'content' of message 0"),
    "wrong role": (
        changed(chosen=[{"role": "user", "content": "hi"}]),
        "'chosen' must end with a message of the role 'assistant'",
    ),
    "mixed row": (changed(prompt="hi"), "must be text, or all lists of messages"),
    "both formats": (changed(label=True), "either paired"),
    "label": (
        json.dumps({"prompt": "a", "completion": "b", "label": 1}),
        "'label' must be true",
    ),
    "other format": (json.dumps(TEXT[0]), "all rows must have one format"),
    "no prompt": (changed(prompt=None), "all rows must have one format"),
    "half a reference": (changed(ref_chosen_logps=-1.0), "come together, in paired rows"),
    "reference of an unpaired row": (
        json.dumps({**tiny.unpaired(1)[0], "ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0}),
        "come together, in paired rows",
    ),
    "reference text": (
        changed(ref_chosen_logps="-1", ref_rejected_logps=-1.0),
        "'ref_chosen_logps' must be a finite number",
    ),
    "reference of some rows": (
        changed(ref_chosen_logps=-1.0, ref_rejected_logps=-1.0),
        "all rows must have one format",
    ),
}


@pytest.mark.parametrize("line, message", BAD.values(), ids=BAD)
def test_bad_line(tmp_path, line, message):
    path = write(tmp_path, [json.dumps(GOOD[0]), line, json.dumps(GOOD[2])])
    with pytest.raises(ValueError) as caught:
        read_preferences(path)
    assert message in str(caught.value)
    assert f"{path}, line 2" in str(caught.value)


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_preferences(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="at least one row"):
        read_preferences(write(tmp_path, ["\n"]))
    with pytest.raises(ValueError, match="is something else"):
        read_preferences(write(tmp_path, ["a"], "pairs.csv"))
    with pytest.raises(ValueError, match=r"line 1: .*one JSON array: .*jq -c .*a.json"):
        read_preferences(write(tmp_path, ["[", *dump(TEXT), "]"], "a.json"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="UTF-8"):
        read_preferences(str(tmp_path / "latin.jsonl"))


def test_conversational_data_needs_a_chat_template():
    bare = copy.deepcopy(tiny.tokenizer())
    bare.chat_template = None
    check_against_tokenizer(tiny.dataset(2), tiny.tokenizer(), "x")
    check_against_tokenizer(tiny.dataset(2, conversational=False), bare, "x")
    with pytest.raises(ValueError, match=r"x, row 1: .*chat template"):
        check_against_tokenizer(tiny.dataset(2), bare, "x")
