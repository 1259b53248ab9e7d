"""Doors: who finds a run, from where, and with which key."""

from __future__ import annotations

import asyncio
import base64
import html
import io
import json
import os
import re
import resource
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pantheraml as pm
import pytest
from conftest import FOREVER, PATIENCE, at_step, environment, until
from leaks import Leaks, below, of_processes, open_to_others
from pantheraml import _native, programs
from pantheraml_widgets.run_panel import RunPanel
from reap import processes_with
from rich.console import Console
from rich.traceback import Traceback
from zmq.utils import z85

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
        capture_output=True, text=True, env=env, timeout=PATIENCE,
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
    secret = given._key["secret_key"]
    assert secret not in repr(given)
    file = given.save(tmp_path / "class.json")
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(pm.InvalidError, match="already"):
        given.save(file)

    for way in (file, given.text()):
        seen = pm.attach(way)
        assert seen is not run and seen.name == run.name and seen.state == "running"
        until(lambda seen=seen: seen.step >= 3, "steps over the network")
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
    until(lambda: run.state == "paused", "the pause to show here")
    steering.resume(wait=True)
    assert run.sharing is not None and run.sharing["keys"] == 2

    viewer = pm.attach(given.text())
    given.revoke()
    until(lambda: viewer.coordinator_pid is None, "the revoked viewer to be shut out")
    with pytest.raises(pm.Error):
        viewer._ask("status")
    with pytest.raises(pm.DeniedError):
        pm.attach(file)
    steering._ask("status")  # the other key is good still
    link = steering._link
    assert link is not None
    assert run.unshare() == 1 and run.sharing is None
    until(lambda: listening(run.coordinator_pid or 0) == [], "the doors to close")
    until(lambda: not link._up, "the other one to be shut out")
    # That nobody is there; where it came again before the doors were shut, that it is not let in.
    with pytest.raises(pm.Error, match="no connection|coordinator is gone|not let in"):
        link.request("status", timeout=1)  # not that somebody is slow to answer
    steering.close()
    until(lambda: run.state == "running", "the resume to show here")

    logged = (run.folder / "events.jsonl").read_text()
    logs = "".join(path.read_text() for path in (run.folder / "log").iterdir())
    assert secret not in logged + logs and "shared at tcp://127.0.0.1" in logged


def test_who_is_shut_out_is_told(start: Callable[..., pm.Run]) -> None:
    """Whoever waits for something hears of it, and is not told that the run had ended."""
    run = start(max_steps=10**6, gradient_accumulation_steps=100)
    at_step(run, 1)
    given = run.share("tcp://127.0.0.1:*", role="control", name="assistant")
    seen = pm.attach(given.text())
    run.pause(wait=True)
    until(lambda: seen.state == "paused", "the pause to show there")
    answers: list[object] = []

    def wait() -> None:
        try:
            answers.append(seen.wait())
        except pm.Error as error:
            answers.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    given.revoke()
    waiting.join(PATIENCE)
    assert isinstance(answers[0], pm.DeniedError), answers
    assert "not let in any more" in str(answers[0]) and "elsewhere" in str(answers[0])
    assert seen.state == "paused" and seen.reason.startswith("not connected any more")
    for verb in (seen.pause, seen.stop, seen.wait, lambda: seen.refused, lambda: run_async(seen)):
        with pytest.raises(pm.DeniedError, match="not let in any more"):
            verb()
    with pytest.raises(pm.DeniedError):
        seen.resume()
    assert seen.history == run.history  # what was heard stays
    assert run.state == "paused" and run.unshare() == 0


def few_places(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Have coordinators begin with few descriptors; gives how many viewers may have one key."""
    descriptors, kept = 160, 128
    real = programs.coordinator()
    (folder / "bin").mkdir()
    (folder / "bin" / "pml-worker").symlink_to(real.with_name("pml-worker"))
    program = folder / "bin" / "pml-coordinator"
    program.write_text(f'#!/bin/sh\nulimit -n {descriptors} && exec {real} "$@"\n')
    program.chmod(0o700)
    monkeypatch.setenv("PML_BIN", str(program.parent))
    return (descriptors - kept) // 4


def cut(address: str) -> None:
    """Break this process's connections to an address, as a network does."""
    port = int(address.rsplit(":", 1)[1])
    for entry in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if not stat.S_ISSOCK(os.stat(int(entry)).st_mode):
                continue  # a copy of it would stay: socket() does not close what is none
            with socket.socket(fileno=os.dup(int(entry))) as seen:
                if seen.family == socket.AF_INET and seen.getpeername()[1] == port:
                    seen.shutdown(socket.SHUT_RDWR)


def test_a_viewer_too_many_is_told(
    start: Callable[..., pm.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it comes, and when it comes back and another one has taken its place."""
    places = few_places(tmp_path, monkeypatch)
    run = start(max_steps=FOREVER)
    at_step(run, 1)
    given = run.share("tcp://127.0.0.1:*", name="class")
    seen = [pm.attach(given.text()) for _ in range(places)]
    words = f"{places} viewers are connected with this key.*close one of them, or ask whoever"
    with pytest.raises(pm.TooManyViewers, match=words):
        pm.attach(given.text())
    until(lambda: any("key for class was turned" in e["message"] for e in logged(run)), "the log")
    another = run.share("tcp://127.0.0.1:*", name="guests")
    pm.attach(another.text()).close()
    seen.pop().close()
    seen.append(pm.attach(given.text()))

    panels = [RunPanel(viewer) for viewer in seen]
    shown: list[list[str]] = [[] for _ in seen]
    for panel, reasons in zip(panels, shown, strict=True):
        panel.send = lambda content, *_, to=reasons: to.append(content.get("reason", ""))
    late: list[pm.Run] = []
    deadline = time.monotonic() + PATIENCE
    while not late and time.monotonic() < deadline:
        cut(given.address)
        with suppress(pm.TooManyViewers):  # whoever was cut was back before
            late.append(pm.attach(given.text()))
    until(lambda: any(viewer.coordinator_pid is None for viewer in seen), "one to be left over")
    at = next(i for i, viewer in enumerate(seen) if viewer.coordinator_pid is None)
    assert re.search(f"not connected any more.*{words}", seen[at].reason)
    until(lambda: any(re.search(words, said) for said in shown[at]), "the panel to say it")
    for ask in (seen[at].wait, lambda: seen[at].refused):
        with pytest.raises(pm.TooManyViewers, match=words):
            ask()
    for panel in panels:
        panel.close()
    for viewer in seen + late:
        viewer.close()
    assert run.state == "running" and run.refused["connections"] >= 2


def logged(run: pm.Run) -> list[dict[str, Any]]:
    return [event for event in run.kept_events() if event["type"] == "log"]


def run_async(run: pm.Run) -> None:
    asyncio.run(run.wait_async())


def test_share_says_what_is_wrong(start: Callable[..., pm.Run]) -> None:
    run = start(max_steps=10**6)
    at_step(run, 1)
    for bind, words in (
        ("tcp://localhost:4000", "in numbers"), ("127.0.0.1:4000", "tcp://ADDRESS:PORT"),
        ("tcp://127.0.0.1", "tcp://ADDRESS:PORT"), ("ipc:///tmp/x", "tcp://ADDRESS:PORT"),
        ("tcp://127.0.0.1:65535", "port"), ("tcp://127.0.0.1:http", "port"), ("", "bind"),
        ("tcp://256.1.1.1:*", "in numbers"), (None, "bind must be a text"), (5, "a text"),
    ):  # fmt: skip
        with pytest.raises(pm.InvalidError, match=words):
            run.share(bind)  # type: ignore[arg-type]
    with pytest.raises(pm.InvalidError, match="role"):
        run.share("tcp://127.0.0.1:*", role="worker")
    for address in ("", 5, "http://host", "a b", "host:99", "host/x", "x" * 300, "host\n"):
        with pytest.raises(pm.InvalidError, match="alone, as viewers reach it"):
            run.share("tcp://127.0.0.1:*", address=address)  # type: ignore[arg-type]
    with pytest.raises(pm.IOFailed, match=r"0\.0\.0\.0 is all of them"):
        run.share("tcp://203.0.113.7:4000")  # not an address of ours
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(pm.IOFailed, match=r"in use; .*\(\* takes any"):
            run.share(f"tcp://127.0.0.1:{taken.getsockname()[1]}")
    for share in ("x", 5):
        with pytest.raises(pm.InvalidError, match="takes what share"):
            run.unshare(share)  # type: ignore[arg-type]
    assert run.sharing is None and run.unshare() == 0
    run.share("tcp://127.0.0.1:*")
    with pytest.raises(pm.BusyError, match="listens"):
        run.share("tcp://127.0.0.1:4999")
    assert run.unshare() == 1


@pytest.mark.parametrize(
    ("bind", "listens", "reach"),
    [
        ("tcp://[::1]:*", "tcp://[::1]:", "every user of this machine"),
        ("tcp://0.0.0.0:*", "tcp://0.0.0.0:", "everyone who can route to this machine"),
        ("tcp://[::]:*", "tcp://[::]:", "everyone who can route to this machine"),
        ("tcp://*:*", "tcp://0.0.0.0:", "everyone who can route to this machine"),
    ],
)
def test_share_says_who_can_reach_it(
    bind: str, listens: str, reach: str, start: Callable[..., pm.Run],
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    """And the address that is handed on is one that somebody can connect to."""
    addresses = Path("/proc/net/if_inet6")  # there and empty where IPv6 is switched off
    if "[" in bind and not (addresses.exists() and addresses.read_text()):
        pytest.skip("this machine has no IPv6")
    run = start(max_steps=10**6)
    at_step(run, 1)
    given = run.share(bind)
    assert f"listens on {listens}" in (said := capsys.readouterr().err) and reach in said
    assert reach in repr(given) and "0.0.0.0" not in given.address and "[::]" not in given.address
    # Whatever the file is called, and however the text was copied.
    seen = pm.attach(given.save(tmp_path / "key"))
    until(lambda: seen.step >= 1, "its steps")
    seen.close()
    text = given.text()
    pm.attach(f' "{text[:40]}\n  {text[40:]}" \n').close()
    with pytest.raises(pm.IOFailed, match="No such file"):
        given.save(tmp_path / "none" / "key.json")
    assert run.unshare() == 1
    with pytest.raises(pm.NotFoundError, match="no such key"):
        given.revoke()


@pytest.mark.parametrize(
    "text", ["pantheraml:", "pantheraml:e30=", "pantheraml:!!", "pantheraml:W10="]
)
def test_a_damaged_connection_text(text: str) -> None:
    """It is not repeated: what is damaged may be a whole key, and the notebook is saved."""
    for around in ("pantheraml:{}", " pantheraml:{}\n", "'pantheraml:{}'", "xpantheraml:{}"):
        with pytest.raises(pm.InvalidError) as caught:
            pm.attach(around.format(text))
        assert text.removeprefix("pantheraml:") in ("", "!!") or text not in str(caught.value)
        assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.mark.parametrize("name", [5, None, [], b"\xff", object()])
def test_what_names_no_run(name: object, runs: Path) -> None:
    with pytest.raises((pm.InvalidError, pm.NotFoundError), match="named by|no run"):
        pm.attach(name)  # type: ignore[arg-type]


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


NOTEBOOK = """
import json, sys
import pantheraml as pm
run = pm.attach(sys.argv[1])
seen = []
run.subscribe(lambda event: seen.append(event["seq"]) if "seq" in event else None)
if sys.argv[2] == "steers":
    run.set(weight_decay=0.125, wait=True)
print("ready", flush=True)
last = int(sys.stdin.readline())           # number of the last event: the run has ended meanwhile
while run.last_seq() < last:
    run.wait_for_change(1)
print(json.dumps({"state": run.state, "events": [(e["seq"], e["type"]) for e in run.events()],
                  "history": run.history, "in_order": seen == sorted(set(seen))}))
"""


def test_many_clients_see_one_truth(start: Callable[..., pm.Run]) -> None:
    """Two notebooks, a shell, and thirty viewers over TCP."""
    run = start(max_steps=10**6, gradient_accumulation_steps=100)
    at_step(run, 1)
    given = run.share("tcp://127.0.0.1:*")
    viewers = [pm.attach(given.text()) for _ in range(30)]
    notebooks = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", NOTEBOOK, str(run.folder), role],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for role in ("looks", "steers")
    ]  # fmt: skip
    for process in notebooks:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    shell = subprocess.run(
        [sys.executable, "-P", "-m", "pantheraml", "set", "max_grad_norm=2.5", "--run",
         str(run.folder)],
        check=True, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert "applied" in shell.stdout
    at_step(run, run.step + 5)
    run.stop(wait=True)
    until(lambda: run.workers[0]["state"] == "stopped", "the last event: of the worker's end")
    # Of hurried clients there may be told later, and not to everybody that looks below.
    truth = [(event["seq"], event["type"]) for event in run.events()]
    last = truth[-1][0]
    for viewer in viewers:
        until(lambda viewer=viewer: viewer.last_seq() >= last, "a viewer to see the end")
        assert viewer.state == "stopped"
        told = [(event["seq"], event["type"]) for event in viewer.events()]
        assert told[: len(truth)] == truth
        assert viewer.history == run.history
        viewer.close()
    for process in notebooks:
        told = json.loads(process.communicate(f"{last}\n", timeout=PATIENCE)[0])
        assert told["state"] == "stopped" and told["in_order"]
        assert [tuple(pair) for pair in told["events"]][: len(truth)] == truth
        assert told["history"] == run.history
    applied = [event for event in run.events() if event["type"] == "applied"]
    assert [event["verb"] for event in applied] == ["set", "set", "stop"]


# ---- another user ------------------------------------------------------------------------------

STRANGER = """
import os, signal, socket, sys
runtime, folder, pid, worker = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
os.setgroups([]); os.setgid(65534); os.setuid(65534)
got = []
def attempt(what, call):
    try:
        call()
    except OSError:
        return
    got.append(what)
def connect(path):
    socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).connect(path)
for name in ("ctl", "pub", "wrk"):
    attempt(f"connect {name}", lambda: connect(f"{runtime}/{name}"))
for path in (f"{runtime}/connection.json", f"{folder}/run.json", f"{folder}/events.jsonl",
             f"{folder}/lock", f"{folder}/log/coordinator.log", f"/proc/{pid}/environ",
             f"/proc/{worker}/environ", f"/proc/{pid}/mem", f"/proc/{pid}/maps"):
    attempt(f"read {path}", lambda: open(path, "rb").read(1))
attempt("list runtime", lambda: os.listdir(runtime))
attempt("list run", lambda: os.listdir(folder))
attempt("list descriptors", lambda: os.listdir(f"/proc/{pid}/fd"))
attempt("make a file", lambda: open(f"{runtime}/x", "w"))
attempt("take the lock", lambda: os.open(f"{folder}/lock", os.O_RDWR))
attempt("signal coordinator", lambda: os.kill(pid, signal.SIGTERM))
attempt("signal worker", lambda: os.kill(worker, signal.SIGKILL))
attempt("follow a descriptor", lambda: open(f"/proc/{worker}/fd/3"))
print("|".join(got) or "nothing")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which only root can")
def test_another_user_can_do_nothing(start: Callable[..., pm.Run], tmp_path: Path) -> None:
    run = start(max_steps=10**6)
    at_step(run, 2)
    for parent in (run.folder.parent, *run.folder.parent.parents):
        if parent in (Path("/tmp"), Path("/")):  # noqa: S108 - where pytest's folders end
            break
        parent.chmod(parent.stat().st_mode | 0o055)  # only the run's own folder protects it
    runtime = Path(_native.connection_file(run.folder)).parent
    arguments = [runtime, run.folder, run.coordinator_pid, run.workers[0]["pid"]]
    made = subprocess.run(
        ["/usr/bin/python3", "-I", "-c", STRANGER, *map(str, arguments)],
        capture_output=True, text=True, timeout=PATIENCE, cwd="/",
    )  # fmt: skip
    assert made.stdout == "nothing\n", made.stdout + made.stderr
    at_step(run, run.step + 2)
    assert open_to_others(run.folder) == [] and open_to_others(runtime) == []


# ---- secrets -----------------------------------------------------------------------------------


def test_no_secret_leaves_its_file(start: Callable[..., pm.Run], tmp_path: Path) -> None:
    """Keys of the coordinator and of a share: in no log, argument, environment or record."""
    run = start(max_steps=10**6, devices=["cpu", "cpu"])
    at_step(run, 2)
    file = Path(_native.connection_file(run.folder))
    given = run.share("tcp://127.0.0.1:*", name="class")
    own = json.loads(file.read_text())
    leaks = Leaks(
        [own["secret_key"], given._key["secret_key"]],
        [each[half] for each in (own, given._key) for half in ("server_key", "public_key")],
    )
    run.checkpoint(wait=True)
    page = run.to_html()
    shown = repr(run) + repr(given) + str(run.events()) + page + json.dumps(run.config)
    texts = {"shown": shown.encode()} | below(run.folder)
    texts |= of_processes(processes_with(f"PML_TEST_RUNS={run.folder.parent}"))
    assert len(texts) > 18 and any(b"shared at" in text for text in texts.values())
    for where, text in texts.items():
        assert not leaks.are_in(text), where
    assert leaks.are_in(file.read_bytes()) and open_to_others(run.folder) == []
    holders = [path for path in file.parent.iterdir() if path.is_file()]
    assert holders == [file] and file.stat().st_mode & 0o777 == 0o600


def test_no_process_that_has_keys_leaves_a_core(start: Callable[..., pm.Run]) -> None:
    before = _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if 0 <= hard < 2:
        pytest.skip("nothing leaves a core file here")
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        run = start(max_steps=10**6, devices=["cpu", "cpu"])
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)
    at_step(run, 1)
    assert run.coordinator_pid is not None
    for pid in (run.coordinator_pid, *(worker["pid"] for worker in run.workers)):
        assert resource.prlimit(pid, resource.RLIMIT_CORE) == (1, hard)


def test_a_traceback_shows_no_key(start: Callable[..., pm.Run], tmp_path: Path) -> None:
    """Not even one with all variables, as a notebook that is saved may have it."""
    run = start(max_steps=10**6)
    at_step(run, 1)
    given = run.share("tcp://127.0.0.1:*")
    file, damaged = given.save(tmp_path / "key.json"), tmp_path / "damaged.json"
    damaged.write_text(json.dumps(json.loads(file.read_text()) | {"server_key": "short"}))
    damaged.chmod(0o600)
    seen = pm.attach(file)
    leaks = Leaks([given._key["secret_key"]], [])
    given.revoke()
    until(lambda: seen._gone, "the key to be shut out")
    for call in (
        lambda: pm.attach(file), lambda: pm.attach(damaged), lambda: seen.pause(),
        lambda: run.share("tcp://127.0.0.1:4999"), lambda: given.revoke(),
        lambda: given.save(tmp_path), lambda: seen.wait(),
    ):  # fmt: skip
        with pytest.raises(pm.Error) as caught:
            call()
        console = Console(file=io.StringIO(), width=400)
        console.print(Traceback.from_exception(
            caught.type, caught.value, caught.tb, show_locals=True, locals_max_string=None,
            locals_hide_dunder=False, locals_hide_sunder=False,
        ))  # fmt: skip
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert "locals" in shown and not leaks.are_in(shown.encode()), shown
    assert not leaks.are_in(repr(vars(given)).encode() + repr(vars(seen)).encode())


@pytest.mark.parametrize("alone", [True, False])
def test_a_key_is_found_in_any_clothes(alone: bool) -> None:
    """Or the test before this one, and that of the saved notebook, could not fail."""
    public, secret = _native.keypair()
    raw = z85.decode(secret.encode())
    around = "" if alone else '{"address": "tcp://127.0.0.1:4000", "key": "%s"}'
    within = (around % secret if around else secret).encode()
    leaks = Leaks([secret], [])
    for text in (
        within, raw, raw.hex().encode(), base64.b64encode(within), base64.urlsafe_b64encode(within),
        b"x" + raw + b"y", base64.b64encode(b"x" + raw), base64.b64encode(b"xy" + raw + b"z"),
        html.escape(within.decode()).encode(), json.dumps({"a": within.decode()}).encode(),
        json.dumps(html.escape(secret)).encode(),
    ):  # fmt: skip
        assert leaks.are_in(text), text
    assert not leaks.are_in(public.encode()) and not leaks.are_in(secret[:-1].encode())
    # One that nobody here knows is known by its public half.
    assert Leaks([], [public]).are_in(b"key: " + secret.encode() + b"\n")
    assert not Leaks([], [public]).are_in(b"key: " + public.encode() + b"\n")
