"""What a run's events add up to: the same for a live run, a log on disk and a report.

Events come in the order of their sequence numbers (docs/protocol.md). A record only ever grows
from them, so whoever has all events has the whole state.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from pantheraml import _native, columns, folders
from pantheraml.errors import CorruptError

Event = dict[str, Any]

#: States in which nothing more will happen by itself.
ENDED = frozenset({"finished", "stopped", "failed"})

_PIECE = 1 << 20  # bytes of the log that are parsed together
_DURABLE = tuple(
    b',"type":"%s",' % kind
    for kind in (b"state", b"applied", b"refused", b"checkpoint", b"restart")
)
_NOT_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole on disk.

    Attributes
    ----------
    step
        Optimizer steps in it.
    path
        Its folder: a PEFT adapter (LoRA) or a model folder (full).
    name
        As it was asked for; None otherwise.
    bytes
        Size of its files.
    abandoned
        Whether somebody has gone back to before it since: what it has is not in the run any more.
    """

    step: int
    path: Path
    name: str | None
    bytes: int
    abandoned: bool = False

    def __str__(self) -> str:
        return str(self.path)


@dataclass
class CommandRecord:
    """How far a command has come: ``accepted``, ``applied`` or ``refused``.

    Attributes
    ----------
    id
        Whoever sent it gave it; unlike the number it is nobody else's, ever.
    """

    number: int
    verb: str
    args: dict[str, Any]
    id: str = ""
    state: str = "accepted"
    step: int | None = None
    workers: list[int] = field(default_factory=list)
    reason: str = ""


@dataclass(frozen=True)
class Past:
    """What had happened when somebody went back; of a checkpoint, the event that told of it."""

    history: columns.Columns
    evals: list[Event]
    checkpoints: dict[Path, int]


class RunRecord:
    """A run's state as far as its events tell.

    Steps are kept as columns of numbers, all other events as they are (`notes`): what a run says
    of itself at each step is most of its log, and would be most of a notebook's memory.

    Parameters
    ----------
    folder
        The run folder; paths in events are relative to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[Event] = []
        self.seq = 0
        self.timeline = 0
        self.state = "starting"
        self.reason = ""
        self.state_seq = 0  # of the event that said so
        self.code = ""
        self.step = 0
        self.max_steps = 0
        self.history = columns.Columns()
        self.plan: Event | None = None
        self.workers: list[dict[str, Any]] = []
        self.progress: Event | None = None
        self.memory: list[dict[str, int]] = []
        self.gpus: list[dict[str, Any]] = []
        self.evals: list[Event] = []
        self._furthest_eval = -1  # no evaluation is of a later step
        self.checkpoints: list[Checkpoint] = []
        self._announced: dict[Path, int] = {}  # seq of the event that told of it last
        self._left: list[Past] = []  # what somebody has gone back from, oldest first
        self.commands: dict[int, CommandRecord] = {}
        self.samples: dict[tuple[int, int], list[int]] = {}  # by command and prompt
        self.samples_done: set[tuple[int, int]] = set()

    def apply(self, event: Event) -> None:
        """Take the next event in. One that is known already changes nothing."""
        if event["seq"] <= self.seq:
            return
        numbered(event)
        self.seq = event["seq"]
        self.timeline = event["timeline"]
        if event["type"] != "step":
            self.notes.append(event)
        handler = _HANDLERS.get(event["type"])
        if handler is not None:
            handler(self, event)

    def _state(self, event: Event) -> None:
        self.state, self.state_seq = event["state"], event["seq"]
        self.reason, self.code = event.get("reason", ""), event.get("code", "")
        if self.state == "starting":
            self._begin_again(event)
            return
        self.progress = None
        self.step = event["step"]
        # A run that went on from a checkpoint tells another past from there on: what the log has
        # beyond it has not happened.
        self._forget_after(self.step)

    def _begin_again(self, event: Event) -> None:
        # Commands without an end are carried out by the new workers: an answer begins again.
        open_ones = {c.number for c in self.commands.values() if c.state == "accepted"}
        for row in [row for row in self.samples if row[0] in open_ones]:
            del self.samples[row]
            self.samples_done.discard(row)
        if event.get("rewound"):
            self._go_back(self.folder / event.get("checkpoint", ""), event["step"])
        self.step = event["step"]
        self._forget_after(self.step)

    def _go_back(self, to: Path, step: int) -> None:
        """Tell another past: that of a checkpoint which somebody has named.

        It may be of one that was gone back from before: then that is what has happened.
        """
        present = {c.path: self._announced[c.path] for c in self.checkpoints if not c.abandoned}
        now = Past(self.history.copy(), list(self.evals), present)
        seq = self._announced.get(to)
        has_it = (p for p in (now, *reversed(self._left)) if p.checkpoints.get(to) == seq)
        past = next(has_it, now) if seq is not None else now
        if any(c.step > step and c.path in present for c in self.checkpoints):
            self._left.append(now)  # else there is nothing by which to go back to it
        if past is not now:
            self.history, self.evals = past.history.copy(), list(past.evals)
            self._furthest_eval = max((e["step"] for e in self.evals), default=-1)
        self.checkpoints = [
            replace(
                c,
                abandoned=c.step > step or past.checkpoints.get(c.path) != self._announced[c.path],
            )
            for c in self.checkpoints
        ]

    def _step(self, event: Event) -> None:
        self._forget_after(event["step"] - 1)
        self.step = event["step"]
        self.history.append(event)
        self.memory = event.get("memory", self.memory)
        self.gpus = event.get("gpus", self.gpus)

    def _forget_after(self, step: int) -> None:
        self.history.forget_after(step)
        if self._furthest_eval > step:
            self.evals = [e for e in self.evals if e["step"] <= step]
            self._furthest_eval = step

    def _plan(self, event: Event) -> None:
        self.plan = event
        self.max_steps = event["max_steps"]

    def _workers(self, event: Event) -> None:
        self.workers = event["workers"]

    def _progress(self, event: Event) -> None:
        over = event["fraction"] >= 1 and self.state != "starting"
        self.progress = None if over else event

    def _eval(self, event: Event) -> None:
        step = event["step"]
        if "command" not in event and self._furthest_eval >= step:
            # The same evaluation, made again after a restart.
            self.evals = [
                e for e in self.evals
                if e["step"] != step or "command" in e or e["timeline"] >= event["timeline"]
            ]  # fmt: skip
        self.evals.append(event)
        self._furthest_eval = max(self._furthest_eval, step)

    def _checkpoint(self, event: Event) -> None:
        if not names_a_checkpoint(event["path"]):
            return  # no coordinator wrote that: nothing is looked for outside of the folder
        path = self.folder / event["path"]
        # One that was given a name is announced without it where a nameless one has nothing to add.
        former = next((c.name for c in self.checkpoints if c.path == path), None)
        made = Checkpoint(event["step"], path, event.get("name", former), event["bytes"])
        self._announced[path] = event["seq"]
        # At once: who reads without the lock finds the former one or this one, never none.
        self.checkpoints = [*(c for c in self.checkpoints if c.path != path), made]

    def _command(self, event: Event) -> None:
        number = event["command"]
        self.commands[number] = CommandRecord(number, event["verb"], event["args"], event["id"])

    def _applied(self, event: Event) -> None:
        command = self._known(event)
        command.step, command.workers = event["step"], event["workers"]
        command.state = "applied"  # last: who reads that without the lock finds the others

    def _refused(self, event: Event) -> None:
        command = self._known(event)
        command.step, command.reason = event["step"], event["reason"]
        command.state = "refused"

    def _known(self, event: Event) -> CommandRecord:
        number = event["command"]
        return self.commands.setdefault(number, CommandRecord(number, event["verb"], {}))

    def _sample(self, event: Event) -> None:
        row = (event["command"], event.get("row", 0))
        self.samples.setdefault(row, []).extend(event["token_ids"])
        if event["done"]:
            self.samples_done.add(row)


_HANDLERS: dict[str, Callable[[RunRecord, Event], None]] = {
    "state": RunRecord._state,
    "step": RunRecord._step,
    "plan": RunRecord._plan,
    "workers": RunRecord._workers,
    "progress": RunRecord._progress,
    "eval": RunRecord._eval,
    "checkpoint": RunRecord._checkpoint,
    "command": RunRecord._command,
    "applied": RunRecord._applied,
    "refused": RunRecord._refused,
    "sample": RunRecord._sample,
}


class LogReader:
    """Reads a run folder's log, each time from where it ended before."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / "events.jsonl"
        self._offset = 0
        self._lines = 0

    def read(self) -> list[Event]:
        """Give the events that have come; a torn end is left for later, recovery cuts it.

        Raises
        ------
        CorruptError
            A line is not what was written, and no crash can have left it so; or there is no file,
            but something else.
        """
        return [event for piece in self.pieces() for event in piece]

    def pieces(self) -> Iterator[list[Event]]:
        """Give them some at a time, so that a long log is never in memory as a whole.

        Raises
        ------
        CorruptError
            As :meth:`read` says.
        """
        try:
            opened = folders.reading(self._folder, self._path.name)
        except FileNotFoundError:
            return
        except folders.NotOurs as error:
            raise CorruptError(f"{self._path}: {error.strerror}") from None
        with opened as file:
            file.seek(self._offset)
            while data := file.read(_PIECE):
                data += file.readline()
                lines, whole = self._sound(data, file)
                self._offset += sum(map(len, lines)) + len(lines)
                self._lines += len(lines)
                # One array is read twice as fast as its lines one by one.
                yield json.loads(b"[" + b",".join(lines) + b"]")
                if not whole:
                    return

    def _sound(self, data: bytes, file: BinaryIO) -> tuple[list[bytes], bool]:
        """Give the lines up to a torn or damaged one, and whether there was none."""
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.split(b"\n")[:-1]
        damaged = _native.first_damaged(whole, self._lines + 1)
        if damaged is None:
            if len(data) - len(whole) > _native.LOG_TORN_MAX:
                raise CorruptError(
                    f"{self._path}, line {self._lines + len(lines) + 1}: no end in "
                    f"{len(data) - len(whole)} bytes, which is more than was ever unsynced; "
                    "pantheraml doctor says what can be done"
                )
            return lines, data.endswith(b"\n")
        bad, why = damaged
        rest = data + file.read()  # what follows it tells a tear from damage
        behind = rest[: rest.rfind(b"\n") + 1].split(b"\n")[bad:-1]
        if not is_torn(behind, rest.endswith(b"\n")):
            raise CorruptError(
                f"{self._path}, line {self._lines + bad + 1}: {why}; pantheraml doctor says what "
                "can be done"
            )
        return lines[:bad], False


def is_torn(lines: Sequence[bytes], ends: bool) -> bool:
    """Whether lines that begin with a damaged one can be what a power cut left.

    Pages that were not synced reach the disk in any order; but a durable event with anything
    behind it was synced, and so was what is far from the end: there the damage came later.

    Parameters
    ----------
    lines
        The rest of the log from the damaged line on.
    ends
        Whether nothing follows the last of them.
    """
    if sum(map(len, lines)) + len(lines) > _native.LOG_TORN_MAX:
        return False
    before_the_end = lines[:-1] if ends else lines
    return not any(mark in line for line in before_the_end for mark in _DURABLE)


def names_a_checkpoint(path: str) -> bool:
    """Whether a path in an event is that of a checkpoint in the run's own folder."""
    folder, _, name = path.partition("/")
    return folder == "checkpoints" and re.fullmatch(r"[\w-][\w.-]{0,199}", name) is not None


def numbered(event: Event) -> Event:
    """Turn the words for non-finite numbers into numbers, in place; gives the event."""
    for name in ("loss", "grad_norm", "learning_rate"):
        value = event.get(name)
        if isinstance(value, str):
            event[name] = _NOT_FINITE.get(value, value)
    return event
