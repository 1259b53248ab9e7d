"""Runs made for a purpose of our own, in a folder that is removed behind them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pantheraml.run import Run


def end(run: Run) -> None:
    """Leave nothing behind: the folder is about to be removed."""
    pid = run.coordinator_pid
    run.close()
    if pid is None:
        return
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)  # stops in order, without waiting for viewers
    deadline = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether a process is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def runs_in(folder: Path) -> Iterator[None]:
    """Have runs made in another folder."""
    before = os.environ.get("PANTHERAML_RUNS")
    os.environ["PANTHERAML_RUNS"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PANTHERAML_RUNS"]
        else:
            os.environ["PANTHERAML_RUNS"] = before
