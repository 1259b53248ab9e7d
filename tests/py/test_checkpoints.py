"""Which checkpoint is meant: by its name, as the best one, and after somebody went back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import examples
import pantheraml as pm
import pytest
from conftest import FOREVER, at_step, end
from examples import event, line

Start = Callable[..., pm.Run]


def test_a_name_stays_with_it(start: Start) -> None:
    """The run stops where it was saved by name: that is its last checkpoint, too."""
    run = start(name="named", max_steps=FOREVER)
    at_step(run, 2)
    run.pause(wait=True)
    mark = run.checkpoint("mark", wait=True)
    run.stop(wait=True)
    last = [e for e in run.events() if e["type"] == "checkpoint"][-1]
    assert last["path"].endswith("-mark") and "name" not in last
    assert [(c.name, c.path) for c in run.checkpoints] == [("mark", mark.path)]
    end(run)
    again = pm.resume("named", checkpoint="mark")
    at_step(again, mark.step + 1)
    starts = [e for e in again.events() if e["type"] == "state" and e["state"] == "starting"]
    assert starts[-1]["checkpoint"] == f"checkpoints/{mark.path.name}"


def test_a_folder_is_meant_before_a_name_that_looks_like_it(start: Start) -> None:
    """And one that the log does not tell of can be named: the doctor tells of it."""
    run = start(name="named", max_steps=FOREVER)
    at_step(run, 2)
    run.pause(wait=True)
    first = run.checkpoint(wait=True)
    run.resume(wait=True)
    at_step(run, first.step + 1)
    run.checkpoint(first.path.name, wait=True)
    run.stop(wait=True)
    end(run)
    unknown = first.path.with_name(f"{first.path.name}-copy")
    shutil.copytree(first.path, unknown)
    with pytest.raises(pm.NotFoundError, match="no checkpoint 'step-'"):
        pm.resume("named", checkpoint="step-")
    for path in (first.path, unknown):
        again = pm.resume("named", checkpoint=path.name)
        at_step(again, first.step + 1)
        starts = [e for e in again.events() if e["type"] == "state" and e["state"] == "starting"]
        assert starts[-1]["checkpoint"] == f"checkpoints/{path.name}"
        again.stop(wait=True)
        end(again)


def forged(folder: Path, *events: tuple[str, int, dict[str, object]]) -> pm.Run:
    """A run that has ended, of such events (kind, timeline, fields) and their checkpoints."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(examples.RUN | {"name": folder.name}))
    written = b""
    for seq, (kind, timeline, fields) in enumerate(events, 1):
        made = event(seq, kind, **fields) | {"timeline": timeline}
        if kind in ("checkpoint", "eval", "state"):
            for absent in {"name", "command", "rewound", "checkpoint"} - set(fields):
                made.pop(absent, None)
        written += line(made)
        if kind == "checkpoint":
            (folder / made["path"]).mkdir(parents=True, exist_ok=True)
    (folder / "events.jsonl").write_bytes(written)
    return pm.attach(folder.name, restart=False)


def at(step: int, name: str = "") -> tuple[str, dict[str, object]]:
    path = f"checkpoints/step-{step:06}" + (f"-{name}" if name else "")
    return path, {"step": step, "path": path} | ({"name": name} if name else {})


def test_the_best_is_one_of_what_has_happened(runs: Path) -> None:
    """A better loss at that step belongs to other weights than those from before going back."""
    twenty, first = at(20)
    _, old = at(40, "x")
    _, new = at(40)
    past = [
        ("checkpoint", 0, first), ("eval", 0, {"step": 20, "loss": 3.0}),
        ("checkpoint", 0, old), ("eval", 0, {"step": 40, "loss": 2.0}),
    ]  # fmt: skip
    back = [
        ("state", 1, {"state": "starting", "step": 20, "checkpoint": twenty, "rewound": True}),
        ("state", 1, {"state": "running", "step": 20}),
    ]
    measured = ("eval", 1, {"step": 40, "loss": 1.0})
    stopped = ("state", 1, {"state": "stopped", "step": 40})

    def best(name: str, *events: tuple[str, int, dict[str, object]]) -> str:
        run = forged(runs / name, *events)
        found = run.best_checkpoint
        assert found is not None and not found.abandoned
        return found.path.name

    assert best("before", *past) == "step-000040-x"
    assert best("back", *past, *back, stopped) == "step-000020"
    assert best("measured", *past, *back, measured, stopped) == "step-000020"
    run = "saved", *past, *back, measured, ("checkpoint", 1, new), stopped
    assert best(*run) == "step-000040"
    abandoned = {c.path.name for c in pm.attach("saved", restart=False).checkpoints if c.abandoned}
    assert abandoned == {"step-000040-x"}
    # Of two alike it is the first step, and of that step what was saved last.
    alike = [("eval", 1, {"step": 40, "loss": 3.0}), ("checkpoint", 1, new)]
    assert best("alike", *past, *back, *alike, stopped) == "step-000020"
    twice = [("checkpoint", 1, at(20, "again")[1]), stopped]
    assert best("twice", *past[:2], *twice) == "step-000020-again"


def test_the_latest_run_is_the_one_that_began_last(runs: Path) -> None:
    """Whichever run.json was written last: its coordinator does that when the workers are ready."""
    for name, created, written in (("a", 20.0, 100), ("b", 30.0, 50), ("c", 10.0, 200)):
        folder = runs / name
        folder.mkdir(parents=True)
        path = folder / "run.json"
        path.write_text(json.dumps(examples.RUN | {"name": name, "created": created}))
        os.utime(path, (written, written))
    assert [info.name for info in pm.runs()] == ["b", "a", "c"]
