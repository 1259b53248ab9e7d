"""Doors: who finds a run, from where, and with which key."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pantheraml as pm
import pytest
from conftest import at_step, environment, until

FINDER = """
import os, sys
import pantheraml as pm
from pantheraml import _native, programs
run = pm.attach(sys.argv[1])
print(run.coordinator_pid, run.state)
print(_native.launch(programs.coordinator(), run.folder, "")[1])   # to start one would be wrong
"""


@pytest.mark.parametrize("place", ["unset", "elsewhere", "nowhere"])
def test_one_coordinator_whatever_the_environment(
    start: Callable[..., pm.Run], tmp_path: Path, place: str
) -> None:
    """Cron, sudo and services have another XDG_RUNTIME_DIR, or none."""
    run = start(max_steps=10**6)
    at_step(run, 1)
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    env = environment(XDG_RUNTIME_DIR="/nowhere" if place == "nowhere" else str(other))
    if place == "unset":
        del env["XDG_RUNTIME_DIR"]
    made = subprocess.run(
        [sys.executable, "-P", "-c", FINDER, str(run.folder)],
        capture_output=True, text=True, env=env, timeout=60,
    )  # fmt: skip
    assert made.stdout.split("\n")[:2] == [f"{run.coordinator_pid} running", "False"], made.stderr


def listening(pid: int) -> list[str]:
    """Addresses on which a process listens, or has sockets of any network, in /proc's words."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            target = os.readlink(entry)
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
        path = Path(f"/proc/{pid}/net/{table}")
        for line in path.read_text().splitlines()[1:] if path.exists() else []:
            fields = line.split()
            if fields[9] in inodes and (fields[3] == "0A" or not table.startswith("tcp")):
                found.append(fields[1])
    return found


MUTATING: list[tuple[str, Callable[[pm.Run], object]]] = [
    ("pause", lambda run: run.pause()),
    ("resume", lambda run: run.resume()),
    ("set", lambda run: run.set(learning_rate=1.0)),
    ("checkpoint", lambda run: run.checkpoint()),
    ("evaluate", lambda run: run._command("evaluate", wait=False)),
    ("sample", lambda run: run.sample(input_ids=[1, 2], max_new_tokens=1)),
    ("share", lambda run: run.share("tcp://127.0.0.1:*")),
    ("unshare", lambda run: run.unshare()),
    ("stop", lambda run: run.stop()),
]


def test_a_shared_run_is_seen_and_not_touched(
    start: Callable[..., pm.Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(max_steps=10**6)
    at_step(run, 3)
    assert run.coordinator_pid is not None
    assert listening(run.coordinator_pid) == [] and run.sharing is None

    given = run.share("tcp://127.0.0.1:*", name="class")
    assert "every user of this machine" in capsys.readouterr().err
    assert len(listening(run.coordinator_pid)) == 2
    assert given.role == "view" and given.address.startswith("tcp://127.0.0.1:")
    secret = given._connection["secret_key"]
    assert secret not in repr(given)
    file = given.save(tmp_path / "class.json")
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(pm.InvalidError, match="already"):
        given.save(file)

    for way in (file, given.text()):
        seen = pm.attach(way)
        assert seen is not run and seen.name == run.name and seen.state == "running"
        until(lambda seen=seen: seen.step >= 3, 20, "steps over the network")
        theirs = seen.history
        at_step(run, len(theirs))
        assert theirs == run.history[: len(theirs)]
        assert seen.memory() and seen.workers and "prepare" not in seen.config
        for verb, call in MUTATING:
            with pytest.raises(pm.DeniedError, match=verb):
                call(seen)
        seen.close()
    verbs = {event["verb"] for event in run.events() if event["type"] == "command"}
    assert verbs == set()

    other = run.share("tcp://127.0.0.1:*", role="control", name="assistant")
    steering = pm.attach(other.text())
    steering.pause(wait=True)
    until(lambda: run.state == "paused", 20, "the pause to show here")
    steering.resume(wait=True)
    assert run.sharing is not None and run.sharing["keys"] == 2

    viewer = pm.attach(given.text())
    given.revoke()
    until(lambda: viewer.coordinator_pid is None, 20, "the revoked viewer to be shut out")
    with pytest.raises(pm.Error):
        viewer._ask("status")
    with pytest.raises(pm.DeniedError):
        pm.attach(file)
    steering._ask("status")  # the other key is good still
    assert run.unshare() == 1 and run.sharing is None
    until(lambda: listening(run.coordinator_pid or 0) == [], 10, "the doors to close")
    link = steering._link
    until(lambda: link is None or not link._up, 20, "the other one to be shut out")
    steering.close()

    logged = (run.folder / "events.jsonl").read_text()
    logs = "".join(path.read_text() for path in (run.folder / "log").iterdir())
    assert secret not in logged + logs and "shared at tcp://127.0.0.1" in logged
    assert run.state == "running"


def test_share_says_what_is_wrong(start: Callable[..., pm.Run]) -> None:
    run = start(max_steps=10**6)
    at_step(run, 1)
    for bind in ("tcp://localhost:4000", "127.0.0.1:4000", "tcp://127.0.0.1", "ipc:///tmp/x"):
        with pytest.raises(pm.InvalidError):
            run.share(bind)
    with pytest.raises(pm.InvalidError, match="role"):
        run.share("tcp://127.0.0.1:*", role="worker")
    with pytest.raises(pm.IOFailed):
        run.share("tcp://203.0.113.7:4000")  # not an address of ours
    assert run.sharing is None and run.unshare() == 0
    run.share("tcp://127.0.0.1:*")
    with pytest.raises(pm.BusyError, match="listens"):
        run.share("tcp://127.0.0.1:4999")
    assert run.unshare() == 1


@pytest.mark.parametrize(
    "text", ["pantheraml:", "pantheraml:e30=", "pantheraml:!!", "pantheraml:W10="]
)
def test_a_damaged_connection_text(text: str) -> None:
    with pytest.raises(pm.InvalidError):
        pm.attach(f"pantheraml:{text}")


def test_a_key_that_others_could_read(tmp_path: Path) -> None:
    path = tmp_path / "key.json"
    path.write_text('{"secret_key": "x"}')
    path.chmod(0o644)
    with pytest.raises(pm.DeniedError, match="chmod 600"):
        pm.attach(path)
    path.chmod(0o600)
    link = tmp_path / "link.json"
    link.symlink_to(path)
    with pytest.raises(OSError, match="symbolic"):
        pm.attach(link)
