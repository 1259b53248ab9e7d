"""The harness itself: a run that a test leaves behind is ended with it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pantheraml as pm
from conftest import FOREVER, alive, at_step, processes_with, reap, until


def test_what_a_test_leaves_is_reaped(start: Callable[..., pm.Run], runs: Path) -> None:
    run = start(max_steps=FOREVER)
    at_step(run, 1)
    left = [run.coordinator_pid or 0, *(worker["pid"] for worker in run.workers)]
    run.close()
    entry = f"PML_TEST_RUNS={runs}"
    assert set(left) <= set(processes_with(entry)) and os.getpid() not in processes_with(entry)
    assert reap(entry) >= len(left)
    until(lambda: not any(map(alive, left)), "their end")
    assert processes_with(entry) == []
