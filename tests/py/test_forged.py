"""Logs that somebody made: lines with a right sum that are no event, or not of this run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import examples
import pantheraml as pm
import pytest
from examples import KINDS, event, line
from pantheraml import _native, autopsy, cli
from pantheraml.record import LogReader, RunRecord, names_a_checkpoint
from pantheraml.report import page_html

TABLE = Path(__file__).parents[2] / "engine/include/pml/json/messages.def"
#: In the place of a field: no kind of field takes all of them.
WRONG: tuple[Any, ...] = (None, "x", "", -1, 1e300, 0.5, True, [], {}, ["x"], [None], {"x": 1})


def required(kind: str) -> set[str]:
    """Fields that the table says an event of that kind has always."""
    found = re.findall(rf"^FIELD\({kind}, (\w+), \w+, REQUIRED", TABLE.read_text(), re.M)
    return set(found) & set(KINDS[kind])


def test_the_examples_have_every_kind_and_every_field() -> None:
    text = TABLE.read_text()
    assert set(KINDS) == set(re.findall(r"^MESSAGE\((\w+), EVENT,", text, re.M))
    for kind, fields in KINDS.items():
        blocks = re.findall(rf"^MESSAGE\({kind}, EVENT,.*\n((?:FIELD.*\n)+)", text, re.M)
        assert set(re.findall(r"^FIELD\(\w+, (\w+),", blocks[0], re.M)) == set(fields), kind
        _native.check_message("event", json.dumps(event(1, kind)))


def forgeries(kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each field of an event left out, and of every wrong type; those of records in it, too."""
    whole = event(2, kind)
    for name in whole:
        yield name, {k: v for k, v in whole.items() if k != name}
        for value in WRONG:
            yield name, {**whole, name: value}
        inner = whole[name][0] if isinstance(whole[name], list) and whole[name] else whole[name]
        if isinstance(inner, dict):
            for key in inner:
                for value in WRONG:
                    changed = {**inner, key: value}
                    yield key, {**whole, name: [changed] if inner is not whole[name] else changed}
    yield "stranger", {**whole, "stranger": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_forged_line_is_named_or_shown(kind: str, runs: Path) -> None:
    """It is called damaged, with its field, or it is an event like any other: never a KeyError."""
    folder = runs / "forged"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(examples.RUN | {"name": "forged"}))
    log = folder / "events.jsonl"
    first = line(event(1, "plan"))
    behind = line(event(3, "state", state="paused")) + line(event(4, "workers"))
    bad = set()
    for name, forged in forgeries(kind):
        wrong = _native.first_damaged(line(forged), 2)
        log.write_bytes(first + line(forged) + behind)
        part = next(p for p in autopsy.examine_run(folder).parts if p.name == "events.jsonl")
        reader = LogReader(folder)
        if wrong is None:
            assert part.verdict == "ok", forged
            record = RunRecord(folder)
            for one in reader.read():
                record.apply(one)
            assert record.state == "paused"
            record.apply(event(5, "state"))  # it starts again: open samples are forgotten
            continue
        bad.add(name)
        assert part.verdict == "bad" and "line 2" in part.found, forged
        if name not in ("type", "verb", "args"):  # those decide which other fields there are
            assert name in wrong[1], (wrong, forged)
        with pytest.raises(pm.CorruptError, match=r"line 2: .*doctor"):
            reader.read()
        log.write_bytes(first + line(forged))  # the last line: no other than a torn one
        assert [e["seq"] for e in LogReader(folder).read()] == [1]
    assert bad >= required(kind) | {"seq", "time", "timeline", "stranger"}
    assert page_html(pm.attach("forged", restart=False))
    assert pm.runs()[0].name == "forged"


def test_a_checkpoint_elsewhere_is_none(runs: Path, tmp_path: Path) -> None:
    """A path that leads out of the folder is told of, and never looked for."""
    folder = runs / "odd"
    folder.mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    for path in (str(outside), "../../outside", "checkpoints/../../../outside", "checkpoints/",
                 "checkpoints/..", "x" * 4000, "checkpoints/" + "x" * 4000):  # fmt: skip
        assert not names_a_checkpoint(path)
        (folder / "run.json").write_text("{}")
        (folder / "events.jsonl").write_bytes(line(event(1, "checkpoint", path=path)))
        found = {p.name: p.found for p in autopsy.examine_run(folder).parts}
        assert "a checkpoint" in found["events.jsonl"]
        record = RunRecord(folder)
        for one in LogReader(folder).read():
            record.apply(one)
        assert record.checkpoints == []


@pytest.mark.parametrize("name", ["/etc/passwd", "../odd/run.json", "data/../../x", "x" * 5000])
def test_a_shard_elsewhere_is_not_read(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(examples.RUN | {"train_data": name}))
    found = autopsy.examine_run(folder)
    assert [p.verdict for p in found.parts if p.name in ("train_data", name)] == ["bad"]


@pytest.mark.parametrize("left", ["events.jsonl", "checkpoints"])
def test_without_its_run_json(
    left: str, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of a run is looked at, though it cannot be resumed."""
    monkeypatch.setenv("COLUMNS", "200")
    folder = runs / "rest"
    folder.mkdir(parents=True)
    if left == "checkpoints":
        checkpoint = folder / "checkpoints/step-000007"
        checkpoint.mkdir(parents=True)
        for name in ("state.json", "optimizer.safetensors"):
            (checkpoint / name).write_text("{}")
        names = sorted(path.name for path in checkpoint.iterdir())
        digests = (f"{autopsy._hash(checkpoint, name)}  {name}\n" for name in names)
        (checkpoint / "MANIFEST").write_text("".join(digests))
    else:
        (folder / left).write_bytes(line(event(1, "state", state="paused")))
    assert cli.main(["doctor", "rest"]) == 1
    said = capsys.readouterr().out
    assert "run.json" in said and "it is not there" in said and "put that back" in said
    assert ("step-000007" in said) == (left == "checkpoints")
    assert cli.main(["doctor", str(folder), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["resume"] is None


def test_what_is_no_run_folder(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("", ".", "/", "/dev/null", str(tmp_path / "file"), "x" * 300, "x" * 5000, "..",
                 "\0", "né", "pantheraml:e30=", "~nobody/x"):  # fmt: skip
        assert cli.main(["doctor", name]) == 1, name
        assert "there is no run" in capsys.readouterr().err, name


def test_log_and_checkpoints_that_are_no_such_things(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    (folder / "events.jsonl").mkdir()
    (folder / "checkpoints").write_text("none")
    found = autopsy.examine_run(folder)
    said = {p.name: (p.verdict, p.found) for p in found.parts}
    assert said["events.jsonl"] == ("bad", "it is no file")
    assert said["checkpoints"] == ("bad", os.strerror(20))
    assert any("cannot be read" in words for words in found.advice)


def test_what_came_over_a_wire_is_checked() -> None:
    """An answer and an event of a coordinator elsewhere, by the same table."""
    beat = {"type": "heartbeat", "time": 1.0, "state": "running", "step": 1, "last": 2,
            "workers": []}  # fmt: skip
    _native.check_message("event", json.dumps(beat))
    for kind, message in (
        ("event", {**beat, "last": "2"}),
        ("event", {"type": "welcome"}),
        ("answer", {"type": "accepted", "id": "a", "command": None}),
        ("answer", beat),
        ("answer", {"type": "events", "id": "a", "from": 1, "next": 2, "last": 1,
                    "events": [{**event(1, "step"), "loss": []}]}),
        ("event", []),
    ):  # fmt: skip
        with pytest.raises((pm.InvalidError, pm.CorruptError)):
            _native.check_message(kind, json.dumps(message))
    with pytest.raises(pm.InvalidError, match="as a signal: .*last"):
        _native.check_message("event", json.dumps({**beat, "last": "2"}))
    with pytest.raises(pm.InvalidError, match="kind is event, answer, request or run, not beat"):
        _native.check_message("beat", json.dumps(beat))
    _native.check_message("answer", json.dumps(
        {"type": "events", "id": "a", "from": 1, "next": 2, "last": 1, "events": [event(1, "step")]}
    ))  # fmt: skip
