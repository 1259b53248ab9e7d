"""``pantheraml doctor RUN`` over folders of real runs that were killed, damaged and robbed."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pantheraml as pm
import pytest
from conftest import FOREVER, PATIENCE, ROWS, at_step, end, environment, until
from pantheraml import autopsy, folders

Start = Callable[..., pm.Run]


@pytest.fixture
def folder(start: Start) -> Path:
    """A run that was steered and stopped."""
    run = start(
        name="patient", max_steps=10**6, save_steps=20, eval_data=ROWS[:4],
        gradient_accumulation_steps=1,
    )  # fmt: skip
    at_step(run, 45)
    run.set(learning_rate=5e-4).wait(PATIENCE)
    run.checkpoint("kept", wait=True)
    run.stop(wait=True)
    end(run)
    return run.folder


def part(found: autopsy.Autopsy, name: str) -> autopsy.Part:
    return next(part for part in found.parts if part.name == name)


def power_fails(run: pm.Run) -> None:
    """All its processes end at once."""
    worker, coordinator = run.workers[0]["pid"], run.coordinator_pid
    assert coordinator is not None
    os.kill(worker, signal.SIGSTOP)  # it does not see the coordinator die, nor is seen dying by it
    os.kill(coordinator, signal.SIGKILL)
    os.kill(worker, signal.SIGKILL)
    until(lambda: run.state == "stopped", "its end")


def started_from(run: pm.Run) -> str:
    until(lambda: run.state not in ("starting", "stopped"), "it to go on")
    starts = [e for e in run.events() if e["type"] == "state" and e["state"] == "starting"]
    path: str = starts[-1]["checkpoint"]
    return path


def flip(path: Path, chance: random.Random) -> None:
    text = bytearray(path.read_bytes())
    bit = chance.randrange(8 * len(text))
    text[bit // 8] ^= 1 << bit % 8
    path.write_bytes(text)


def test_a_healthy_folder(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found = autopsy.examine_run(folder)
    assert found.state.startswith("stopped at step") and not found.damaged
    said = "\n".join(words for _, words in found.happened)
    assert "set learning_rate=0.0005 from step" in said and "checkpoint 'kept'" in said
    assert "made steps 1 to" in said
    assert found.resume is not None and f"goes on from {found.resume}" in "\n".join(found.advice)
    assert part(found, "data/train.safetensors").verdict == "ok"
    assert {p: p.read_bytes() for p in before} == before  # it only looks
    made = json.loads(found.to_json())
    assert made["resume"] == found.resume


def test_each_damaged_part_is_named(folder: Path, tmp_path: Path) -> None:
    """One bit anywhere in a file: the doctor names that part, and no run is made of it."""
    chance = random.Random(8)
    newest = folder / (autopsy.examine_run(folder).resume or "")
    log = len((folder / "events.jsonl").read_bytes())
    cases = {
        newest / "adapter_model.safetensors": f"checkpoints/{newest.name}",
        newest / "state.json": f"checkpoints/{newest.name}",
        newest / "MANIFEST": f"checkpoints/{newest.name}",
        folder / "run.json": "run.json",
        folder / "data/train.safetensors": "data/train.safetensors",
        folder / "data/eval.safetensors": "data/eval.safetensors",
    }
    for path, name in cases.items():
        whole = path.read_bytes()
        for _ in range(5):
            flip(path, chance)
            found = autopsy.examine_run(folder)
            if name == "run.json" and not found.damaged:  # the sum's own frame: see sums.py
                assert part(found, name).verdict == "note"
            else:
                assert [p.name for p in found.damaged] == [name], path
            if name.startswith("checkpoints/"):
                assert found.resume != name and found.resume is not None
            path.write_bytes(whole)
    text = bytearray((folder / "events.jsonl").read_bytes())
    text[log // 3] ^= 4
    (folder / "events.jsonl").write_bytes(text)
    found = autopsy.examine_run(folder)
    assert [p.name for p in found.damaged] == ["events.jsonl"]
    # What it says can be done, can be done.
    advice = next(words for words in found.advice if "head -n" in words)
    subprocess.run(["sh", "-c", advice[advice.index("mv ") :]], check=True)
    again = autopsy.examine_run(folder)
    assert not [p for p in again.damaged if p.name == "events.jsonl"]
    # And leads where it says: also to those of which the log does not tell any more.
    assert again.resume == found.resume
    others = next(words for words in found.advice if words.startswith("or back to"))
    named = others.removeprefix("or back to ").split(":")[0].split(", ")
    for name in named:
        run = pm.resume("patient", checkpoint=name)
        assert started_from(run) == f"checkpoints/{name}"
        run.stop(wait=True)
        end(run)


def test_every_flip_of_a_manifest_is_seen(tmp_path: Path) -> None:
    """One in a thousand bits makes another kind of line end of a newline."""
    checkpoint = tmp_path / "step-000001"
    checkpoint.mkdir()
    names = ("optimizer.safetensors", "state.json")
    for name in names:
        (checkpoint / name).write_bytes(name.encode())
    lines = (f"{autopsy._hash(checkpoint, name)}  {name}\n" for name in names)
    whole = "".join(lines).encode()
    manifest = checkpoint / "MANIFEST"
    manifest.write_bytes(whole)
    assert autopsy._why_damaged(tmp_path, checkpoint.name) == ""
    for bit in range(8 * len(whole)):
        text = bytearray(whole)
        text[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(text)
        assert autopsy._why_damaged(tmp_path, checkpoint.name), f"bit {bit}: {bytes(text)!r}"
    for size in range(len(whole)):
        manifest.write_bytes(whole[:size])
        assert autopsy._why_damaged(tmp_path, checkpoint.name), f"cut after {size}"


def test_it_resumes_from_where_it_says(folder: Path) -> None:
    newest = folder / (autopsy.examine_run(folder).resume or "")
    shutil.rmtree(newest)
    found = autopsy.examine_run(folder)
    assert part(found, f"checkpoints/{newest.name}").verdict == "bad"
    assert started_from(pm.resume("patient")) == found.resume


@pytest.mark.parametrize("newest_is_gone", [False, True])
def test_two_of_one_step(start: Start, newest_is_gone: bool) -> None:
    """The one last announced is gone on from; where that is gone, the one without a name is."""
    run = start(name="twins", max_steps=FOREVER, save_steps=FOREVER, restart="never")
    at_step(run, 2)
    run.pause().wait(PATIENCE)
    for name in ("b", "a", "c", "b2"):
        run.checkpoint(name, wait=True)
    power_fails(run)
    newest = run.folder / [e["path"] for e in run.events() if e["type"] == "checkpoint"][-1]
    step = newest.name.removesuffix("-b2")
    if not (nameless := newest.with_name(step)).exists():
        shutil.copytree(newest, nameless)
    if newest_is_gone:
        shutil.rmtree(newest)
    found = autopsy.examine_run(run.folder)
    assert found.resume == f"checkpoints/{step if newest_is_gone else newest.name}"
    assert started_from(pm.resume("twins")) == found.resume


def refuse(monkeypatch: pytest.MonkeyPatch, code: int, *names: str) -> None:
    """Opening what is called so in a run's folder fails from now on."""
    opened = folders.opened

    def refused(folder: Path, name: str, flags: int = os.O_RDONLY) -> int:
        if name.startswith(names):
            raise OSError(code, os.strerror(code), str(folder / name))
        return opened(folder, name, flags)

    monkeypatch.setattr(folders, "opened", refused)


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE, errno.ENOMEM])
def test_what_cannot_be_read_is_no_damage(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    healthy = autopsy.examine_run(folder)
    newest = healthy.resume or ""
    others = [p.name for p in healthy.parts if p.name.startswith("checkpoints/step-")]
    others.sort(key=lambda name: name != newest)  # it may be one of two of its step
    for name in (newest, f"{newest}/MANIFEST", f"{newest}/optimizer.safetensors"):
        with monkeypatch.context() as patch:
            refuse(patch, code, name)
            found = autopsy.examine_run(folder)
        assert part(found, newest).verdict == "unread" and not found.damaged
        assert os.strerror(code) in part(found, newest).found
        words = "\n".join(found.advice)
        assert found.resume is None and "begins again" not in words and "is refused" in words
        assert others[0] == newest and Path(others[1]).name in words
    oldest = others[-1]
    refuse(monkeypatch, code, oldest)
    found = autopsy.examine_run(folder)
    assert part(found, oldest).verdict == "unread" and found.resume == newest


@pytest.mark.parametrize("name", ["run.json", "events.jsonl", "checkpoints", "data/"])
def test_no_part_that_cannot_be_read_is_called_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    refuse(monkeypatch, errno.EIO, name)
    found = autopsy.examine_run(folder)
    assert found.unread and not found.damaged and autopsy.show(found) == 1
    words = "\n".join(found.advice)
    assert "which is no damage" in words
    assert "begins again" not in words and "damaged" not in words and "remove" not in words


def test_a_killed_run(start: Start) -> None:
    """Everything is killed at once, as a machine that goes down does it."""
    run = start(name="victim", max_steps=10**6, save_steps=20, restart="never")
    at_step(run, 45)
    living = autopsy.examine_run(run.folder)
    assert f"process {run.coordinator_pid}" in living.state and "attach" in living.advice[0]
    power_fails(run)
    found = autopsy.examine_run(run.folder)
    assert found.state.startswith("it ended without a word at step")
    assert not found.damaged and found.resume is not None
    made = subprocess.run(
        [sys.executable, "-m", "pantheraml", "doctor", "victim"],
        capture_output=True, text=True, env=environment(), check=False,
    )  # fmt: skip
    assert made.returncode == 0 and "ended without a word" in made.stdout


def test_a_run_out_of_reach_is_not_dead(start: Start) -> None:
    """Its sockets are taken away, and it has not put them back yet: it is stopped just then."""
    run = start(name="victim", max_steps=FOREVER)
    at_step(run, 2)
    pid = run.coordinator_pid
    assert pid is not None
    place = Path((run.folder / "lock").read_text().splitlines()[0])
    run.close()
    os.kill(pid, signal.SIGSTOP)
    try:
        shutil.rmtree(place)
        (run.folder / "checkpoints" / ".step-000009.tmp-1").mkdir(parents=True)
        found = autopsy.examine_run(run.folder)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert found.state.startswith("running at step") and f"{pid}" in found.state
    assert "cannot be reached" in found.state and "attach victim" in found.advice[0]
    assert "being written" in part(found, "checkpoints/.step-000009.tmp-1").found

    def is_back() -> bool:
        with suppress(pm.BusyError):
            return pm.attach("victim").coordinator_pid == pid
        return False

    until(is_back, "its sockets to be there again")


def test_a_damaged_shard_is_not_loaded(folder: Path) -> None:
    flip(folder / "data/train.safetensors", random.Random(3))
    with pytest.raises(pm.Error, match=r"train\.safetensors.* is not what was written"):
        pm.resume("patient").wait(PATIENCE)
    (folder / "data/train.safetensors").unlink()
    run = pm.resume("patient")
    until(lambda: run.state in ("running", "failed"), "it to go on")
    assert run.state == "running", run.reason


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    ("where", "content", "part", "verdict"),
    [
        ("run.json", None, "run.json", "bad"),
        ("run.json", "pipe", "run.json", "bad"),
        ("run.json", "link", "run.json", "bad"),
        ("run.json", DEEP, "run.json", "bad"),
        ("run.json", b'{"train_data":5,"eval_data":["x"]}', "run.json", "bad"),
        ("events.jsonl", bytes(range(256)) * 50, "events.jsonl", "note"),
        ("checkpoints/step-²/x", b"", "checkpoints/step-²", "note"),
        ("checkpoints/step-5/MANIFEST", "pipe", "checkpoints/step-5", "bad"),
        ("checkpoints/step-5/MANIFEST", b"0  a\0b\n", "checkpoints/step-5", "bad"),
        ("checkpoints/step-5/state.json", DEEP, "checkpoints/step-5", "bad"),
        ("checkpoints/step-5/state.json", b'{"timeline":1' + b"0" * 400 + b"}",
         "checkpoints/step-5", "bad"),
    ],
)  # fmt: skip
def test_nonsense_is_told_of_by_name(
    tmp_path: Path, where: str, content: bytes | str | None, part: str, verdict: str
) -> None:
    """What no run ever wrote ends neither the doctor nor its patience."""
    folder = tmp_path / "odd"
    path = folder / where
    path.parent.mkdir(parents=True)
    (folder / "run.json").write_bytes(b"{}")
    path.unlink(missing_ok=True)
    if content is None:
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    elif content == "link":
        (tmp_path / "whole").write_bytes(b"{}")
        path.symlink_to(tmp_path / "whole")
    else:
        assert isinstance(content, bytes)
        path.write_bytes(content)
    found = {one.name: one.verdict for one in autopsy.examine_run(folder).parts}
    assert found[part] == verdict


def test_pipes_and_links_that_a_manifest_names_are_not_read(tmp_path: Path) -> None:
    checkpoint = tmp_path / "odd" / "checkpoints" / "step-5"
    checkpoint.mkdir(parents=True)
    (tmp_path / "odd" / "run.json").write_bytes(b"{}")
    os.mkfifo(checkpoint / "state.json")
    (checkpoint / "MANIFEST").write_text("0" * 64 + "  state.json\n")
    found = {one.name: one.found for one in autopsy.examine_run(tmp_path / "odd").parts}
    assert found["checkpoints/step-5"] == "state.json: it is no file"
    (checkpoint / "state.json").unlink()
    (checkpoint / "state.json").symlink_to(tmp_path / "odd" / "run.json")
    found = {one.name: one.found for one in autopsy.examine_run(tmp_path / "odd").parts}
    assert found["checkpoints/step-5"].startswith("state.json: it is a link, which is not followed")


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/step-5", "data"])
def test_folders_that_are_links_are_not_entered(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "odd"
    for inside in ("checkpoints/step-5", "data"):
        (folder / inside).mkdir(parents=True)
    (folder / "run.json").write_bytes(b'{"train_data":"data/shard.safetensors"}')
    (folder / "data/shard.safetensors").write_bytes(b"rows")
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    bad = {one.name: one.found for one in autopsy.examine_run(folder).damaged}
    part = "data/shard.safetensors" if name == "data" else name
    assert "it is a link, which is not followed here: remove it" in bad[part]
