"""A long run, steered and visited all the way: memory and descriptors stay where they are.

Usage: tools/chaos/soak.py [--steps N] [--commands N] [--visits N]

The coordinator may grow by what it has to know: where each line of the log begins, and each
command. A client holds the history; what a step costs it is printed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import descriptors, end, make_model, memory, reach, rows

MIB = 1 << 20
VISITOR = "import pantheraml as pm; run = pm.attach('soak'); run.close()"


def main() -> int:
    """Print one line of figures; the exit status says whether all held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--commands", type=int, default=1000)
    parser.add_argument("--visits", type=int, default=100)
    args = parser.parse_args()
    rounds = 20
    seen: list[dict[str, tuple[int, int]]] = []
    with tempfile.TemporaryDirectory(prefix="pml-soak-") as name:
        os.environ["PANTHERAML_RUNS"] = str(Path(name) / "runs")
        import pantheraml as pm

        begin = time.monotonic()
        run = pm.finetune(
            make_model(Path(name)), rows(), name="soak", max_steps=10**9, max_length=64, threads=1,
            generate_length=16, save_steps=max(1, args.steps // 100), save_total_limit=2,
        )  # fmt: skip
        try:
            reach(run, 1)
            for number in range(1, rounds + 1):
                for k in range(args.commands // rounds):
                    run.set(max_grad_norm=1.0 + k % 3)
                for _ in range(args.visits // rounds):
                    subprocess.run(
                        [sys.executable, "-P", "-c", VISITOR],
                        check=True,
                    )  # fmt: skip
                reach(run, args.steps * number // rounds)
                pids = {
                    "coordinator": run.coordinator_pid or 0,
                    "worker": run.workers[0]["pid"],
                    "client": os.getpid(),
                }
                seen.append({who: (memory(pid), descriptors(pid)) for who, pid in pids.items()})
            seconds = time.monotonic() - begin
            step = run.step
        finally:
            end(run)
    # The first quarter warms up: caches, arenas, sockets of the first visitors.
    first, last = seen[rounds // 4], seen[-1]
    grown = {who: last[who][0] - first[who][0] for who in last}
    opened = {who: last[who][1] - first[who][1] for who in last}
    known = 2 * (16 * step + 2048 * args.commands)
    good = grown["worker"] < 4 * MIB and grown["coordinator"] < 4 * MIB + known
    good = good and all(n <= 2 for n in opened.values())
    words = ", ".join(f"{who} {grown[who] / MIB:+.1f} MiB {opened[who]:+d} fd" for who in grown)
    print(
        f"soak: {step} steps, {args.commands} commands, {args.visits} visits in {seconds:.0f} s: "
        f"{words}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
