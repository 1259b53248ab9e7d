"""Packed text beside full rows on a GPU, through real runs in turn: real tokens a second of each.

    python3 tools/bench/packed_gpu.py MODEL [--rows 4] [--turns 4] [--steps 8]
                                      [--shortest 50] [--longest 2048]

Documents have lengths between --shortest and --longest, each factor of two as likely as another one
(many short ones, few long ones), and are packed by the run into rows of --longest tokens. The
other run has nothing but full rows. Both live at the same time, one paused while the other makes
--steps steps, so that a card whose clocks drift is the same card for both. Counted are the tokens
that are there, in the steps after the 30th (12th of full rows) but for the first of each turn:
batches are padded to a few sizes, whose graphs are recorded by then, and none is timed op by op.
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
from dataclasses import dataclass, field
from typing import Any

import pantheraml as pm
from pantheraml import _native
from pantheraml.aside import is_alive

WARM = {"full rows": 12, "packed": 30}
LONGEST = 1 << 15  # documents are pieces of twice as many numbers


def lengths_of(draw: random.Random, tokens: int, shortest: int, longest: int) -> list[int]:
    """Lengths of documents that have so many tokens together."""
    made: list[int] = []
    while sum(made) < tokens:
        made.append(round(math.exp(draw.uniform(math.log(shortest), math.log(longest)))))
    return made


@dataclass
class Side:
    """One of the two runs, and the steps that count."""

    name: str
    run: pm.Run
    documents: int
    pids: list[int] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def go_to(self, step: int) -> None:
        """Let it train until that step and stand still."""
        if self.run.state == "paused":
            self.run.resume(wait=True)
        while self.run.step < step:
            self.run.wait_for_change(0.05)
            self.pids = [w["pid"] for w in self.run.workers] or self.pids
            if self.run.state in ("failed", "stopped", "finished"):
                raise SystemExit(f"{self.name}: {self.run.state}, {self.run.reason}")
        self.run.pause(wait=True)

    def turn(self, steps: int) -> None:
        """So many steps more that count; the one that wakes the card does not."""
        before = self.run.step
        self.go_to(before + steps + 1)
        made = [row for row in self.run.history if row["step"] > before + 1]
        self.steps += made
        self.rates.append(sum(r["tokens"] for r in made) / sum(r["seconds"] for r in made))

    @property
    def rate(self) -> float:
        """Real tokens a second, of all turns."""
        return sum(r["tokens"] for r in self.steps) / sum(r["seconds"] for r in self.steps)

    def end(self) -> None:
        """Without the last checkpoint: coordinator first, then its worker."""
        pids = [self.run.coordinator_pid or 0, *self.pids]
        self.run.close()
        for pid in filter(None, pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while any(pid and is_alive(pid) for pid in pids):
            time.sleep(0.05)


def start(name: str, lengths: list[int], args: argparse.Namespace) -> Side:
    """Start a run over documents of these lengths."""
    draw = random.Random(1)
    vocab = int(_native.check_model(args.model)["vocab"])
    numbers = [draw.randrange(3, vocab) for _ in range(1 << 16)]
    rows = []
    for length in lengths:
        begin = draw.randrange(len(numbers) - length)
        ids = numbers[begin : begin + length]
        rows.append({"input_ids": ids, "labels": ids})
    run = pm.finetune(
        args.model, rows, devices=args.device, max_steps=10**6, name=name.replace(" ", "-"),
        per_device_train_batch_size=args.rows, max_length=args.longest, packing=True,
        save_strategy="no", restart="never",
    )  # fmt: skip
    return Side(name, run, len(lengths))


def tell(side: Side, args: argparse.Namespace) -> None:
    """One line of what came."""
    full = sum(r["tokens"] for r in side.steps) / (len(side.steps) * args.rows * args.longest)
    plan = side.run.plan.total if side.run.plan else 0
    turns = ", ".join(f"{rate:,.0f}" for rate in side.rates)
    slowest = max(side.steps, key=lambda row: row["seconds"])
    print(
        f"{side.name:10} {side.rate:10,.0f} tokens/s ({turns}), {len(side.steps)} steps, "
        f"{side.documents} documents, rows {100 * full:.1f} % full, plan {plan / 2**30:.1f} GiB, "
        f"slowest {slowest['seconds']:.3f} s (step {slowest['step']}, {slowest['tokens']:,} tokens)"
    )


def main() -> int:
    """Measure both in turn and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    parser.add_argument("--shortest", type=int, default=50)
    parser.add_argument("--longest", type=int, default=2048)
    args = parser.parse_args()
    if min(args.rows, args.turns, args.steps) < 1:
        parser.error("--rows, --turns and --steps are at least 1")
    if not 2 <= args.shortest <= args.longest <= LONGEST:
        parser.error(f"2 <= --shortest <= --longest <= {LONGEST}")
    # Half of what is trained on; the second half comes again.
    tokens = args.rows * args.longest * (WARM["packed"] + args.turns * (args.steps + 2)) // 2
    spread = lengths_of(random.Random(0), tokens, args.shortest, args.longest)
    sides: list[Side] = []
    with tempfile.TemporaryDirectory(prefix="pml-packed-") as runs:
        os.environ["PANTHERAML_RUNS"] = runs
        try:
            for name, lengths in (
                ("full rows", [args.longest] * (tokens // args.longest)),
                ("packed", spread),
            ):
                sides.append(start(name, lengths, args))
                sides[-1].go_to(WARM[name])
            for _ in range(args.turns):
                for side in sides:
                    side.turn(args.steps)
            for side in sides:
                tell(side, args)
        finally:
            for side in sides:
                side.end()
    pairs = [p / f for f, p in zip(sides[0].rates, sides[1].rates, strict=True)]
    print(
        f"packed has {100 * sides[1].rate / sides[0].rate:.1f} % of the rate of full rows "
        f"({100 * min(pairs):.1f} to {100 * max(pairs):.1f} in {len(pairs)} turns)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
