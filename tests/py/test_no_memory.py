"""The extension without memory: no crash, no leak, a MemoryError. The lives are out_of_memory.py's.

`PML_NOMEM_POINTS=0` refuses every allocation there is; otherwise some, spread over each life.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pantheraml as pm
import pytest
from conftest import at_step, environment

ROOT = Path(__file__).parents[2]
SHIM = ROOT / "build" / "release" / "libnomem.so"
LIVES = Path(__file__).with_name("out_of_memory.py")


# Scenario, so many points in the short form, at least so many allocations in a life.
@pytest.mark.parametrize(
    ("scenario", "points", "least"),
    [
        ("client", 15, 50),
        ("run", 8, 50),
        ("engine", 200, 500),
        ("messages", 0, 50),
        ("python", 0, 100),
    ],
)
def test_every_allocation(
    start: Callable[..., pm.Run], model: Path, scenario: str, points: int, least: int
) -> None:
    if not SHIM.exists():
        pytest.fail(f"{SHIM} is not there: tools/build -DPML_TESTS=ON")
    run = start(max_steps=10**6, restart="never")
    at_step(run, 3)
    run.checkpoint(wait=True)
    run.pause(wait=True)
    wanted = os.environ.get("PML_NOMEM_POINTS", str(points))
    done = subprocess.run(
        [sys.executable, "-P", LIVES, SHIM, scenario, run.folder, model, wanted],
        env=environment(LD_PRELOAD=str(SHIM)), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    figures = json.loads(done.stdout)
    print(scenario, figures)
    assert figures["allocations"] >= least
    assert figures["refused"] >= min(points, least)
    pid = run.coordinator_pid
    assert pid is not None and run.state == "paused"  # what it talked to took no harm
