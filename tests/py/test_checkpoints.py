"""Which checkpoint is meant: by its name, as the best one, and after somebody went back."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import examples
import pantheraml as pm
import pytest
from conftest import FOREVER, PATIENCE, ROWS, at_step, end, until
from examples import event, line
from pantheraml.report import held_out
from pantheraml_widgets.run_panel import RunPanel
from safetensors.numpy import load_file

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


def weights(folder: Path) -> dict[str, Any]:
    return load_file(next(folder.glob("adapter_model.safetensors")))


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

    loading = forged(runs / "loading", *past, back[0])
    assert loading.step == 20 and [e.step for e in loading.evaluations] == [20]
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


BEST: dict[str, Any] = {
    "eval_data": ROWS[:8], "load_best_model_at_end": True, "lr_scheduler_type": "constant",
    "gradient_accumulation_steps": 16,
}  # fmt: skip


def paused_at(run: pm.Run, step: int, name: str) -> pm.Checkpoint:
    """Let it come so far and a little further, and stand; a checkpoint of that."""
    at_step(run, step)
    run.pause(wait=True)
    return run.checkpoint(name, wait=True)


def rated_at(run: pm.Run, step: int, name: str, rate: float = 0.0) -> pm.Checkpoint:
    """The same; who goes on from it has that rate: learns nothing any more, where none is given."""
    at_step(run, step)
    run.pause(wait=True)
    run.set(learning_rate=rate, wait=True)
    made = run.checkpoint(name, wait=True)
    run.set(learning_rate=1e-3, wait=True)
    return made


def loss_at(run: pm.Run, step: int) -> float:
    return next(e.loss for e in run.evaluations if e.step == step)


def ended(run: pm.Run) -> None:
    run.stop(wait=True)
    end(run)


def test_back_to_what_was_gone_back_from(start: Start, tmp_path: Path) -> None:
    """Two branches have a checkpoint of one step; the run ends with the weights of its own."""
    run = start(name="undo", max_steps=300, eval_steps=1, **BEST)
    first = rated_at(run, 3, "first", 1e-2)
    run.resume(wait=True)
    one = rated_at(run, first.step + 4, "one")
    best = loss_at(run, one.step)
    ended(run)
    run = pm.resume("undo", checkpoint="first")
    two = paused_at(run, one.step + 2, "two")
    assert loss_at(run, one.step) != best
    assert {c.name for c in run.checkpoints if c.abandoned and c.name} == {"one"}
    other = [row["loss"] for row in run.history]
    ended(run)
    run = pm.resume("undo", checkpoint="one")
    run.wait(PATIENCE)
    assert {c.name for c in run.checkpoints if c.abandoned and c.name} == {"two"}
    assert two.step > one.step and loss_at(run, one.step) == best
    panel = RunPanel(run)
    assert panel.snapshot["columns"]["step"] == [row["step"] for row in run.history]
    assert panel.snapshot["evals"]["step"] == [e.step for e in run.evaluations]
    panel.close()
    assert [row["loss"] for row in run.history][first.step + 1 : one.step] != (
        other[first.step + 1 : one.step]
    )
    found = run.best_checkpoint
    assert found is not None and found.name == "one"
    measured = run.evaluate()
    assert (measured.loss, measured.step) == (pytest.approx(best, rel=1e-6), one.step)
    made = weights(run.export(tmp_path / "out"))
    assert all((made[name] == x).all() for name, x in weights(one.path).items())


def test_the_best_one_has_been_pruned(start: Start) -> None:
    """One with a name has its weights still; where none has, it is said, and no reason to fail."""
    run = start(name="pruned", max_steps=300, eval_steps=1, save_total_limit=1, **BEST)
    first = rated_at(run, 3, "first")
    best = loss_at(run, first.step)
    run.resume(wait=True)
    at_step(run, first.step + 5)
    ended(run)
    run = pm.resume("pruned", checkpoint="first")
    run.wait(PATIENCE)
    measured = run.evaluate()
    assert (measured.loss, measured.step) == (pytest.approx(best, rel=1e-6), first.step)
    steps, _ = held_out(run)
    assert steps == sorted(steps) and steps.count(first.step) == 2
    assert run.evaluations[-1].step == first.step  # what came last, for who asks for that
    assert run._newest(None).path == first.path
    ended(run)
    # As one that was made before the evaluation had been: it does not know of it.
    shutil.rmtree(first.path)
    again = pm.resume("pruned")
    assert again.evaluate().step == again.step == again._newest(None).step == 300
    assert again.state == "finished"
    warned = [e["message"] for e in again.events() if e["type"] == "log"][-1]
    assert "the run ends with the weights of its last step instead" in warned


def test_an_evaluation_that_is_asked_for_is_none_of_the_runs_own(runs: Path) -> None:
    """It comes in a later timeline than the run's own of that step, which stays."""
    _, made = at(20)
    run = forged(
        runs / "asked", ("checkpoint", 0, made), ("eval", 0, {"step": 20, "loss": 3.0}),
        ("eval", 1, {"step": 20, "loss": 3.0, "command": 1}),
        ("state", 1, {"state": "finished", "step": 20}),
    )  # fmt: skip
    found = run.best_checkpoint
    assert found is not None and found.path.name == "step-000020" and len(run.evaluations) == 2


def test_a_resume_takes_back_a_stop_for_good(start: Start) -> None:
    """Also where the coordinator is lost later: the next one reads of that stop, or pause."""
    run = start(name="again", max_steps=FOREVER, save_steps=50)
    at_step(run, 5)
    run.pause(wait=True)
    run.stop(wait=True)
    end(run)
    again = pm.resume("again")
    at_step(again, again.step + 20)
    lost = again.coordinator_pid
    assert lost is not None
    os.kill(lost, signal.SIGKILL)
    until(lambda: again.coordinator_pid not in (None, lost), "another coordinator")
    at_step(again, again.step + 30)
    assert again.state == "running"


def test_the_latest_run_is_the_one_that_began_last(runs: Path) -> None:
    """Whichever run.json was written last: its coordinator does that when the workers are ready."""
    for name, created, written in (("a", 20.0, 100), ("b", 30.0, 50), ("c", 10.0, 200)):
        folder = runs / name
        folder.mkdir(parents=True)
        path = folder / "run.json"
        path.write_text(json.dumps(examples.RUN | {"name": name, "created": created}))
        os.utime(path, (written, written))
    assert [info.name for info in pm.runs()] == ["b", "a", "c"]
