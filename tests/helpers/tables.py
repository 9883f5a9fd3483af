"""Tables of the documentation that are made from the code.

`python tests/helpers/tables.py` puts them between their markers in docs/.
"""

import dataclasses
import re
from pathlib import Path

from dilkern import LOSSES

ROOT = Path(__file__).resolve().parents[2]


def table(header, rows):
    lines = [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def loss_table(losses):
    rows = ["| name | loss of one example | defaults | source |", "|---|---|---|---|"]
    for entry in losses:
        names = " / ".join(f"`{n}`" for n in (entry.name, *entry.aliases))
        formula = entry.formula.replace("|", "\\|")
        defaults = [] if entry.beta is None else [f"beta={entry.beta:g}"]
        defaults += [f"{k}={v:g}" for k, v in entry.params.items()]
        defaults += [f"sft_weight={entry.sft_weight:g}"] if entry.sft_weight else []
        defaults += ["f per token"] if entry.length_normalize else []
        defaults += [] if entry.reference else ["no reference"]
        note = f"<br>{entry.note}" if entry.note else ""
        rows.append(f"| {names} | `{formula}` | {', '.join(defaults)} | {entry.source}{note} |")
    return "\n".join(rows)


def default(field):
    """The default of a dataclass's field as text."""
    made = field.default_factory
    value = field.default if made is dataclasses.MISSING else made()
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return f"`{value}`" if value not in ("", None) else "none"


def text(field):
    """The help of a field, as a cell of a table."""
    words = " ".join(str(field.metadata.get("help", "")).split())
    return words.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("$", "\\$")


def trl_losses():
    """Each loss of TRL's `DPOTrainer` and the name of the same one here."""
    from trl import DPOConfig

    (field,) = (f for f in dataclasses.fields(DPOConfig) if f.name == "loss_type")
    rows = []
    for name in re.findall(r"`'(\w+)'`", field.metadata["help"]):
        told = [e for e in LOSSES.values() if re.search(rf"TRL.*\b{name}\b", e.note)]
        named = [e for e in LOSSES.values() if name in (e.name, *e.aliases)]
        entry = next(iter(told + named), None)
        here = f"`{entry.name}`" if entry else "-"
        rows.append((f"`{name}`", here, (entry.note if entry else "") or ""))
    return table(("TRL's `loss_type`", "here", "note"), rows)


def trl_options():
    """What an option of `trl dpo` is here, where it is not the same."""
    from trl import DPOConfig

    from dilkern.cli.options import _ELSEWHERE
    from dilkern.integrations.trl_config import _FOREIGN, DILConfig

    refused = {name for name, *_ in _FOREIGN} | set(_ELSEWHERE)
    rows = [(f"`--{n}`", f"refused, unless `{value}`", do) for n, value, do in _FOREIGN]
    rows += [(f"`--{name}`", "refused", remedy) for name, remedy in _ELSEWHERE.items()]
    theirs = {field.name: field for field in dataclasses.fields(DPOConfig)}
    for field in dataclasses.fields(DILConfig):
        if field.name not in theirs or field.name in refused:
            continue
        ours, other = default(field), default(theirs[field.name])
        if ours != other:
            said = text(field)
            rows.append((f"`--{field.name}`", f"default {ours} (TRL: {other})", said))
    return table(("flag or YAML key", "here", "what to do, or what it is"), rows)


def short_names():
    from dilkern.cli.options import _ALIASES

    names = (f"`--{short.replace('_', '-')}` (`--{name}`)" for short, name in _ALIASES.items())
    return ", ".join(names)


def new_options():
    """Options that TRL does not have."""
    from trl import DPOConfig
    from trl.scripts.utils import ScriptArguments

    from dilkern.cli.options import TrainArguments
    from dilkern.integrations.trl_config import DILConfig

    rows = []
    for ours, theirs in ((DILConfig, DPOConfig), (TrainArguments, ScriptArguments)):
        known = {field.name for field in dataclasses.fields(theirs)}
        for field in dataclasses.fields(ours):
            if field.name not in known:
                name = field.name.replace("_", "-")
                rows.append((f"`--{name}`", default(field), text(field)))
    return table(("flag", "default", "what it is"), rows)


def inherited_options():
    """Options that are TRL's own, and the names of those of transformers."""
    from transformers import TrainingArguments
    from trl import DPOConfig
    from trl.scripts.utils import ScriptArguments
    from trl.trainer.model_config import ModelConfig

    from dilkern.cli.options import _ELSEWHERE, TrainArguments
    from dilkern.integrations.trl_config import _FOREIGN, DILConfig

    refused = {name for name, *_ in _FOREIGN} | set(_ELSEWHERE)
    general = {field.name for field in dataclasses.fields(TrainingArguments)}
    parts = []
    for title, kinds in (
        ("Data", (TrainArguments, ScriptArguments)),
        ("Model and adapter", (ModelConfig, ModelConfig)),
        ("Trainer", (DILConfig, DPOConfig)),
    ):
        ours, theirs = ({f.name: f for f in dataclasses.fields(kind)} for kind in kinds)
        rows = [
            (f"`--{name.replace('_', '-')}`", default(ours[name]), text(ours[name]))
            for name in theirs
            if name not in refused | general and ours[name].init
        ]
        parts.append(f"### {title}\n\n{table(('flag', 'default', 'what it is'), rows)}")
    names = ", ".join(f"`--{name.replace('_', '-')}`" for name in sorted(general - refused))
    parts.append(f"### Of `transformers.TrainingArguments`\n\n{names}")
    return "\n\n".join(parts)


def short_help(command):
    from dilkern.cli.help import HELP

    return f"```text\n{HELP[command]}\n```"


# What stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` of a file.
TABLES = {
    "docs/losses.md": {"losses": lambda: loss_table(LOSSES.values())},
    "docs/howto/from-trl.md": {
        "trl-losses": trl_losses,
        "trl-options": trl_options,
        "short-names": short_names,
    },
    "docs/reference/cli.md": {
        "train": lambda: short_help("train"),
        "report": lambda: short_help("report"),
        "plan": lambda: short_help("plan"),
        "new-options": new_options,
        "inherited-options": inherited_options,
    },
}


def filled(file):
    """The text of a file with its tables anew."""
    page = (ROOT / file).read_text(encoding="utf-8")
    for name, make in TABLES[file].items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        assert found, f"{file} has no {begin} ... {end}"
        page = f"{before}{begin}\n{make()}\n{end}{after}"
    return page


if __name__ == "__main__":
    for name in TABLES:
        (ROOT / name).write_text(filled(name), encoding="utf-8")
