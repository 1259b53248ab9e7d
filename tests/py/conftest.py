"""What the tests of the Python side share: a tiny model, a folder of runs, their end."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pantheraml as pm
import pytest
from pantheraml import programs
from pantheraml.tiny import TinyLlama

sys.path.append(str(Path(__file__).parents[2] / "tools" / "chaos"))
from reap import at_end, reap

at_end()  # tests that are killed leave nothing behind either

#: Seconds. Nothing that a test waits for takes so long on any machine that works, however slow or
#: busy: who has waited so long waits for nothing. What has to be quick is measured by tools/chaos
#: and tools/bench; no test asserts a time.
PATIENCE = 240.0

#: The worker that is as slow as a test needs it: tests/fault/slow_worker.c.
SLOW_WORKER = Path(__file__).parents[2] / "build" / "release" / "tests" / "fault" / "slow_worker"

#: Steps of a run that does not end by itself.
FOREVER = 10**6

ROWS = [
    {"prompt": f"{a} plus {b} is ", "completion": f"{a + b}."} for a in range(8) for b in range(8)
]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte tokenizer and a chat template."""
    return TinyLlama().write(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of kept shards: what another test made is not this one's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PANTHERAML_CACHE", str(folder))
    return folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of runs; every coordinator begun in it is gone afterwards."""
    folder = tmp_path / "runs"
    monkeypatch.setenv("PANTHERAML_RUNS", str(folder))
    monkeypatch.setenv("PML_TEST_RUNS", str(folder))  # of all that is started for it
    monkeypatch.setenv("PML_GRACE_SECONDS", "600")  # a coordinator waits for us, however late
    try:
        yield folder
        for info in pm.runs():
            end(pm.attach(info.folder, restart=False))
    finally:
        reap(f"PML_TEST_RUNS={folder}")


def end(run: pm.Run) -> None:
    """Stop a run and wait until its coordinator has gone."""
    pid = run.coordinator_pid
    run.close()
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)  # in order, and without waiting for viewers
        until(lambda: not alive(pid), f"coordinator {pid} to go")


def remove(folder: Path) -> None:
    """Remove a run's folder under its coordinator.

    The log first: as long as that is there, a lock that goes is put back.
    """
    (folder / "events.jsonl").unlink()
    shutil.rmtree(folder)


def alive(pid: int) -> bool:
    """Whether a process is there.

    A zombie is not, once its other threads have ended: until then its locks are held.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return fields[0] not in "ZX" or int(fields[17]) > 1  # state, threads


def until(over: Callable[[], object], what: str) -> None:
    """Wait for something, or fail."""
    deadline = time.monotonic() + PATIENCE
    while not over():
        assert time.monotonic() < deadline, f"waited {PATIENCE:g} s for {what}"
        time.sleep(0.02)


def at_step(run: pm.Run, step: int) -> None:
    """Wait until a run has made so many steps, or fail."""
    until(lambda: run.step >= step or run.state == "failed", f"step {step}")
    assert run.state != "failed", run.reason


def hear_ctrl_c() -> None:
    """For `preexec_fn`: a child hears SIGINT also where the tests were started with it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start(runs: Path, model: Path) -> Callable[..., pm.Run]:
    """Start a small run; keyword arguments go over the defaults."""

    def begin(data: Any = ROWS, **settings: Any) -> pm.Run:
        given: dict[str, Any] = {
            "max_steps": 20, "learning_rate": 1e-3, "max_length": 64, "packing": False,
            "per_device_train_batch_size": 2, "threads": 1, "generate_length": 64,
        } | settings  # fmt: skip
        if given["max_steps"] == FOREVER:  # else it makes 500 steps a second, for every client
            given.setdefault("gradient_accumulation_steps", 16)
        return pm.finetune(given.pop("model", model), data, **given)

    return begin


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that workers wait for before they begin: what is asked until then is so at step 1.

    However slow this process is. PML_BEHIND_GATE names the worker.
    """
    gate, script = tmp_path / "gate", tmp_path / "pml-worker"
    worker = programs.coordinator().with_name("pml-worker")
    script.write_text(
        f"#!/bin/sh\nwhile [ ! -e {shlex.quote(str(gate))} ]; do sleep 0.01; done\n"
        'exec "$PML_BEHIND_GATE"\n'
    )
    script.chmod(0o700)
    monkeypatch.setenv("PML_WORKER", str(script))
    monkeypatch.setenv("PML_BEHIND_GATE", str(worker))
    return gate


def environment(**also: str) -> dict[str, str]:
    """The environment of a child process."""
    return {**os.environ, **also}
