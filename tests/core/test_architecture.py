"""The shape of the package: import levels, what import costs, what is public and documented."""

import ast
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import dilkern
from dilkern import LossOptions

ROOT = Path(__file__).parents[2]

# Imports go strictly to a lower number; docs/architecture.md says what each level is for.
LEVELS = {
    "dilkern.kernels": 0,
    "dilkern.validation": 1,
    "dilkern.curves": 1,
    "dilkern.options": 1,
    "dilkern.output": 1,
    "dilkern.losses": 2,
    "dilkern.backends": 3,
    "dilkern.lm_head": 4,
    "dilkern.reference": 4,
    "dilkern.logps": 5,
    "dilkern.objective": 5,
    "dilkern.pointwise": 5,
    "dilkern.filter_report": 6,
    "dilkern.preference": 6,
    "dilkern.functional": 7,
    "dilkern.integrations": 8,
    "dilkern.cli": 9,
    "dilkern.__main__": 10,
}


def area(module):
    """The entry of LEVELS that a module belongs to; siblings in one area may import each other."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in LEVELS:
            return ".".join(parts[:end])
    return None


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources():
    for folder, package in ((ROOT / "dilkern", "dilkern"), (ROOT / "kernels", "dilkern.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            yield path, ".".join([package, *(p for p in parts if p != "__init__")])


@pytest.mark.parametrize("path, module", [pytest.param(*s, id=s[1]) for s in sources()])
def test_imports_go_strictly_down(path, module):
    if module == "dilkern":
        return
    mine = area(module)
    assert mine is not None, f"{module} has no level"
    for name in imports_of(path):
        theirs = area(name) if name.startswith("dilkern.") else None
        if theirs is not None and theirs != mine:
            assert LEVELS[theirs] < LEVELS[mine], f"{module} imports {name}"
        assert name.split(".")[0] != "kernels", f"{module}: never `import kernels`"


def test_kernels_import_only_torch_and_triton():
    for path in (ROOT / "kernels").glob("*.py"):
        for name in imports_of(path):
            top = name.split(".")[0]
            known = top in ("torch", "triton", "__future__") or top in sys.stdlib_module_names
            assert known or name.startswith("dilkern.kernels"), f"{path.name} imports {name}"


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


def test_runs_without_triton_and_without_loading_the_trainer_stack():
    code = """
import sys
for name in ("triton", "transformers", "trl", "peft", "bitsandbytes"):
    sys.modules[name] = None  # as if not installed
import torch, dilkern
h = torch.randn(2, 3, 4, requires_grad=True)
out = dilkern.fused_dil_loss(h, torch.randn(5, 4), torch.ones(2, 3).long(), reference_free=True)
out.loss.backward()
from dilkern.backends.base import why_not
print(why_not("triton", torch.device("cpu")))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "triton" in done.stdout


def test_public_names_are_documented():
    for name in dilkern.__all__:
        thing = getattr(dilkern, name)
        if callable(thing):
            doc = inspect.getdoc(thing)
            assert doc and len(doc.splitlines()[0]) > 15, f"{name} has no docstring"
    for name in ("fused_dil_loss", "fused_preference_loss", "linear_logps", "preference_loss"):
        doc = inspect.getdoc(getattr(dilkern, name))
        for part in ("Args:", "Returns:", "Raises:", "Example:"):
            assert part in doc, f"{name}: {part}"
        for argument in inspect.signature(getattr(dilkern, name)).parameters:
            assert argument in doc, f"{name}: `{argument}` is not documented"


def test_options_stand_once():
    """The keywords that editors see are the fields of LossOptions, each with a help text."""
    from dataclasses import fields
    from typing import get_type_hints

    from dilkern.options import LossKeywords

    assert get_type_hints(LossKeywords) == get_type_hints(LossOptions)
    for field in fields(LossOptions):
        assert field.metadata["help"].endswith("."), field.name
        for function in ("fused_dil_loss", "fused_preference_loss", "preference_loss"):
            assert field.name not in inspect.signature(getattr(dilkern, function)).parameters


def test_version_is_written_once_more_and_agrees():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == dilkern.__version__
    assert f"## {dilkern.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_equations_cited_by_code_exist():
    import re

    numbers = set(re.findall(r"\\tag\{(\d+)\}", (ROOT / "docs" / "math.md").read_text()))
    for path, _ in sources():
        for cited in re.findall(r"math\.md,? \(?(\d+)(?:-(\d+))?", path.read_text()):
            assert {c for c in cited if c} <= numbers, f"{path.name} cites equation {cited}"
