"""The log as a client reads it: torn, damaged, whole."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import examples
import pytest
from pantheraml import _native, folders, sums
from pantheraml.errors import CorruptError
from pantheraml.record import LogReader


def line(seq: int, kind: str = "progress", **fields: Any) -> bytes:
    return examples.line(examples.event(seq, kind, **fields))


def read(folder: Path) -> list[int]:
    return [event["seq"] for event in LogReader(folder).read()]


def test_a_torn_end_is_left_for_later(tmp_path: Path) -> None:
    """Whatever a crash leaves of the last lines, those before it are read."""
    log = tmp_path / "events.jsonl"
    lines = [line(n, fraction=1.0 / n) for n in range(1, 6)]
    whole = b"".join(lines)
    reader = LogReader(tmp_path)
    taken = 0
    for cut in range(len(lines[0]), len(whole) + 1):
        log.write_bytes(whole[:cut])
        assert read(tmp_path) == list(range(1, whole[:cut].count(b"\n") + 1))
        taken += len(reader.read())
    assert taken == 5
    # Pages that reached the disk out of order: nothing behind the hole was synced.
    log.write_bytes(lines[0] + b"\0" * len(lines[1]) + b"\n" + lines[2])
    assert read(tmp_path) == [1]
    # The last durable event may be whole though the one before it is not.
    log.write_bytes(lines[0] + b"\0\n" + line(3, "state", state="paused"))
    assert read(tmp_path) == [1]


def test_damage_is_named(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    durable = line(3, "checkpoint", step=2)
    log.write_bytes(line(1) + line(2)[:-4] + b'x"}\n' + durable + line(4))
    with pytest.raises(CorruptError, match="line 2"):
        read(tmp_path)


def test_no_tear_is_long(tmp_path: Path) -> None:
    """What is far from the end was synced: it is damaged, though no durable event is behind it."""
    lines = [line(n, what="x" * 200) for n in range(1, 4000)]
    lines[99] = lines[99].replace(b"xx", b"xy", 1)
    assert sum(map(len, lines[99:])) > _native.LOG_TORN_MAX
    (tmp_path / "events.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(CorruptError, match="line 100"):
        read(tmp_path)
    (tmp_path / "events.jsonl").write_bytes(b"".join(lines[:200]))
    assert read(tmp_path) == list(range(1, 100))


def test_nothing_long_is_without_an_end(tmp_path: Path) -> None:
    """A line that has no end is a tear for as long as what may be unsynced, as in recovery."""
    zeros = bytes(_native.LOG_TORN_MAX)
    (tmp_path / "events.jsonl").write_bytes(line(1) + zeros)
    assert read(tmp_path) == [1]
    (tmp_path / "events.jsonl").write_bytes(line(1) + zeros + b"\0")
    with pytest.raises(CorruptError, match="line 2: no end"):
        read(tmp_path)


def test_every_flipped_bit_is_seen(tmp_path: Path) -> None:
    """Nothing is read that was not written, whichever bit is flipped."""
    chance = random.Random(5)
    log = tmp_path / "events.jsonl"
    lines = [
        line(n, "refused", step=chance.randrange(99)) if n % 3 == 0
        else line(n, fraction=chance.random())
        for n in range(1, 8)
    ]  # fmt: skip
    whole = b"".join(lines)
    events = [json.loads(text) for text in lines]
    for bit in range(8 * len(whole)):
        text = bytearray(whole)
        text[bit // 8] ^= 1 << bit % 8
        log.write_bytes(text)
        try:
            found = LogReader(tmp_path).read()
        except CorruptError:
            continue
        assert found == events[: len(found)] and len(found) < len(events)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_only_a_file_is_read(tmp_path: Path, kind: str) -> None:
    """What a link leads to is not the run's; of a pipe one would wait for ever."""
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").write_bytes(line(1))
    for name in ("events.jsonl", "run.json"):
        path = tmp_path / "run" / name
        if kind == "link":
            path.symlink_to(tmp_path / "elsewhere")
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()
        words = "is a link, which is not followed here" if kind == "link" else "is no file"
        with pytest.raises(CorruptError, match=rf"{name}: it {words}"):
            read(tmp_path / "run") if name == "events.jsonl" else folders.read_config(path.parent)


def test_run_json(tmp_path: Path) -> None:
    """Whichever bit is flipped, it is no run.json any more; nor is it with a field wrong."""
    path = tmp_path / "run.json"
    good = sums.add(json.dumps(examples.RUN, indent=1).encode()) + b"\n"
    path.write_bytes(good)
    assert folders.read_config(tmp_path) == examples.RUN
    for bit in range(8 * (len(good) - 1)):
        text = bytearray(good)
        text[bit // 8] ^= 1 << bit % 8
        path.write_bytes(text)
        with pytest.raises(CorruptError, match=r"run\.json"):
            folders.read_config(tmp_path)
    path.write_text(json.dumps(examples.RUN | {"seed": 43}))  # edited by hand
    assert folders.read_config(tmp_path)["seed"] == 43
    for name in examples.RUN:
        for value in (None, {"x": 1}, [[]]):
            if name == "data" and value == {"x": 1}:
                continue
            path.write_text(json.dumps(examples.RUN | {name: value}))
            with pytest.raises(CorruptError, match=rf"run\.json: run\.{name}"):
                folders.read_config(tmp_path)
