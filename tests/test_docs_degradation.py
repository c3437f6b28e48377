"""The table of what fails names tests; they exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"`(test_\w+)`")
DEFINED = re.compile(r"^(?:async )?def (test_\w+)\(", re.MULTILINE)


def test_every_row_of_the_degradation_table_names_tests_that_exist() -> None:
    rows = [line for line in (ROOT / "docs/degradation.md").read_text().splitlines() if line.startswith("| ")][2:]
    there = {name for path in (ROOT / "tests").rglob("test_*.py") for name in DEFINED.findall(path.read_text())}
    assert len(rows) >= 18
    for row in rows:
        named = NAMED.findall(row)
        assert named, f"no test shows this row: {row[:80]}"
        assert not set(named) - there, f"there are no such tests: {sorted(set(named) - there)}"
