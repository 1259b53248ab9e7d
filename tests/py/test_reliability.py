"""Each promise of docs/reliability.md names tests, and each test that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "reliability.md").read_text()
FILE = re.compile(r"`([\w/]+\.(?:c|py))`([^`]*)")
TOOL = re.compile(r"tools/[\w/]+\.py")
NAME = re.compile(r"\b[a-z0-9]+(?:_[a-z0-9]+)+\b")


def test_every_promise_names_tests_that_are_there() -> None:
    rows = [line for line in TEXT.splitlines() if re.match(r"\| [A-Z0-9`]", line)]
    promises = [row for row in rows if len(row.split(" | ")) == 3]
    assert len(promises) > 30
    named = 0
    for row in promises:
        where = row.rsplit(" | ", 1)[1]
        assert re.search(r"\.(c|py)|`make |tests/", where), f"no test: {row}"
        for tool in TOOL.findall(where):
            assert (ROOT / tool).is_file(), f"{tool} is not there: {row}"
        for file, words in FILE.findall(where):
            path = ROOT / "tests" / file
            assert path.is_file(), f"{file} is not there: {row}"
            source = path.read_text()
            for name in NAME.findall(TOOL.sub("", words)):
                assert re.search(rf"\b(test_)?{name}\(", source), f"{file} has no {name}: {row}"
                named += 1
    assert named > 30
