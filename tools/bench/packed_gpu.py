"""Packed text beside full rows on a GPU, through a real run: real tokens a second of each.

    python3 tools/bench/packed_gpu.py MODEL [--rows 4] [--steps 26] [--shortest 50] [--longest 2048]

Documents have lengths between --shortest and --longest, each factor of two as likely as another one
(many short ones, few long ones), and are packed by the run into rows of --longest tokens. The
other run has nothing but full rows. Counted are the tokens that are there, in the steps after the
30th: batches are padded to a few sizes, whose graphs are recorded by then, and no step from the
31st on is timed op by op.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from typing import Any

import pantheraml as pm
from pantheraml import _native
from pantheraml.aside import is_alive

WARM = 30


def lengths_of(draw: random.Random, tokens: int, shortest: int, longest: int) -> list[int]:
    """Lengths of documents that have so many tokens together."""
    made: list[int] = []
    while sum(made) < tokens:
        made.append(round(math.exp(draw.uniform(math.log(shortest), math.log(longest)))))
    return made


def measure(model: str, lengths: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of a run over documents of these lengths."""
    draw = random.Random(1)
    vocab = int(_native.check_model(model)["vocab"])
    numbers = [draw.randrange(3, vocab) for _ in range(1 << 16)]
    rows = []
    for length in lengths:
        begin = draw.randrange(len(numbers) - length)
        ids = numbers[begin : begin + length]
        rows.append({"input_ids": ids, "labels": ids})
    last = WARM + args.steps
    run = pm.finetune(
        model, rows, devices=args.device, max_steps=10**6, per_device_train_batch_size=args.rows,
        max_length=args.longest, packing=True, save_strategy="no", restart="never",
    )  # fmt: skip
    pids = [0]
    try:
        while run.step < last:
            run.wait_for_change(0.2)
            pids = [w["pid"] for w in run.workers] or pids
            if run.state == "failed":
                raise SystemExit(run.reason)
        steps = [row for row in run.history if WARM < row["step"] <= last]
    finally:
        pids.insert(0, run.coordinator_pid or 0)
        run.close()
        for pid in filter(None, pids):  # without the last checkpoint
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while any(pid and is_alive(pid) for pid in pids):
            time.sleep(0.05)
    tokens = sum(row["tokens"] for row in steps)
    return {
        "rate": tokens / sum(row["seconds"] for row in steps),
        "full": tokens / (len(steps) * args.rows * args.longest),
        "plan": run.plan.total if run.plan else 0,
        "docs": len(lengths),
        "slowest": max(row["seconds"] for row in steps),
        "mfu": steps[-1].get("mfu"),
    }


def main() -> int:
    """Measure both and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=26)
    parser.add_argument("--shortest", type=int, default=50)
    parser.add_argument("--longest", type=int, default=2048)
    args = parser.parse_args()
    tokens = args.rows * args.longest * (WARM + args.steps) // 2  # the second half comes again
    spread = lengths_of(random.Random(0), tokens, args.shortest, args.longest)
    with tempfile.TemporaryDirectory(prefix="pml-packed-") as runs:
        os.environ["PANTHERAML_RUNS"] = runs
        full = measure(args.model, [args.longest] * (tokens // args.longest), args)
        packed = measure(args.model, spread, args)
    for name, found in (("full rows", full), ("packed", packed)):
        print(
            f"{name:10} {found['rate']:10,.0f} tokens/s  {found['docs']} documents, rows "
            f"{100 * found['full']:.1f} % full, plan {found['plan'] / 2**30:.1f} GiB, slowest step "
            f"{found['slowest']:.3f} s, MFU {found['mfu']}"
        )
    print(f"packed has {100 * packed['rate'] / full['rate']:.1f} % of the rate of full rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
