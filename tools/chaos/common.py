"""What the campaigns share: a model that steps quickly, waiting, ending, looking at processes."""

from __future__ import annotations

import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pantheraml as pm
from pantheraml.tiny import TinyLlama
from reap import reap

MARK = "PML_OF_A_TRY"
SHIMS = Path(__file__).resolve().parent.parent.parent / "build" / "release" / "tests" / "fault"


def work_in(folder: Path) -> None:
    """Have runs and kept shards lie there: what one campaign damages, no other one has linked."""
    os.environ["PANTHERAML_RUNS"] = str(folder / "runs")
    os.environ["PANTHERAML_CACHE"] = str(folder / "cache")


def make_model(folder: Path) -> Path:
    """Write the smallest model that is still a Llama."""
    shape = TinyLlama(hidden=16, layers=1, heads=2, kv_heads=1, intermediate=16)
    return shape.write(folder / "model")


def rows() -> list[dict[str, str]]:
    """Give a few short rows."""
    return [{"prompt": f"{n} and {n}", "completion": f" is {2 * n}."} for n in range(36)]


def reach(run: pm.Run, step: int, seconds: float = 36_000) -> None:
    """Wait until so many steps are made; a run that ends before is an error."""
    deadline = time.monotonic() + seconds
    while run.step < step:
        if run.state in ("failed", "stopped", "finished"):
            raise SystemExit(f"the run is {run.state} at step {run.step}: {run.reason}")
        if time.monotonic() > deadline:
            raise SystemExit(f"step {step} is not there after {seconds} s")
        run.wait_for_change(0.5)


def wait_for(over: Callable[[], object], what: str, patience: float) -> float:
    """Wait until something is so, for at most so many seconds; for how many it was."""
    begin = time.monotonic()
    while not over():
        if time.monotonic() > begin + patience:
            raise SystemExit(f"waited {patience:g} s for {what}")
        time.sleep(0.002)
    return time.monotonic() - begin


def end(run: pm.Run) -> None:
    """End a run's coordinator, and wait until it has gone."""
    pid = run.coordinator_pid
    run.close()
    if pid is None:
        return
    with suppress(ProcessLookupError):
        gone = os.pidfd_open(pid)  # readable from its end on, whoever reaps it and when
        os.kill(pid, signal.SIGTERM)
        select.select([gone], [], [], 600)
        os.close(gone)


@contextmanager
def marked() -> Iterator[str]:
    """Have what is started meanwhile bear a mark of its own, and be killed if it is left."""
    os.environ[MARK] = secrets.token_hex(8)
    entry = f"{MARK}={os.environ[MARK]}"
    try:
        yield entry
    finally:
        del os.environ[MARK]
        reap(entry)


def wait_for_end(pids: list[int], others: Callable[[], list[int]], patience: float) -> float:
    """Wait until these processes are gone, and all others that are found then; when that was.

    One that is being started while we look is found at the next look.
    """
    last = time.monotonic()
    quiet = 0
    deadline = last + patience
    while quiet < 3:
        held = []
        for pid in pids:
            with suppress(ProcessLookupError):
                held.append(os.pidfd_open(pid))
        for descriptor in held:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
                raise SystemExit(f"after {patience:g} s there are still {pids}")
            os.close(descriptor)
            last = time.monotonic()
        quiet = 0 if held else quiet + 1
        time.sleep(0.01)
        pids = others()
    return last


def memory(pid: int) -> int:
    """Bytes of a process that are its own (RssAnon)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(pid)


def descriptors(pid: int) -> int:
    """How many files, sockets and the like a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


@contextmanager
def load(processes: int) -> Iterator[None]:
    """Have so many processes burn time meanwhile."""
    burning = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)
    ]
    try:
        yield
    finally:
        for process in burning:
            process.kill()
            process.wait()
