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
