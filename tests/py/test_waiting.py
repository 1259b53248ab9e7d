"""Memory that a run's device does not give, with the real worker: what a stop of a run that waits
for it saves, and what is said of a plan that is made again.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pantheraml as pm
import pytest
from conftest import PATIENCE, SLOW_WORKER, until
from pantheraml import programs
from pantheraml.live import notes

STEPS = 600  # more than a client that is stalled lets pass

Start = Callable[..., pm.Run]


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file: while it is there, a run is not over before what is to happen to it.

    Its worker finds no memory while the run's folder has a file `crowded`.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    shutil.copy(programs.coordinator(), folder)  # it looks for the worker beside itself
    (folder / "pml-worker").symlink_to(SLOW_WORKER)
    monkeypatch.setenv("PML_BIN", str(folder))
    path = tmp_path / "slow"
    path.touch()
    monkeypatch.setenv("PML_SLOW", str(path))
    return path


def ended(run: pm.Run, folder: Path) -> tuple[bytes, list[tuple[float, ...]]]:
    """Its weights, and its last steps, which it made after whatever happened to it."""
    weights = next(run.export(folder).glob("*model.safetensors")).read_bytes()
    return weights, [(r["step"], r["loss"], r["grad_norm"]) for r in run.history[-5:]]


@pytest.mark.parametrize(
    "settings",
    [
        {"lora": pm.LoRA(r=4, lora_dropout=0.1), "devices": 2},
        {"lora": pm.LoRA(r=64), "optim": "adamw_8bit"},
        {"method": "full"},
        {"method": "full", "optim": "sgd", "optim_args": "momentum=0.9"},
    ],
    ids=["lora", "8 bits", "full", "sgd"],
)
def test_what_a_stop_saves_goes_on(
    start: Start, slow: Path, gate: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    given = {"max_steps": STEPS, "deterministic": True, "shuffle": True} | settings
    run = start(name="waits", **given)
    pause = run.pause()
    gate.touch()
    pause.wait(PATIENCE)
    while run.step < 10:
        run.resume()  # the next pause is on its way before it goes on
        run.pause(wait=True)
    assert run.step < STEPS
    (run.folder / "crowded").touch()
    os.kill(run.workers[0]["pid"], signal.SIGKILL)
    until(lambda: run.reason.startswith("waiting for memory of cpu: others have it"), "waiting")
    restart = next(event for event in run.events() if event["type"] == "restart")
    assert restart["from"] == "snapshot"
    assert not (run.folder / "checkpoints").exists()
    run.stop(wait=True)
    folder = run.folder / "checkpoints" / f"step-{restart['step']:06}"
    assert run.state == "stopped" and f"checkpoints/{folder.name}" in run.reason
    assert (folder / "MANIFEST").exists()
    (run.folder / "crowded").unlink()
    slow.unlink()
    run.resume()
    run.wait(PATIENCE)
    plain = start(name="plain", **given)
    plain.wait(PATIENCE)
    assert ended(run, tmp_path / "a") == ended(plain, tmp_path / "b")


def test_memory_that_is_refused_is_planned_again_and_said(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PML_WORKER", str(SLOW_WORKER))
    given = {"max_steps": 3, "per_device_train_batch_size": 64, "deterministic": True}
    plain = start(name="plain", **given).wait(PATIENCE)
    monkeypatch.setenv("PML_REFUSE", "1")
    run = start(name="refused", **given).wait(PATIENCE)
    assert run.state == "finished" and run.step == 3, run.reason
    plan, first = (next(e for e in r.events() if e["type"] == "plan") for r in (run, plain))
    assert plan["total"] <= first["total"] * 15 // 16
    words = (
        f"the device refused the memory that was planned ({first['total'] >> 20} MiB); "
        f"the plan was made again, for {plan['total'] >> 20} MiB"
    )
    assert [line for line in notes(run) if "warning" in line] == [f"warning: {words}"]
    assert not [line for line in notes(plain) if "warning" in line]
    losses, before = ([row["loss"] for row in r.history] for r in (run, plain))
    assert losses == pytest.approx(before, rel=1e-5)
