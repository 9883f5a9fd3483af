"""Wheel and sdist: what is in them, that they import from anywhere, and that their types are read."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    # A build writes into its source folder: keep that out of the checkout.
    source = tmp_path_factory.mktemp("source") / "checkout"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    return source


def build_wheel(source, out):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "-w", str(out), str(source)],
        check=True,
    )  # fmt: skip
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=checkout, check=True, capture_output=True)
    (path,) = out.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder for PYTHONPATH, as pip would fill it."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def tracked(*patterns):
    done = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "dilkern/py.typed" in names and "dilkern/functional.py" in names
    tops = {n.split("/")[0] for n in names if not n.split("/")[0].endswith(".dist-info")}
    assert tops == {"dilkern"}
    assert {f"dilkern/{path}" for path in tracked("kernels/*.py")} <= set(names)


def test_sdist_has_all_that_the_wheel_is_built_from(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
        file.extractall(tmp_path, filter="data")
    wanted = tracked("dilkern/", "kernels/", "LICENSE", "README.md", "pyproject.toml", "setup.py")
    assert len(wanted) > 50 and wanted <= names
    (unpacked,) = tmp_path.iterdir()
    again = build_wheel(unpacked, tmp_path)
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())
    assert any(n.endswith("licenses/LICENSE") for n in zipfile.ZipFile(again).namelist())


GOOD = """
import torch
from dilkern import Objective, PreferenceLossOutput, fused_dil_loss, linear_logps
from typing_extensions import assert_type

def step(x: torch.Tensor, head: torch.nn.Linear, labels: torch.Tensor) -> PreferenceLossOutput:
    ref_logps = linear_logps(x.detach(), head, labels, shift=True).sum(-1)
    objective = Objective("lsif", sft_weight=0.1)
    assert_type(objective.beta, float)
    out = fused_dil_loss(x, head, labels, ref_logps=ref_logps, h=objective)
    assert_type(out, PreferenceLossOutput)
    assert_type(out.pairwise, bool)
    return out
"""
BAD = """
import torch
from dilkern import Objective, PreferenceLossOutput, fused_dil_loss, linear_logps

x = torch.zeros(2, 3)
fused_dil_loss(x, x, x, ref_logps=x, bta=0.1)
linear_logps(x, x, x, ignore_index="pad")
Objective("dpo", beta="0.1")

def beta(out: PreferenceLossOutput) -> str:
    return out.beta
"""


def test_types_are_read_by_those_who_use_them(installed, tmp_path):
    """By mypy --strict, from the wheel; without py.typed the good file would have errors too."""
    pytest.importorskip("mypy")
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text(BAD)
    # torch's own types would take most of the time, and say nothing of ours.
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict=True\n[mypy-torch.*]\nfollow_imports=skip\n")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mypy", "--config-file", "mypy.ini", "good.py", "bad.py"],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )  # fmt: skip
    found = re.findall(r"^(\w+\.py):(\d+): error: (.*?)  \[", done.stdout, re.M)
    assert [(file, int(line)) for file, line, _ in found] == [
        ("bad.py", 6), ("bad.py", 7), ("bad.py", 8), ("bad.py", 11)
    ], done.stdout + done.stderr  # fmt: skip
    names = ('"bta"', '"ignore_index"', '"beta"', '"float"')
    assert all(name in text for name, (_, _, text) in zip(names, found)), found


@pytest.mark.parametrize("folder", ["/", str(ROOT)])
def test_imports_from_the_wheel(installed, folder):
    code = (
        "import dilkern, importlib.util as u; print(dilkern.__file__);"
        "print(u.find_spec('dilkern.kernels').submodule_search_locations[0]);"
        "import transformers; print(transformers.__version__)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    package, kernels, _ = done.stdout.splitlines()
    assert package.startswith(str(installed)) and kernels.startswith(str(installed))


def test_checkout_root_on_the_path_does_not_break_transformers():
    done = subprocess.run(
        [sys.executable, "-c", "import transformers, dilkern, dilkern.kernels; print('fine')"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.stdout.strip() == "fine", done.stderr
