"""Whether this process is a notebook's kernel."""

from __future__ import annotations

import sys
from typing import Any


def kernel() -> Any | None:
    """Give the kernel that this process is; None for a script, a prompt or a shell's command."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None)
