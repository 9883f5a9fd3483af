"""What a tag needs before it goes out."""

import tomllib

import pytest

from tools.release import ROOT, complaints

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture
def ready(tmp_path):
    """The project's own files, with the section of its version dated."""
    for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    change(tmp_path / "CHANGELOG.md", f"## {VERSION} - unreleased", f"## {VERSION} - 2026-12-01")
    return tmp_path


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_the_tree_becomes_ready_with_a_date(ready):
    assert complaints(f"v{VERSION}", ready) == []


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("CHANGELOG.md", "2026-12-01", "unreleased", "not YYYY-MM-DD"),
        ("CHANGELOG.md", f"## {VERSION} - 2026-12-01", "## 9.9.9 - 2026-12-01", "no section"),
        ("CHANGELOG.md", "2026-12-01\n", "2026-12-01\n\n## 0.0.1\n", "no change"),
        ("CITATION.cff", f"version: {VERSION}", "version: 0.0.9", "CITATION.cff"),
        ("pyproject.toml", f'version = "{VERSION}"', 'version = "0.0.9"', "pyproject.toml has"),
    ],
)  # fmt: skip
def test_each_omission_is_named(ready, name, old, new, message):
    change(ready / name, old, new)
    assert any(message in line for line in complaints(f"v{VERSION}", ready))


def test_a_tag_has_the_form_of_one(ready):
    assert "must look like" in complaints("release-1", ready)[0]
