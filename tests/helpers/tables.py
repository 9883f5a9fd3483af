"""Tables of the README that are made from the code: `python tests/helpers/tables.py` prints them."""

from dilkern import LOSSES


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


if __name__ == "__main__":
    print(loss_table(LOSSES.values()))
