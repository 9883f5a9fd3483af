"""The table of docs/heads.md names tests that exist."""

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_the_table_names_tests_that_exist():
    text = (HERE.parents[1] / "docs" / "heads.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    for row in rows:
        assert row.count("|") == 5, row
        source = ""
        for file, name in re.findall(r"`(test_\w+\.py)?::(test_\w+)", row):
            source = (HERE / file).read_text() if file else source
            assert f"def {name}(" in source, f"{name} in: {row}"
