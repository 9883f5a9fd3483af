"""The options of a loss: each with its type, its default and its meaning, once.

Every other place takes them from here: the functions by `**options: Unpack[LossKeywords]`, which
editors and type checkers resolve to these names, `DILConfig` and through it the command line by
inheritance.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from inspect import cleandoc
from types import MappingProxyType
from typing import TypeVar

from typing_extensions import TypedDict, Unpack

__all__ = ["LossKeywords", "LossOptions", "Unpack"]

_Class = TypeVar("_Class", bound=type)


def described(cls: _Class) -> _Class:
    """Give each field that a dataclass itself has the text of its docstring as help text."""
    args = cleandoc(cls.__doc__ or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    texts = dict(re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", args, re.M))
    for field in fields(cls):
        if field.name in texts and field.name in cls.__annotations__:
            text = " ".join(texts[field.name].split())
            field.metadata = MappingProxyType({**field.metadata, "help": text})
    return cls


@described
@dataclass(kw_only=True)
class LossOptions:
    """How a loss is used; which one it is, `loss` and `params` say.

    Not frozen, because `DILConfig` inherits these fields and the configurations of transformers are
    not; an `Objective`, which is made of them, is settled once and for all.

    Args:
        beta: temperature, the factor on f; None for the default of the loss.
        length_normalize: divide f by the number of scored tokens; None for the default of the loss.
        pairing: "pointwise" or "pairwise"; None for the loss's own. "pairwise" makes an h-function a
            BPO loss l_1(m) + l_-1(-m) of the margin m.
        max_log_ratio: beyond it exponentials in f continue linearly, on both sides of a pair at the
            same point, so that the minimiser stays exact below it; None for the paper's formula.
            Losses whose slope is bounded have no exponential and are the same for any value.
        label_smoothing: probability that a pair, or a label, is flipped.
        mixture: weight of chosen samples in the denominator of the ratio; 0 is the paper's loss.
        sft_weight: weight of the negative log-likelihood of the chosen tokens; None for the default
            of the loss.
        strict: raise where a log-ratio is beyond max_log_ratio. One device sync.
    """

    beta: float | None = None
    length_normalize: bool | None = None
    pairing: str | None = None
    max_log_ratio: float | None = 10.0
    label_smoothing: float = 0.0
    mixture: float = 0.0
    sft_weight: float | None = None
    strict: bool = False


class LossKeywords(TypedDict, total=False):
    """The fields of `LossOptions` as keywords; a test holds the two together."""

    beta: float | None
    length_normalize: bool | None
    pairing: str | None
    max_log_ratio: float | None
    label_smoothing: float
    mixture: float
    sft_weight: float | None
    strict: bool


# Not asked of the class at every call: torch.compile cannot trace that.
DEFAULTS = {field.name: field.default for field in fields(LossOptions)}
OPTION_NAMES = tuple(DEFAULTS)


def check_option_names(names: Iterable[str]) -> None:
    """Raise the TypeError of an unknown keyword, with the nearest known one."""
    for name in names:
        if name not in OPTION_NAMES:
            near = difflib.get_close_matches(name, OPTION_NAMES, 1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise TypeError(
                f"unexpected keyword argument {name!r}; {meant}"
                f"The options of a loss are: {', '.join(OPTION_NAMES)}."
            )
