"""Memory that runs out: each allocation of the coordinator, or of the extension, refused once.

Usage: tools/chaos/memory.py [--at N...] [--from N] [--count N] [--together N]
       tools/chaos/memory.py --extension [--together N]

What each life must show is in tests/fault/test_no_memory.c and in tests/py/out_of_memory.py.

How many allocations a life of the coordinator makes depends on how busy the machine is, so nothing
is counted beforehand: one number after the other is refused until no life comes so far any more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from common import end, make_model, reach, rows, work_in
from reap import at_end

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "release"
TRIES = 5  # of lives that end before the allocation that is to be refused
BEYOND = 10  # numbers in a row that none of them comes to: there are no more
LEAST, MOST = 1000, 50_000  # that a life makes: with fewer it is none, with more it has no end
SCENARIOS = ("client", "run", "engine", "messages", "python")


def live(number: int) -> tuple[int, str]:
    """One life in which an allocation is refused, 0: none; how many it came to, and what was said.

    0 where it did not hold.
    """
    fault = BUILD / "tests" / "fault"
    done = subprocess.run(
        [fault / "test_fault_no_memory", BUILD / "pml-coordinator", fault / "fake_worker",
         BUILD / "libnomem.so"],
        env=os.environ | {"PML_NOMEM_AT": str(number)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = re.search(r"(\d+) allocations", done.stdout)
    return int(found[1]) if found and done.returncode == 0 else 0, done.stdout + done.stderr


def refuse(number: int, live: Callable[[int], tuple[int, str]] = live) -> tuple[int, str]:
    """The same until a life comes to this allocation: one may be over a little sooner."""
    came, said = live(number)
    for _ in range(TRIES - 1):
        if came == 0 or came >= number:
            break
        came, said = live(number)
    return came, said


class Campaign:
    """Numbers refused one after the other, until none comes so far any more."""

    def __init__(self) -> None:
        self.refused = 0
        self.absent: list[int] = []  # that no life came to, though one came to a later one
        self.bad: list[int] = []
        self.ended = False  # no life comes so far any more
        self._row: list[int] = []

    def take(self, number: int, came: int, said: str) -> None:
        """What came of refusing it."""
        if 0 < came < number:
            self._row.append(number)
            self.ended = len(self._row) >= BEYOND
            return
        self.absent += self._row
        self._row = []
        self.refused += 1
        if came == 0:
            self.bad.append(number)
            print(f"allocation {number}:\n{said}", flush=True)

    def run(
        self, numbers: Iterable[int], together: int, live: Callable[[int], tuple[int, str]] = live
    ) -> None:
        """Refuse these in their order, so many at a time."""
        left = iter(numbers)
        with ThreadPoolExecutor(together) as pool:
            ahead = deque(
                (number, pool.submit(refuse, number, live)) for number in islice(left, 2 * together)
            )
            while ahead and not self.ended:
                number, life = ahead.popleft()
                self.take(number, *life.result())
                for following in islice(left, 1):
                    ahead.append((following, pool.submit(refuse, following, live)))
                if number % 100 == 0:
                    print(f"allocation {number}: {len(self.bad)} failed until here", flush=True)
            for _, life in ahead:
                life.cancel()
        if not self.ended:  # these alone were asked for
            self.absent += self._row


def extension(together: int) -> int:
    """Every allocation of each scenario; a long one in parts, each in a process of its own."""
    begin = time.monotonic()
    shim, lives = BUILD / "libnomem.so", ROOT / "tests" / "py" / "out_of_memory.py"
    with tempfile.TemporaryDirectory(prefix="pml-memory-") as name:
        work_in(Path(name))
        import pantheraml as pm

        model = make_model(Path(name))
        run = pm.finetune(
            model, rows(), name="memory", max_steps=10**9, max_length=64, threads=1,
            generate_length=16, restart="never",
        )  # fmt: skip
        try:
            reach(run, 3)
            run.checkpoint(wait=True)
            run.pause(wait=True)

            def part(what: tuple[str, int, int]) -> tuple[str, int, int, int, str]:
                scenario, number, parts = what
                call = [shim, scenario, run.folder, model, 0, number, parts]
                done = subprocess.run(
                    [sys.executable, "-P", lives, *map(str, call)],
                    env=os.environ | {"LD_PRELOAD": str(shim)},
                    capture_output=True, text=True, check=False,
                )  # fmt: skip
                if done.returncode != 0:
                    return scenario, 0, 0, 0, f"{done.returncode}: {done.stderr}"
                figures = json.loads(done.stdout)
                return scenario, figures["allocations"], figures["refused"], figures["absent"], ""

            parts = [
                (scenario, number, count)
                for scenario in SCENARIOS
                for count in (max(1, together - 3) if scenario == "engine" else 1,)
                for number in range(count)
            ]
            with ThreadPoolExecutor(together) as pool:
                made = list(pool.map(part, parts))
            good = run.state == "paused"
        finally:
            end(run)
    said = []
    for scenario in SCENARIOS:
        mine = [each for each in made if each[0] == scenario]
        total, refused = min(each[1] for each in mine), sum(each[2] for each in mine)
        absent = sum(each[3] for each in mine)  # which no life of twenty came to
        said.append(f"{scenario} {refused} of {total}" + (f" ({absent} absent)" if absent else ""))
        good = good and refused + absent >= total and refused > 0 and absent < 4
        for each in mine:
            if each[4]:
                print(f"{scenario}: {each[4]}")
    print(f"extension: refused {', '.join(said)} in {time.monotonic() - begin:.0f} s")
    return 0 if good else 1


def main() -> int:
    """Print one line of figures; the exit status says whether all held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--at", type=int, nargs="+", help="these alone")
    parser.add_argument("--from", type=int, default=1, dest="first", help="the first of a part")
    parser.add_argument("--count", type=int, help="of the part; all that are left when not given")
    parser.add_argument("--extension", action="store_true", help="instead of the coordinator")
    parser.add_argument("--together", type=int, default=os.cpu_count() or 2)
    args = parser.parse_args()
    at_end()
    if args.extension:
        return extension(args.together)
    begin = time.monotonic()
    came, said = live(0)
    if came == 0:
        print(said)
        return 1
    campaign = Campaign()
    part = args.at or (range(args.first, args.first + args.count) if args.count else None)
    campaign.run(part or range(args.first, MOST), args.together)
    least = 1 if part else max(1, LEAST - args.first)
    good = not campaign.bad and campaign.refused >= least
    if part is None and not campaign.ended:
        good = False
        print(f"a life makes more than {MOST} allocations")
    failed = ", ".join(map(str, campaign.bad)) or "none"
    absent = f"; {len(campaign.absent)} that no life of {TRIES} came to" if campaign.absent else ""
    whole = "" if part else ", all that lives come to"
    print(
        f"memory: {campaign.refused} allocations refused{whole}{absent} in "
        f"{time.monotonic() - begin:.0f} s; failed: {failed}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
