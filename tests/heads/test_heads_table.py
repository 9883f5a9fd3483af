"""The table of docs/heads.md names tests that exist."""

import re
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def rows():
    """Yield the cells of each row: kind, frozen on the CPU, trainable on the CPU, GPU."""
    text = (ROOT / "docs" / "heads.md").read_text()
    for line in [line for line in text.splitlines() if line.startswith("| ")][1:]:
        assert line.count("|") == 5, line
        yield [cell.strip() for cell in line.strip("|").split("|")]


def test_every_cell_names_tests_that_exist():
    assert len(list(rows())) > 10
    for kind, *cells in rows():
        source = named = ""
        for cell in cells:
            found = re.findall(r"`(test_\w+\.py)?::(test_\w+)", cell)
            for file, name in found:
                source = (HERE / file).read_text() if file else source
                assert f"def {name}(" in source, f"{name} in: {kind}"
            named = named or found
            untested = cell in ("-", "no test")
            assert untested or found or (named and "the same" in cell), f"{kind}: {cell}"
        if cells[-1].startswith("test written"):
            assert (
                'usefixtures("device")' in source
                or "device" in re.findall(rf"def {name}\(([^)]*)\)", source)[0]
            ), f"{kind}: {name} does not run on a GPU"
