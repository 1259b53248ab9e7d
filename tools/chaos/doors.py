"""Crowds at a shared door: what they cost a step.

    .venv/bin/python tools/chaos/doors.py [ROUNDS]

A small run is shared on loopback. Undisturbed stretches, stretches with 2,000 half-open connections
and stretches with 30 viewers, ten of them stopped, take turns; the median seconds of a step are
compared. Goals: +2% with the crowd, +1% with the viewers.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pantheraml as pm
from pantheraml.tiny import TinyLlama

STRETCH = 3.0
VIEWERS, STOPPED, CROWD = 30, 10, 2000
VIEWER = (
    "import sys, time, pantheraml as pm; runs = [pm.attach(sys.argv[1]) for _ in range(10)]; "
    "print('up', flush=True); time.sleep(1e6)"
)


@contextmanager
def nobody(_: pm.Share) -> Iterator[None]:
    """Nothing happens."""
    yield


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
            subprocess.Popen([sys.executable, "-c", VIEWER, str(key)], stdout=subprocess.PIPE)
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


def stretch(run: pm.Run, share: pm.Share, disturb: Callable[[pm.Share], object]) -> list[float]:
    """Seconds of the steps of one stretch, once the disturbance stands."""
    with disturb(share):  # type: ignore[attr-defined]
        time.sleep(0.5)
        begin = run.step
        time.sleep(STRETCH)
        return [row["seconds"] for row in run.history if row["step"] > begin]


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    taken: dict[str, list[float]] = {"undisturbed": [], "crowd": [], "viewers": []}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PANTHERAML_RUNS"] = folder
        run = pm.finetune(
            TinyLlama(hidden=128, layers=4).write(Path(folder) / "model"),
            [{"text": "a panther climbs well " * 20}] * 50,
            max_steps=10**6, max_length=256, threads=1, name="doors",
        )  # fmt: skip
        while run.step < 3:
            time.sleep(0.1)
        share = run.share("tcp://127.0.0.1:*")
        for _ in range(rounds):
            for name, disturb in (("undisturbed", nobody), ("crowd", crowd), ("viewers", viewers)):
                taken[name] += stretch(run, share, disturb)
        refused = run.refused
        run.stop(wait=True)
    base = statistics.median(taken["undisturbed"])
    for name, seconds in taken.items():
        median = statistics.median(seconds)
        print(
            f"{name:<12}{median * 1e3:8.3f} ms a step, {median / base - 1:+.2%}, n={len(seconds)}"
        )
    print(f"turned away: {refused}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
