"""The harness itself: a run that a test or a campaign leaves behind is ended with it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pantheraml as pm
from conftest import FOREVER, alive, at_step, until
from reap import MARK, processes_with, reap


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


CAMPAIGN = """
import os, sys, time
sys.path.append(sys.argv[1])
import reap
reap.at_end()
import pantheraml as pm
run = pm.finetune(sys.argv[2], [{"text": "left behind"}], max_steps=10**6, max_length=16, threads=1)
while run.step < 1:
    run.wait_for_change(0.1)
print(run.coordinator_pid, run.workers[0]["pid"], os.environ[reap.MARK], flush=True)
time.sleep(1e6)
"""


def test_what_a_killed_campaign_leaves_is_reaped(runs: Path, model: Path) -> None:
    tools = Path(__file__).parents[2] / "tools" / "chaos"
    campaign = subprocess.Popen(
        [sys.executable, "-P", "-c", CAMPAIGN, str(tools), str(model)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert campaign.stdout is not None
        coordinator, worker, mark = campaign.stdout.readline().split()
        left = processes_with(f"{MARK}={mark}")
        assert {int(coordinator), int(worker)} <= set(left) and campaign.pid not in left
        assert mark != os.environ[MARK]
    finally:
        campaign.kill()
        campaign.communicate()
    until(lambda: not any(map(alive, left)), "the end of what it left")


HALF_GONE = """
import ctypes, os, threading
def last():
    os.read(0, 1)
    os._exit(0)
threading.Thread(target=last).start()
print(flush=True)
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[os.uname().machine], 0)  # this thread ends
"""


def test_a_process_is_there_until_its_last_thread_has_ended() -> None:
    """What it has open stays open until then: a run's lock, where a test goes on at once."""
    child = subprocess.Popen(
        [sys.executable, "-c", HALF_GONE], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None and child.stdout is not None
    child.stdout.readline()
    stat = Path(f"/proc/{child.pid}/stat")
    until(lambda: ") Z " in stat.read_text(), "the first thread's end")
    assert alive(child.pid)
    child.stdin.close()
    until(lambda: not alive(child.pid), "the last thread's end")
    assert child.wait() == 0
