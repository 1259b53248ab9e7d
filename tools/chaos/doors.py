"""Crowds at a shared door: what they cost a step.

Usage: tools/chaos/doors.py [--rounds N] [--block SECONDS] [--report-only]

A small run is shared on loopback. Blocks without anybody, with 2,000 half-open connections and
with 30 viewers, ten of them stopped, take turns: nobody, crowd, nobody, viewers, nobody, … Each
disturbed block is held against the mean of its two undisturbed neighbours, so that a machine that
slowly changes its pace changes nothing. Two measures of a step: processor seconds of the worker
(user and system), and the median of the steps' own seconds. Of the rounds' ratios the median is
given, with an interval that holds the true one with 95%, whatever their distribution (order
statistics).

Goals: +2% with the crowd, +1% with the viewers. A goal is held where the whole interval is within
it, missed where it is beyond, and not decided where it is on both sides: more rounds, or a quieter
machine. Exit status 0: all held; 1: one is missed; 3: one is not decided; --report-only: always 0.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pantheraml as pm
from common import end, reach
from pantheraml.tiny import TinyLlama

GOALS = {"crowd": 0.02, "viewers": 0.01}
CONFIDENCE = 0.95
SETTLE = 0.5  # seconds until a disturbance stands, or has gone
VIEWERS, STOPPED, CROWD = 30, 10, 2000
LEAST = 10  # steps in a block, however slow the machine is
LOWEST = ("nice", "-n", "19")  # what viewers compute, they compute elsewhere in life
TICK = os.sysconf("SC_CLK_TCK")
VIEWER = (
    "import sys, time, pantheraml as pm; runs = [pm.attach(sys.argv[1]) for _ in range(10)]; "
    "print('up', flush=True); time.sleep(1e6)"
)


@contextmanager
def crowd(share: pm.Share) -> Iterator[None]:
    """Connect and say nothing; who is thrown out is gone."""
    host, port = share.address.removeprefix("tcp://").rsplit(":", 1)
    held = [socket.create_connection((host, int(port))) for _ in range(CROWD)]
    try:
        yield
    finally:
        for connection in held:
            connection.close()


@contextmanager
def viewers(share: pm.Share) -> Iterator[None]:
    """Three processes of ten viewers each; one of them stops reading."""
    with tempfile.TemporaryDirectory() as folder:
        key = share.save(Path(folder) / "key.json")
        made = [
            subprocess.Popen(
                [*LOWEST, sys.executable, "-c", VIEWER, str(key)], stdout=subprocess.PIPE
            )
            for _ in range(VIEWERS // STOPPED)
        ]
        for process in made:
            assert process.stdout is not None
            process.stdout.readline()
        made[0].send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for process in made:
                process.kill()
                process.wait()


def processor_seconds(run: pm.Run) -> float:
    """User and system seconds of the run's workers so far."""
    total = 0
    for worker in run.workers:
        fields = Path(f"/proc/{worker['pid']}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICK


def block(run: pm.Run, seconds: float) -> tuple[float, float]:
    """Processor seconds of a step, and the median of the steps' seconds."""
    time.sleep(SETTLE)
    used, begin = processor_seconds(run), run.step
    time.sleep(seconds)
    reach(run, begin + LEAST)
    used, last = processor_seconds(run) - used, run.step
    taken = [row["seconds"] for row in run.history if begin < row["step"] <= last]
    return used / (last - begin), statistics.median(taken)


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Median, and the ends of an interval for it: the k-th smallest and the k-th largest value."""
    n, values = len(ratios), sorted(ratios)
    k = 0
    while 1 - 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n >= CONFIDENCE:
        k += 1
    if k == 0:
        return statistics.median(values), -math.inf, math.inf  # too few rounds
    return statistics.median(values), values[k - 1], values[n - k]


def verdict(low: float, high: float, goal: float) -> str:
    """What an interval says of a goal."""
    return "held" if high <= goal else "MISSED" if low > goal else "not decided"


Measured = list[tuple[float, float]]


def measure(rounds: int, seconds: float) -> tuple[Measured, dict[str, Measured], object]:
    """Give the undisturbed blocks, one more than disturbed ones, and the others in between."""
    crowds: dict[str, Callable[[pm.Share], AbstractContextManager[None]]]
    crowds = {"crowd": crowd, "viewers": viewers}
    alone: Measured = []
    disturbed: dict[str, Measured] = {name: [] for name in crowds}
    with tempfile.TemporaryDirectory(prefix="pml-doors-") as folder:
        os.environ["PANTHERAML_RUNS"] = folder
        run = pm.finetune(
            TinyLlama(hidden=128, layers=4).write(Path(folder) / "model"),
            [{"text": "a panther climbs well " * 20}] * 50,
            max_steps=10**6, max_length=256, threads=1, name="doors",
        )  # fmt: skip
        try:
            reach(run, 20)
            share = run.share("tcp://127.0.0.1:*")
            alone.append(block(run, seconds))
            for _ in range(rounds):
                for name, come in crowds.items():
                    with come(share):
                        disturbed[name].append(block(run, seconds))
                    alone.append(block(run, seconds))
            return alone, disturbed, run.refused
        finally:
            end(run)


def main() -> int:
    """Print a line for each goal and measure, and one of all at last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--block", type=float, default=4.5, help="seconds")
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    begin = time.monotonic()
    alone, disturbed, refused = measure(args.rounds, args.block)
    kinds = len(disturbed)
    said, verdicts = [], []
    for measure_index, measure_name in enumerate(("processor", "wall")):
        base = statistics.median(pair[measure_index] for pair in alone)
        print(f"{measure_name:<10}alone    {base * 1e3:8.3f} ms a step, {len(alone)} blocks")
        for which, (name, blocks) in enumerate(disturbed.items()):
            ratios = []
            for number, pair in enumerate(blocks):
                at = number * kinds + which
                beside = (alone[at][measure_index] + alone[at + 1][measure_index]) / 2
                ratios.append(pair[measure_index] / beside - 1)
            median, low, high = interval(ratios)
            verdicts.append(verdict(low, high, GOALS[name]))
            words = f"{median:+.2%} ({low:+.2%} to {high:+.2%})"
            said.append(f"{name} {measure_name} {words} {verdicts[-1]}")
            print(f"{measure_name:<10}{name:<9}{words}, goal {GOALS[name]:+.0%}: {verdicts[-1]}")
    print(f"turned away: {refused}")
    print(f"doors: {'; '.join(said)}; {time.monotonic() - begin:.0f} s")
    if args.report_only:
        return 0
    return 1 if "MISSED" in verdicts else 3 if "not decided" in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
