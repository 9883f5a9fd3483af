"""What pages show holds: Python runs, command lines are read, tables are the code's."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tables
import tiny_models as tiny
import torch

import dilkern
from dilkern import LOSSES
from dilkern.integrations.collators import PreferenceCollator

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
PAGES = ["README.md", *DOCS]
# A block of Python, and the comment before it that keeps it from being run.
BLOCK = re.compile(r"(?:<!-- test: skip, ([^>]+) -->\n)?```python\n(.*?)```", re.S)


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.fixture
def place(tmp_path, folder, monkeypatch):
    """A folder with data to run a page in; the model and file that pages name, by what stands there."""
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in tiny.pairs(8)), encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["count.py", "pairs.jsonl", folder])
    losses = dict(LOSSES)
    yield lambda text: text.replace("path-or-hub-id", folder)
    LOSSES.clear()  # of what a page has entered
    LOSSES.update(losses)


def given(page):
    """What the reader of a page that shows a part of a program has already."""
    if page == "README.md":
        return {"dataset": tiny.dataset()}
    if page not in ("docs/heads.md", "docs/shared_prompts.md"):
        return {}
    ids = torch.randint(5, 300, (8, 12))
    ids[:, :6] = ids[:2, :6].repeat(4, 1)
    labels = ids.clone()
    labels[:, :6] = -100
    return {
        "torch": torch,
        "model": tiny.build(),
        "loader": [
            {**PreferenceCollator(tiny.tokenizer())(tiny.pairs(4)), "ref_logps": torch.zeros(8)}
        ],
        "ids": ids, "input_ids": ids, "labels": labels, "mask": torch.ones_like(ids),
        "ref_logps": torch.zeros(8),
    }  # fmt: skip


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in read(p)])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::ResourceWarning")
def test_python_of_a_page_runs(page, place):
    names = given(page)
    for reason, block in BLOCK.findall(read(page)):
        if not reason:
            exec(compile(place(block), page, "exec"), names)


@pytest.mark.parametrize("page", [p for p in PAGES if "\ndilkern " in read(p)])
def test_command_lines_of_a_page_are_read(page, place):
    from dilkern.cli import options

    if "4bit" in read(page):
        pytest.importorskip("bitsandbytes")
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", read(page), re.S)).replace("\\\n", " ")
    for line in re.findall(r"dilkern train (.*)", place(blocks)):
        words = shlex.split(line, comments=True)
        if "--config" not in words:
            assert options.read(words).given


@pytest.mark.parametrize("page", tables.TABLES)
def test_tables_of_a_page_are_those_of_the_code(page):
    assert read(page) == tables.filled(page), "python tests/helpers/tables.py writes them anew"


def test_losses_of_trl_that_have_no_name_here_are_refused():
    from dilkern.integrations.trl import DILConfig

    missing = re.findall(r"\| `(\w+)` \| - \|", tables.trl_losses())
    assert len(missing) > 3
    for name in missing:
        with pytest.raises(ValueError, match="loss_type"):
            DILConfig("out", loss_type=name)


def test_the_reference_documents_every_public_name():
    documented = re.findall(r"^::: dilkern\.(\w+)$", "".join(map(read, PAGES)), re.M)
    assert set(documented) == set(dilkern.__all__)


def test_the_site_builds_without_a_warning(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python", "latex2mathml"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "<math" in (tmp_path / "math.html").read_text()


def numbers(text):
    return {abs(float(number)) for number in re.findall(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?", text)}


@pytest.mark.parametrize(
    "page, heading",
    [("docs/study.md", "What it shows"), ("docs/guide.md", "What the study shows"),
     ("docs/guide.md", "Where to start")],
)  # fmt: skip
def test_what_is_said_of_the_study_stands_in_its_tables(page, heading):
    _, _, rest = read(page).partition(f"# {heading}\n")
    said = re.split(r"\n##+ ", rest)[0]
    study = read("docs/study.md")
    drawn = study[study.index("<!-- study:begin -->") :]
    settings = study[study.index("\n## Set-up") : study.index("<!-- study:begin -->")]
    assert len(numbers(said)) > 5
    default = {1e-4}  # the learning rate of an adapter
    assert numbers(said) <= numbers(drawn) | numbers(settings) | default
