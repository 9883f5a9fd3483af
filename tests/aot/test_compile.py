"""Every row of the config table compiles for its architecture, without a GPU.

Run without TRITON_INTERPRET: `pytest -m aot tests/aot`. The rows come from the script that also
writes the table of docs/kernels.md.
"""

import os
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
    ),
]

# On the path, and not loaded by file name: the worker processes import it too.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import kernel_resources  # noqa: E402

CASES = list(kernel_resources.cases())
MATRIX = ("logps_forward", "dz_tile")


@pytest.fixture(scope="session")
def compiled():
    begin = time.perf_counter()
    results = kernel_resources.compile_all(CASES, os.cpu_count() or 1)
    print(f"{len(CASES)} kernels compiled in {time.perf_counter() - begin:.0f} s")
    return results


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_compiles_without_spills(case, compiled):
    result = compiled[case]
    assert not isinstance(result, str), result
    assert result.stack <= 16, f"{result.stack} bytes of stack: registers spill"
    assert result.shared <= kernel_resources.SHARED_LIMIT[case.arch]
    if case.kernel in MATRIX and case.dtype != "float32":
        assert result.tensor_core > 0, "no tensor-core instruction"
    if case.kernel in MATRIX and not case.arch.startswith("gfx"):
        assert result.async_copies > 0, "the loads are not pipelined"


def test_promised_instructions_are_those_of_the_architecture(compiled):
    """Descriptor rows load by TMA, Hopper multiplies by warp groups, Blackwell by tcgen05."""
    from dilkern.kernels import configs

    expected = {"sm_90": {"HGMMA", "UTMALDG"}, "sm_100": {"UTCHMMA", "UTMALDG"}}
    for case, result in compiled.items():
        if case.kernel in MATRIX and case.dtype != "float32":
            wanted = expected.get(case.arch, set())
            assert wanted <= set(result.notable.split()), (case, result.notable)
            assert ("UTMALDG" in result.notable) == configs._TILES_16[case.arch].descriptors
