"""Following: a run's record, kept up to date by a link to its coordinator.

What a run looks like from another process: its log on disk, and the events that come. This part
of :class:`pantheraml.Run` connects, listens, waits, and starts coordinators; `standing` says what
the events add up to, `asking` sends commands, and `run` has the words for people.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pantheraml import _native, aside, folders, programs
from pantheraml.checks import number
from pantheraml.errors import (
    BusyError,
    CorruptError,
    DeniedError,
    Error,
    IOFailed,
    NoMemoryError,
    NotFoundError,
    PeerError,
    RunFailed,
    TimedOut,
    TooManyViewers,
)
from pantheraml.link import ANSWER, Link
from pantheraml.plain import complain
from pantheraml.record import ENDED, Event, LogReader, RunRecord
from pantheraml.text import Text

Subscriber = Callable[[Event], None]

# Workers without a coordinator save and start another one. One that is stopped, or hangs, does not:
# after so many seconds whoever looks after the run does it. It waits for those that still save.
PATIENCE = 5.0
# A coordinator that holds the run's lock is there, whether or not it answers yet: it may be reading
# a long log on a busy machine. So many seconds are waited for it.
STARTING = 60.0
# What could not be read now, or had no memory, may be a moment later: within STARTING it is tried
# again after so many seconds, as workers do that start a coordinator.
AGAIN = 1.0
LATE = 15.0  # the same for one who attaches, and is told then
_TAKEN_OVER = "its coordinator is gone; the workers save, and another one goes on"
# What ended a link and would end the next one, too.
_FOR_EVER = (DeniedError, CorruptError, TooManyViewers)


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
        self._subscribers: list[Subscriber] = []
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

    def fileno(self) -> int:
        """Give an eventfd that is readable while news waits, for other event loops.

        Raises
        ------
        PeerError
            The coordinator is gone.
        """
        return self._there().fileno()

    def close(self) -> None:
        """Stop following the run. The run goes on."""
        self._closed = True
        link, self._link = self._link, None
        if link is not None:
            link.close()
        _forget(self)

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

    def on_gone(self, link: Link) -> None:
        """Hear that the coordinator is gone (for the link)."""
        self._read_log()
        with self._changed:
            if self._link is not link:
                return  # we follow another one already
            self._link, self._gone = None, True
            going_on = self._going_on is not None
            goes_on = not isinstance(link.error, _FOR_EVER) and not going_on
            # Said in one breath: else who looks now finds a run that has stopped.
            self._lost = self._lost if going_on else self._comes_back() if goes_on else ""
        if goes_on:
            self._go_on()
        with self._changed:
            self._changed.notify_all()
        if self._gone and not going_on:
            self._tell_gone()

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

    # ---- connection ------------------------------------------------------------------------

    def _read_log(self) -> None:
        """Take in what the log on disk has and we have not."""
        with self._changed:
            for piece in self._log.pieces():
                for event in piece:
                    self._record.apply(event)
            self._changed.notify_all()

    def _open_link(self) -> Link:
        """Open a link; a coordinator that is just starting gets the time to be there."""
        deadline = time.monotonic() + 5
        while True:
            try:
                return Link(_native.connection_file(self.folder), self, self.name)
            except BusyError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def _connect(self, timeout: float = ANSWER) -> bool:
        """Find the run's coordinator, if it has one; returns whether."""
        try:
            link = self._open_link()
        except (NotFoundError, PeerError):
            self._gone = True
            return False
        return self._catch_up(link, timeout)

    def _catch_up(self, link: Link, timeout: float) -> bool:
        """Wait until a new link has all events; as long as some come, there is no time limit."""
        self._link, self._gone = link, False
        link.start()
        seq, until = -1, 0.0
        while not link.caught_up.wait(0.1):
            if self._record.seq != seq:
                seq, until = self._record.seq, time.monotonic() + timeout
            elif time.monotonic() > until:
                link.close()
                self._link, self._gone = None, True
                raise TimedOut(
                    f"the coordinator of {self.name} (process {link.coordinator_pid}) does not "
                    f"answer: it is stopped, or gets no processor; kill -CONT "
                    f"{link.coordinator_pid} wakes one that was stopped"
                )
        if isinstance(link.error, _FOR_EVER):
            raise link.error
        return self._link is not None

    def _connect_in_time(self, deadline: float) -> bool:
        """Connect as `_connect` does; a coordinator that is not up yet is asked until then."""
        while True:
            try:
                return self._connect()
            except (BusyError, TimedOut):
                if self._closed:
                    return False
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _go_on(self) -> None:
        """Find the coordinator that takes over from one that died, or start it.

        Where only the connection broke (there was no memory for what came) it is the same one,
        whether or not another would be started. Its workers save and start another one; where none
        of them is left, whoever looks after the run does. Two at once start one: the run's lock
        lets one through. Of our threads one does: a link that it opens may end at once, and must
        not begin all of this anew, or each try would leave a thread that tries.
        """
        with self._changed:
            if self._going_on is not None:
                return
            self._going_on = threading.current_thread()
        try:
            with self._changed:
                self._lost = self._comes_back()
                self._changed.notify_all()
            begin = time.monotonic()
            while True:
                try:
                    if self._looked_once(begin):
                        return
                    time.sleep(0.05)
                except (IOFailed, NoMemoryError):
                    if time.monotonic() > begin + STARTING:
                        raise
                    time.sleep(AGAIN)
        except Error as error:
            warnings.warn(f"run {self.name}: {error}", RuntimeWarning, stacklevel=1)
        finally:
            with self._changed:
                if self._going_on is threading.current_thread():  # else its link's end is another's
                    self._lost, self._going_on = "", None
                self._changed.notify_all()

    def _search(self) -> None:
        """Go on, beside who has attached; its subscribers hear where nothing is found."""
        self._go_on()
        if self._gone and self._link is None and self._going_on is None and not self._closed:
            self._tell_gone()

    def _looked_once(self, begin: float) -> bool:
        """Look for the coordinator that goes on, or start one; whether that is all there is to do.

        `begin`: when the first look was. There is nothing to do, too, where nothing comes back.
        """
        if self._connect_in_time(begin + STARTING) and self._has_link():
            return True
        self._read_log()
        if self._closed or not self._comes_back():
            return True
        if _native.workers_there(self.folder) and time.monotonic() < begin + PATIENCE:
            return False
        if time.monotonic() > begin + STARTING:
            raise TimedOut("no coordinator has taken over; resume() goes on")
        if self._goes_on_by_itself():
            with suppress(BusyError, TimedOut):  # another one is starting: the next look finds it
                _native.launch(
                    programs.coordinator(), self.folder, recover=True, prepare=programs.prepare()
                )
        return False

    def _has_link(self) -> bool:
        """Whether the link that was found is still there; from now on its end is one of its own."""
        with self._changed:
            if self._link is None:
                return False
            self._lost, self._going_on = "", None
            self._changed.notify_all()
            return True

    def _goes_on_by_itself(self) -> bool:
        """Whether a run that lost its coordinator now is to be gone on with."""
        wanted = self.config.get("restart", "on-failure") == "on-failure"
        return wanted and self._record.seq > 0 and self._record.state not in ENDED

    def _comes_back(self) -> str:
        """Why a run that is without a link now will have one again, in words; "": it will not."""
        if self._record.state in ENDED:
            return ""
        try:
            _native.coordinator_pid(_native.connection_file(self.folder))
        except BusyError:
            return "its coordinator is starting"
        except Error:  # it is gone
            goes_on = self._goes_on_by_itself()
            return _TAKEN_OVER if goes_on else ""
        return "the connection to its coordinator broke; another one is made"

    def _launch(self) -> None:
        """Start the coordinator of a new run and connect."""
        with self._leave_alone():
            file, started = _native.launch(
                programs.coordinator(), self.folder, prepare=programs.prepare()
            )
        if not started:
            pid = _native.coordinator_pid(file)
            raise BusyError(
                f"process {pid} is still the coordinator of an earlier run in {self.folder}, whose "
                f"folder has been removed; end it (kill {pid}), or give another name"
            )
        with self._leave_alone():
            there = self._connect()
        if not there:
            self._read_log()
            if self._record.state != "failed":
                log = self.folder / "log" / "coordinator.log"
                raise PeerError(f"the coordinator ended as soon as it began; {log} says why")

    def _start_again(self, checkpoint: str, accept_changes: bool) -> None:
        """Start a coordinator for a run that has ended, in the place of one that lingers."""
        with self._changed:
            link, self._link = self._link, None
        if link is not None:
            link.close()
        seen = self._record.state_seq
        deadline = time.monotonic() + 30
        asked = None
        while True:
            # Said while ours starts only: until the former one has gone nothing would go on.
            # Busy: it was there when asked, and gone when looked for.
            with suppress(BusyError), self._leave_alone():
                _, started = _native.launch(
                    programs.coordinator(),
                    self.folder,
                    checkpoint,
                    accept_changes,
                    prepare=programs.prepare(),
                )
                if started:
                    break
            if time.monotonic() > deadline:
                raise BusyError(f"the coordinator of {self.name} has not gone; try again")
            # It waits for viewers that may still ask; a termination signal says not to.
            with suppress(Error, ProcessLookupError):
                pid = _native.coordinator_pid(_native.connection_file(self.folder))
                if pid != asked:
                    os.kill(pid, signal.SIGTERM)
                    asked = pid
            time.sleep(0.1)
        with self._leave_alone():
            if not self._connect():
                self._read_log()
            remember(self)
            # Until it says so, the state would be that of the run's former end.
            self._wait_for(
                lambda: self._record.state_seq > seen or self._link is None, 30, "resume"
            )
        if self._link is None:
            self._raise_failure()

    def _follow(self, go_on: bool = False) -> None:
        """Be connected to the coordinator that the run has now, if it has one.

        `go_on`: where it died and the run goes on by itself, see to it that there is another.
        """
        self._closed = False
        link = self._link
        if link is not None:
            with suppress(Error):
                if _native.coordinator_pid(link.file) == link.coordinator_pid:
                    return
            with self._changed:
                self._link = None
            link.close()
        self._read_log()
        if (
            not self._connect_in_time(time.monotonic() + LATE)
            and go_on
            and not self._lost
            and self._goes_on_by_itself()
        ):
            if _native.workers_there(self.folder):  # they are saving: that may take a while
                threading.Thread(target=self._search, name=f"pml {self.name}", daemon=True).start()
                self._wait_for(lambda: bool(self._lost) or self._link is not None, 2, "attach")
            else:
                self._go_on()

    def _not_forked(self) -> None:
        """Refuse to wait in a child of fork(): the thread that listens is not there.

        Raises
        ------
        BusyError
            It is one.
        """
        if self._link is not None and self._owner != os.getpid():
            raise BusyError(
                f"run {self.name} is followed by the process that forked this one; "
                f"pm.attach({self.name!r}) follows it here"
            )

    def _there(self) -> Link:
        """Give the link; one that is being made anew is waited for.

        Raises
        ------
        PeerError
            There is none, and will be none.
        TimedOut
            It is still on its way.
        """
        self._not_forked()
        if self._link is None and threading.current_thread() is not self._going_on:
            self._wait_for(lambda: not self._lost, ANSWER, "the run's next coordinator")
        link = self._link
        if link is None:
            if not self._gone:
                raise PeerError(f"this Run was closed; pm.attach({self.name!r}) makes a new one")
            hint = "; resume() goes on" if self.state == "stopped" else ""
            raise PeerError(f"run {self.name} is {self.state} and its workers are gone{hint}")
        return link

    # ---- asking and waiting ----------------------------------------------------------------

    def _ask(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._there().request(kind, **fields)

    def _is_over(self) -> bool:
        return self.state in ENDED

    def _stands(self) -> bool:
        """Whether it stands for a reason of its own, since before anybody let it go on.

        A pause that was asked for has no reason; while the disk is full, `reason` is the disk's.
        """
        with self._changed:
            record = self._record
            since = record.state_seq > self._resumed_at
            return record.state == "paused" and bool(record.reason) and since and not self._gone

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
        except KeyboardInterrupt:
            if aside.is_own(self):
                raise
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
