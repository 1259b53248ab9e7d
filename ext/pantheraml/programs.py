"""What is started: ``pml-coordinator`` inside the package (or where ``$PML_BIN`` says), prepare."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pantheraml.errors import NotFoundError


def coordinator() -> Path:
    """Give the absolute path of ``pml-coordinator``; ``pml-worker`` lies beside it.

    Raises
    ------
    NotFoundError
        One of the two is not there, or not executable.
    """
    chosen = os.environ.get("PML_BIN")
    folder = Path(chosen).absolute() if chosen else Path(__file__).parent / "bin"
    program = folder / "pml-coordinator"
    for needed in (program, folder / "pml-worker"):
        if not os.access(needed, os.X_OK):
            raise NotFoundError(f"{needed} is missing; reinstall pantheraml, or set PML_BIN")
    return program


def prepare() -> list[str]:
    """Give what makes token shards, for a coordinator to run; the run folder is appended.

    It goes with the launch and not into the run folder: a folder from somebody else names no
    program.
    """
    # -P: what lies in the current folder must not take the place of a library.
    return [sys.executable, "-P", "-m", "pantheraml.data.prepare"]
