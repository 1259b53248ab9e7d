"""Ctrl-C while modules load: the call ends, the process can go on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE, hear_ctrl_c
from pantheraml import whole

# Ctrl-C comes when a part of NumPy behind its C modules is looked for, in the first call that needs
# it; then the call is made again.
INTERRUPTED = """
import signal, sys, threading
from importlib.abc import MetaPathFinder
import pantheraml as pm

class CtrlC(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "numpy.linalg":
            sys.meta_path.remove(self)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

sys.meta_path.insert(0, CtrlC())
assert "numpy" not in sys.modules
for _ in range(2):
    try:
        print(pm.preview([{"text": "seen"}], sys.argv[1]))
    except KeyboardInterrupt:
        print("interrupted")
"""


def test_an_interrupt_spoils_nothing(model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", INTERRUPTED, str(model)],
        capture_output=True, text=True, check=False, timeout=PATIENCE, preexec_fn=hear_ctrl_c,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("interrupted\n") and "⟦een" in done.stdout


def test_what_cannot_be_loaded_is_told_where_it_was_asked_for() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        whole.load("json", "no_such_module")
