"""Whether the tree is ready for a tag: `python tools/release.py v1.2.3`.

pyproject.toml and CITATION.cff have the tag's version, and CHANGELOG.md has a dated section of it
that is not empty. Needs nothing but Python.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def complaints(tag: str, root: Path = ROOT) -> list[str]:
    """What forbids a release called `tag`, in plain words."""
    version, found = tag.removeprefix("v"), []
    if not re.fullmatch(r"v\d+\.\d+\.\d+(rc\d+)?", tag):
        found.append(f"a tag must look like v1.2.3 or v1.2.3rc1, not {tag!r}")
    ours = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    if ours != version:
        found.append(f"pyproject.toml has version {ours}, the tag {version}")
    if f"\nversion: {version}\n" not in (root / "CITATION.cff").read_text():
        found.append(f"CITATION.cff has no 'version: {version}'")
    text = (root / "CHANGELOG.md").read_text()
    section = re.search(rf"^## {re.escape(version)} - (.*)\n((?:(?!## ).*\n?)*)", text, re.M)
    if section is None:
        found.append(f"CHANGELOG.md has no section '## {version} - DATE'")
    else:
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", section[1]):
            found.append(f"CHANGELOG.md dates {version} {section[1]!r}, not YYYY-MM-DD")
        if "\n- " not in "\n" + section[2]:
            found.append(f"CHANGELOG.md lists no change in {version}")
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit("\n".join(complaints(sys.argv[1])) or None)
