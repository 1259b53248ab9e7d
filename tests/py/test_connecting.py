"""Between two links: what is asked of a run while it has none, and who must not wait."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pantheraml as pm
import pytest
from conftest import FOREVER, PATIENCE, alive, at_step, until
from pantheraml import connecting
from pantheraml.link import Link

Start = Callable[..., pm.Run]


@contextmanager
def without_a_link(run: pm.Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Break a run's link; it is made anew when the event is set that this gives, or at the end."""
    link, go_on, may = run._link, run._go_on, threading.Event()
    assert link is not None

    def late() -> None:
        assert may.wait(PATIENCE), "nobody lets it be found"
        go_on()

    with monkeypatch.context() as patch:
        patch.setattr(run, "_go_on", late)
        link.close()
        gone = threading.Thread(target=run.on_gone, args=(link,))
        gone.start()
        try:
            until(lambda: run._lost, "the link to be missed")
            yield may
        finally:
            may.set()
            gone.join()


def heard(work: Callable[[], Any]) -> Callable[[], BaseException | None]:
    """Begin something in a thread; gives what waits for its end, and says what it raised."""
    raised: list[BaseException] = []

    def tries() -> None:
        try:
            work()
        except BaseException as error:  # the test looks at it
            raised.append(error)

    thread = threading.Thread(target=tries, daemon=True)
    thread.start()

    def ended() -> BaseException | None:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "it waits for ever"
        return raised[0] if raised else None

    return ended


def waiting(run: pm.Run, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Give what is set once somebody waits for something about the run."""
    waits, wait_for = threading.Event(), run._wait_for

    def waited(over: Callable[[], bool], timeout: float | None, what: str) -> None:
        def looked() -> bool:
            waits.set()  # with the lock: who takes it next finds us waiting
            return over()

        wait_for(looked, timeout, what)

    monkeypatch.setattr(run, "_wait_for", waited)
    return waits


def test_a_stop_waits_for_the_next_link(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on: a stop that did nothing would say otherwise."""
    run = start(max_steps=FOREVER, restart="never")
    at_step(run, 2)
    with without_a_link(run, monkeypatch) as may:
        waits = waiting(run, monkeypatch)
        ended = heard(lambda: run.stop(wait=True))
        until(waits.is_set, "it to wait")
        may.set()
        assert ended() is None
    assert run.state == "stopped" and run._record.state == "stopped"


def test_a_stop_of_what_ends_without_a_link(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no link any more then, and nothing to stop."""
    run = start(max_steps=FOREVER, restart="never")
    at_step(run, 2)
    pids = [run.coordinator_pid, *(w["pid"] for w in run.workers)]
    with without_a_link(run, monkeypatch) as may:
        waits = waiting(run, monkeypatch)
        ended = heard(lambda: run.stop(wait=True))
        until(waits.is_set, "it to wait")
        for pid in pids:
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        until(lambda: not any(map(alive, pids)), "their end")
        may.set()
        assert ended() is None
    assert run.state == "stopped"


@pytest.mark.parametrize("ask", ["pause", "stop"])
def test_ctrl_c_without_a_link_says_that_the_run_goes_on(
    ask: str, start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(max_steps=FOREVER)
    at_step(run, 2)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with without_a_link(run, monkeypatch), monkeypatch.context() as patch:
        patch.setattr(run, "_wait_for", interrupted)
        capsys.readouterr()
        with pytest.raises(KeyboardInterrupt):
            getattr(run, ask)()
        assert capsys.readouterr().err.count("The run goes on without you") == 1
    run.stop(wait=True)


def test_an_export_waits_for_the_next_link(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is of the weights as they are now, of which there is no checkpoint yet."""
    run = start(max_steps=FOREVER, restart="never")
    at_step(run, 2)
    with without_a_link(run, monkeypatch) as may:
        waits = waiting(run, monkeypatch)
        ended = heard(lambda: run.export(tmp_path / "adapter"))
        until(waits.is_set, "it to wait")
        may.set()
        assert ended() is None
    assert (tmp_path / "adapter").is_dir()
    run.stop(wait=True)


def test_a_wait_keeps_its_own_time_without_a_link(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And who waits for the end, however late, is not told that the next link is late."""
    run = start(max_steps=FOREVER, restart="never")
    at_step(run, 2)
    monkeypatch.setattr(connecting, "ANSWER", 0.0)
    with without_a_link(run, monkeypatch) as may:
        with pytest.raises(pm.TimedOut, match="the run's end: not within 0 s"):
            run.wait(0)
        waits = waiting(run, monkeypatch)
        ended = heard(run.wait)
        until(waits.is_set, "it to wait")
        may.set()
        until(lambda: run._link is not None and not run._lost, "the next link")
        run.stop()
        assert ended() is None
    assert run._record.state == "stopped"


@pytest.mark.parametrize("how", ["wait", "wait_async", "command"])
def test_who_waits_hears_that_it_was_closed(
    how: str, start: Start, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing comes any more then, and the run is not over."""
    run = start(name="shut", max_steps=FOREVER)
    command = run.set(learning_rate=1e-4)  # nobody applies it
    subscribed = len(run._subscribers)
    waits = waiting(run, monkeypatch)
    if how == "wait_async":
        ended = heard(lambda: asyncio.run(run.wait_async()))
        until(lambda: len(run._subscribers) > subscribed, "it to wait")
    else:
        ended = heard(run.wait if how == "wait" else command.wait)
        until(waits.is_set, "it to wait")
    run.close()
    error = ended()
    assert isinstance(error, pm.PeerError) and "this Run was closed" in str(error)
    gate.touch()
    pm.attach("shut").stop(wait=True)


def test_what_was_closed_is_followed_again_where_it_is_started(start: Start) -> None:
    run = start(max_steps=2)
    run.wait(PATIENCE)
    run.close()
    found: list[Any] = []
    ended = heard(lambda: found.append(run.sample(input_ids=[5, 6], max_new_tokens=2)))
    assert ended() is None and len(found[0].token_ids) <= 2


@pytest.mark.parametrize("shared", [False, True])
def test_what_was_closed_and_could_not_be_followed_is_closed(
    shared: bool, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens: who waited for the run's end would wait for ever."""
    run = start(max_steps=FOREVER)
    at_step(run, 2)
    seen = pm.attach(run.share("tcp://127.0.0.1:*", role="control").text()) if shared else run
    seen.close()

    def full(self: Link) -> None:
        raise pm.IOFailed("too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(type(seen), "_connect", full)
        with pytest.raises(pm.IOFailed):
            seen.resume()
    with pytest.raises(pm.PeerError, match="this Run was closed"):
        seen.wait(0)
    seen.resume()
    assert seen.state == "running"
    seen.stop(wait=True)


def test_a_shared_run_that_was_closed_goes_on_by_resume(start: Start) -> None:
    run = start(max_steps=FOREVER)
    at_step(run, 2)
    run.pause(wait=True)
    there = pm.attach(run.share("tcp://127.0.0.1:*", role="control").text())
    there.close()
    there.resume(wait=True)
    assert there.state == "running"
    there.close()
    run.stop(wait=True)


def test_a_late_end_of_the_time_leaves_another_link(start: Start) -> None:
    """Two of our threads connect; the one whose coordinator does not answer ends its own link."""
    run = start(max_steps=FOREVER)
    at_step(run, 2)

    class Silent(Link):
        """Hears nothing, and just as it is given up, another thread connects."""

        def _listen(self) -> None:
            """Nothing comes."""

        def close(self) -> None:
            first, self._closing = not self._closing, True
            super().close()
            if first:
                run._catch_up(Link(self.file, run, "another"), PATIENCE)

    assert run._link is not None
    silent = Silent(run._link.file, run, "silent")
    with pytest.raises(pm.TimedOut, match="does not answer"):
        run._catch_up(silent, 0.0)
    assert run._link is not None and run._link is not silent and run.state == "running"
    run.stop(wait=True)


def test_who_finds_none_does_not_miss_anothers(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of our threads looked before there was a coordinator, another after."""
    run = start(max_steps=FOREVER)
    at_step(run, 2)

    def none() -> Link:
        raise pm.NotFoundError("there is none")

    with monkeypatch.context() as patch:
        patch.setattr(run, "_open_link", none)
        assert run._connect()
    assert run.state == "running"
    run.stop(wait=True)


def test_a_link_that_cannot_begin_is_not_kept(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a thread nobody listens: who waited for its news would wait for ever."""
    run = start(max_steps=FOREVER)
    at_step(run, 2)
    link = run._link
    assert link is not None

    def full(self: Link) -> None:
        raise RuntimeError("can't start new thread")

    another = Link(link.file, run, "another")
    with monkeypatch.context() as patch:
        patch.setattr(Link, "start", full)
        with pytest.raises(RuntimeError, match="can't start"):
            run._catch_up(another, PATIENCE)
    assert run._link is link and another._closing
    run.stop(wait=True)


@pytest.mark.parametrize("ask", ["wait", "pause"])
def test_a_child_is_refused_without_a_link(
    ask: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of fork(): the thread that makes it anew is not there."""
    run = start(max_steps=FOREVER)
    at_step(run, 2)
    with without_a_link(run, monkeypatch):
        run._going_on = threading.current_thread()  # as whoever makes it anew says
        pid = os.fork()
        if pid == 0:
            try:
                getattr(run, ask)()
            except pm.BusyError as error:
                os._exit(0 if "the process that forked" in str(error) else 2)
            except BaseException:  # nothing may come back from here
                os._exit(3)
            os._exit(1)
        run._going_on = None
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    run.stop(wait=True)


def test_who_attaches_first_tells_that_it_is_gone(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the link has found that its coordinator died, and then cannot say so any more."""
    run = start(name="found", max_steps=FOREVER, restart="never")
    at_step(run, 2)
    link, pids = run._link, [run.coordinator_pid, *(w["pid"] for w in run.workers)]
    assert link is not None
    monkeypatch.setattr(link, "_is_there", lambda: True)
    subscribed = len(run._subscribers)
    ended = heard(lambda: asyncio.run(run.wait_async()))
    until(lambda: len(run._subscribers) > subscribed, "it to wait")
    for pid in pids:
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    until(lambda: not any(map(alive, pids)), "their end")
    assert pm.attach("found", restart=False) is run and run.state == "stopped"
    assert ended() is None


def test_who_waits_is_not_woken_before_another_one_comes(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attaching finds no coordinator, and then has the run go on: it had not stopped."""
    run = start(name="between", max_steps=FOREVER)
    at_step(run, 2)
    link, pid, worker = run._link, run.coordinator_pid, run.workers[0]["pid"]
    assert link is not None and pid is not None
    monkeypatch.setattr(link, "_is_there", lambda: True)  # attaching comes first
    waits, woken, goes_on = waiting(run, monkeypatch), threading.Event(), run._goes_on_by_itself

    def wait() -> None:
        try:
            run.wait()
        finally:
            woken.set()

    ended = heard(wait)
    until(waits.is_set, "it to wait")

    def late() -> bool:
        if run._gone and run._going_on is None:
            assert not woken.wait(1), "its wait is over"
        return goes_on()

    monkeypatch.setattr(run, "_goes_on_by_itself", late)
    os.kill(worker, signal.SIGSTOP)  # it starts no other
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid), "its end")
    try:
        assert pm.attach("between") is run
    finally:
        os.kill(worker, signal.SIGCONT)
    until(lambda: run._link is not None and not run._lost, "the next coordinator")
    assert not woken.is_set()
    run.stop()
    assert ended() is None


def test_no_memory_at_the_end_of_a_link(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the log says is not to be had then; a new link is, and the old one is not kept."""
    run = start(max_steps=FOREVER, restart="never")
    at_step(run, 2)
    link, read_log, fails = run._link, run._read_log, [MemoryError("none for it")]
    assert link is not None

    def full() -> None:
        if fails:
            raise fails.pop()
        read_log()

    monkeypatch.setattr(run, "_read_log", full)
    link.close()
    with pytest.warns(RuntimeWarning, match="none for it"):
        run.on_gone(link)
    assert not fails and run._link not in (None, link) and run.state == "running"
    run.stop(wait=True)


def test_a_search_that_is_over_at_once_holds_nobody_up(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who attaches may look only when it has failed already."""
    run = start(name="over", max_steps=FOREVER)
    at_step(run, 2)
    pid, wait_for = run.coordinator_pid, pm.Run._wait_for
    assert pid is not None
    worker = run.workers[0]["pid"]
    run.close()
    os.kill(worker, signal.SIGSTOP)  # it starts no other
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid), "its end")

    def denied(run: pm.Run, begin: float) -> bool:
        raise pm.DeniedError("you may not")

    def late(run: pm.Run, over: Callable[[], bool], timeout: float | None, what: str) -> None:
        if what == "attach":
            until(lambda: f"pml {run.name}" not in {t.name for t in threading.enumerate()}, "it")
            timeout = 0
        wait_for(run, over, timeout, what)

    monkeypatch.setattr(pm.Run, "_looked_once", denied)
    monkeypatch.setattr(pm.Run, "_wait_for", late)
    with pytest.warns(RuntimeWarning, match="you may not"):
        assert pm.attach("over").state == "stopped"
    os.kill(worker, signal.SIGKILL)
