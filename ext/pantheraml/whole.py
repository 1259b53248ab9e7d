"""Modules that are loaded whole, or an interrupt would spoil them for good."""

from __future__ import annotations

import sys
import threading
from importlib import import_module


def load(*names: str) -> None:
    """Load modules so that Ctrl-C cannot stop one half-way.

    NumPy that was interrupted while it loaded cannot be loaded again in that process ("cannot load
    module more than once per process"): who pressed Ctrl-C in the first cell that needs it would
    have to restart the kernel. Interrupts are raised in the main thread only, so another one loads;
    what is interrupted is the waiting for it.

    Raises
    ------
    ImportError
        One of them is not installed, or cannot be loaded.
    """
    for name in names:
        if name in sys.modules:
            continue
        failed: list[BaseException] = []
        thread = threading.Thread(target=_load, args=(name, failed), name=f"pml import {name}")
        thread.start()
        thread.join()
        if failed:
            raise failed[0]


def _load(name: str, failed: list[BaseException]) -> None:
    try:
        import_module(name)
    except BaseException as error:  # it is raised where it was asked for
        failed.append(error)
