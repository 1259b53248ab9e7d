"""The step program and its times, of plans and of runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import pantheraml as pm
import pytest
from conftest import PATIENCE
from pantheraml import _native, api, connecting, profiles
from pantheraml.aside import is_alive
from pantheraml.link import Link
from pantheraml.steps import Program
from test_cli import shell

Start = Callable[..., pm.Run]


def test_a_program_explains_every_op(model: Path) -> None:
    program = pm.program(model, max_length=32, per_device_train_batch_size=2, packing=False)
    assert program.steps == 0 and "predicted" in repr(program)
    assert all(op.sentence.endswith(".") and op.predicted > 0 for op in program)
    assert all(op.seconds is None and op.calls == 0 for op in program)
    down = next(op for op in program if op.label == "down" and op.layer == 1)
    # 64 tokens through [64, 128] and an adapter of rank 16.
    assert down.flops == 2 * 64 * (64 * 128 + 16 * 128 + 64 * 16)
    assert down.shapes["x"] == (64, 128) and down.shapes["w"] == (64, 128)
    rows = program.rows()
    assert len(rows) == len(program) and rows[down.node]["label"] == "down"
    text, html = str(program), program._repr_html_()
    for sentence in program.sentences().values():
        assert sentence in text and escape(sentence) in html


def test_what_waits_on_the_host_is_told(model: Path) -> None:
    """A plan says so, and its program shows every copy; the CPU does them when it is told to."""
    config, limits, available = api._planned(model, {"max_length": 32, "packing": False})
    text = _native.program(config, limits, available, (3, 2, 8, 1, 0, 0, 1, 1))
    program = Program.parse(text)
    ops = {kind: [op for op in program if op.op == kind] for kind in ("offload", "fetch", "await")}
    assert {op.layer for kind in ops.values() for op in kind} == {0}
    assert 0 < len(ops["offload"]) == len(ops["fetch"]) == len(ops["await"]) // 2
    assert program.document["offload_layers"] == 1 and program.document["offload"] == "norms"
    # What is sent is what the host holds, but for gaps; the planner's clocks know it, too.
    sent = sum(op.bytes for op in ops["offload"])
    assert sent <= program.document["host"] < sent + 256 * len(ops["offload"])
    assert program.document["link"] > program.document["waited"] >= 0
    fields = {name: program.document[name] for name in ("offload", "offload_layers", "host")}
    plan = pm.plan(model, max_length=32, packing=False)
    assert plan.offload_layers == plan.host == 0 and "host memory" not in str(plan)
    assert "activations of 1 layers wait in" in str(replace(plan, **fields))


def test_times_of_a_run(start: Start, tmp_path: Path) -> None:
    rows = [{"input_ids": [i % 7 + 3] * 32, "labels": [i % 7 + 3] * 32} for i in range(16)]
    run = start(
        rows, max_steps=12, max_length=32, gradient_accumulation_steps=2, generate_length=32
    )
    run.wait(PATIENCE)
    program, profile = run.program(), run.profile()
    # Steps 4 to 10: the mark is the tenth, and the third was the one before.
    assert (program.step, program.steps) == (10, 7) == (profile.step, profile.steps)
    calls = {op.node: op.calls for op in program if op.seconds is not None}
    assert {op.segment for op in program if op.node in calls} == {
        "micro",
        "norm",
        "update",
        "clear",
    }
    assert {calls[op.node] for op in program if op.segment == "micro"} == {2}
    assert {calls[op.node] for op in program if op.label == "clip"} == {1}
    down = next(op for op in program if op.label == "down" and op.layer == 1)
    assert down.flops == 2 * 64 * (64 * 128 + 16 * 128 + 64 * 16) and (down.seconds or 0) > 0
    # Ops are part of the step, one after another.
    steps = [row for row in run.history if 4 <= row["step"] <= 10]
    assert profile.seconds == pytest.approx(sum(row["seconds"] for row in steps) / 7)
    assert profile.tokens == 128
    assert sum(op.seconds for op in profile.ops) <= profile.seconds
    assert profile.gemm_flops > 0 and profile.copy_bytes > 0
    work = sum(op.flops * op.seconds for op in profile.ops)
    assert profile.of_peak == pytest.approx(work / profile.seconds / profile.gemm_flops)
    assert profile.ops[0].label in str(profile) and profile.ops[0].label in profile._repr_html_()
    trace = json.loads(profile.to_trace(tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in trace if event["tid"] == 1]
    assert len(spans) == len(calls) and all(event["ph"] == "X" for event in spans)
    for one, next_one in zip(spans, spans[1:], strict=False):
        assert next_one["ts"] == pytest.approx(one["ts"] + one["dur"])
    # The same of the shell, and of the log alone.
    run.stop(wait=True)
    made = shell("profile", str(run.folder), "--json")
    assert [row["label"] for row in json.loads(made.stdout)] == [op.label for op in profile.ops]


def test_a_run_that_timed_nothing_says_so(start: Start) -> None:
    run = start(max_steps=2).wait(PATIENCE)
    with pytest.raises(pm.NotFoundError, match="after their third step"):
        run.profile()
    assert run.program().steps == 0


@pytest.mark.parametrize("notebook", ["", "Batch"])
def test_profile_of_a_model(
    notebook: str, model: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nobody is there, and a run of the user's would be waited for."""
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", notebook)
    settings: dict[str, Any] = {"max_length": 32, "per_device_train_batch_size": 2}
    made = pm.profile(model, method="full", threads=1, **settings)
    assert made.tokens == 64 and made.step >= 10 and made.steps >= 7
    assert "with decay" in {op.label for op in made.ops}
    assert not runs.exists()
    with pytest.raises(TypeError, match="max_length"):
        pm.profile(model, maxlength=3)


def test_it_goes_on_until_enough_was_timed(
    model: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a backend compiled until after the tenth step: no row of eight is told of before."""
    monkeypatch.setattr(profiles, "_STEPS", 8)
    made = pm.profile(model, max_length=32)
    assert made.step >= 30 and made.steps == 8


def test_what_has_no_effect_is_taken(model: Path, runs: Path) -> None:
    """Whatever a run is started with can be profiled; what is wrong in it is said all the same."""
    settings: dict[str, Any] = {
        "max_length": 32, "threads": 1, "max_steps": 4000, "num_train_epochs": 3, "packing": True,
        "learning_rate": 1.0, "warmup_steps": 5, "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 2}, "eval_steps": 1, "eval_split": 0.5,
        "save_steps": 2, "load_best_model_at_end": True, "early_stopping_patience": 1,
        "overlong": "refuse", "chat_template": "{{ messages }}",
    }  # fmt: skip
    made = pm.profile(model, **settings)
    assert made.step >= 10 and made.tokens == 4 * 32
    with pytest.raises(pm.InvalidError, match="max_steps"):
        pm.profile(model, max_steps=-5)


def test_interrupted_it_leaves_nothing(
    model: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where it is not yet known which run that is; and nobody is told to come back to it."""
    begun: list[int] = []

    def interrupted(run: connecting.Connecting, link: Link, timeout: float) -> bool:
        begun.append(link.coordinator_pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(connecting.Connecting, "_catch_up", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pm.profile(model, max_length=32)
    assert len(begun) == 1 and not is_alive(begun[0])
    assert "goes on without you" not in capfd.readouterr().err
