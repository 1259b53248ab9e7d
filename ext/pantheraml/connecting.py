"""Connecting: whom a run's news comes from, and what becomes of it where that one is gone.

This part of :class:`pantheraml.Run` finds the coordinator that a run has, makes a connection that
broke anew, and starts coordinators: for a new run, for one that has ended, and for one that lost
its own. Several clients, and the workers, may do so at once; the run's lock lets one through.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pantheraml import _native, programs
from pantheraml.errors import (
    BusyError,
    CorruptError,
    DeniedError,
    Error,
    IOFailed,
    NoMemoryError,
    NotFoundError,
    PeerError,
    TimedOut,
    TooManyViewers,
)
from pantheraml.following import Following, remember
from pantheraml.link import ANSWER, Link
from pantheraml.record import ENDED

# Workers without a coordinator save and start another one. One that is stopped, or hangs, does not:
# after so many seconds whoever looks after the run does it. It waits for those that still save.
PATIENCE = 5.0
# A coordinator that holds the run's lock is there, whether or not it answers yet: it may be reading
# a long log on a busy machine. So many seconds are waited for it.
STARTING = 60.0
LATE = 15.0  # the same for one who attaches, and is told then
# What could not be read now, or had no memory, may be a moment later: within STARTING it is tried
# again after so many seconds, as workers do that start a coordinator.
AGAIN = 1.0
# What ended a link and would end the next one, too.
_FOR_EVER = (DeniedError, CorruptError, TooManyViewers)


class Connecting(Following):
    """A run that has a link, or comes to have one."""

    def fileno(self) -> int:
        """Give an eventfd that is readable while news waits, for other event loops.

        Raises
        ------
        PeerError
            The coordinator is gone.
        """
        return self._there().fileno()

    def on_gone(self, link: Link) -> None:
        """Hear that the coordinator is gone (for the link)."""
        try:
            self._read_log()
        except (Error, MemoryError) as error:  # what came until now is all there is to go by
            warnings.warn(f"run {self.name}: {error}", RuntimeWarning, stacklevel=1)
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

    # ---- the link itself -------------------------------------------------------------------

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
            self._not_closed()
            hint = "; resume() goes on" if self.state == "stopped" else ""
            raise PeerError(f"run {self.name} is {self.state} and its workers are gone{hint}")
        return link

    def _ask(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._there().request(kind, **fields)

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
            with self._changed:
                self._gone = self._link is None  # else another thread of ours found it meanwhile
                self._changed.notify_all()
                return not self._gone
        return self._catch_up(link, timeout)

    def _catch_up(self, link: Link, timeout: float) -> bool:
        """Wait until a new link has all events; as long as some come, there is no time limit."""
        with self._changed:
            closed = self._closed
            if not closed:
                try:  # before it is ours: without its thread nobody would listen
                    link.start()
                except BaseException:
                    link.close()
                    raise
                former, self._link, self._gone = self._link, link, False
        if closed:  # while this one was looked for: nobody would end it
            link.close()
            return False
        if former is not None:  # another thread of ours found it at the same time
            former.close()
        seq, until = -1, 0.0
        while not link.caught_up.wait(0.1):
            if self._record.seq != seq:
                seq, until = self._record.seq, time.monotonic() + timeout
            elif time.monotonic() > until:
                link.close()
                with self._changed:
                    if self._link is link:  # else another thread of ours has found another
                        self._link, self._gone = None, True
                    self._changed.notify_all()
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
        except (Error, MemoryError) as error:
            warnings.warn(f"run {self.name}: {error}", RuntimeWarning, stacklevel=1)
        finally:
            with self._changed:
                if self._going_on is threading.current_thread():  # else its link's end is another's
                    self._lost, self._going_on = "", None
                self._changed.notify_all()

    def _search(self, searched: threading.Event) -> None:
        """Go on, beside who has attached; its subscribers hear where nothing is found."""
        try:
            self._go_on()
        finally:
            with self._changed:  # it may all be over before who attaches has looked
                searched.set()
                self._changed.notify_all()
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
            if self._goes_on_by_itself():
                return "its coordinator is gone; the workers save, and another one goes on"
            return ""
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

    def _start_again(self, checkpoint: str, accept_changes: bool) -> bool:
        """Start a coordinator for a run that has ended, in the place of one that lingers.

        Returns whether it did: where somebody else had the run go on meanwhile, it is followed.
        """
        self._closed = False
        link = self._let_go()
        lingers = None if link is None else link.coordinator_pid
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
            with suppress(BusyError, NotFoundError, PeerError, ProcessLookupError):  # it has gone
                pid = _native.coordinator_pid(_native.connection_file(self.folder))
                if pid != lingers and self._connect():
                    if self._goes_on():
                        return False
                    lingers = pid
                # It waits for viewers that may still ask; a termination signal says not to.
                if pid == lingers and pid != asked:
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
        return True

    def _let_go(self) -> Link | None:
        """Have no link any more; gives the one that was, closed."""
        with self._changed:
            link, self._link = self._link, None
        if link is not None:
            link.close()
        return link

    def _goes_on(self) -> bool:
        """Whether the coordinator that was found is of a run that goes on; else it is left."""
        if self._welcome is None or self._welcome["state"] in ENDED:
            self._let_go()
            return False
        # Its first event may not be there yet, and the state would be that of the run's former end.
        self._wait_for(lambda: self.state not in ENDED or self._link is None, 30, "resume")
        return True

    @contextmanager
    def _or_closed(self) -> Iterator[None]:
        """Be closed where nobody could look for its coordinator: who waits would wait for ever."""
        try:
            yield
        except BaseException:
            with self._changed:
                unknown = self._link is None and self._going_on is None and not self._gone
            if unknown:
                self._hear_no_more()
            raise

    def _follow(self, go_on: bool = False) -> None:
        """Be connected to the coordinator that the run has now, if it has one.

        `go_on`: where it died and the run goes on by itself, see to it that there is another.
        """
        self._not_forked()
        self._closed = False
        if self._going_on not in (None, threading.current_thread()):  # a thread of ours is at it
            if go_on:
                return
            self._wait_for(lambda: self._going_on is None, STARTING, "the next coordinator")
        link = self._link
        if link is not None:
            with suppress(Error):
                if _native.coordinator_pid(link.file) == link.coordinator_pid:
                    return
            with self._changed:
                # Said in one breath: else who waits finds a run that has stopped.
                self._link, self._lost = None, self._comes_back() if go_on else ""
            link.close()
        try:
            with self._or_closed():
                self._read_log()
                found = self._connect_in_time(time.monotonic() + LATE)
            if not found and self._going_on is None:
                self._look_further(go_on, link is not None)
        finally:
            with self._changed:
                if self._going_on is None:  # else it says so now
                    self._lost = ""
                self._changed.notify_all()

    def _look_further(self, go_on: bool, untold: bool) -> None:
        """Go on with a run that has no coordinator, if `go_on` and it does that by itself.

        `untold`: its link was closed before it could say that the coordinator is gone.
        """
        searched = threading.Event()
        if not go_on or not self._goes_on_by_itself():
            with self._changed:
                self._lost = ""
            if untold:
                self._tell_gone()
        elif _native.workers_there(self.folder):  # they are saving: that may take a while
            threading.Thread(
                target=self._search, args=(searched,), name=f"pml {self.name}", daemon=True
            ).start()
            self._wait_for(
                lambda: bool(self._going_on or self._link) or searched.is_set(), STARTING, "attach"
            )
        else:
            self._search(searched)
