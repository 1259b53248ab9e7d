"""The extension by itself: how it is built, how it fails, whom it lets wait."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pantheraml as pm
import pytest
from conftest import PATIENCE, at_step, end, until
from pantheraml import _native, errors, programs


def test_it_is_abi3_and_exports_its_init_only() -> None:
    path = Path(_native.__file__)
    assert path.name == "_native.abi3.so"
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True
    ).stdout.split("\n")
    assert [line.split()[-1] for line in symbols if line] == ["PyInit__native"]


def test_it_loads_more_than_once() -> None:
    """Multi-phase: a second module object has a Client type of its own."""
    import importlib.util

    spec = importlib.util.find_spec("pantheraml._native")
    assert spec is not None and spec.loader is not None
    second = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(second)
    assert second.Client is not _native.Client
    with pytest.raises(pm.NotFoundError):
        second.Client("/nowhere/connection.json")
    with pytest.raises(TypeError, match="immutable"):
        _native.Client.send = None  # type: ignore[method-assign,assignment]


def test_errors_are_the_classes_of_the_package(tmp_path: Path) -> None:
    with pytest.raises(pm.NotFoundError):
        _native.Client(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError):
        _native.hash_file(tmp_path / "none")
    with pytest.raises(TypeError):
        _native.Client(3)  # type: ignore[arg-type]
    assert set(errors.BY_CODE) >= {"invalid", "busy", "peer", "internal"}
    assert str(errors.from_code("a code of tomorrow", "text")) == "text"


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o604])
def test_connection_file_that_others_could_read(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "connection.json"
    path.write_text("{}")
    path.chmod(mode)
    with pytest.raises(PermissionError):
        _native.Client(path)


def test_connection_file_that_is_a_link_or_garbage(tmp_path: Path) -> None:
    path = tmp_path / "connection.json"
    for content in (b"", b"\x00\xff", b"[]", b"{}", b'{"format": 1}', b"{" * 5000):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(pm.Error):
            _native.Client(path)
    link = tmp_path / "link.json"
    link.symlink_to(path)
    with pytest.raises(pm.Error):
        _native.Client(link)


def test_hash_is_blake2b(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"panther" * 100_000)
    expected = hashlib.blake2b(path.read_bytes(), digest_size=32).hexdigest()
    assert _native.hash_file(path) == expected


def test_device_info() -> None:
    info = _native.device_info()
    assert info["threads"] >= 1 and 0 < info["memory_free"] <= info["memory_total"]
    assert "OpenBLAS" in info["libraries"]


def test_launch_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pm.Error):
        _native.launch(tmp_path / "no-program", tmp_path)
    with pytest.raises(pm.Error):
        _native.launch(programs.coordinator(), tmp_path)  # no run.json
    with pytest.raises(ValueError, match="timeout"):
        _native.launch(programs.coordinator(), tmp_path, timeout=-1.0)
    monkeypatch.setenv("PML_BIN", str(tmp_path))
    with pytest.raises(pm.NotFoundError, match="pml-coordinator is missing"):
        programs.coordinator()


#: A coordinator that comes on, and is never ready. It interrupts who waits for it, and says whether
#: that one went (its sign of life is not taken any more) or had to be left.
SLOW = """#!/bin/sh
trap '' PIPE
for i in $(seq 2400); do
    [ $i = 3 ] && kill -INT "$PML_TEST_WAITS"
    printf + >&3 2>/dev/null || { echo went >"$PML_TEST_SAID"; exit; }
    sleep 0.1
done
echo stayed >"$PML_TEST_SAID"
"""


def test_ctrl_c_ends_the_wait_for_a_coordinator(
    start: Callable[..., pm.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(max_steps=1).wait()
    run.stop()
    end(run)
    program, said = tmp_path / "slow", tmp_path / "said"
    program.write_text(SLOW)
    program.chmod(0o700)
    monkeypatch.setenv("PML_TEST_WAITS", str(os.getpid()))
    monkeypatch.setenv("PML_TEST_SAID", str(said))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            _native.launch(program, run.folder, "")
    finally:
        signal.signal(signal.SIGINT, before)
    until(lambda: said.exists() and said.read_text(), "what the coordinator has to say")
    assert said.read_text() == "went\n"


@pytest.mark.parametrize("index", [-1, -(2**32), 2**31, 2**32, -(10**30)])
def test_a_gpu_that_cannot_be(index: int) -> None:
    """Cut to 32 bits, two of these would be GPU 0."""
    for ask in (_native.gpu_dtypes, _native.gpu_reserved):
        with pytest.raises(pm.InvalidError, match="no GPU has such a number"):
            ask(index)


def test_client_by_hand(start: Callable[..., pm.Run]) -> None:
    run = start(max_steps=10**6)
    at_step(run, 1)
    with _native.Client(_native.connection_file(run.folder)) as client:
        client.send(json.dumps({"type": "status", "id": "mine-1"}))
        seen: dict[str, dict[str, object]] = {}
        while "answer" not in seen:
            for kind, text in client.receive(5.0):
                seen[kind] = json.loads(text) if text else {}
        assert seen["answer"]["id"] == "mine-1" and seen["answer"]["type"] == "welcome"
        assert os.fstat(client.fileno())
        with pytest.raises(ValueError, match="negative"):
            client.receive(-1)
        with pytest.raises(TypeError):
            client.send(7)  # type: ignore[arg-type]
    assert client.closed
    client.close()
    for call in (client.receive, client.fileno, lambda: client.send("{}")):
        with pytest.raises(pm.PeerError, match="closed"):
            call()


WAITER = """
import os, signal, sys, threading, time
from pantheraml import _native
client = _native.Client(sys.argv[1])
coordinator = _native.coordinator_pid(sys.argv[1])
while ("up", "") not in client.receive(30.0):
    pass
os.kill(coordinator, signal.SIGSTOP)          # from here on nothing comes that would end a wait
while client.receive(1.0):
    pass
ticks = 0
def tick():
    global ticks
    while True:
        ticks += 1
        time.sleep(0.01)
threading.Thread(target=tick, daemon=True).start()
signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("signal")))
before = ticks
assert client.receive(3.0) == []
assert ticks > before + 1, ticks - before     # others run while we wait
try:
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    client.receive(1000.0)
except TimeoutError:                          # a signal is noticed while waiting
    threading.Timer(0.2, client.close).start()
    try:
        while True:
            client.receive(1000.0)            # close by another thread ends the wait
    except ConnectionError:
        print("well")
"""


def test_waiting_lets_others_run(start: Callable[..., pm.Run]) -> None:
    run = start(max_steps=10**6)
    at_step(run, 1)
    file = _native.connection_file(run.folder)
    assert run.coordinator_pid is not None
    try:
        made = subprocess.run(
            [sys.executable, "-c", WAITER, file], capture_output=True, text=True, timeout=PATIENCE
        )
    finally:
        os.kill(run.coordinator_pid, signal.SIGCONT)
    assert made.stdout == "well\n", made.stderr


def test_many_clients_leave_nothing_behind(start: Callable[..., pm.Run]) -> None:
    run = start(max_steps=10**6)
    at_step(run, 1)
    file = _native.connection_file(run.folder)

    def counts() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    for _ in range(3):
        _native.Client(file).close()
    before = counts()
    for _ in range(30):
        client = _native.Client(file)
        client.receive(0.01)
        del client  # not closed: the object's end closes it
    until(lambda: all(now <= then for now, then in zip(counts(), before, strict=True)), "its end")
