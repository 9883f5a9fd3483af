"""How the reference reads our docstrings (a griffe extension, named in mkdocs.yml)."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Google's section is "Examples"; a star in `rewards/*` is no emphasis; comments tell fields."""

    def on_object(self, *, obj: griffe.Object, loader: Any, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
        text = re.sub(r"(?<=\w/)\*", r"\\*", text)
        if isinstance(obj, griffe.Class) and "NamedTuple" in map(str, obj.bases):
            lines = [
                f"    {name} ({field.annotation}): {told[1]}"
                for name, field in obj.attributes.items()
                if (told := re.search(r"# (.+)", "\n".join(field.lines)))
            ]
            text += "\n".join(["\n\nAttributes:", *lines])
        obj.docstring.value = text
