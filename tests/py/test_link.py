"""The link and the record, against a coordinator that loses what it publishes."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, until
from pantheraml import errors, link, sums
from pantheraml.record import CommandRecord, Event, LogReader, RunRecord


def step(seq: int, number: int, timeline: int = 0, **also: Any) -> Event:
    return {
        "seq": seq, "time": 0.0, "timeline": timeline, "type": "step", "step": number,
        "loss": 1.0 / number, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 8, "labels": 8,
        "seconds": 0.1, "tokens_per_second": 80.0, "epoch": 0.1, **also,
    }  # fmt: skip


REFUSED = dict.fromkeys(
    ("keys", "handshakes", "connections", "turned_out", "messages", "roles", "hurried"), 0
)
WELCOME: dict[str, Any] = {
    "type": "welcome", "run": "test", "state": "running", "reason": "", "step": 1, "max_steps": 9,
    "timeline": 0, "pid": 7, "role": "control", "workers": [], "refused": REFUSED,
}  # fmt: skip


def heartbeat(last: int) -> Event:
    return {
        "type": "heartbeat", "time": 1.0, "state": "running", "step": last, "last": last,
        "workers": [],
    }  # fmt: skip


class LossyClient:
    """Stands in for `_native.Client`: answers as a coordinator does, and loses events."""

    def __init__(self, log: list[Event], lose: float, seed: int) -> None:
        self.log, self.lose, self.random = log, lose, random.Random(seed)
        self.inbox: deque[tuple[str, str]] = deque([("up", "")])
        self.lock = threading.RLock()
        self.closed = False
        self.requests: list[dict[str, Any]] = []

    def publish(self, event: Event) -> None:
        with self.lock:
            if event.get("seq") is not None:
                self.log.append(event)
            if self.random.random() >= self.lose:
                self.inbox.append(("event", json.dumps(event)))

    def send(self, text: str) -> None:
        request = json.loads(text)
        with self.lock:
            if self.closed:  # as the real one: nobody hears of it any more
                raise errors.PeerError("closed")
            self.requests.append(request)
            answer: dict[str, Any] = {"id": request["id"]}
            if request["type"] == "replay":
                start, count = request["from"], self.random.randint(1, 5)
                chunk = self.log[start - 1 : start - 1 + count]
                answer |= {"type": "events", "from": start, "next": start + len(chunk)}
                answer |= {"last": len(self.log), "events": chunk}
            elif request["type"] == "pause":
                answer |= {"type": "error", "code": "busy", "message": "no"}
            elif request["type"] == "evaluate":  # it takes for ever
                return
            else:
                answer |= WELCOME | {"seq": len(self.log)}
            self.inbox.append(("answer", json.dumps(answer)))

    def receive(self, timeout: float = 0.0) -> list[tuple[str, str]]:
        for _ in range(3):
            with self.lock:
                if self.closed:
                    raise errors.PeerError("closed")
                if self.inbox:
                    count = self.random.randint(1, 3)
                    return [self.inbox.popleft() for _ in range(min(count, len(self.inbox)))]
            time.sleep(0.002)
        return []

    def close(self) -> None:
        self.closed = True

    def fileno(self) -> int:
        return -1


class Follower:
    def __init__(self) -> None:
        self.record = RunRecord(Path("."))
        self.gone = threading.Event()
        self.heartbeats = 0

    def last_seq(self) -> int:
        return self.record.seq

    def on_events(self, events: list[Event]) -> None:
        for event in events:
            if "seq" in event:
                assert event["seq"] == self.record.seq + 1
                self.record.apply(event)
            else:
                self.heartbeats += 1

    def on_welcome(self, welcome: dict[str, Any]) -> None: ...

    def on_gone(self, _: link.Link) -> None:
        self.gone.set()


def follow(
    client: LossyClient, follower: Follower, monkeypatch: pytest.MonkeyPatch, pid: int = 7
) -> link.Link:
    monkeypatch.setattr(link._native, "Client", lambda _: client)
    monkeypatch.setattr(link._native, "coordinator_pid", lambda _: pid)
    made = link.Link("connection.json", follower, "test")
    made.start()
    return made


@pytest.mark.parametrize("lose", [0.0, 0.3, 0.95])
def test_nothing_is_missed_and_nothing_comes_twice(
    lose: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = [step(n, n) for n in range(1, 40)]
    client, follower = LossyClient(log, lose, 1), Follower()
    made = follow(client, follower, monkeypatch)
    assert made.caught_up.wait(PATIENCE) and follower.record.seq >= 39
    for n in range(40, 300):
        client.publish(step(n, n))
        if n % 50 == 0:
            client.publish(heartbeat(n))
    client.lose = 0
    client.publish(heartbeat(299))
    until(lambda: follower.record.seq >= 299, "the last event")
    assert follower.record.history.column("seq") == list(range(1, 300))
    until(lambda: follower.heartbeats >= 1, "a heartbeat")
    made.close()
    assert not follower.gone.is_set()


class HurriedClient(LossyClient):
    """Refuses each replay but every fourth, as one that is asked too fast; or cannot send them."""

    def __init__(self, log: list[Event], full: bool) -> None:
        super().__init__(log, 0.0, 1)
        self.full, self.asked = full, 0

    def send(self, text: str) -> None:
        request = json.loads(text)
        self.asked += request["type"] in ("hello", "replay")
        if request["type"] != "replay" and not self.full or self.asked % 4 == 0:
            super().send(text)
        elif self.full:
            raise errors.BusyError("1000 requests wait")
        else:
            refused = {"type": "error", "id": request["id"], "code": "busy", "message": "slower"}
            with self.lock:
                self.inbox.append(("answer", json.dumps(refused)))


@pytest.mark.parametrize("full", [False, True])
def test_a_replay_that_is_refused_is_asked_for_again(
    full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A viewer's replay of a long log is faster than its guests may ask."""
    monkeypatch.setattr(link, "AGAIN", 0.001)
    client, follower = HurriedClient([step(n, n) for n in range(1, 61)], full), Follower()
    made = follow(client, follower, monkeypatch)
    until(lambda: follower.record.seq >= 60 and made.caught_up.is_set(), "the whole log")
    asked = client.asked
    client.publish(heartbeat(60))
    until(lambda: follower.heartbeats == 1, "a heartbeat")
    assert client.asked == asked and not follower.gone.is_set()  # nothing is missing any more
    made.close()


def test_who_gives_nothing_is_not_asked_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that names events and does not give them is asked again, now and then."""

    class Empty(LossyClient):
        def send(self, text: str) -> None:
            with self.lock:
                super().send(text)
                if json.loads(text)["type"] == "replay":
                    answer = json.loads(self.inbox.pop()[1])
                    self.inbox.append(("answer", json.dumps(answer | {"last": 99, "events": []})))

    monkeypatch.setattr(link, "AGAIN", 3600.0)
    client, follower = Empty([], 0.0, 1), Follower()
    made = follow(client, follower, monkeypatch)
    for _ in range(50):
        client.publish(heartbeat(99))
    until(lambda: follower.heartbeats == 50, "the heartbeats")
    assert [request["type"] for request in client.requests] == ["hello", "replay"]
    monkeypatch.setattr(link, "AGAIN", 0.001)
    made._ask_at = time.monotonic()
    until(lambda: len(client.requests) > 4, "it to be asked again")
    made.close()


def test_answers_find_who_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    follower = Follower()
    made = follow(LossyClient([], 0, 0), follower, monkeypatch)
    assert made.request("status")["type"] == "welcome"
    with pytest.raises(errors.BusyError, match="no"):
        made.request("pause")
    with pytest.raises(TimeoutError, match="did not answer evaluate"):
        made.request("evaluate", timeout=0.05)
    made.close()


@pytest.mark.parametrize("name", ["half \udcff", "a\0b", "x" * 65])
def test_what_cannot_be_read_is_not_sent(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator could not say whose answer its error is, and who asked waited in vain."""
    client = LossyClient([], 0, 0)
    made = follow(client, Follower(), monkeypatch)
    key = "x" * 40
    with pytest.raises(errors.InvalidError, match="share"):
        made.request("share", bind="tcp://127.0.0.1:*", role="view", public_key=key, name=name)
    assert made.request("status")["type"] == "welcome"
    until(lambda: made._pending == {}, "nobody to be left waiting")
    assert "share" not in [request["type"] for request in client.requests]
    made.close()


def test_who_waits_hears_that_it_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    client, follower = LossyClient([], 0, 0), Follower()
    made = follow(client, follower, monkeypatch)
    made.caught_up.wait(PATIENCE)
    threading.Timer(0.1, client.close).start()
    with pytest.raises(errors.PeerError):
        made.request("evaluate", timeout=PATIENCE)
    assert follower.gone.wait(PATIENCE)


def test_a_coordinator_that_died_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    client, follower = LossyClient([], 0, 0), Follower()
    made = follow(client, follower, monkeypatch)
    made.caught_up.wait(PATIENCE)

    def stale(_: object) -> int:
        raise errors.PeerError("stale")

    monkeypatch.setattr(link._native, "coordinator_pid", stale)
    with client.lock:
        client.inbox.append(("down", ""))
    assert follower.gone.wait(PATIENCE)
    made.close()


def test_a_new_timeline_forgets_what_did_not_happen() -> None:
    record = RunRecord(Path("/run"))
    for n in range(1, 11):
        record.apply(step(n, n))
    start = {"seq": 11, "time": 0.0, "timeline": 1, "type": "state", "state": "starting", "step": 6}
    record.apply(start)
    assert record.history.column("step") == [1, 2, 3, 4, 5, 6]
    record.apply(step(12, 7, 1, loss="NaN"))
    (last,) = record.history.copy(1).rows()
    assert last["step"] == 7 and last["loss"] != last["loss"]
    assert record.step == 7 and len(record.history) == 7 and record.notes == [start]


def test_commands_and_samples() -> None:
    record = RunRecord(Path("/run"))
    base = {"time": 0.0, "timeline": 0}
    record.apply(
        {**base, "seq": 1, "type": "command", "command": 1, "verb": "set", "id": "a", "args": {}}
    )
    assert record.commands[1].state == "accepted"
    record.apply(
        {
            **base,
            "seq": 2,
            "type": "applied",
            "command": 1,
            "verb": "set",
            "step": 5,
            "workers": [0, 1],
        }
    )
    assert (record.commands[1].state, record.commands[1].step) == ("applied", 5)
    record.apply(
        {
            **base,
            "seq": 3,
            "type": "refused",
            "command": 2,
            "verb": "sample",
            "step": 5,
            "reason": "no",
        }
    )
    assert record.commands[2].reason == "no"
    for seq, ids, done in ((4, [1, 2], False), (5, [3], True)):
        record.apply(
            {
                **base,
                "seq": seq,
                "type": "sample",
                "command": 3,
                "step": 5,
                "token_ids": ids,
                "done": done,
            }
        )
    assert record.samples[3, 0] == [1, 2, 3] and (3, 0) in record.samples_done


def test_what_is_read_without_the_lock_is_whole(tmp_path: Path) -> None:
    """Who looks for a checkpoint, or at a command, does it beside the thread that hears of them."""
    record = RunRecord(tmp_path)
    found: list[int] = []

    class Seen(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            found.append(len(record.checkpoints))
            return super().__getitem__(name)

    class Told(CommandRecord):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            assert name != "state" or value == "accepted" or self.step == 5

    base = {"time": 0.0, "timeline": 0, "step": 5}
    saved = {**base, "type": "checkpoint", "path": "checkpoints/step-000005", "bytes": 9}
    record.apply({**saved, "seq": 1})
    record.apply(Seen(saved | {"seq": 2}))  # told again: to somebody who asked for it, too
    assert found and set(found) == {1}
    for number, kind in ((1, "applied"), (2, "refused")):
        record.commands[number] = Told(number, "set", {})
        told = {"command": number, "verb": "set", "workers": [0], "reason": "no"}
        record.apply({**base, **told, "seq": number + 2, "type": kind})
        assert record.commands[number].state == kind


def test_the_log_is_read_in_pieces(tmp_path: Path) -> None:
    lines = [sums.add(json.dumps(step(n, n)).encode()).decode() + "\n" for n in (1, 2, 3)]
    log = LogReader(tmp_path)
    assert log.read() == []
    (tmp_path / "events.jsonl").write_text(lines[0] + lines[1][:20])
    assert [event["seq"] for event in log.read()] == [1]
    assert log.read() == []
    (tmp_path / "events.jsonl").write_text("".join(lines))
    assert [event["seq"] for event in log.read()] == [2, 3]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("event", {"type": "heartbeat"}),
        ("event", {"seq": 1, "type": "step"}),
        ("answer", {"type": "error", "id": "?"}),
        ("answer", {"type": "accepted", "id": 5}),
        ("event", []),
    ],
)
def test_who_speaks_otherwise_is_left(
    kind: str, message: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is no message of ours ends the link with a word, and not its thread with a KeyError."""
    client, follower = LossyClient([], 0.0, 1), Follower()
    made = follow(client, follower, monkeypatch)
    assert made.caught_up.wait(PATIENCE)
    with client.lock:
        client.inbox.append((kind, json.dumps(message)))
    with pytest.raises(errors.CorruptError, match=f"sent what is no {kind}"):
        made.request("evaluate", timeout=PATIENCE)
    assert follower.gone.wait(PATIENCE)


def test_no_memory_ends_the_link_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    client, follower = LossyClient([], 0.0, 1), Follower()
    made = follow(client, follower, monkeypatch)
    assert made.caught_up.wait(PATIENCE)

    def none(_: float = 0.0) -> list[tuple[str, str]]:
        raise MemoryError

    monkeypatch.setattr(client, "receive", none)
    with pytest.raises(MemoryError, match="no memory"):
        made.request("evaluate", timeout=PATIENCE)
    assert follower.gone.wait(PATIENCE) and isinstance(made.error, errors.NoMemoryError)


def test_events_that_do_not_come_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One port is let through and the other one is not: the truth comes late, and that is said."""
    monkeypatch.setattr(link, "DEAF", 0.05)
    client, follower = LossyClient([step(1, 1)], 1.0, 1), Follower()
    made = follow(client, follower, monkeypatch)
    for n in (2, 3):
        client.publish(step(n, n))
        until(lambda n=n: follower.record.seq == n, "what was published and never came")
    assert made.deaf
    monkeypatch.setattr(link, "DEAF", PATIENCE)
    client.lose = 0
    client.publish(heartbeat(3))
    until(lambda: not made.deaf, "the heartbeat")
    made.close()


def test_who_is_one_too_many_hears_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the caller whose request it was that got the answer, and nobody asks again."""
    client, follower = LossyClient([], 0, 0), Follower()
    made = follow(client, follower, monkeypatch)
    assert made.caught_up.wait(PATIENCE)
    words = "8 viewers are connected"
    answer = {"type": "error", "id": "", "code": "busy", "message": words, "viewers": 8}

    def send(text: str) -> None:
        answer["id"] = json.loads(text)["id"]
        with client.lock:
            client.inbox.append(("answer", json.dumps(answer)))

    monkeypatch.setattr(client, "send", send)
    with pytest.raises(errors.TooManyViewers, match=words):
        made.request("status", timeout=PATIENCE)
    assert follower.gone.wait(PATIENCE) and isinstance(made.error, errors.TooManyViewers)
    assert client.closed
