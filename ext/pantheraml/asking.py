"""Asking a run's workers for something, and waiting for what it brings about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pantheraml.commands import Command
from pantheraml.errors import BusyError, Error, NotFoundError, PeerError
from pantheraml.record import Event, names_a_checkpoint
from pantheraml.standing import Standing

_OPPOSITE = {"pause": "resume", "resume": "pause"}


def _undoes(event: Event, command: Command) -> bool:
    """Whether it tells that a later command was applied, which took this one's effect back.

    Where both were in force between the same two steps, the run was never in the state that the
    first one asked for.
    """
    if event["type"] != "applied" or event["command"] <= command.number:
        return False
    return bool(event["verb"] == _OPPOSITE.get(command.verb))


class Asking(Standing):
    """Commands on their way to the workers, and the events that answer them."""

    def _serve(self, verb: str, **fields: Any) -> Command:
        """Ask the workers; those of a run that finished long ago are started again for it."""
        if self._gone:
            self._follow()  # somebody else may have started it again
        if self._link is not None:
            try:
                return self._command(verb, wait=False, **fields)
            except BusyError:
                if self.state != "finished":
                    raise
        if self.state == "finished":
            self._start_again("", accept_changes=False)
            self._wait_for(lambda: self.state != "starting", None, "the weights being loaded")
            self._raise_failure()
        return self._command(verb, wait=False, **fields)

    def _checkpoint_named(self, name: str | None) -> str:
        if name is None:
            return ""
        # A folder's name before what somebody has called one, which may look like it. It may also
        # be one that the log does not tell of: the coordinator looks whether it is whole.
        path = f"checkpoints/{name}"
        if name.startswith("step-") and names_a_checkpoint(path) and (self.folder / path).is_dir():
            return name
        for checkpoint in reversed(self.checkpoints):
            if name == checkpoint.name:
                return checkpoint.path.name
        known = ", ".join(c.path.name for c in self.checkpoints) or "none"
        raise NotFoundError(f"run {self.name} has no checkpoint {name!r}; it has {known}")

    def _command(self, verb: str, *, wait: bool, **fields: Any) -> Command:
        with self._leave_alone():
            link = self._there()
            command = Command(self, link, verb, link.request(verb, **fields))
            if wait:
                command.wait()
        return command

    def _stand(self, command: Command, state: str, wait: bool) -> Command:
        """Wait until a command that was applied shows in the run's state."""
        if not wait:
            return command
        events = self._record.notes
        looked = next(i for i, e in enumerate(events) if e.get("command") == command.number)

        def shows() -> bool:
            nonlocal looked
            for event in events[looked:]:
                if event["type"] == "state" and event["state"] == state:
                    return True
                if _undoes(event, command):
                    return True
            looked = len(events)
            return self.state == state or self._nothing_comes()

        with self._leave_alone():
            self._wait_for(shows, None, command.verb)
        self._connected()
        return command

    def _event_of(
        self, command: Command, kind: str, fits: Callable[[Event], bool] | None = None
    ) -> Event:
        """Wait for the event that a command brings about."""
        found: list[Event] = []
        looked = 0

        def look() -> bool:
            nonlocal looked
            if command.is_lost:
                return False
            events = self._record.notes
            for event in events[looked:]:
                if event["type"] == kind and event.get("command") == command.number:
                    if fits is None or fits(event):
                        found.append(event)
                elif event["type"] == "log" and event.get("command") == command.number:
                    if event["level"] == "error":
                        found.append(event)
            looked = len(events)
            return bool(found)

        def over() -> bool:
            return look() or command.state == "refused" or self._link is None

        self._wait_for(over, None, command.verb)
        if found and found[0]["type"] == "log":
            raise Error(f"{command.verb}: {found[0]['message']}")
        if not found:
            self._connected()
            command.wait(0)
            raise PeerError(f"the run is {self.state}; {command.verb} has no result")
        return found[0]
