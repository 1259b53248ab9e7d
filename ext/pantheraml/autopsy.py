"""``pantheraml doctor RUN``: what happened to a run, and what can be resumed.

It only reads: the log, run.json, the checkpoints, the shards, the lock. Nothing is started and
nothing in the folder is changed, so it may be asked of a run that is running.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any

from pantheraml import _native, folders, sums
from pantheraml.checks import path_of
from pantheraml.errors import (
    BusyError,
    CorruptError,
    Error,
    IOFailed,
    NoMemoryError,
    NotFoundError,
)
from pantheraml.record import ENDED, Event, is_torn, names_a_checkpoint

_NEEDED = ("state.json", "optimizer.safetensors")
_PARTS = ("run.json", "events.jsonl", "checkpoints")  # by any of them a run's folder is known


@dataclass
class Part:
    """A part of the folder: ``ok``, ``note`` (nothing is lost), ``bad``, or ``unread``.

    What could not be read just now (a disk that fails, no descriptors, no permission) may be whole.
    """

    name: str
    verdict: str
    found: str


@dataclass
class Autopsy:
    """What :func:`examine_run` finds.

    Attributes
    ----------
    name, folder
        Of the run.
    state
        How it stands, in words.
    happened
        What happened to it, in order: time, and what.
    parts
        Of its folder, each with a verdict.
    resume
        The checkpoint that a resume takes; None: the run begins again, or cannot be resumed.
    advice
        What can be done, in words and commands.
    """

    name: str
    folder: str
    state: str = ""
    happened: list[tuple[float, str]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    resume: str | None = None
    advice: list[str] = field(default_factory=list)

    @property
    def damaged(self) -> list[Part]:
        """The parts that are not what was written."""
        return [part for part in self.parts if part.verdict == "bad"]

    @property
    def unread(self) -> list[Part]:
        """The parts of which nothing is known: they could not be read."""
        return [part for part in self.parts if part.verdict == "unread"]

    def to_json(self) -> str:
        """Everything, for programs."""
        return json.dumps(asdict(self), indent=1)


def find(name: str) -> Path:
    """Find what is left of a run: its folder, also without a run.json.

    Raises
    ------
    NotFoundError
        There is none; the nearest name is suggested.
    """
    try:
        return folders.find(name)
    except NotFoundError:
        path = path_of(name)
        for folder in (folders.runs_folder() / path, path.absolute()):
            if any(_there(folder / part) for part in _PARTS):
                return folder
        raise


def examine_run(folder: Path) -> Autopsy:
    """Read a run folder and say what happened to it."""
    found = Autopsy(folder.name, str(folder))
    config = _run_json(folder, found)
    events, log_lines = _log(folder, found)
    pid, out_of_reach = _coordinator(folder, found)
    _history(events, found)
    lives = pid is not None or bool(out_of_reach)
    whole = _checkpoints(folder, events, config, found, lives)
    shards = _shards(folder, config, found)
    found.state = _state(events, pid, out_of_reach, found)
    if lives:
        _advise_to_attach(found, folder, out_of_reach)
    else:
        _advise(found, folder, events, whole, log_lines, shards)
    return found


# ---- the parts -------------------------------------------------------------------------------


def _run_json(folder: Path, found: Autopsy) -> dict[str, Any]:
    try:
        config = folders.read_config(folder)
        edited = not sums.carries(_bytes(folder, "run.json"))
    except NotFoundError:
        found.parts.append(Part("run.json", "bad", "it is not there"))
        return {}
    except OSError as error:
        found.parts.append(Part("run.json", _verdict(error), _words(error)))
        return {}
    except CorruptError as error:
        found.parts.append(Part("run.json", "bad", _words(error)))
        try:  # what can be read of it helps to say more
            text = json.loads(_bytes(folder, "run.json"))
        except (OSError, ValueError, RecursionError):
            return {}
        return text if isinstance(text, dict) else {}
    words = "edited by hand: it has no sum" if edited else "whole"
    found.parts.append(Part("run.json", "note" if edited else "ok", words))
    return config


def _log(folder: Path, found: Autopsy) -> tuple[list[Event], int | None]:
    """Events that are what was written, and how many lines can be kept (None: all)."""
    try:
        data = _bytes(folder, "events.jsonl")
    except FileNotFoundError:
        found.parts.append(Part("events.jsonl", "note", "there is none: the run never began"))
        return [], None
    except OSError as error:
        found.parts.append(Part("events.jsonl", _verdict(error), _words(error)))
        return [], None
    lines = data.split(b"\n")
    rest = lines.pop()
    events: list[Event] = []
    bad: dict[int, str] = {}  # by line: what is wrong with it
    for number, line in enumerate(lines, 1):
        damaged = _native.first_damaged(line + b"\n", number)
        if damaged is None:
            events.append(json.loads(line))
        else:
            bad[number] = damaged[1]
    kept = min(bad) - 1 if bad else len(lines)
    size = sum(len(line) + 1 for line in lines[:kept])
    if bad and not is_torn(lines[kept:], not rest):
        names = ", ".join(map(str, list(bad)[:8])) + (" …" if len(bad) > 8 else "")
        found.parts.append(
            Part(
                "events.jsonl",
                "bad",
                f"line {names} of {len(lines)}: not what was written, and no crash leaves that "
                f"(line {kept + 1}: {bad[kept + 1]}); {len(events)} lines are whole",
            )
        )
        return events, kept
    if bad or rest:
        words = f"{kept} lines, and {len(data) - size} bytes that a crash tore: a resume cuts them"
        found.parts.append(Part("events.jsonl", "note", words))
        return events[:kept], None
    found.parts.append(Part("events.jsonl", "ok", f"{len(lines)} lines"))
    return events, None


def _why_damaged(folder: Path, checkpoint: str) -> str:
    """Which file of a checkpoint is not what was written; "" when all are.

    Raises
    ------
    OSError
        One cannot be read, which is no damage.
    """
    try:
        text = _bytes(folder, f"{checkpoint}/MANIFEST").decode()
    except folders.NotOurs as error:
        return f"{Path(error.filename).relative_to(folder)}: {error.strerror}"
    except OSError as error:
        if not folders.is_absent(error):
            raise
        return "MANIFEST is missing or damaged"
    except ValueError:
        return "MANIFEST is missing or damaged"
    listed = set()
    *lines, rest = text.split("\n")  # not splitlines(): one bit makes \v of a newline
    if rest:
        return "MANIFEST is damaged"
    for line in lines:
        digest, two, name = line.partition("  ")
        if not two or "/" in name or name in ("", ".", ".."):
            return "MANIFEST is damaged"
        try:
            right = _hash(folder, f"{checkpoint}/{name}") == digest
        except OSError as error:
            if not folders.is_absent(error):
                raise
            return f"{name}: {error.strerror}"
        except ValueError:  # no file has such a name
            return "MANIFEST is damaged"
        if not right:
            return f"{name} is not what was written"
        listed.add(name)
    for name in _NEEDED:
        if name not in listed:
            return f"MANIFEST does not list {name}"
    return ""


def _bytes(folder: Path, name: str) -> bytes:
    with folders.reading(folder, name) as file:
        return file.read()


def _words(error: Exception) -> str:
    """What an error says, without the name of what it is said of already."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _path_words(folder: Path, error: OSError) -> str:
    """Likewise, with the name of the file in the folder that it is said of."""
    path = Path(error.filename) if error.filename else folder
    name = str(path.relative_to(folder)) if path.is_relative_to(folder) else ""
    return f"{name}: {_words(error)}" if name not in ("", ".") else _words(error)


def _verdict(error: OSError) -> str:
    """On a part that could not be read."""
    return "bad" if folders.is_absent(error) else "unread"


def _there(path: Path) -> bool:
    """Whether something has that name; a name that no file can have has nothing."""
    try:
        path.lstat()
    except ValueError:
        return False
    except OSError as error:
        return not folders.is_absent(error)
    return True


def _hash(folder: Path, name: str) -> str:
    digest = blake2b(digest_size=32)
    with folders.reading(folder, name) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _order(folder: Path, name: str) -> tuple[float, int, str]:
    """By timeline, then step, the newest first: whose state cannot be read is looked at first."""
    try:
        state = json.loads(_bytes(folder, f"checkpoints/{name}/state.json"))
        timeline = float(state["timeline"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        timeline = float("inf")
    return -timeline, -_step(name), name


def _folders_in(folder: Path, name: str) -> list[str]:
    """Names of the folders, and of the links, in one below a run's."""
    fd = folders.opened(folder, name, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with os.scandir(fd) as found:
            return [e.name for e in found if e.is_dir(follow_symlinks=False) or e.is_symlink()]
    finally:
        os.close(fd)


def _step(name: str) -> int:
    digits = name.removeprefix("step-").split("-", 1)[0]
    plain = digits.isdecimal() and digits.isascii() and len(digits) <= 15  # as the coordinator
    return int(digits) if name.startswith("step-") and plain else -1


def _checkpoints(
    folder: Path, events: list[Event], config: dict[str, Any], found: Autopsy, lives: bool
) -> list[str]:
    """Names of the whole ones, the newest first."""
    try:
        there = _folders_in(folder, "checkpoints")
    except FileNotFoundError:
        there = []
    except OSError as error:
        found.parts.append(Part("checkpoints", _verdict(error), _words(error)))
        return []
    whole = []
    announced: dict[str, Event] = {}
    for event in events:
        if event["type"] == "checkpoint":  # one with a name may be announced again, without it
            announced[event["path"]] = {**announced.get(event["path"], {}), **event}
    steps = [name for name in there if _step(name) >= 0]
    for step in sorted(steps, key=partial(_order, folder)):
        name = f"checkpoints/{step}"
        try:
            why = _why_damaged(folder, name)
        except OSError as error:
            found.parts.append(Part(name, "unread", _path_words(folder / name, error)))
            continue
        if why:
            found.parts.append(Part(name, "bad", why))
            continue
        whole.append(step)
        unknown = "not announced yet" if lives else "written as the run ended, not announced"
        words = "whole" if name in announced else f"whole; {unknown}"
        found.parts.append(Part(name, "ok", words))
    for name in sorted(there):
        if _step(name) < 0:
            words = "left over by a write that was cut off; the next save removes it"
            if lives:
                words = "a checkpoint that is being written, or what was left of one"
            found.parts.append(Part(f"checkpoints/{name}", "note", words))
    limit = config.get("save_total_limit", 0)
    for name, event in announced.items():
        if not names_a_checkpoint(name):
            found.parts.append(Part("events.jsonl", "bad", f"it names {name!r} a checkpoint"))
        elif name.removeprefix("checkpoints/") not in there and (not limit or "name" in event):
            found.parts.append(Part(name, "bad", "it was announced, and somebody removed it"))
    return whole


def _shards(folder: Path, config: dict[str, Any], found: Autopsy) -> bool:
    """Whether the data is there as it was made."""
    good = True
    for key in ("train_data", "eval_data"):
        name = config.get(key) or ""
        if not name or not isinstance(name, str):  # a run.json that is damaged is told of already
            continue
        if not _below(name):
            good = False
            found.parts.append(Part(key, "bad", f"run.json names {name!r}, outside of the folder"))
            continue
        try:
            right = _hash(folder, name)
            wanted = _bytes(folder, f"{name}.b2sum").decode(errors="replace").split("  ")[0]
        except FileNotFoundError as error:
            words = "not there: it is made again from the data"
            if error.filename == str(folder / f"{name}.b2sum"):
                words = "there; nothing says what it should be"
            found.parts.append(Part(name, "note", words))
            continue
        except OSError as error:
            good = good and not folders.is_absent(error)
            found.parts.append(Part(name, _verdict(error), _words(error)))
            continue
        if wanted != right:
            good = False
            found.parts.append(Part(name, "bad", "it is not what was written"))
        else:
            found.parts.append(Part(name, "ok", "whole"))
    return good


def _below(name: str) -> bool:
    """Whether a name of run.json is one of a file in the run's own folder."""
    path = PurePosixPath(name)
    return "\0" not in name and not path.is_absolute() and ".." not in path.parts


def _coordinator(folder: Path, found: Autopsy) -> tuple[int | None, str]:
    """Its process; or, where it is there and cannot be reached, why not."""
    try:
        return _native.coordinator_pid(_native.connection_file(folder)), ""
    except BusyError as error:
        return None, str(error)
    except (IOFailed, NoMemoryError) as error:
        found.parts.append(Part("lock", "unread", str(error)))
        return None, ""
    except Error:
        return None, ""


# ---- what happened ---------------------------------------------------------------------------


def _history(events: list[Event], found: Autopsy) -> None:
    first = last = None
    saved: list[Event] = []

    def settle() -> None:
        nonlocal first, last
        if first is not None and last is not None:
            words = f"made steps {first['step']} to {last['step']}, loss {last['loss']}"
            if saved:
                words += f"; {len(saved)} checkpoints, the last of step {saved[-1]['step']}"
            found.happened.append((last["time"], words))
        first = last = None
        saved.clear()

    for event in events:
        if event["type"] == "step":
            first, last = first or event, event
        elif event["type"] == "checkpoint" and "name" not in event:
            saved.append(event)
        elif words := _say(event):
            settle()
            found.happened.append((event["time"], words))
    settle()


def _say(event: Event) -> str:
    """What an event means for the run's fate; "" for nothing."""
    kind = event["type"]
    if kind == "state":
        words = f"{event['state']} at step {event['step']}"
        if "checkpoint" in event:
            words = f"went {'back to' if event.get('rewound') else 'on from'} {event['checkpoint']}"
        return words + (f": {event['reason']}" if event.get("reason") else "")
    if kind == "restart":
        where = f"{event['from']} of step {event['step']}"
        return f"restarted by itself ({event['cause']}: {event['reason']}), from its {where}"
    if kind == "applied" and event["verb"] == "set":
        given = ", ".join(f"{k}={v}" for k, v in event.get("args", {}).items())
        return f"set {given} from step {event['step']} on"
    if kind == "checkpoint":
        return f"checkpoint {event['name']!r} of step {event['step']}"
    if kind == "refused":
        return f"{event['verb']} was refused: {event['reason']}"
    if kind == "log" and event["level"] != "info":
        return f"{event['level']}: {event['message']}"
    return ""


def _state(events: list[Event], pid: int | None, out_of_reach: str, found: Autopsy) -> str:
    states = [event for event in events if event["type"] == "state"]
    steps = [event["step"] for event in events if event["type"] in ("step", "state")]
    at = f" at step {steps[-1]}" if steps else ""
    if pid is not None or out_of_reach:
        words = f"its coordinator is process {pid}" if pid is not None else out_of_reach
        return f"{states[-1]['state'] if states else 'starting'}{at}; {words}"
    unread = {part.name for part in found.unread}
    if "events.jsonl" in unread:
        return "its log cannot be read just now"
    if not states:
        return "it never began"
    if "lock" in unread:
        return f"{states[-1]['state']}{at}, by its log; its lock cannot be read just now"
    if states[-1]["state"] in ENDED:
        reason = states[-1].get("reason", "")
        return f"{states[-1]['state']}{at}" + (f": {reason}" if reason else "")
    return f"it ended without a word{at}: its processes were killed, or the machine went down"


# ---- what can be done ------------------------------------------------------------------------


def _named(found: Autopsy, folder: Path) -> str:
    """What its commands are given: its name alone is found in the folder of runs only."""
    known = folder.parent == folders.runs_folder()
    return shlex.quote(found.name if known else str(folder))


def _advise_to_attach(found: Autopsy, folder: Path, out_of_reach: str) -> None:
    words = "it has a coordinator"
    if out_of_reach:
        words += ", which may be reached in a moment, or from where it was started"
    found.advice.append(f"{words}: pantheraml attach {_named(found, folder)}")


def _advise(
    found: Autopsy,
    folder: Path,
    events: list[Event],
    whole: list[str],
    log_lines: int | None,
    shards: bool,
) -> None:
    say = found.advice.append
    name = _named(found, folder)
    bad = {part.name for part in found.damaged}
    for part in found.unread:
        say(
            f"{part.name} could not be read just now ({part.found}), which is no damage: ask again "
            "when the disk answers, and the process has descriptors and permission"
        )
    if not _there(folder / "run.json"):
        say("without its run.json it cannot be resumed: put that back from a copy, if there is one")
        if whole:
            say(
                f"what was trained is whole in checkpoints/{whole[0]}: other tools load that folder"
            )
        return
    blocked = "events.jsonl" in bad or bool(found.unread)
    if {"events.jsonl", "lock", "checkpoints"} & {part.name for part in found.unread}:
        return
    if "events.jsonl" in bad and log_lines is None:
        say("the log cannot be read: put that right first")
    if "run.json" in bad:
        blocked = True
        say(
            'run.json is damaged: put right what is wrong in it, remove its field "sum", and it is '
            "taken as it is"
        )
    if log_lines is not None:
        blocked = True
        events = events[:log_lines]
        log, old = (shlex.quote(str(folder / n)) for n in ("events.jsonl", "events.damaged.jsonl"))
        say(
            f"the log is damaged: what was set after its line {log_lines} would be lost, the "
            f"checkpoints are not touched. To go on with the {log_lines} lines before: "
            f"mv {log} {old} && head -n {log_lines} {old} > {log}"
        )
    if not shards:
        blocked = True
        say("remove the damaged shard: it is made again from the data, as it was")
    past = _limit(events)
    usable = [n for n in whole if _step(n) <= past]
    newest = _newest_announced(events)
    usable.sort(key=lambda n: n != newest)  # one that was given a name may be of the same step
    if _may_be_newest(found, newest, usable, past):
        say(
            f"until then pantheraml resume {name} is refused, as it may be the newest"
            + (
                f"; back to {', '.join(usable[:5])}: pantheraml resume {name} --checkpoint NAME"
                if usable
                else ""
            )
        )
        return
    last = next((e["step"] for e in reversed(events) if e["type"] in ("step", "state")), 0)
    if not usable:
        words = "no checkpoint is whole" if found.damaged else "there is no checkpoint"
        say(f"{words}: pantheraml resume {name} begins again at step 0")
        return
    found.resume = f"checkpoints/{usable[0]}"
    lost = max(0, last - _step(usable[0]))
    words = f"; {lost} steps are made again" if lost else ""
    say(
        f"{'then ' if blocked else ''}pantheraml resume {name} goes on from {found.resume}{words}, "
        "with what was set after it"
    )
    others = [n for n in whole if n != usable[0]]
    if others:
        say(f"or back to {', '.join(others[:5])}: pantheraml resume {name} --checkpoint NAME")


def _newest_announced(events: list[Event]) -> str:
    newest = ""
    for event in events:
        if event["type"] == "checkpoint":
            newest = event["path"].rsplit("/", 1)[-1]
        elif event["type"] == "state" and event.get("rewound") and "checkpoint" in event:
            newest = event["checkpoint"].rsplit("/", 1)[-1]
    return newest


def _may_be_newest(found: Autopsy, newest: str, usable: list[str], past: float) -> list[str]:
    """Names of the checkpoints that could not be read, where a resume cannot do without.

    It takes the newest that was announced; only where that is not whole it looks at the others.
    """
    names = [part.name.rsplit("/", 1)[-1] for part in found.unread]
    return [] if newest in usable else [n for n in names if 0 <= _step(n) <= past]


def _limit(events: list[Event]) -> float:
    """Step of the newest checkpoint of this past: beyond it lies one that was gone back from."""
    limit = float("inf")
    for event in events:
        if event["type"] == "checkpoint":
            limit = event["step"]
        elif event["type"] == "state" and event.get("rewound") and "checkpoint" in event:
            limit = _step(event["checkpoint"].rsplit("/", 1)[-1])
    return limit


def show(found: Autopsy) -> int:
    """Print it for people; returns 0 when all could be read and nothing is damaged."""
    from rich.markup import escape

    from pantheraml.terminal import Terminal

    marks = {
        "ok": "[green]✓[/]",
        "note": "[yellow]•[/]",
        "bad": "[red]✗[/]",
        "unread": "[yellow]?[/]",
    }
    console = Terminal()
    console.print(f"[bold]{escape(found.name)}[/]  {escape(found.state)}")
    for when, words in found.happened:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
        console.print(f"  {stamp}  {escape(words)}")
    for part in found.parts:
        console.print(f"{marks[part.verdict]} [bold]{escape(part.name)}[/]  {escape(part.found)}")
    for words in found.advice:
        console.print(f"→ {escape(words)}", soft_wrap=True)
    return 1 if found.damaged or found.unread else 0
