"""Tables and pictures of a study, from the files of its runs; what is missing is said."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.environment import markdown
from benchmarks.pictures import GREY, on_any_page, panels
from benchmarks.study_plan import DIL, METHODS, Study, columns, figures


def settings(method: str, run: dict[str, Any]) -> str:
    """Learning rate and knob of a run, as tables show them."""
    options, knob = run["options"], METHODS[method].knob
    told = f"{options['learning_rate']:g}"
    if knob:
        told += f", {knob} {(options | options.get('loss_params', {}))[knob]:g}"
    return told


def spread(values: list[float], digits: int) -> str:
    """Mean and, over several seeds, half of the distance between the outermost."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"


FIGURES = {  # column of the table: (figure, digits)
    "accuracy": ("accuracy", 3),
    "of sums / per token": ("", 0),
    "margin per token": ("margin", 3),
    "change of chosen per token": ("chosen", 3),
    "of rejected": ("rejected", 3),
    "largest beta f": ("largest", 2),
    "KL to reference per token": ("kl", 3),
    "perplexity of other text": ("perplexity", 2),
    "length of answers": ("length", 1),
}


def finals_table(study: Study) -> str:
    lines = []
    for method in study.methods:
        runs = study.finals(method)
        if not runs:
            continue
        seen = [figures(method, run) for run in runs]
        cells = [METHODS[method].title, settings(method, runs[0]), str(len(runs))]
        for name, digits in FIGURES.values():
            if name:
                values = [found[name] for found in seen if name in found]
                cells.append(spread(values, digits) if values else "")
            else:
                both = ("accuracy_sum", "accuracy_per_token")
                cells.append(" / ".join(f"{mean(f[key] for f in seen):.3f}" for key in both))
        clock = "cpu_seconds" if study.setup.device == "cpu" else "seconds"
        cells.append(f"{mean(study.setup.pairs / run[clock] for run in runs):.2f}")
        lines.append(cells)
    speed = "pairs per CPU second" if study.setup.device == "cpu" else "pairs/s"
    return markdown("|".join(("|learning rate, knob|seeds", *FIGURES, speed)), lines)


def grid_table(study: Study) -> str:
    lines = []
    for method in study.methods:
        best = study.chosen(method)
        for run in study.grid(method):
            found = figures(method, run)
            mark = "chosen" if best is not None and run["options"] == best["options"] else ""
            numbers = [f"{found[name]:.4f}" for name in ("log_loss", "nll")]
            numbers += [
                f"{found[name]:.3f}" for name in ("accuracy", "margin", "chosen", "rejected")
            ]
            norms = run["curve"]["grad_norm"]
            numbers += [f"{norms[0]:.2g} .. {max(norms):.2g}"]
            lines.append([METHODS[method].title, settings(method, run), *numbers, mark])
    header = "|learning rate, knob|log-loss|NLL of chosen|accuracy|margin per token"
    return markdown(
        f"{header}|change of chosen|of rejected|gradient norm, first .. largest|", lines
    )


def claims_table(study: Study) -> str:
    """The paper's figure as differences: chosen log-probs per token under DIL less those under others.

    Per test pair the mean over seeds of either side; the error is that of the mean over pairs, which
    knows nothing of other seeds, hence their range.
    """
    seeds = {}
    for method in study.methods:
        runs = study.finals(method)
        if len(runs) == study.seeds:
            ratios = [columns(run)[0] / columns(run)[2] for run in runs]
            seeds[method] = torch.stack(ratios)  # (seeds, pairs)
    lines = []
    for rival in (method for method in seeds if method not in DIL):
        cells = [METHODS[rival].title]
        for ours in DIL:
            if ours not in seeds:
                cells.append("")
                continue
            apart = seeds[ours] - seeds[rival]
            pairs, (low, high) = apart.mean(0), apart.mean(1).aminmax()
            size, error = float(pairs.mean()), float(pairs.std() / len(pairs) ** 0.5)
            agreed = abs(size) >= 2 * error and low * high > 0
            word = "undecided" if not agreed else "higher" if size > 0 else "lower"
            cells.append(f"{size:+.3f} ± {error:.3f} ({low:+.3f} .. {high:+.3f}): {word}")
        lines.append(cells)
    return markdown("|" + "|".join(METHODS[ours].title for ours in DIL), lines)


def report(study: Study) -> str:
    """Everything that the files show, as Markdown."""
    runs = study.runs()
    done = [run for run in runs if study.path(run).exists()]
    missing = [run for run in runs if run not in done]
    text = [f"**{len(done)} of {len(runs)} runs are finished**"]
    if missing:
        names = dict.fromkeys(METHODS[run.method].title for run in missing)
        text[0] += f"; runs are missing of: {'; '.join(names)}. No conclusion before they are there"
    text[0] += "."
    if not done:
        return text[0] + "\n"
    where = next(found for run in runs if (found := study.read(run)))["environment"]
    setup = study.setup
    layers = f"the last {setup.lora_layers} layers" if setup.lora_layers else "all layers"
    text.append(
        f"{where['cpu'] if setup.device == 'cpu' else where['gpu']}, {setup.dtype}; torch "
        f"{where['versions']['torch']}; first run {where['time'][:10]} at commit {where['commit']}. "
        f"{setup.pairs} training pairs in steps of {setup.batch}, {setup.validation} validation "
        f"pairs, {setup.test} test pairs of at most {setup.max_length} tokens; LoRA of rank "
        f"{setup.lora_r} on {layers}."
    )
    if any(study.finals(method) for method in study.methods):
        shown = next(found for m in study.methods for found in study.finals(m))
        _, _, of_chosen, of_rejected = columns(shown)
        shorter = float((of_chosen < of_rejected).double().mean())
        n = setup.test
        text += [
            f"Test pairs, chosen settings, mean and half range over seeds. The standard error of an "
            f"accuracy of 0.6 on {n} pairs is {(0.24 / n) ** 0.5:.3f}; in {shorter:.3f} of them the "
            f"chosen answer is the shorter one. Perplexity of other text before training: "
            f"{shown['perplexity_before']:.2f}.",
            finals_table(study),
            "Change of chosen log-probs per token under DIL less that under each other method: above 0 "
            "they end higher under DIL, as the paper has it against SimPO and DPO. Mean over pairs ± "
            "its standard error, seeds averaged, and (least .. most of a seed); undecided: within two "
            "errors, or the seeds differ in sign.",
            claims_table(study),
        ]
    text += ["Validation pairs, all settings:", grid_table(study)]
    return "\n\n".join(part.strip() for part in text) + "\n"


# No reds: those are DIL's.
OTHERS = ("#1f77b4", "#2ca02c", "#9467bd", "#17becf", "#8c564b", "#bcbd22", "#7f7f7f", "#1b4f72",
          "#0b6e4f", "#5b3a8c", "#6b7a00")  # fmt: skip


def style(method: str) -> dict[str, Any]:
    """Of a method's points in all pictures: squares and solid lines are DIL's."""
    others = [name for name in METHODS if name not in DIL]
    ours = ("#d62728", "#ff7f0e", "#8c1a4b")
    given = {"label": METHODS[method].title, "markersize": 6}
    if method in DIL:
        return given | {"color": ours[DIL.index(method)], "marker": "s", "linestyle": "-"}
    number = others.index(method)
    colour = OTHERS[number % len(OTHERS)]
    return given | {"color": colour, "marker": "o^vD<>P*Xphd8"[number], "linestyle": ":"}


def draw_change(study: Study, path: Path) -> None:
    """Left: what final runs did to chosen and rejected. Right: the same of every setting, by margin."""
    seen = {
        method: [figures(method, run) for run in runs]
        for method in study.methods
        if (runs := study.finals(method))
    }
    order = sorted(seen, key=lambda method: mean(f["chosen"] for f in seen[method]))
    figure, ((bars, trade),) = panels(1, 2, 14, 6)
    for place, method in enumerate(order):
        for side, offset, colour in (("chosen", 0.2, "#1b9e77"), ("rejected", -0.2, "#d95f02")):
            values = [f[side] for f in seen[method]]
            label = side if place == 0 else None
            bars.barh(place + offset, mean(values), 0.36, color=colour, label=label, alpha=0.7)
            bars.plot(values, [place + offset] * len(values), "o", color=GREY, markersize=4)
    bars.set_yticks(range(len(order)), [METHODS[method].title for method in order])
    bars.axvline(0, color=GREY, linewidth=1)
    bars.set_xlabel("change of log-prob per token, nats (test; dots: seeds)")
    bars.set_title("final runs, by change of chosen", fontsize=10)
    if order:
        bars.legend(fontsize=8)
    for method in study.methods:
        points = sorted(
            (found["margin"], found["chosen"])
            for found in (figures(method, run) for run in study.grid(method))
        )
        if points:
            trade.plot(*zip(*points), **style(method))
    trade.axhline(0, color=GREY, linewidth=1)
    trade.set(xlabel="margin per token, nats (validation)")
    trade.set_ylabel("change of chosen log-prob per token, nats")
    trade.set_title("every setting, seed 0", fontsize=10)
    if trade.has_data():
        trade.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    on_any_page(figure).savefig(path, dpi=130)


def draw_price(study: Study, path: Path) -> None:
    """Accuracy over what it costs: divergence from the reference, and what is forgotten."""
    figure, (line,) = panels(1, 2, 14, 5.5, sharey=True)
    asked = (
        ("kl", "KL to the reference per token, nats (sampled answers)"),
        ("forgotten", "rise of the log-perplexity of other text, nats"),
    )
    for axis, (name, label) in zip(line, asked):
        for method in study.methods:
            seen = [figures(method, run) for run in study.finals(method)]
            if seen:
                axis.plot([f[name] for f in seen], [f["accuracy"] for f in seen], **style(method))
        axis.axhline(0.5, color=GREY, linestyle="--", linewidth=1)
        axis.set_xlabel(label)
    line[0].set_xscale("log")
    line[0].set_ylabel("accuracy of the implicit reward (test; a line joins seeds)")
    if any(study.finals(method) for method in study.methods):
        line[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    on_any_page(figure).savefig(path, dpi=130)


def draw_all(study: Study) -> None:
    (study.folder / "study.md").write_text(report(study))
    draw_change(study, study.folder / "change.png")
    draw_price(study, study.folder / "price.png")
