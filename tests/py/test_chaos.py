"""The short form of the campaign: what is killed at random ends with the bits of what was not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

KILL = Path(__file__).parents[2] / "tools" / "chaos" / "kill.py"


def test_struck_six_times() -> None:
    done = subprocess.run(
        [sys.executable, "-P", KILL, "--kills", "6", "--seed", "7"],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal bit for bit" in done.stdout and " 0 restarts" not in done.stdout
