"""Hung, silent and absent processes told apart, by the clock on a quiet machine and on a busy one.

Usage: tools/chaos/hang.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import common
from reap import at_end

BUILD = Path(__file__).resolve().parents[2] / "build" / "release"
TESTS = ("recover", "takeover", "hang")


def run(test: str, quiet: bool) -> tuple[int, list[str], str]:
    """Run the tests of a program: how many passed, which failed, what was measured."""
    done = subprocess.run(
        [
            BUILD / f"tests/fault/test_fault_{test}",
            BUILD / "pml-coordinator",
            BUILD / "tests/fault/fake_worker",
        ],
        env=os.environ | ({"PML_QUIET": "1"} if quiet else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    said = (done.stdout + done.stderr).splitlines()
    passed = sum("[       OK ]" in line for line in said)
    failed = [
        line.split("] ", 1)[1] for line in said if "[  FAILED  ]" in line and "below" not in line
    ]
    if done.returncode != 0 and not failed:
        failed = [f"{test} ended with {done.returncode}"]
    if failed:
        print("\n".join(line for line in said if "[       OK ]" not in line), flush=True)
    found = re.search(r"found, and its workers ended, after ([0-9.]+) s", done.stdout)
    return passed, failed, found[1] if found else ""


def main() -> int:
    """Print one line of figures; the exit status says whether all held."""
    at_end()
    good, bad, seconds = 0, [], ""
    for test in TESTS:
        passed, failed, measured = run(test, quiet=True)
        good, bad, seconds = good + passed, bad + failed, measured or seconds
    load = 3 * len(os.sched_getaffinity(0))
    with common.load(load):
        for test in TESTS:
            passed, failed, _ = run(test, quiet=False)
            good, bad = good + passed, bad + [f"{name} under load" for name in failed]
    print(
        f"hang: {good} passed, half of them beside {load} busy loops; found after {seconds} s;"
        f" failed: {', '.join(dict.fromkeys(bad)) or 'none'}"
    )
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
