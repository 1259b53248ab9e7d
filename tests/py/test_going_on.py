"""Who finds, or starts, the coordinator of a run that lost its own; a link that is made anew."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pantheraml as pm
import pytest
from conftest import FOREVER, PATIENCE, alive, at_step, until
from pantheraml import _native, connecting
from pantheraml.link import Link

Start = Callable[..., pm.Run]


COME = """
import sys
import pantheraml as pm
run = pm.attach(sys.argv[1])
if run.state == "stopped":
    run.resume(wait=True)
print(run.coordinator_pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_who_resumes_beside_another_ends_nothing(
    end: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a look for a coordinator and the start of one, another client has started it."""
    run = start(name="both", max_steps=FOREVER)
    at_step(run, 5)
    if end == "stopped":
        run.stop(wait=True)
    else:
        pids = [run.coordinator_pid, *(w["pid"] for w in run.workers)]
        run.close()
        for sign in (signal.SIGSTOP, signal.SIGKILL):  # so that none of them helps
            for pid in pids:
                os.kill(pid, sign)
        until(lambda: not any(map(alive, pids)), "their end")
        run = pm.attach("both", restart=False)
    assert run.state == "stopped"
    with subprocess.Popen(
        [sys.executable, "-c", COME, run.folder],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout is not None
        theirs = int(other.stdout.readline())
        with monkeypatch.context() as patch:
            patch.setattr(run, "_follow", lambda: None)  # we have looked, before it was there
            run.resume(wait=True)
        assert run.coordinator_pid == theirs
        other.communicate()
    at_step(run, run.step + 5)
    events = run.events()
    assert sum(e["type"] == "state" and e["state"] == "stopped" for e in events) == (
        end == "stopped"
    )
    run.stop(wait=True)


def test_who_closes_while_a_link_is_made_leaves_none(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever makes it finds that nobody wants it any more."""
    run = start(name="closing", max_steps=FOREVER)
    link, open_link, opened = run._link, run._open_link, []
    assert link is not None

    def closes() -> Link:
        opened.append(open_link())
        run.close()
        return opened[-1]

    with monkeypatch.context() as patch:
        patch.setattr(run, "_open_link", closes)
        link.close()
        run.on_gone(link)
    assert len(opened) == 1 and opened[0] is not link and run._link is None
    assert "pml closing" not in {thread.name for thread in threading.enumerate()}
    pm.attach("closing").stop(wait=True)


def test_a_start_that_cannot_read_is_tried_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody of the run is left, and who starts its coordinator finds a disk that was away."""
    run = start(name="unread", max_steps=FOREVER)
    at_step(run, 5)
    pids = [run.coordinator_pid, *(w["pid"] for w in run.workers)]
    launch, left = _native.launch, [pm.NoMemoryError("no memory"), pm.IOFailed("cannot read")]

    def fails_first(*args: Any, **options: Any) -> tuple[str, bool]:
        if left:
            raise left.pop()
        return launch(*args, **options)

    monkeypatch.setattr(_native, "launch", fails_first)
    monkeypatch.setattr(connecting, "AGAIN", 0.01)
    monkeypatch.setattr(connecting, "STARTING", PATIENCE)
    for number in (signal.SIGSTOP, signal.SIGKILL):  # so that none of them helps
        for pid in pids:
            assert pid is not None
            os.kill(pid, number)
    until(lambda: run.coordinator_pid not in (None, pids[0]), "another coordinator")
    assert not left
    at_step(run, run.step + 5)


def test_a_search_that_fails_later_is_told(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who attaches while workers save subscribes before it is known that nobody goes on."""
    run = start(name="searched", max_steps=FOREVER)
    at_step(run, 5)
    coordinator, worker = run.coordinator_pid, run.workers[0]["pid"]
    assert coordinator is not None
    run.close()
    heard: list[dict[str, Any]] = []
    subscribed = threading.Event()

    def denied(*_: Any, **__: Any) -> tuple[str, bool]:
        assert subscribed.wait(PATIENCE)
        raise pm.DeniedError("you may not")

    os.kill(worker, signal.SIGSTOP)
    try:
        os.kill(coordinator, signal.SIGKILL)
        until(lambda: not alive(coordinator), "its end")
        monkeypatch.setattr(_native, "launch", denied)
        monkeypatch.setattr(connecting, "PATIENCE", 0.0)
        with pytest.warns(RuntimeWarning, match="you may not"):
            run = pm.attach("searched")
            run.subscribe(heard.append)
            subscribed.set()
            until(lambda: any(event["type"] == "gone" for event in heard), "the word")
        assert run.state == heard[-1]["state"] == "stopped"
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("problem", [pm.BusyError, pm.TimedOut])
def test_a_coordinator_that_is_late_is_not_gone(
    problem: type[pm.Error], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock is taken, and it has no place yet or does not answer: that run is not stopped."""
    run = start(name="late", max_steps=FOREVER)
    at_step(run, 5)
    connect, late = run._connect, [problem("not yet")] * 3

    def connect_late(timeout: float = 10.0) -> bool:
        if late:
            raise late.pop()
        return connect(timeout)

    monkeypatch.setattr(run, "_connect", connect_late)
    pid = run.coordinator_pid
    assert pid is not None
    states, goes_on = set(), run._go_on

    def go_on() -> None:
        states.add(run.state)  # of the moment in which it is known that the coordinator has gone
        goes_on()

    monkeypatch.setattr(run, "_go_on", go_on)
    os.kill(pid, signal.SIGKILL)
    until(
        lambda: states.add(run.state) or run.coordinator_pid not in (None, pid),  # type: ignore[func-returns-value]
        "another coordinator",
    )  # fmt: skip
    assert "stopped" not in states and not late
    at_step(run, run.step + 5)


def test_links_that_end_at_once_leave_no_threads(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread looks for the coordinator that goes on, whatever becomes of what it finds."""
    run = start(name="dropped", max_steps=FOREVER)
    link = run._link
    assert link is not None
    opened = []

    class Dropped(Link):
        def _listen(self) -> None:
            opened.append(self.file)
            if len(opened) > 5:  # enough of them: nobody waits any longer
                patch.setattr(connecting, "PATIENCE", 0.0)
                patch.setattr(connecting, "STARTING", 0.0)
            self._client.close()
            self._listener.on_gone(self)
            self.caught_up.set()

    link.close()  # its thread ends without a word; that the coordinator has gone is said below
    before, most = threading.active_count(), 0
    gone = threading.Thread(target=run.on_gone, args=(link,))
    with (
        monkeypatch.context() as patch,
        pytest.warns(RuntimeWarning, match="no coordinator has taken over"),
    ):
        patch.setattr(connecting, "Link", Dropped)
        patch.setattr(connecting, "PATIENCE", PATIENCE)
        patch.setattr(connecting, "STARTING", PATIENCE)
        gone.start()
        while gone.is_alive():
            most = max(most, threading.active_count())
            gone.join(0.01)
    # The last link's may not have ended yet when the next one begins.
    assert len(opened) > 5 and most <= before + 3
    pm.attach("dropped").stop(wait=True)


@pytest.mark.parametrize("restart", ["on-failure", "never"])
def test_a_link_that_breaks_is_made_anew(
    restart: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was no memory for what came: its coordinator is there, whoever would start another."""
    run = start(name="broken", max_steps=FOREVER, restart=restart)
    at_step(run, 3)
    link, pid, waits = run._link, run.coordinator_pid, threading.Event()
    assert link is not None
    go_on, wait_for = run._go_on, run._wait_for

    def late() -> None:
        assert waits.wait(PATIENCE), "nobody waits for it"
        go_on()

    def waited(over: Callable[[], bool], timeout: float | None, what: str) -> None:
        waits.set()
        wait_for(over, timeout, what)

    class Full:
        """A client that has no memory for what comes next."""

        def receive(self, timeout: float) -> list[tuple[str, str]]:
            raise MemoryError

        def send(self, text: str) -> None:
            client.send(text)

        def close(self) -> None:
            client.close()

    client, link._client = link._client, Full()  # type: ignore[assignment]
    monkeypatch.setattr(run, "_go_on", late)
    until(lambda: run._link is None, "the end of the link")
    monkeypatch.setattr(run, "_wait_for", waited)
    assert run.set(max_grad_norm=2.0).wait(PATIENCE).state == "applied"
    assert run.coordinator_pid == pid
    at_step(run, run.step + 3)
    run.stop(wait=True)


def test_who_is_told_of_a_broken_link(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is made anew the run is not called stopped, and says why nothing comes."""
    run = start(name="anew", max_steps=FOREVER, restart="never")
    at_step(run, 3)
    link, go_on = run._link, run._go_on
    assert link is not None
    said = []

    def looked() -> None:
        said.append((run.state, run.reason))
        go_on()

    monkeypatch.setattr(run, "_go_on", looked)
    link.close()
    run.on_gone(link)
    assert said == [("starting", "the connection to its coordinator broke; another one is made")]
    assert run.state == "running"
    run.stop(wait=True)


def lose(run: pm.Run) -> None:
    """Kill all that a run has at once, so that nobody saves."""
    pids = [worker["pid"] for worker in run.workers] + [run.coordinator_pid]
    for pid in pids:
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    until(lambda: run.state not in ("running", "starting"), "the run's end")


def test_a_setting_behind_a_newer_command(start: Start) -> None:
    """Of a step that is made again, after a command of a greater number at an earlier one."""
    run = start(
        name="behind", max_steps=FOREVER, lr_scheduler_type="constant", save_steps=10**6,
        gradient_accumulation_steps=16, restart="never",
    )  # fmt: skip
    at_step(run, 5)
    first = run.checkpoint("first", wait=True)
    at_step(run, first.step + 100)
    run.pause(wait=True)
    run.set(learning_rate=1e-5, wait=True)
    stood = run.step
    run.resume(wait=True)
    at_step(run, stood + 2)
    for number in range(8):  # the command may come too late: a tenth of a second is enough for that
        lose(run)
        run = pm.resume("behind")
        newer = run.checkpoint(f"newer{number}", wait=True)
        if newer.step < stood:
            break
        shutil.rmtree(newer.path)
    assert first.step <= newer.step < stood
    at_step(run, stood + 2)
    rates = [row["learning_rate"] for row in run.history[stood - 1 : stood + 2]]
    assert rates == pytest.approx([run.config["learning_rate"], 1e-5, 1e-5])
