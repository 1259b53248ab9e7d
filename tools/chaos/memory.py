"""Memory that runs out in the coordinator: each of its allocations refused, in a life of its own.

Usage: tools/chaos/memory.py [--at N...] [--from N] [--count N] [--together N]

What each life must show is in tests/fault/test_no_memory.c.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from reap import at_end

BUILD = Path(__file__).resolve().parents[2] / "build" / "release"


def live(number: int) -> tuple[bool, str]:
    """One life in which an allocation is refused, 0: none; whether it held, and what was said."""
    fault = BUILD / "tests" / "fault"
    done = subprocess.run(
        [fault / "test_fault_no_memory", BUILD / "pml-coordinator", fault / "fake_worker",
         BUILD / "libnomem.so"],
        env=os.environ | {"PML_NOMEM_AT": str(number)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode == 0, done.stdout + done.stderr


def main() -> int:
    """Print one line of figures; the exit status says whether all held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--at", type=int, nargs="+", help="these alone")
    parser.add_argument("--from", type=int, default=1, dest="first", help="the first of a part")
    parser.add_argument("--count", type=int, help="of the part; all that are left when not given")
    parser.add_argument("--together", type=int, default=os.cpu_count() or 2)
    args = parser.parse_args()
    at_end()
    begin = time.monotonic()
    held, said = live(0)
    total = re.search(r"(\d+) allocations", said)
    if not held or total is None:
        print(said)
        return 1
    last = int(total[1])
    if args.count is not None:
        last = min(last, args.first + args.count - 1)
    numbers = args.at or range(args.first, last + 1)
    bad = []
    with ThreadPoolExecutor(args.together) as pool:
        for number, (held, said) in zip(numbers, pool.map(live, numbers), strict=True):
            if not held:
                bad.append(number)
                print(f"allocation {number}:\n{said}", flush=True)
            if number % 100 == 0:
                print(f"allocation {number}: {len(bad)} failed until here", flush=True)
    print(
        f"memory: {len(numbers)} of {total[1]} allocations refused in "
        f"{time.monotonic() - begin:.0f} s; failed: {', '.join(map(str, bad)) or 'none'}"
    )
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
