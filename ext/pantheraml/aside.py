"""Runs made for a purpose of our own, in a folder that is removed behind them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pantheraml import _native
from pantheraml.errors import Error

if TYPE_CHECKING:
    from pantheraml.following import Following

_folders: set[Path] = set()


def is_own(run: Following) -> bool:
    """Whether a run is one of these: nobody need be told how to come back to it."""
    return run.folder.parent in _folders


def end(run: Following) -> None:
    """Leave nothing behind: the folder is about to be removed."""
    pid = run.coordinator_pid
    run.close()
    with suppress(Error):  # one that nobody was connected to yet
        pid = pid or _native.coordinator_pid(_native.connection_file(run.folder))
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
    """Have runs made in another folder. None of them goes on behind it, whatever happens."""
    from pantheraml.following import every_followed

    before = os.environ.get("PANTHERAML_RUNS")
    os.environ["PANTHERAML_RUNS"] = str(folder)
    _folders.add(folder)
    try:
        yield
    finally:
        for run in list(every_followed):
            if is_own(run):
                end(run)
        _folders.discard(folder)
        if before is None:
            del os.environ["PANTHERAML_RUNS"]
        else:
            os.environ["PANTHERAML_RUNS"] = before
