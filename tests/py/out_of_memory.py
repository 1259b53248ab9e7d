"""The extension without memory, a process of its own: tests/py/test_no_memory.py starts it.

Usage: LD_PRELOAD=libnomem.so out_of_memory.py LIBNOMEM SCENARIO RUN_FOLDER MODEL POINTS [PART OF]

A scenario is done again and again. In each life another allocation is refused: one that the
extension's own code asks for (Jansson's are among them), or one that Python's allocators are asked
for in a call of the extension. It has to be well, or raise MemoryError; a life that ended leaves
no block of the extension's, no descriptor, no thread. POINTS: so many of the allocations, spread
over the life; 0: all. PART, from 0 on, OF so many parts: only these of them (never of Python's).
Prints how many there were, how many were refused, and how many of them no life came to: lives
differ by a few, by what comes together.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pantheraml as pm
from pantheraml import _native

SHIM = ctypes.CDLL(sys.argv[1])
SHIM.nomem_seen.restype = SHIM.nomem_live.restype = ctypes.c_long
SHIM.nomem_refuse.argtypes = ctypes.c_long, ctypes.c_bool
SHIM.nomem_refused.restype = SHIM.nomem_python_refused.restype = ctypes.c_bool
SHIM.nomem_python_refuse.argtypes = (ctypes.c_long,)
FOLDER, MODEL, POINTS = Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5])
PART, PARTS = map(int, sys.argv[6:8] or (0, 1))
LIMITS = (64, 4, 32, 64, 16)
HEARTBEAT = (
    '{"type":"heartbeat","time":1.0,"state":"running","step":1,"last":2,"workers":[{"rank":0,'
    '"rss":1,"cpu":0.5}]}'
)
PATIENCE = 240.0
LIVES = 20  # in which an allocation may be, before it is taken for one that is not always there


# ---- what is done ----------------------------------------------------------------------------


def answers(client: _native.Client, wanted: set[str]) -> None:
    """Receive until these have answered; MemoryError where one of them was lost."""
    deadline = time.monotonic() + PATIENCE
    while wanted:
        assert time.monotonic() < deadline, f"no answer to {wanted}"
        for kind, text in client.receive(1.0):
            if kind == "answer":
                wanted.discard(json.loads(text)["id"])


def client() -> None:
    """The Client by itself: connect, command, events, snapshot, close."""
    with _native.Client(_native.connection_file(FOLDER)) as made:
        requests: list[dict[str, Any]] = [
            {"type": "hello"}, {"type": "replay", "from": 1}, {"type": "set", "max_grad_norm": 2.0},
            {"type": "status"}, {"type": "configuration"}, {"type": "checkpoint"},
        ]  # fmt: skip
        for number, request in enumerate(requests):
            made.send(json.dumps({**request, "id": str(number)}))
        answers(made, {str(number) for number in range(6)})


def run() -> None:
    """What a notebook does: attach, look, steer, close. It comes through whatever was refused."""
    made = pm.attach(FOLDER)
    try:
        assert [row["step"] for row in made.history] == list(range(1, len(made.history) + 1))
        made.set(max_grad_norm=2.0)
        made.memory()
        made.checkpoint()
    finally:
        made.close()


def engine() -> None:
    """What the extension does without a coordinator."""
    config = (FOLDER / "run.json").read_text()
    _native.check_run(config)
    _native.plan(config, LIMITS)
    _native.program(config, LIMITS)
    _native.check_model(MODEL)
    _native.hash_file(FOLDER / "run.json")
    _native.device_info()
    _native.packed(bytes(16 * [3, 0, 0, 0]), 7)
    _native.keypair()
    newest = max((FOLDER / "checkpoints").iterdir())
    _native.read_adapter(newest, MODEL)
    _native.coordinator_pid(_native.connection_file(FOLDER))


def messages() -> None:
    """What comes from outside, held against the table: no memory is no fault of its own."""
    with (FOLDER / "events.jsonl").open("rb") as log:
        line = log.readline()
    assert _native.first_damaged(line, 1) is None
    _native.check_message("event", line.decode())
    _native.check_message("event", HEARTBEAT)
    _native.check_message("answer", '{"type":"accepted","id":"1","command":1}')
    _native.check_message("run", (FOLDER / "run.json").read_text())


# ---- refusals of ours and Jansson's ------------------------------------------------------------


def counts() -> tuple[int, int, int]:
    """Blocks of the extension's, descriptors, threads."""
    return SHIM.nomem_live(), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def settle(before: tuple[int, int, int]) -> None:
    """Wait until a life has left nothing; its threads may be on their way out."""
    deadline = time.monotonic() + PATIENCE
    while True:
        gc.collect()
        now = counts()
        if all(a <= b for a, b in zip(now, before, strict=True)):
            return
        assert time.monotonic() < deadline, f"(blocks, descriptors, threads) {before} are now {now}"
        time.sleep(0.01)


def live(scenario: Callable[[], None], number: int) -> tuple[int, bool]:
    """One life: how many allocations it had, and whether one was refused."""
    SHIM.nomem_refuse(number, False)
    try:
        scenario()
    except MemoryError as error:
        assert SHIM.nomem_refused(), "there was memory"
        assert "memory" in str(error), f"it says {error!r}"
    seen, refused = SHIM.nomem_seen(), SHIM.nomem_refused()
    SHIM.nomem_refuse(0, False)
    return seen, refused


def ours(scenario: Callable[[], None]) -> None:
    """Refuse what the extension's code asks for."""
    assert SHIM.nomem_watch(b"/_native.abi3.so")
    for _ in range(2):  # what is only set up once
        total, _ = live(scenario, 0)
    before = counts()
    stride = 1 if POINTS == 0 else max(1, total // POINTS)
    tried = absent = 0
    for number in range(1 + PART * stride, total + 1, PARTS * stride):
        refused, lives = False, 0
        while not refused and lives < LIVES:
            try:
                seen, refused = live(scenario, number)
                settle(before)
            except BaseException:
                print(f"allocation {number} of {total}", file=sys.stderr)
                raise
            lives += 1
            assert refused or seen < number, f"allocation {number} of {seen} was not refused"
        tried += refused
        absent += not refused
    print(json.dumps({"allocations": total, "refused": tried, "absent": absent}))


# ---- refusals of Python's ------------------------------------------------------------------------


def calls() -> list[Callable[[], object]]:
    """Each kind of call into the extension, ready to be made; what they need is made before.

    Paths are strings: Python itself calls a Path, whose words for itself had no memory, no path.
    """
    config = (FOLDER / "run.json").read_text()
    folder, model = str(FOLDER), str(MODEL)
    file = _native.connection_file(FOLDER)
    lengths = bytes(16 * [3, 0, 0, 0])
    newest = str(max((FOLDER / "checkpoints").iterdir()))
    there = _native.Client(file)
    request = '{"type":"status","id":"1"}'

    def receive() -> object:
        there.send(request)
        select.select([there.fileno()], [], [], PATIENCE)
        return there.receive(1.0)

    def closes() -> None:
        _native.Client(file).close()

    return [
        closes, receive, lambda: there.send(request), there.fileno,
        lambda: _native.connection_file(folder), lambda: _native.coordinator_pid(file),
        lambda: _native.check_run(config), lambda: _native.plan(config, LIMITS),
        lambda: _native.program(config, LIMITS), lambda: _native.check_model(model),
        lambda: _native.read_adapter(newest, model), lambda: _native.hash_file(file),
        lambda: _native.packed(lengths, 7), _native.keypair, _native.device_info,
        lambda: _refused(_native.hash_file, "/nowhere"),
    ]  # fmt: skip


def _refused(call: Callable[[str], object], argument: str) -> None:
    """An error is made of words, which need memory, too."""
    try:
        call(argument)
    except pm.Error:
        return


def pythons() -> None:
    """Refuse what Python is asked for within each call."""
    set_allocator = ctypes.pythonapi.PyMem_SetAllocator
    SHIM.nomem_python(ctypes.pythonapi.PyMem_GetAllocator, set_allocator)
    total = 0
    blocks = 0
    for call in calls():
        for attempt in range(3):  # the first two set up what is only set up once
            gc.collect()
            blocks = sys.getallocatedblocks()
            number = 0
            refused = True
            while refused:
                number += 1
                try:
                    SHIM.nomem_python_refuse(number)
                    call()
                    SHIM.nomem_python_refuse(0)  # which itself asks for memory
                except (MemoryError, ctypes.ArgumentError):
                    pass
                refused = SHIM.nomem_python_refused()
            gc.collect()
            if attempt == 2:
                total += number - 1
        grown = sys.getallocatedblocks() - blocks
        assert grown < number, f"{call}: {grown} blocks stay of {number} lives"
    print(json.dumps({"allocations": total, "refused": total, "absent": 0}))


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)  # a link that has no memory says so
    scenario = sys.argv[2]
    if scenario == "python":
        pythons()
    else:
        ours({"client": client, "run": run, "engine": engine, "messages": messages}[scenario])
