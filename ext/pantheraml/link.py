"""Link: a client's connection to a run's coordinator, and the thread that listens to it.

The thread takes events in, in the order of their numbers; where one is missing it asks for a
replay. Answers find the callers that wait for them. When the coordinator's process is gone, what
it logged last is read from the run folder.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from pantheraml import _native
from pantheraml.errors import (
    BusyError,
    CorruptError,
    Error,
    InvalidError,
    NoMemoryError,
    PeerError,
    TimedOut,
    TooManyViewers,
    from_code,
)
from pantheraml.record import Event

# Seconds for an answer. A coordinator on a busy machine or a slow disk is late, not gone; one that
# is gone is noticed by its process, long before.
ANSWER = 30.0
# Seconds without an event, of which a coordinator that is there sends one each second: something
# between here and there lets the commands' port through and not the events'. They are asked for
# then, as often.
DEAF = 10.0
# Seconds until events are asked for again that were refused, or of which none came. The coordinator
# of a long log refuses whoever asks faster than its guests may, or does not read what is answered;
# and one that names events which it never gives is not asked at full speed for ever.
AGAIN = 0.5


class Listener(Protocol):
    """What a link tells. All calls come from the link's thread."""

    def last_seq(self) -> int:
        """Give the number of the last event taken in."""

    def on_events(self, events: list[Event]) -> None:
        """Take events in; heartbeats are among them, they have no ``seq``."""

    def on_welcome(self, welcome: dict[str, Any]) -> None:
        """Hear that the coordinator has let us in."""

    def on_gone(self, link: Link) -> None:
        """Hear that the coordinator is gone; the link's thread ends. Not after close()."""


def parsed(kind: str, text: str) -> dict[str, Any]:
    """Parse an ``answer`` or an ``event`` that fits the message table.

    Raises
    ------
    CorruptError
        It does not. Whoever answers is no coordinator of ours, or of another version.
    """
    try:
        _native.check_message(kind, text)
    except (InvalidError, CorruptError) as problem:
        raise CorruptError(f"the coordinator sent what is no {kind}: {problem}") from None
    made: dict[str, Any] = json.loads(text)
    return made


def problem_of(answer: dict[str, Any]) -> Error:
    """Give what an answer of the type ``error`` says, as its class."""
    if "viewers" in answer:
        return TooManyViewers(answer["message"])
    return from_code(answer["code"], answer["message"])


class _Pending:
    def __init__(self) -> None:
        self.done = threading.Event()
        self.answer: dict[str, Any] | None = None
        self.error: Error | None = None


class Link:
    """A connection that is being listened to.

    Parameters
    ----------
    connection_file
        As `_native.launch` or `_native.connection_file` gives it.
    listener
        Who is told.
    name
        Of the run, for the thread's name.
    """

    def __init__(self, connection_file: str | Path, listener: Listener, name: str) -> None:
        self.file = connection_file
        self.coordinator_pid, self._client = self._open()
        self._listener = listener
        self._prefix = secrets.token_hex(6)
        self._lock = threading.Lock()
        self._counter = 0
        self._pending: dict[str, _Pending] = {}
        self._replaying: _Pending | None = None  # what asks for events, and is not answered yet
        self._owed = self._greets = False  # it, and before it a hello, are still to be sent
        self._ask_at = 0.0  # not before
        self._seen = 0  # highest number that anyone has told us of
        self._goal: int | None = None  # last number when we came: from there on it is live
        self._up = False
        self._down_since = time.monotonic()
        self._heard = self._asked = time.monotonic()  # an event; or asked, where none comes
        #: Whether it is let in and answered, and hears no events.
        self.deaf = False
        self._closing = False
        self.caught_up = threading.Event()
        self.error: Error | None = None  # why the thread ended
        self._thread = threading.Thread(target=self._listen, name=f"pml {name}", daemon=True)

    def _open(self) -> tuple[int, _native.Client]:
        return _native.coordinator_pid(self.file), _native.Client(self.file)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    # ---- any thread ------------------------------------------------------------------------

    def request(self, kind: str, timeout: float = ANSWER, **fields: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises
        ------
        BusyError
            It was called from a subscriber, which the answer would wait for.
        Error
            What the coordinator answered, as its class.
        TimedOut
            No answer came in time.
        PeerError
            The coordinator is gone, or there is no connection to it.
        """
        if threading.current_thread() is self._thread:
            raise BusyError("a subscriber may not wait for an answer; ask from another thread")
        pending = self._send(kind, fields)
        if not pending.done.wait(timeout):
            if not self._up:
                raise PeerError(
                    f"there is no connection to the run's coordinator, and none came back within "
                    f"{timeout:g} s; should one come, it may still carry out {kind}"
                )
            raise TimedOut(f"the run's coordinator did not answer {kind} within {timeout:g} s")
        if pending.error is not None:
            raise pending.error
        assert pending.answer is not None
        return pending.answer

    def fileno(self) -> int:
        """Give the eventfd of the C client."""
        return self._client.fileno()

    def close(self) -> None:
        """Stop listening. The run goes on."""
        self._closing = True
        self._client.close()
        if threading.current_thread() is not self._thread and self._thread.is_alive():
            self._thread.join(timeout=5)

    def _send(self, kind: str, fields: dict[str, Any]) -> _Pending:
        """Send a request that the coordinator can read.

        Of one that it cannot (half a surrogate pair, a NUL in a text) it could not say whose answer
        its error is.
        """
        pending = _Pending()
        with self._lock:
            self._counter += 1
            number = f"{self._prefix}-{self._counter}"
            self._pending[number] = pending
        try:
            message = {"type": kind, "id": number, **fields}
            text = json.dumps(message, separators=(",", ":"), allow_nan=False)
            try:
                _native.check_message("request", text)
            except CorruptError as problem:
                raise InvalidError(f"{kind} cannot be sent: {problem}") from None
            self._client.send(text)
        except BaseException as problem:
            with self._lock:
                self._pending.pop(number, None)
            if isinstance(problem, PeerError) and self.error is not None:
                raise self.error from None  # why it is closed
            raise
        return pending

    # ---- the link's own thread -------------------------------------------------------------

    def _listen(self) -> None:
        self.error = PeerError("the run's coordinator is gone")
        gone = False
        checked = time.monotonic()
        while not self._closing and not gone:
            try:
                batch = self._client.receive(0.5)
                self._take(batch)
            except Error as problem:
                self.error = problem
                break
            except MemoryError as problem:  # what was being taken in is lost: attach anew
                self.error = NoMemoryError(str(problem) or "no memory for what came")
                break
            now = time.monotonic()
            if not self._up and now - checked > 0.4:
                checked = now
                gone = not self._is_there()
            if self._up and now - max(self._heard, self._asked) > DEAF:
                self._asked = now
                with suppress(BusyError):  # a thousand requests wait: nobody answers either
                    self._send("hello", {})
        left, self._closing = self._closing, True
        self._client.close()
        with self._lock:
            pending, self._pending = self._pending, {}
        try:
            if not left:
                # It reads the log's end, so that whoever waits finds what happened last.
                self._listener.on_gone(self)
        finally:
            for waiting in pending.values():
                waiting.error = self.error
                waiting.done.set()
            self.caught_up.set()

    def _take(self, batch: list[tuple[str, str]]) -> None:
        events: list[Event] = []
        for kind, text in batch:
            if kind == "event":
                self._event(parsed(kind, text), events)
            elif kind == "answer":
                self._answer(parsed(kind, text), events)
            elif kind == "up":
                self._up = True
                self._heard = time.monotonic()
                self._replaying, self._greets, self._ask_at = None, True, 0.0
                self._replay(events)
            elif kind == "down":
                self._up = False
                self._down_since = time.monotonic()
            elif kind == "lost":
                self._replay(events)
            elif kind == "denied":
                raise from_code("denied", text or "the coordinator does not accept our key")
        if events:
            self._listener.on_events(events)
        if self._up and self._owed:
            self._replay([])
        if self._goal is not None and self._listener.last_seq() >= self._goal:
            self.caught_up.set()

    def _event(self, event: Event, events: list[Event]) -> None:
        self._heard, self.deaf = time.monotonic(), False
        if "seq" not in event:  # a heartbeat
            self._seen = max(self._seen, event["last"])
            events.append(event)
        else:
            self._seen = max(self._seen, event["seq"])
            if event["seq"] == self._next(events):
                events.append(event)
        if self._seen >= self._next(events):
            self._replay(events)

    def _answer(self, answer: dict[str, Any], events: list[Event]) -> None:
        with self._lock:
            pending = self._pending.pop(answer["id"], None)
        if answer["type"] == "events":
            self._replaying = None
            number = self._next(events)
            for event in answer["events"]:
                if event["seq"] == self._next(events):
                    events.append(event)
            self._seen = max(self._seen, answer["last"])
            self._ask_at = self._later() if self._seen >= number == self._next(events) else 0.0
            if self._seen >= self._next(events):
                self._replay(events)
        elif answer["type"] == "welcome":
            self._goal = answer["seq"] if self._goal is None else self._goal
            self.deaf = time.monotonic() - self._heard > DEAF
            self._listener.on_welcome(answer)
            self._seen = max(self._seen, answer["seq"])
            if self.deaf and self._seen >= self._next(events):
                self._replay(events)
        elif answer["type"] == "error" and (pending is None or pending is self._replaying):
            # Nobody waits for a replay but this thread.
            self._replaying, self._owed, self._ask_at = None, True, self._later()
        if pending is not None:
            if answer["type"] == "error":
                pending.error = problem_of(answer)
            pending.answer = answer
            pending.done.set()
        if answer["type"] == "error" and "viewers" in answer:
            raise problem_of(answer)  # the coordinator closes this connection, and would the next

    def _next(self, events: list[Event]) -> int:
        """Give the number of the event that must come next."""
        for event in reversed(events):
            if "seq" in event:
                return int(event["seq"]) + 1
        return self._listener.last_seq() + 1

    def _replay(self, events: list[Event]) -> None:
        if self._replaying is not None:
            return
        self._owed = True
        if time.monotonic() < self._ask_at:
            return
        try:
            if self._greets:
                self._send("hello", {})
                self._greets = False
            self._replaying = self._send("replay", {"from": self._next(events)})
            self._owed = False
        except BusyError:  # a thousand requests wait, and this one waits for them
            self._ask_at = self._later()

    @staticmethod
    def _later() -> float:
        return time.monotonic() + AGAIN

    def _is_there(self) -> bool:
        try:
            return _native.coordinator_pid(self.file) == self.coordinator_pid
        except Error:
            return False
