"""A kernel that dies at random moments loses nothing.

How soon it is back is measured by tools/chaos/attach.py.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pantheraml as pm
from conftest import PATIENCE, at_step
from pantheraml.tiny import TinyLlama

ATTACH = """
import json, time
import pantheraml as pm
run = pm.attach("victim")
steps = [row["step"] for row in run.history]
print(json.dumps({"steps": steps, "step": run.step, "state": run.state}), flush=True)
"""
WORK = """
while True:                       # a kernel at work: reading, steering, asking
    run.set(max_grad_norm=1.0)
    run.history
    run.checkpoint()
    time.sleep(0.001)
"""


def test_killed_ten_times(start: Callable[..., pm.Run]) -> None:
    chance = random.Random(20261121)
    run = start(name="victim", max_steps=10**6, save_total_limit=2)
    at_step(run, 1)
    run.close()
    for _ in range(10):
        child = subprocess.Popen(
            [sys.executable, "-c", ATTACH + WORK], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        if chance.random() < 0.3:  # some die before they are there
            time.sleep(chance.uniform(0, 0.6))
            child.kill()
            child.communicate()
            continue
        told = json.loads(child.stdout.readline())
        time.sleep(chance.uniform(0, 0.3))
        child.kill()
        child.communicate()
        assert told["state"] == "running" and told["step"] >= len(told["steps"])
        assert told["steps"] == list(range(1, len(told["steps"]) + 1))
    run = pm.attach("victim")
    seen = run.step
    at_step(run, seen + 5)
    steps = [row["step"] for row in run.history]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= seen + 5
    sequence = [event["seq"] for event in run.events()]
    assert sequence == list(range(1, len(sequence) + 1))
    assert {event["timeline"] for event in run.events()} == {0}


def test_attach_to_a_long_history(start: Callable[..., pm.Run], tmp_path: Path) -> None:
    """All of it is there: a megabyte of log, where an answer has 64 KiB at most."""
    shape = TinyLlama(hidden=16, layers=1, heads=2, kv_heads=1, intermediate=16)
    run = start(
        [{"input_ids": [1, 2, 3, 4]}], model=shape.write(tmp_path / "m"), name="victim",
        max_steps=3000, per_device_train_batch_size=1, generate_length=8,
        lora=pm.LoRA(r=1, target_modules="q_proj"),
    )  # fmt: skip
    run.wait(PATIENCE)
    run.close()
    done = subprocess.run(
        [sys.executable, "-c", ATTACH], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    told = json.loads(done.stdout)
    assert told["steps"] == list(range(1, 3001)) and told["state"] == "finished"
