"""Plans against running workers: the short form of tools/bench/plan_check.py."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "bench"))
from plan_check import check


@pytest.mark.parametrize("number", range(8))
def test_a_plan_is_what_the_worker_takes(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PANTHERAML_RUNS", "")
    good, off = check(random.Random(2000 + number), number)
    assert good, f"{off:+.1f} MiB"
