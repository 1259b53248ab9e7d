"""What is kept of a run's steps, and where the rest of its events is read again."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pantheraml as pm
import pytest
from conftest import FOREVER, at_step, end, remove, until
from pantheraml.columns import NAMES, Columns
from pantheraml.record import RunRecord

Start = Callable[..., pm.Run]


def step(number: int, **also: Any) -> dict[str, Any]:
    """A step event, as a worker tells it."""
    event = {
        "seq": number + 3, "time": 1.5, "timeline": 0, "type": "step", "step": number,
        "loss": 1 / number, "learning_rate": 1e-4 / 3, "grad_norm": 0.1 + number, "tokens": 4096,
        "labels": 17, "seconds": 0.1 / number, "tokens_per_second": 4096 / (0.1 / number),
        "epoch": 0.5,
    }  # fmt: skip
    return event | also


def test_what_was_told_is_what_is_kept_to_the_last_bit() -> None:
    columns = Columns()
    told = [step(n) for n in range(1, 200)]
    told.append(step(200, tokens=0, seconds=0.0, tokens_per_second=0.0, loss=float("inf")))
    for event in told:
        columns.append(event)
    assert list(columns.rows()) == [{name: event[name] for name in NAMES} for event in told]
    assert columns.column("seq") == list(range(4, 204))
    assert [row["step"] for row in columns.copy(3).rows("step")] == [198, 199, 200]
    columns.forget_after(150)
    assert len(columns) == 150 and columns.column("step")[-1] == 150
    columns.forget_after(0)
    assert len(columns) == 0 and list(columns.copy(5).rows()) == []


def test_what_only_float16_tells_is_where_it_was_told() -> None:
    columns = Columns()
    assert columns.loss_scale is None and columns.skipped == 0
    columns.append(step(1))
    columns.append(step(2, loss_scale=512.0, skipped=True))
    columns.append(step(3, loss_scale=256.0))
    told = [(row.get("loss_scale"), row.get("skipped")) for row in columns.rows()]
    assert told == [(None, None), (512.0, True), (256.0, None)]
    assert columns.loss_scale == 256.0 and columns.skipped == columns.copy(2).skipped == 1
    columns.forget_after(1)
    assert columns.skipped == 0 and columns.loss_scale is None


def test_what_only_gpus_tell_is_where_it_was_told() -> None:
    columns = Columns()
    columns.append(step(1))
    columns.append(step(2, mfu=0.25, gpus=[{"rank": 0, "power": 690.5}]))
    columns.append(step(3))
    columns.append(step(4, mfu=0.5))
    told = [(row.get("mfu"), "gpus" in row) for row in columns.rows()]
    assert told == [(None, False), (0.25, True), (None, False), (0.5, False)]
    assert next(columns.copy(3).rows("step"))["gpus"] == [{"rank": 0, "power": 690.5}]
    columns.forget_after(1)
    columns.append(step(2, seq=9))
    assert [set(row) - set(NAMES) for row in columns.rows()] == [set(), set()]


def test_numbers_beyond_four_bytes() -> None:
    columns = Columns()
    columns.append(step(1))
    columns.append(step(2**32, seq=2**33, tokens=2**40))
    columns.append(step(2**32 + 1))
    assert columns.column("step") == [1, 2**32, 2**32 + 1]
    assert columns.column("seq")[1] == 2**33 and columns.column("tokens")[1] == 2**40


def test_a_step_takes_fifty_bytes_of_a_notebook() -> None:
    record = RunRecord(Path("/run"))
    steps = 20_000
    tracemalloc.start()
    try:
        for number in range(1, steps + 1):
            record.apply(step(number, seq=number))
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(record.history) == steps and record.notes == []
    assert taken < 50 * steps + 20_000  # an array has an eighth to spare


def test_events_are_read_where_they_are(start: Start) -> None:
    run = start(max_steps=FOREVER)
    at_step(run, 3)
    run.stop(wait=True)
    until(lambda: run.workers[0]["state"] == "stopped", "the last event: of the worker's end")
    whole = run.events()
    assert [event["seq"] for event in whole] == list(range(1, len(whole) + 1))
    lines = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    assert whole == lines[: len(whole)]
    kept = run.kept_events()
    assert [e for e in kept if e["type"] != "step"] == [e for e in whole if e["type"] != "step"]
    assert [e["seq"] for e in kept] == [e["seq"] for e in whole]
    assert kept[-1]["type"] != "step" and any(e.get("memory") for e in kept)
    assert [row["loss"] for row in run.history] == [e["loss"] for e in kept if e["type"] == "step"]


@pytest.mark.parametrize("coordinator", [True, False], ids=["asked for", "kept"])
def test_events_of_a_run_whose_folder_is_gone(start: Start, coordinator: bool) -> None:
    run = start(max_steps=FOREVER)
    at_step(run, 3)
    run.pause(wait=True)
    whole = run.events()
    remove(run.folder)
    if not coordinator:
        run.stop(wait=True)
        run.close()
    again = run.events()[: len(whole)]
    if coordinator:
        assert again == whole
    else:
        assert [(e["seq"], e["type"]) for e in again] == [(e["seq"], e["type"]) for e in whole]
    end(run)
