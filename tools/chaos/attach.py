"""Kernels that are killed and come back: each finds the whole history, in under two seconds.

Usage: tools/chaos/attach.py [--restarts N] [--steps N] [--limit SECONDS]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import end, make_model, reach, rows, work_in
from reap import at_end

KERNEL = """
import json, sys, time
import pantheraml as pm
begin = time.monotonic()
run = pm.attach("victim")
steps = [row["step"] for row in run.history]
print(json.dumps({"seconds": time.monotonic() - begin, "n": len(steps), "state": run.state,
                  "whole": steps == list(range(1, len(steps) + 1))}), flush=True)
while True:
    run.set(max_grad_norm=1.0)
    run.history
    time.sleep(0.01)
"""


def main() -> int:
    """Print one line of figures; the exit status says whether all held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--restarts", type=int, default=50)
    parser.add_argument("--steps", type=int, default=10_000, help="of history, at least")
    parser.add_argument("--limit", type=float, default=2.0, help="seconds for an attach")
    args = parser.parse_args()
    at_end()
    chance = random.Random(5)
    bad = 0
    taken: list[float] = []
    with tempfile.TemporaryDirectory(prefix="pml-attach-") as name:
        work_in(Path(name))
        import pantheraml as pm

        run = pm.finetune(
            make_model(Path(name)), rows(), name="victim", max_steps=10**9, max_length=64,
            threads=1, generate_length=16, per_device_train_batch_size=1,
        )  # fmt: skip
        try:
            reach(run, args.steps)
            run.pause(wait=True)  # what is measured is the way back, not a race for the processor
            for _ in range(args.restarts):
                child = subprocess.Popen(
                    [sys.executable, "-P", "-c", KERNEL], stdout=subprocess.PIPE
                )
                assert child.stdout is not None
                told = json.loads(child.stdout.readline())
                time.sleep(chance.uniform(0, 0.1))
                child.kill()
                child.communicate()
                taken.append(told["seconds"])
                if not told["whole"] or told["n"] < args.steps or told["seconds"] >= args.limit:
                    bad += 1
                    print(told)
        finally:
            end(run)
    taken.sort()
    print(
        f"attach: {args.restarts} kernels killed over {args.steps} steps of history, attach "
        f"{taken[len(taken) // 2]:.2f} s (longest {taken[-1]:.2f} s): {bad} bad"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
