"""Doors: who finds a run, from where, and with which key."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pantheraml as pm
import pytest
from conftest import at_step, environment

FINDER = """
import os, sys
import pantheraml as pm
from pantheraml import _native, programs
run = pm.attach(sys.argv[1])
print(run.coordinator_pid, run.state)
print(_native.launch(programs.coordinator(), run.folder, "")[1])   # to start one would be wrong
"""


@pytest.mark.parametrize("place", ["unset", "elsewhere", "nowhere"])
def test_one_coordinator_whatever_the_environment(
    start: Callable[..., pm.Run], tmp_path: Path, place: str
) -> None:
    """Cron, sudo and services have another XDG_RUNTIME_DIR, or none."""
    run = start(max_steps=10**6)
    at_step(run, 1)
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    env = environment(XDG_RUNTIME_DIR="/nowhere" if place == "nowhere" else str(other))
    if place == "unset":
        del env["XDG_RUNTIME_DIR"]
    made = subprocess.run(
        [sys.executable, "-P", "-c", FINDER, str(run.folder)],
        capture_output=True, text=True, env=env, timeout=60,
    )  # fmt: skip
    assert made.stdout.split("\n")[:2] == [f"{run.coordinator_pid} running", "False"], made.stderr
