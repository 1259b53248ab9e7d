"""Following: a run's record, kept up to date by a link to its coordinator.

What a run looks like from another process: its log on disk, and the events that come. This part
of :class:`pantheraml.Run` listens and waits; `connecting` finds whom the events come from,
`standing` says what they add up to, `asking` sends commands, and `run` has the words for people.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pantheraml import aside, folders
from pantheraml.checks import number
from pantheraml.errors import (
    BusyError,
    Error,
    IOFailed,
    PeerError,
    RunFailed,
    TimedOut,
)
from pantheraml.link import Link
from pantheraml.plain import complain
from pantheraml.record import ENDED, Event, LogReader, RunRecord
from pantheraml.text import Text

Subscriber = Callable[[Event], None]


class Following:
    """A run as it is followed. Made by :func:`pantheraml.run.open_run`.

    Attributes
    ----------
    name
        Its name.
    folder
        Its run folder.
    config
        ``run.json``: every setting as resolved.
    """

    def __init__(self, folder: Path) -> None:
        self._begin(folder, folders.read_config(folder))
        self.name: str = folder.name  # by which it is attached to: it may be a copy, or moved

    def _begin(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = folder
        self.config = config
        self._owner = os.getpid()
        every_followed.add(self)
        self.name = config["name"]
        self._text = Text(Path(self.config["model"]), folder, self.config.get("data", {}))
        self._changed = threading.Condition()
        self._record = RunRecord(folder)
        self._heartbeat: Event | None = None
        self._welcome: dict[str, Any] | None = None
        self._trouble = ""  # why the log is not written now
        self._untold: Event | None = None  # the state and step that it would have
        self._link: Link | None = None
        self._gone = False  # it has no coordinator, as far as we know
        self._lost = ""  # why it is without a coordinator that will be found, in words
        # The thread of ours that sees to it, and to what becomes of the links that it opens.
        self._going_on: threading.Thread | None = None
        self._closed = False
        self._resumed_at = 0  # number of the last event when we let it go on
        self._begun = False  # by this object: nothing that was said of it was for somebody else
        self._subscribers: list[Subscriber] = []
        self._at_close: list[Callable[[], None]] = []  # of who waits without a thread
        self._log = LogReader(folder)

    @property
    def state(self) -> str:
        """``starting``, ``running``, ``paused``, ``finished``, ``stopped`` or ``failed``.

        A run whose coordinator has gone without a word (its machine went down) is ``starting``
        while another one takes over, and ``stopped`` where none does; it is ``starting``, too,
        while a connection that broke is made anew. While the disk does not take the run's events
        it is what they would say.
        """
        with self._changed:
            state = self._record.state
            said = self._unlogged()
            if said is not None and not {state, said["state"]} & ENDED:
                return str(said["state"])
            if state not in ENDED and self._lost:
                return "starting"
            return "stopped" if self._gone and state not in ENDED else state

    @property
    def reason(self) -> str:
        """Why it is in this state, in words; may be empty.

        While the disk does not take the run's events, it is that, and what to do.
        """
        with self._changed:
            if self._trouble and self._link is not None:
                return self._trouble
            if self._lost and self._record.state not in ENDED:
                return self._lost
            if self._gone and self._record.state not in ENDED:
                return "its coordinator is gone; resume() goes on from the newest checkpoint"
            return self._record.reason

    @property
    def coordinator_pid(self) -> int | None:
        """Process id of the coordinator; None when it is gone."""
        link = self._link
        return None if link is None else link.coordinator_pid

    def wait_for_change(self, timeout: float) -> None:
        """Wait until anything about the run changes, at most `timeout` seconds."""
        with self._changed:
            self._changed.wait(timeout)

    def subscribe(self, callback: Subscriber) -> Callable[[], None]:
        """Call `callback(event)` for each event from now on.

        Parameters
        ----------
        callback
            Called on the run's own thread after the run's properties have changed, in the order
            of the events; heartbeats (without ``seq``) among them, and at last an event of the
            type ``gone`` when the coordinator has gone. It must be quick, and may not call what
            waits for an answer. One that raises is reported and dropped.

        Returns
        -------
        callable
            Ends the subscription.
        """
        with self._changed:
            self._subscribers.append(callback)

        def unsubscribe() -> None:
            with self._changed:
                if callback in self._subscribers:
                    self._subscribers.remove(callback)

        return unsubscribe

    def close(self) -> None:
        """Stop following the run. The run goes on."""
        self._hear_no_more()
        _forget(self)

    def _hear_no_more(self) -> None:
        """Be closed, and say so to who waits; attaching again makes it hear again."""
        with self._changed:  # a link that is found just now is closed by who finds it
            self._closed = True
            link, self._link = self._link, None
            self._changed.notify_all()  # who waits would wait for ever
            wake = list(self._at_close)
        if link is not None:
            link.close()
        for each in wake:
            each()

    # ---- the link's thread -----------------------------------------------------------------

    def last_seq(self) -> int:
        """Give the number of the last event taken in (for the link)."""
        return self._record.seq

    def on_events(self, events: list[Event]) -> None:
        """Take events in (for the link)."""
        with self._changed:
            for event in events:
                if "seq" in event:
                    self._record.apply(event)
                else:
                    self._heartbeat = event
                    self._note_trouble(event)
            self._changed.notify_all()
        for event in events:
            self._tell(event)

    def _unlogged(self) -> Event | None:
        """The state and the step that the coordinator says, where its log cannot say so now."""
        return self._untold if self._link is not None else None

    def _note_trouble(self, said: Event) -> None:
        self._trouble = said.get("trouble", "")
        self._untold = said if self._trouble else None

    def on_welcome(self, welcome: dict[str, Any]) -> None:
        """Hear that the coordinator has let us in (for the link)."""
        with self._changed:
            self._welcome = welcome
            self._note_trouble(welcome)
            self._changed.notify_all()

    def _tell_gone(self) -> None:
        self._tell({"type": "gone", "state": self.state, "step": self._record.step})

    def _tell(self, event: Event) -> None:
        with self._changed:
            subscribers = list(self._subscribers)
        for callback in subscribers:
            try:
                callback(event)
            except Exception as error:  # a stranger's function must not end our thread
                with self._changed:
                    if callback in self._subscribers:
                        self._subscribers.remove(callback)
                warnings.warn(
                    f"run {self.name}: a subscriber failed and was dropped: {error!r}",
                    RuntimeWarning,
                    stacklevel=1,
                )

    # ---- the log ------------------------------------------------------------------------

    def _read_log(self) -> None:
        """Take in what the log on disk has and we have not.

        Raises
        ------
        CorruptError
            It is damaged.
        IOFailed
            The disk does not give it.
        """
        with self._changed:
            try:
                for piece in self._log.pieces():
                    for event in piece:
                        self._record.apply(event)
            except Error:
                raise
            except OSError as error:
                where = self.folder / "events.jsonl"
                raise IOFailed(f"{where} cannot be read: {error.strerror}") from None
            finally:
                self._changed.notify_all()

    def _not_forked(self) -> None:
        """Refuse to wait in a child of fork(): the thread that listens is not there.

        Raises
        ------
        BusyError
            It is one.
        """
        followed = self._link is not None or self._going_on is not None or bool(self._lost)
        if followed and self._owner != os.getpid():
            raise BusyError(
                f"run {self.name} is followed by the process that forked this one; "
                f"pm.attach({self.name!r}) follows it here"
            )

    def _not_closed(self) -> None:
        """Refuse to wait for news of a run that is not followed any more.

        Raises
        ------
        PeerError
            It was closed.
        """
        if self._closed:
            raise PeerError(f"this Run was closed; pm.attach({self.name!r}) makes a new one")

    # ---- asking and waiting ----------------------------------------------------------------

    def _is_over(self) -> bool:
        return self.state in ENDED

    def _stands(self) -> bool:
        """Whether it stands for a reason of its own, since before anybody let it go on.

        A pause that was asked for has no reason; while the disk is full, `reason` is the disk's. A
        run that has lost its coordinator stands again once the next one has taken over.
        """
        with self._changed:
            record = self._record
            since = record.state_seq > self._resumed_at
            there = not self._gone and not self._lost
            return record.state == "paused" and bool(record.reason) and since and there

    def _nothing_comes(self) -> bool:
        """Whether no event will come any more, at which somebody who waits for one gives up."""
        return self._is_over()

    def _connected(self) -> None:
        """Raise why nothing comes, where that is not the run's end."""

    def _will_not_end(self) -> bool:
        """Whether there is nothing to wait for: it has ended, or stands for good."""
        return self._nothing_comes() or self._stands()

    def _raise_failure(self) -> None:
        self._connected()
        if self.state == "failed":
            raise RunFailed(f"run {self.name} failed: {self.reason}")
        if self._stands():
            raise RunFailed(f"run {self.name} stands: {self.reason}")

    def _wait_for(self, over: Callable[[], bool], timeout: float | None, what: str) -> None:
        if timeout is not None:
            timeout = number("timeout", timeout, 0, threading.TIMEOUT_MAX)
        deadline = None if timeout is None else time.monotonic() + timeout
        told = ""
        with self._changed:
            while not over():
                self._not_forked()
                self._not_closed()
                if self._trouble and not told:  # what is waited for is not told of before that ends
                    told = self._trouble
                    complain(f"{self.name}: {what} waits: {told}")
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimedOut(f"{what}: not within {timeout:g} s; the run goes on")
                self._changed.wait(left)

    @contextmanager
    def _leave_alone(self) -> Iterator[None]:
        """Say at Ctrl-C that the run goes on, and how to come back."""
        try:
            yield
        except KeyboardInterrupt as interrupt:
            said = vars(interrupt)  # once, where one of these is within another
            if not aside.is_own(self) and "left_alone" not in said:
                said["left_alone"] = True
                complain(
                    f"The run goes on without you. Come back by pm.attach({self.name!r}); "
                    "run.stop() ends it."
                )
            raise


# One object for each run that this process follows, so that attaching twice costs nothing.
_followed: dict[tuple[int, Path], Following] = {}
_followed_lock = threading.Lock()


# A child of fork() has none of the threads, and may have any of their locks held: by nobody.
every_followed: weakref.WeakSet[Following] = weakref.WeakSet()


def _renew_locks() -> None:
    global _followed_lock
    _followed_lock = threading.Lock()
    for run in list(every_followed):
        run._changed = threading.Condition()


os.register_at_fork(after_in_child=_renew_locks)


def followed(folder: Path) -> Following | None:
    """Give the object by which this process follows a run already."""
    with _followed_lock:
        return _followed.get((os.getpid(), folder))


def remember(run: Following) -> None:
    """From now on `followed` gives this one."""
    with _followed_lock:
        _followed[os.getpid(), run.folder] = run


def _forget(run: Following) -> None:
    with _followed_lock:
        if _followed.get((os.getpid(), run.folder)) is run:
            del _followed[os.getpid(), run.folder]
