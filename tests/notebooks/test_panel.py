"""The Python half of the panel over a run that pretends (``fake_run``)."""

from __future__ import annotations

import gc
import itertools
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("anywidget")

from fake_run import FakeRun
from pantheraml.columns import NAMES
from pantheraml.record import RunRecord
from pantheraml_widgets.feed import COLUMNS, KEEP, MAX_POINTS, MAX_ROWS, SAMPLES, Feed, thin
from pantheraml_widgets.run_panel import RunPanel, panel_of


def step(seq: int, number: int, loss: object = 1.0, **more: object) -> dict[str, Any]:
    values = dict.fromkeys(COLUMNS, 1.0) | {"step": number, "loss": loss}
    return {"seq": seq, "time": 0.0, "type": "step", **values, **more}


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 240  # longer than any machine that works takes, however busy
    while not condition():
        assert time.monotonic() < end, "did not come about in time"
        time.sleep(0.01)


def feed() -> Feed:
    return Feed("run", lambda: 100)


def test_ticks_join_without_gap_and_without_repeat() -> None:
    f = feed()
    assert f.tick() is None
    for i in range(1, 6):
        assert f.add(step(i, i))
    assert not f.add(step(5, 5))
    first = f.tick()
    assert first is not None and (first["after"], first["seq"]) == (0, 5)
    assert first["columns"]["step"] == [1, 2, 3, 4, 5]
    f.add(step(6, 6))
    second = f.tick()
    assert second is not None and (second["after"], second["columns"]["step"]) == (5, [6])
    f.add(step(7, 7))
    whole = f.snapshot()
    assert whole["columns"]["step"] == [1, 2, 3, 4, 5, 6, 7]
    assert f.tick() is None


def test_the_loss_scale_comes_when_it_changes_or_a_step_is_skipped() -> None:
    f = feed()
    f.add(step(1, 1))
    assert (f.tick() or {})["scale"] is None and f.snapshot()["scale"] is None
    f.add(step(2, 2, loss_scale=512.0))
    assert (f.tick() or {})["scale"] == {"value": 512.0, "skipped": 0}
    f.add(step(3, 3, loss_scale=512.0))
    assert (f.tick() or {})["scale"] is None
    f.add(step(4, 4, loss_scale=512.0, skipped=True, grad_norm=float("inf")))
    assert (f.tick() or {})["scale"] == {"value": 512.0, "skipped": 1}
    f.add(step(5, 5, loss_scale=256.0))
    assert (f.tick() or {})["scale"] == {"value": 256.0, "skipped": 1}
    f.add({"seq": 6, "time": 0.0, "type": "state", "state": "starting", "step": 3})
    assert (f.tick() or {})["scale"] == {"value": 256.0, "skipped": 0}
    assert f.snapshot()["scale"] == {"value": 256.0, "skipped": 0}


def test_what_no_event_tells_is_said(run: FakeRun) -> None:
    """A disk that takes no events: the next heartbeat brings the reason, and takes it away."""
    panel = RunPanel(run)
    sent: list[dict[str, Any]] = []
    panel.send = lambda content, *_: sent.append(content)  # type: ignore[method-assign]
    for reason in ("the disk is full: make room", ""):
        run.reason = reason
        panel._on_event({"type": "heartbeat", "workers": []})
        wait_for(lambda reason=reason: any(tick.get("reason") == reason for tick in sent))
        assert panel._feed.snapshot()["reason"] == reason
        sent.clear()
    panel.close()
    f = feed()
    assert f.say("x") and not f.say("x") and (f.tick() or {})["reason"] == "x" and f.tick() is None


def test_gpus_come_live_and_from_the_log() -> None:
    f = feed()
    f.add(step(1, 1, gpus=[{"rank": 0, "power": 100.0}]))
    assert f.snapshot()["gpus"] == [{"rank": 0, "power": 100.0}]
    beat = {
        "type": "heartbeat",
        "workers": [{"rank": 0, "gpu": {"rank": 0, "power": 690.12345678}}],
    }
    assert f.add(beat)
    tick = f.tick()
    assert tick is not None and tick["gpus"] == [{"rank": 0, "power": 690.123}]
    assert tick["after"] == tick["seq"] == 1 and tick["memory"] is None
    assert f.tick() is None
    assert not f.add({"type": "heartbeat", "workers": [{"rank": 0, "rss": 1}]})
    f.add(step(2, 2, gpus=[{"rank": 0, "power": 1.0}]))  # the log is behind what is live
    assert f.snapshot()["gpus"] == [{"rank": 0, "power": 690.123}]


def test_a_plan_has_its_words_before_the_first_step() -> None:
    """In ticks and in snapshots, which a saved notebook has: the front end knows no other words."""
    f = Feed("run", lambda: 100, plan=lambda event: f"{event['total']} bytes")
    f.add({"seq": 1, "time": 0.0, "type": "plan", "total": 7, "by_cause": {}})
    tick = f.tick()
    assert tick is not None and tick["columns"]["step"] == []
    assert [event["text"] for event in tick["events"]] == ["7 bytes"]
    f.add(step(2, 1))
    assert [event["text"] for event in f.snapshot()["events"]] == ["7 bytes"]


def test_a_new_timeline_replaces_what_it_repeats() -> None:
    f = feed()
    for i in range(1, 9):
        f.add(step(i, i))
    f.tick()
    f.add(step(9, 9))
    f.add(step(10, 5, loss=0.5))
    tick = f.tick()
    assert tick is not None and tick["columns"]["step"] == [5]
    assert f.snapshot()["columns"]["step"] == [1, 2, 3, 4, 5]


def test_a_restart_from_a_checkpoint_forgets_what_came_after_it() -> None:
    f = feed()
    for i in range(1, 9):
        f.add(step(i, i))
    f.tick()
    f.add({"seq": 9, "time": 0.0, "type": "state", "state": "starting", "step": 6})
    tick = f.tick()
    assert tick is not None and tick["columns"]["step"] == []
    assert f.snapshot()["columns"]["step"] == [1, 2, 3, 4, 5, 6]


def test_what_json_has_not_travels_as_text_and_digits_are_cut() -> None:
    f = feed()
    f.add(step(1, 1, loss=float("nan"), grad_norm=float("inf")))
    f.add(step(2, 2, loss="NaN", learning_rate=1 / 3))
    f.add({"seq": 3, "time": 0.0, "type": "eval", "step": 2, "loss": float("nan")})
    whole = json.loads(json.dumps(f.snapshot(), allow_nan=False))
    assert whole["columns"]["loss"] == ["NaN", "NaN"]
    assert whole["columns"]["grad_norm"][0] == "Infinity"
    assert whole["columns"]["learning_rate"][1] == 0.333333


def test_thinning_keeps_the_ends_and_every_spike() -> None:
    rows = 50_000
    loss: list[object] = [1.0] * rows
    loss[12_345], loss[40_000], loss[7] = 9.0, -3.0, "NaN"
    thinned = thin({"step": list(range(rows)), "loss": loss}, most=2000)
    assert len(thinned["step"]) == len(thinned["loss"]) <= 2000
    assert {0, rows - 1, 12_345, 40_000} <= set(thinned["step"])
    assert thinned["step"] == sorted(thinned["step"])


def test_a_long_run_stays_within_the_budget() -> None:
    f = feed()
    for i in range(1, 20_001):
        f.add(step(i, i, loss=2.0 + 1 / i, seconds=0.123456789))
    for i in range(20_001, 20_001 + 2 * KEEP):
        f.add({"seq": i, "time": 0.0, "type": "log", "level": "info", "message": "x"})
    whole = f.snapshot()
    assert len(whole["events"]) == KEEP
    assert len(json.dumps(whole)) < 150_000


def event(seq: int, kind: str, **fields: Any) -> dict[str, Any]:
    return {"seq": seq, "time": 0.0, "type": kind, **fields}


def of_type(whole: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [e for e in whole["events"] if e["type"] == kind]


def test_a_late_view_of_a_long_run_knows_how_it_stands() -> None:
    f = feed()
    f.add(event(1, "state", state="starting", step=0))
    f.add(event(2, "progress", what="tokenising", fraction=1.0))
    f.add(event(3, "plan", total=7))
    f.add(event(4, "workers", workers=[{"rank": 0}]))
    f.add(event(5, "state", state="running", step=0))
    change = {"verb": "set", "command": 1, "workers": [0]}
    f.add(event(6, "applied", step=1, **change))
    f.add(event(7, "checkpoint", step=1, path="checkpoints/step-1", bytes=1))
    evals = range(8, 8 + 2 * KEEP)
    for i in evals:
        f.add(event(i, "eval", step=i, loss=1 / i))
    whole = f.snapshot()
    early = [e for e in whole["events"] if e["type"] != "eval"]
    assert [e["seq"] for e in early] == [3, 4, 5, 6, 7]  # progress is over
    assert [e["seq"] for e in of_type(whole, "eval")] == list(evals)[-KEEP:]  # lines of the list
    assert whole["evals"]["step"] == list(evals)
    assert whole["evals"]["loss"][0] == 0.125
    seqs = [e["seq"] for e in whole["events"]]
    assert seqs == sorted(seqs)


def test_what_no_panel_shows_takes_no_room_in_its_feed() -> None:
    f = feed()
    f.add(event(1, "log", level="info", message="x"))
    for i in range(2, 2 + 2 * KEEP):
        f.add(event(i, ("profile", "export")[i % 2], step=i, done=False))
    assert [e["type"] for e in f.snapshot()["events"]] == ["log"]
    for i in range(2 * KEEP, 4 * KEEP):
        f.add(event(i, "sample", command=i, step=1, token_ids=[1], done=True))
    whole = f.snapshot()
    assert len(of_type(whole, "log")) == 1 and len(of_type(whole, "sample")) == SAMPLES


def test_the_held_out_curve_is_thinned_and_cut_as_the_training_curve_is() -> None:
    f = feed()
    count = MAX_ROWS + 10
    for i in range(1, count + 1):
        f.add(event(i, "eval", step=i, loss=9.0 if i == 777 else 1.0))
        assert len(f._evals["step"]) <= MAX_ROWS
    shown = f.snapshot()["evals"]
    assert {1, 777, count} <= set(shown["step"]) and len(shown["step"]) <= MAX_POINTS
    f.add(event(count + 1, "state", state="starting", step=777))
    assert f.snapshot()["evals"]["step"][-1] == 777
    f.add(event(count + 2, "eval", step=777, loss=2.0))  # made again
    shown = f.snapshot()["evals"]
    assert (shown["step"].count(777), shown["loss"][-1]) == (1, 2.0)
    # One that was asked for, at that step or of the best weights before it, takes nothing away.
    for i, step in ((3, 777), (4, 5)):
        f.add(event(count + i, "eval", step=step, loss=3.0, command=i))
    assert f.snapshot()["evals"] == shown
    f.add(event(count + 5, "eval", step=778, loss=3.0, command=5))
    assert f.snapshot()["evals"]["step"][-1] == 778


def test_settings_are_marked_until_somebody_goes_back() -> None:
    f = feed()
    f.add(event(1, "applied", verb="set", command=1, step=12, workers=[0]))
    f.add(event(2, "checkpoint", step=12, path="checkpoints/step-12", bytes=1))
    for i in range(3, 3 + KEEP):
        f.add(event(i, "log", level="info", message="x"))
    f.add(event(400, "state", state="starting", step=11))
    marks = [e["seq"] for e in f.snapshot()["events"] if e["type"] in ("applied", "checkpoint")]
    assert marks == [1]
    f.add(event(401, "state", state="starting", step=11, rewound=True))
    assert not of_type(f.snapshot(), "applied")


def test_a_save_that_a_crash_broke_off_is_under_way_no_more() -> None:
    f = feed()
    f.add(event(1, "state", state="running", step=4))
    f.add(event(2, "progress", what="saving", fraction=0.5))
    assert of_type(f.snapshot(), "progress")
    f.add(event(3, "state", state="starting", step=4))
    assert not of_type(f.snapshot(), "progress")
    f.add(event(4, "progress", what="loading", fraction=0.5))
    f.add(event(5, "state", state="starting", step=4))
    assert of_type(f.snapshot(), "progress")


def writing() -> Feed:
    """A feed of a run that answers command 1 in two rows, of which one is done."""
    f = Feed("run", lambda: 100, decode=lambda ids: bytes(ids).decode())
    f.add(event(1, "state", state="running", step=5))
    f.add(event(2, "sample", command=1, step=5, token_ids=list(b"Once "), done=False))
    f.add(event(3, "sample", command=1, row=1, step=5, token_ids=list(b"The end"), done=True))
    return f


def test_an_answer_that_begins_again_is_shown_once() -> None:
    f = writing()
    f.add(event(4, "sample", command=2, step=5, token_ids=list(b"kept"), done=True))
    f.add(event(5, "applied", verb="sample", command=2, step=5, workers=[0]))
    f.add(event(6, "state", state="starting", step=4))
    assert [e["text"] for e in of_type(f.snapshot(), "sample")] == ["kept"]
    f.add(event(7, "sample", command=1, step=4, token_ids=list(b"Once "), done=False))
    f.add(event(8, "sample", command=1, step=4, token_ids=list(b"a time"), done=True))
    assert [e["text"] for e in of_type(f.snapshot(), "sample")] == ["kept", "Once a time"]


def test_an_answer_that_is_broken_off_is_done() -> None:
    f = writing()
    f.add(event(4, "refused", verb="sample", command=1, step=5, reason="the run is stopped"))
    samples = of_type(f.snapshot(), "sample")
    assert [(e["text"], e["done"]) for e in samples] == [("Once ", True), ("The end", True)]
    assert not f._samples


def test_a_feed_is_of_bounded_size_and_old_steps_fade_no_more_than_new_ones() -> None:
    f = feed()
    steps = 6 * MAX_ROWS
    for i in range(1, steps + 1):
        f.add(step(i, i, loss=9.0 if i == 777 else 2.0 + i % 7))
        assert len(f._columns["step"]) <= MAX_ROWS
    shown = f.snapshot()["columns"]["step"]
    assert {1, 777, steps} <= set(shown) and len(shown) <= MAX_POINTS
    gaps = [after - before for before, after in itertools.pairwise(shown)]
    assert max(gaps) < 4 * steps / MAX_POINTS
    f.add(step(steps + 1, steps // 2))
    assert f.snapshot()["columns"]["step"][-1] == steps // 2
    tick = f.tick()
    assert tick is None


def test_samples_are_decoded_as_a_whole() -> None:
    f = Feed("run", lambda: 1, decode=lambda ids: bytes(ids).decode("utf-8", "replace"))
    first, second = "é".encode()
    f.add({"seq": 1, "time": 0.0, "type": "sample", "command": 4, "token_ids": [first]})
    done = {"type": "sample", "command": 4, "token_ids": [second], "done": True}
    f.add({"seq": 2, "time": 0.0, **done})
    samples = [e for e in f.snapshot()["events"] if e["type"] == "sample"]
    assert [e["text"] for e in samples] == ["é"]
    f.add({"seq": 3, "time": 0.0, "type": "sample", "command": 5, "token_ids": [65]})
    f.add({"seq": 4, "time": 0.0, "type": "sample", "command": 5, "row": 1, "token_ids": [66]})
    f.add({"seq": 5, "time": 0.0, **done, "command": 5, "token_ids": [67]})
    samples = [e for e in f.snapshot()["events"] if e["type"] == "sample"]
    # In the order in which they began, as a view that was there has them.
    assert [e["text"] for e in samples] == ["é", "AC", "B"]


class Recorder:
    """A panel that keeps what it would send."""

    def __init__(self, run: FakeRun) -> None:
        self.sent: list[dict[str, Any]] = []
        self.times: list[float] = []

        class Silent(RunPanel):
            def send(_, content: dict[str, Any], buffers: object = None) -> None:
                json.dumps(content, allow_nan=False)
                self.sent.append(content)
                if content["kind"] == "tick":
                    self.times.append(time.monotonic())

        self.panel = Silent(run, record=lambda: "<p>record</p>", decode=run.decode)

    def kinds(self, kind: str) -> list[dict[str, Any]]:
        return [content for content in self.sent if content["kind"] == kind]

    def say(self, **content: Any) -> None:
        self.panel._on_message(self.panel, content, [])


@pytest.fixture
def run() -> Iterator[FakeRun]:
    fake = FakeRun(max_steps=10**9, seconds=0.002, workers=2)
    yield fake
    if fake.state not in ("finished", "stopped"):
        fake.stop()


def test_at_most_five_ticks_a_second_and_nothing_lost(run: FakeRun) -> None:
    recorder = Recorder(run)
    begin = recorder.panel.snapshot["columns"]["step"]

    def told() -> list[int]:
        ticks = [tick["columns"]["step"] for tick in recorder.kinds("tick")]
        return sum(ticks, start=list(begin))

    wait_for(lambda: len(recorder.times) >= 5 and len(told()) > 20)
    recorder.panel.close()
    times, columns = recorder.times, told()
    assert all(after - before >= 0.2 for before, after in zip(times, times[1:], strict=False))
    assert columns == list(range(1, len(columns) + 1))


def test_hello_is_answered_with_the_whole(run: FakeRun) -> None:
    recorder = Recorder(run)
    wait_for(lambda: run.step > 30)
    recorder.say(kind="hello")
    wait_for(lambda: recorder.kinds("welcome"))
    assert recorder.kinds("welcome")[0]["fresh"] is True
    assert len(recorder.panel.snapshot["columns"]["step"]) >= 30
    recorder.say(kind="hello")
    wait_for(lambda: len(recorder.kinds("welcome")) == 2)
    assert recorder.kinds("welcome")[1]["fresh"] is False
    recorder.panel.close()


def test_commands_reach_the_run_and_errors_the_page(run: FakeRun) -> None:
    recorder = Recorder(run)

    def ask(number: str, verb: object, args: object = None) -> str | None:
        recorder.say(kind="command", id=number, verb=verb, args=args or {})
        wait_for(lambda: any(r["id"] == number for r in recorder.kinds("reply")))
        error = next(r["error"] for r in recorder.kinds("reply") if r["id"] == number)
        assert error is None or isinstance(error, str)
        return error

    assert ask("a", "pause") is None
    wait_for(lambda: run.state == "paused")
    assert ask("b", "set", {"learning_rate": 1e-5}) is None
    assert "at most 0.5" in str(ask("c", "set", {"learning_rate": 0.9}))
    assert "number" in str(ask("d", "set", {"learning_rate": "1e-4"}))
    assert "number" in str(ask("e", "set", {"learning_rate": True}))
    assert "no command" in str(ask("f", "__init__"))
    assert ask("g", "resume") is None
    assert ask("h", "checkpoint") is None
    assert ask("i", "stop") is None
    wait_for(lambda: run.state == "stopped")
    recorder.panel.close()


def test_a_slow_command_does_not_hold_the_curve(run: FakeRun) -> None:
    recorder = Recorder(run)
    release = threading.Event()
    run.pause = release.wait  # type: ignore[assignment, method-assign]
    recorder.say(kind="command", id="slow", verb="pause", args={})
    before = len(recorder.kinds("tick"))
    wait_for(lambda: len(recorder.kinds("tick")) > before + 1)
    assert not recorder.kinds("reply")
    release.set()
    wait_for(lambda: recorder.kinds("reply"))
    recorder.panel.close()


def test_the_end_is_in_the_trait_and_the_record_beside_the_view() -> None:
    run = FakeRun(max_steps=20, seconds=0.005)
    recorder = Recorder(run)
    wait_for(lambda: run.state == "finished")
    wait_for(lambda: recorder.panel.snapshot["columns"]["step"][-1:] == [20])
    made = recorder.panel._repr_mimebundle_()
    assert made is not None
    assert made[0]["text/html"] == "<p>record</p>"
    assert "application/vnd.jupyter.widget-view+json" in made[0]
    recorder.panel.close()


def test_close_ends_the_threads_and_leaves_the_run(run: FakeRun) -> None:
    before = set(threading.enumerate())
    panel = RunPanel(run)
    own = set(threading.enumerate()) - before
    assert len(own) == 2
    panel.close()
    panel.close()
    wait_for(lambda: not any(thread.is_alive() for thread in own))
    assert run.state == "running" and not run._listeners


def test_a_coordinator_that_goes_without_a_word_ends_the_panel_too(run: FakeRun) -> None:
    recorder = Recorder(run)
    run.state, run.reason = "stopped", "its coordinator is gone"
    recorder.panel._on_event({"type": "gone", "state": "stopped", "step": run.step})
    wait_for(lambda: any(e["type"] == "state" for t in recorder.kinds("tick") for e in t["events"]))
    # The snapshot is made behind the tick.
    wait_for(lambda: recorder.panel.snapshot["events"][-1].get("state") == "stopped")
    last = recorder.panel.snapshot["events"][-1]
    assert (last["state"], last["reason"]) == ("stopped", "its coordinator is gone")
    recorder.panel.close()
    run.state = "stopped"


def test_one_panel_per_run(run: FakeRun) -> None:
    panel = panel_of(run)
    assert panel_of(run) is panel
    (plan,) = (event for event in panel.snapshot["events"] if event["type"] == "plan")
    assert (
        plan["text"].startswith("plan of fake/model on each of cpu, cpu\n")
        and "total" in plan["text"]
    )
    panel.close()
    assert panel_of(run) is not panel
    panel_of(run).close()


class Branching:
    """A run whose events a test tells: what has happened is what the run's own record says."""

    name, max_steps = "branching", 100

    def __init__(self, *events: dict[str, Any]) -> None:
        self.record = RunRecord(Path("branching"))
        self.callbacks: list[Callable[[dict[str, Any]], None]] = []
        self.tell(*events)

    def tell(self, *events: dict[str, Any]) -> None:
        told = [{"seq": self.record.seq + 1 + i, "timeline": 0, "time": 0.0, **event}
                for i, event in enumerate(events)]  # fmt: skip
        for one in told:
            self.record.apply(one)
        for one in told:  # the record is ahead, as of a run whose events come in bunches
            for callback in self.callbacks:
                callback(one)

    def subscribe(self, callback: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        self.callbacks.append(callback)
        return lambda: self.callbacks.remove(callback)

    def kept_past(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        rows = self.record.history.rows("seq", *NAMES)
        return [{"type": "step", **row} for row in rows], self.record.evals

    def kept_events(self) -> list[dict[str, Any]]:
        return sorted([*self.record.notes, *self.kept_past()[0]], key=lambda event: event["seq"])

    @property
    def state(self) -> str:
        return self.record.state

    @property
    def reason(self) -> str:
        return self.record.reason


def branch(first: int, last: int, loss: float) -> list[dict[str, Any]]:
    """Steps, the last of which is evaluated and saved."""
    shared = {"type": "step", "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 9, "seconds": 0.1}
    saved = {"type": "checkpoint", "step": last, "bytes": 1}
    return [
        *({**shared, "step": number, "loss": loss} for number in range(first, last + 1)),
        {"type": "eval", "step": last, "loss": loss, "labels": 9, "seconds": 0.1},
        {**saved, "path": f"checkpoints/step-{last:06}-of{int(loss)}"},
    ]


def back_to(step: int, loss: float) -> dict[str, Any]:
    path = f"checkpoints/step-{step:06}-of{int(loss)}"
    return {"type": "state", "state": "starting", "step": step, "checkpoint": path, "rewound": True}


def test_going_back_to_what_was_gone_back_from_shows_its_curve() -> None:
    run = Branching(*branch(1, 4, 9.0), *branch(5, 8, 8.0), back_to(4, 9.0))
    panels: list[RunPanel] = []
    try:
        panels.append(RunPanel(run))  # type: ignore[arg-type]
        assert panels[0].snapshot["columns"]["loss"] == [9.0] * 4
        run.tell(*branch(5, 10, 7.0))
        # Its own steps come with it, and one that goes on from there.
        run.tell(back_to(8, 8.0), *branch(9, 9, 6.0))
        wait_for(lambda: panels[0].snapshot["columns"]["step"] == list(range(1, 10)))
        panels.append(RunPanel(run))  # type: ignore[arg-type]
        for panel in panels:
            assert panel.snapshot["columns"]["loss"] == [9.0] * 4 + [8.0] * 4 + [6.0]
            assert panel.snapshot["evals"] == {"step": [4, 8, 9], "loss": [9.0, 8.0, 6.0]}
    finally:
        for panel in panels:
            panel.close()


def test_what_nobody_was_told_of_is_caught_up_with() -> None:
    run = Branching(*branch(1, 4, 9.0), *branch(5, 8, 8.0))
    panel = RunPanel(run)  # type: ignore[arg-type]
    try:
        told, run.callbacks = run.callbacks, []
        run.tell(back_to(4, 9.0), *branch(5, 6, 7.0))
        run.callbacks = told
        run.tell(*branch(7, 7, 6.0))
        wait_for(lambda: panel.snapshot["columns"]["step"] == list(range(1, 8)))
        assert panel.snapshot["columns"]["loss"] == [9.0] * 4 + [7.0] * 2 + [6.0]
        assert panel.snapshot["evals"] == {"step": [4, 6, 7], "loss": [9.0, 7.0, 6.0]}
    finally:
        panel.close()


def test_a_failed_send_does_not_end_the_panel(
    run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    panel = RunPanel(run)
    sent: list[Any] = []
    failures = {"welcome": 2, "tick": 1}

    def send(message: Any, *_: Any, **__: Any) -> None:
        if failures.get(message["kind"]):
            failures[message["kind"]] -= 1
            raise RuntimeError("the comm is closed")
        sent.append(message)

    monkeypatch.setattr(panel, "send", send)
    with pytest.warns(RuntimeWarning, match="comm is closed"):
        for left in (1, 0):
            panel._on_message(panel, {"kind": "hello"}, [])
            wait_for(lambda left=left: failures["welcome"] == left)
        wait_for(lambda: failures["tick"] == 0)
        panel._on_message(panel, {"kind": "hello"}, [])
        wait_for(lambda: {"welcome", "tick"} <= {message["kind"] for message in sent})
    panel.close()


def test_a_closed_panel_is_freed() -> None:
    run = FakeRun()
    panel = panel_of(run)  # type: ignore[arg-type]
    assert panel_of(run) is panel  # type: ignore[arg-type]
    seen = weakref.ref(panel)
    panel.close()
    del panel

    def gone() -> bool:
        gc.collect()
        return seen() is None

    wait_for(gone)  # its threads let go a moment later
    again = panel_of(run)  # type: ignore[arg-type]
    assert not again._closed
    again.close()
