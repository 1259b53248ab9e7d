"""The short form of the campaign: what is killed at random ends with the bits of what was not."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

KILL = Path(__file__).parents[2] / "tools" / "chaos" / "kill.py"


def test_struck_six_times() -> None:
    done = subprocess.run(
        [sys.executable, KILL, "--kills", "6", "--steps", "1000", "--seed", "7"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal bit for bit" in done.stdout and " 0 restarts" not in done.stdout.splitlines()[-1]


def test_only_a_named_refusal_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(KILL.parent))
    judge = importlib.import_module("flips").judge
    part = Path("checkpoints/step-000100/state.json")
    assert judge(1, "", "state.json is damaged", part) == "refused"
    assert judge(None, "state.json is damaged", "", part) == "refused"
    for status, said in ((-11, "state.json"), (127, "state.json"), (None, "state.json"), (1, "no")):
        assert judge(status, "", said, part) != "refused"


def test_passed_over_is_only_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(KILL.parent))
    flips = importlib.import_module("flips")
    part = Path("checkpoints/step-000300/state.json")
    said = "checkpoint step-000300 is not used, the one before it is: /r/step-000300/state.json"
    one = "checkpoints/step-000200"
    start = flips.Outcome(started=True, running=True, used=one, logged=said)
    assert flips.passed_over(start, part, "step-000200") == flips.PASSED_OVER
    assert flips.passed_over(start, part, "step-000299") != flips.PASSED_OVER
    for used, logged, running in (
        (one, "", True),
        (one, said.replace("state", "other"), True),
        ("checkpoints/step-000300", said, True),
        ("", said, True),
        (one, said, False),
    ):
        other = flips.Outcome(started=True, running=running, used=used, logged=logged)
        assert flips.passed_over(other, part, "step-000200") != flips.PASSED_OVER


def test_asked_for_by_name_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(KILL.parent))
    flips = importlib.import_module("flips")
    part = Path("checkpoints/step-000100/state.json")
    said = f"/r/{part} is not what was written"
    assert flips.by_name(flips.Outcome(status=1, stderr=said), part) == flips.BY_NAME
    for bad in (
        flips.Outcome(status=1, stderr=said, started=True),
        flips.Outcome(status=1, stderr=said.replace("100", "200")),
        flips.Outcome(status=1, stderr=said.replace("state", "other")),
        flips.Outcome(status=-11, stderr=said),
        flips.Outcome(status=None, stderr=said),
    ):
        assert flips.by_name(bad, part) != flips.BY_NAME


def test_allocations_are_refused_until_no_life_comes_so_far(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However different lives are: all that the longest came to, and then it is over."""
    monkeypatch.syspath_prepend(str(KILL.parent))
    memory = importlib.import_module("memory")
    lives: dict[int, int] = {}

    def live(number: int) -> tuple[int, str]:  # three of four are short, and 7 is one that fails
        lives[number] = lives.get(number, 0) + 1
        came = 300 if (number + lives[number]) % 4 == 0 else 200
        return (0 if number == 7 else came), "it hung"

    whole = memory.Campaign()
    whole.run(range(1, memory.MOST), 3, live)
    assert whole.ended and whole.refused == 300 and whole.bad == [7] and not whole.absent
    assert all(lives[number] == memory.TRIES for number in range(301, 301 + memory.BEYOND))
    assert max(lives) <= 300 + memory.BEYOND + 2 * 3

    def gap(number: int) -> tuple[int, str]:  # fewer in a row than would be the end
        return (number - 1 if 40 <= number < 40 + memory.BEYOND - 1 else 100), ""

    part = memory.Campaign()
    part.run(range(30, 102), 2, gap)
    assert not part.ended and part.refused == 72 - (memory.BEYOND - 1) - 1
    assert part.absent == [*range(40, 40 + memory.BEYOND - 1), 101]
