"""A long run, steered and visited all the way: memory and descriptors stay where they are.

Usage: tools/chaos/soak.py [--steps N] [--commands N] [--visits N]

Two workers. The coordinator may grow by what it has to know: where each line of the log begins, and
each command. A client keeps 44 bytes a step, half as much again while it makes room, and each
command. Memory is what is a process's own (RssAnon): the log, which is mapped, is the disk's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pantheraml as pm
from common import descriptors, end, make_model, memory, reach, rows, work_in
from reap import at_end

MIB = 1 << 20
ROUNDS = 20
VISITOR = "import pantheraml as pm; run = pm.attach('soak'); run.close()"


def look(run: pm.Run) -> dict[str, tuple[int, int]]:
    """Memory and descriptors of each process of the run, and of this one."""
    pids = {"coordinator": run.coordinator_pid or 0, "client": os.getpid()}
    pids |= {f"worker {worker['rank']}": worker["pid"] for worker in run.workers}
    return {who: (memory(pid), descriptors(pid)) for who, pid in pids.items()}


def soak(folder: Path, steps: int, commands: int, visits: int) -> tuple[list[Any], int]:
    """Do it; what was seen after each round, and how many steps were made."""
    seen: list[dict[str, tuple[int, int]]] = []
    run = pm.finetune(
        make_model(folder), rows(), name="soak", max_steps=10**9, max_length=64, threads=1,
        devices=2, generate_length=16, save_steps=max(1, steps // 100), save_total_limit=2,
    )  # fmt: skip
    try:
        reach(run, 1)
        for number in range(1, ROUNDS + 1):
            for k in range(commands // ROUNDS):
                run.set(max_grad_norm=1.0 + k % 3)
            run.pause(wait=True)  # or the steps made meanwhile would be most of them
            for _ in range(visits // ROUNDS):
                subprocess.run([sys.executable, "-P", "-c", VISITOR], check=True)
            run.resume(wait=True)
            reach(run, steps * number // ROUNDS)
            seen.append(look(run))
            print(
                f"{run.step:7} steps: "
                + ", ".join(f"{who} {m / MIB:.1f} MiB {n} fd" for who, (m, n) in seen[-1].items()),
                flush=True,
            )
        return seen, run.step
    finally:
        end(run)


def judge(
    first: dict[str, tuple[int, int]], last: dict[str, tuple[int, int]], steps: int, commands: int
) -> bool:
    """Whether memory and descriptors stayed where they were, but for what has to be known."""
    allowed = {
        "coordinator": 2 * (16 * steps + 2048 * commands),
        "client": 66 * steps + 8192 * commands,
    }
    return all(
        memory - first[who][0] < 4 * MIB + allowed.get(who, 0) and n - first[who][1] <= 2
        for who, (memory, n) in last.items()
    )


def main() -> int:
    """Print one line of figures; the exit status says whether all held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--commands", type=int, default=1000)
    parser.add_argument("--visits", type=int, default=100)
    args = parser.parse_args()
    at_end()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pml-soak-") as name:
        work_in(Path(name))
        seen, steps = soak(Path(name), args.steps, args.commands, args.visits)
    # The first quarter warms up: caches, arenas, sockets of the first visitors.
    first, last = seen[ROUNDS // 4], seen[-1]
    words = ", ".join(
        f"{who} {first[who][0] / MIB:.1f} → {last[who][0] / MIB:.1f} MiB, "
        f"{first[who][1]} → {last[who][1]} fd"
        for who in sorted(last)
    )
    print(
        f"soak: {steps} steps, {args.commands} commands, {args.visits} visits in "
        f"{time.monotonic() - begin:.0f} s: {words}"
    )
    return 0 if judge(first, last, steps, args.commands) else 1


if __name__ == "__main__":
    sys.exit(main())
