"""The date is set an hour forward and back while a run goes on: nothing but timestamps may notice.

Usage: tools/chaos/clock.py [--steps N]
"""

from __future__ import annotations

import argparse
import os
import struct
import sys
import tempfile
from pathlib import Path

from common import SHIMS, end, make_model, reach, rows, work_in
from reap import at_end

HOUR = 3600.0


def main() -> int:
    """Print one line of figures; the exit status says whether all held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="between two changes of the date")
    args = parser.parse_args()
    at_end()
    with tempfile.TemporaryDirectory(prefix="pml-clock-") as name:
        folder = Path(name)
        shift = folder / "shift"
        shift.write_bytes(struct.pack("d", 0.0))
        work_in(folder)
        os.environ.update(
            PML_CLOCK=str(shift), PML_SCOPE="0",
            LD_PRELOAD=str(SHIMS / "libclock.so"),
        )  # fmt: skip
        import pantheraml as pm

        run = pm.finetune(
            make_model(folder), rows(), name="clock", max_steps=10**9, max_length=64, threads=1,
            save_steps=args.steps, save_total_limit=2, generate_length=32, devices=2,
        )  # fmt: skip
        del os.environ["LD_PRELOAD"]  # the run has it, this process and its children go without
        try:
            reach(run, args.steps)
            for seconds in (HOUR, -HOUR, 0.0, -HOUR, HOUR):
                with shift.open("r+b") as file:
                    file.write(struct.pack("d", seconds))
                seen = run.step
                reach(run, seen + args.steps)
                run.set(max_grad_norm=1.0).wait(600)
                run.checkpoint(wait=True)
                run.sample(input_ids=[1, 2], max_new_tokens=4)
            run.stop(wait=True)
        finally:
            end(run)
        events = run.events()
        jumps = [b["time"] - a["time"] for a, b in zip(events, events[1:], strict=False)]
        jumped = sum(abs(jump) > HOUR / 2 for jump in jumps)
        restarts = sum(event["type"] == "restart" for event in events)
        whole = [event["seq"] for event in events] == list(range(1, len(events) + 1))
        good = run.state == "stopped" and restarts == 0 and whole and jumped >= 5
    print(f"clock: {jumped} jumps of an hour or two in {run.step} steps, {restarts} restarts")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
