"""Where ``pml-coordinator`` lies: inside the package, or where ``$PML_BIN`` says."""

from __future__ import annotations

import os
from pathlib import Path

from pantheraml.errors import NotFoundError


def coordinator() -> Path:
    """Give the absolute path of ``pml-coordinator``; ``pml-worker`` lies beside it."""
    chosen = os.environ.get("PML_BIN")
    folder = Path(chosen).absolute() if chosen else Path(__file__).parent / "bin"
    program = folder / "pml-coordinator"
    for needed in (program, folder / "pml-worker"):
        if not os.access(needed, os.X_OK):
            raise NotFoundError(f"{needed} is missing; reinstall pantheraml, or set PML_BIN")
    return program
