"""The built wheel: what is in it, and that it imports from anywhere, also from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source") / "checkout"
    # A build writes into its source folder: keep that out of the checkout.
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "-w", str(out), str(source)],
        check=True,
    )  # fmt: skip
    (path,) = out.glob("*.whl")
    return path


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "dilkern/py.typed" in names and "dilkern/functional.py" in names
    tops = {n.split("/")[0] for n in names if not n.split("/")[0].endswith(".dist-info")}
    assert tops == {"dilkern"}
    committed = {
        f"dilkern/{p}" for p in subprocess.run(
            ["git", "ls-files", "kernels/*.py"], cwd=ROOT, capture_output=True, text=True
        ).stdout.split()
    }  # fmt: skip
    assert committed <= set(names)


@pytest.mark.parametrize("folder", ["/", str(ROOT)])
def test_imports_from_the_wheel(wheel, tmp_path, folder):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import dilkern, importlib.util as u; print(dilkern.__file__);"
        "print(u.find_spec('dilkern.kernels').submodule_search_locations[0]);"
        "import transformers; print(transformers.__version__)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    package, kernels, _ = done.stdout.splitlines()
    assert package.startswith(str(tmp_path)) and kernels.startswith(str(tmp_path))


def test_checkout_root_on_the_path_does_not_break_transformers():
    done = subprocess.run(
        [sys.executable, "-c", "import transformers, dilkern, dilkern.kernels; print('fine')"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.stdout.strip() == "fine", done.stderr
