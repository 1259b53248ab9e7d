"""A command is told by its id: numbers of commands that a lost coordinator took are given again."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pantheraml as pm
import pytest
from pantheraml.commands import Command
from pantheraml.record import RunRecord


class StubLink:
    """A link that has, or has not, taken in what its coordinator's log holds."""

    def __init__(self, caught_up: bool) -> None:
        self.caught_up = threading.Event()
        if caught_up:
            self.caught_up.set()


class StubRun:
    """What a command looks at."""

    name, state = "stub", "running"

    def __init__(self) -> None:
        self._record = RunRecord(Path("/run"))
        self._link: Any = StubLink(True)
        self.workers = [{"rank": 0}]

    def take(self, kind: str, **fields: Any) -> None:
        """Hear of an event."""
        event = {"seq": self._record.seq + 1, "time": 0.0, "timeline": 0, "type": kind}
        self._record.apply(event | {"verb": "set"} | fields)

    def send(self, identity: str, number: int) -> Command:
        """Send a set that is accepted."""
        run: Any = self
        return Command(run, self._link, "set", {"id": identity, "command": number})

    def _is_over(self) -> bool:
        return False

    def _wait_for(self, over: Any, timeout: float | None, what: str) -> None:
        assert over()


def test_a_number_that_is_given_again_is_another_command() -> None:
    run = StubRun()
    mine = run.send("me-1", 7)
    assert mine.state == "accepted"
    # Its coordinator dies with it in memory; the next one gives the number to somebody else.
    run._link = StubLink(True)
    theirs = run.send("them-1", 7)
    run.take("command", command=7, id="them-1", args={"learning_rate": 1.0})
    run.take("applied", command=7, step=12, workers=[0])
    assert theirs.state == "applied" and theirs.step == 12 and theirs.wait() is theirs
    assert mine.is_lost and not theirs.is_lost
    assert mine.state == "refused" and mine.step is None and mine.workers == []
    with pytest.raises(pm.BusyError, match="send it again"):
        mine.wait()


def test_what_the_next_coordinator_does_not_know_is_lost() -> None:
    run = StubRun()
    lost, kept = run.send("me-1", 1), run.send("me-2", 2)
    run.take("command", command=2, id="me-2", args={})
    run._link = None
    assert lost.state == kept.state == "accepted"  # it may be in the log
    run._link = StubLink(False)
    assert lost.state == "accepted"
    run._link.caught_up.set()
    assert lost.state == "refused" and kept.state == "accepted"
    run.take("refused", command=2, step=3, reason="the run's coordinator ended")
    with pytest.raises(pm.BusyError, match="the run's coordinator ended"):
        kept.wait()
