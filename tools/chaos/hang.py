"""Hung, silent and absent processes, told apart by the clock: the tests that a busy machine upsets.

Usage: tools/chaos/hang.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BUILD = Path(__file__).resolve().parents[2] / "build" / "release"


def main() -> int:
    """Run the recovery tests with those among them that other runs leave out."""
    done = subprocess.run(
        [
            BUILD / "tests/fault/test_fault_recover",
            BUILD / "pml-coordinator",
            BUILD / "tests/fault/fake_worker",
        ],
        env=os.environ | {"PML_QUIET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = (done.stdout + done.stderr).splitlines()
    passed = sum("[       OK ]" in line for line in said)
    failed = [line.split("] ", 1)[1] for line in said if "[  FAILED  ]" in line]
    print(f"hang: {passed} passed; failed: {', '.join(dict.fromkeys(failed)) or 'none'}")
    return done.returncode != 0


if __name__ == "__main__":
    sys.exit(main())
