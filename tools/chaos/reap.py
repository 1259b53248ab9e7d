"""What somebody has started is ended with him, however he ends: for campaigns and for tests.

A run outlives its client on purpose, and so it outlives a campaign or a test that is killed. Here
a mark is laid into the environment, which every process inherits that is started from then on, and
a process stands aside that waits for the end of this one and then kills what bears the mark. Whom
it looks at it holds by a process descriptor: what is killed is what was seen, though its number may
be another's by then. A fork without an exec has the pipe, too: the end is awaited until it is gone.

Usage: tools/chaos/reap.py ENTRY     reads its input to the end, then kills what has ENTRY
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

MARK = "PML_REAPED_WITH"
LONGEST = 60.0  # seconds; what cannot be killed then waits for a disk that is gone
_aside: list[object] = []  # the process that stands aside, and the end of the pipe that we keep


def at_end() -> str:
    """Have all that is started from now on killed when this process is gone; gives the mark."""
    if not _aside:
        waits, ours = os.pipe()  # neither is inherited but by name
        entry = f"{MARK}={secrets.token_hex(8)}"
        unmarked = {name: value for name, value in os.environ.items() if name != MARK}
        process = subprocess.Popen(
            [sys.executable, "-P", __file__, entry], stdin=waits, env=unmarked,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(waits)
        _aside.extend((process, ours))
        os.environ[MARK] = entry.partition("=")[2]
    return f"{MARK}={os.environ[MARK]}"


def has(pid: int, entry: str) -> bool:
    """Whether a process is there, and was started with this in its environment."""
    with suppress(OSError):
        return entry.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False


def processes_with(entry: str) -> list[int]:
    """Processes that were started with this in their environment; not this one, and no zombies."""
    numbers = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return [pid for pid in numbers if pid != os.getpid() and has(pid, entry)]


def reap(entry: str) -> int:
    """Kill every process that has this in its environment; how many there were.

    One that is being started while we look is found at the next look.

    Raises
    ------
    TimeoutError
        Some are there still after LONGEST seconds.
    """
    killed = quiet = 0
    deadline = time.monotonic() + LONGEST
    while quiet < 3:
        found = 0
        if time.monotonic() > deadline:
            raise TimeoutError(f"not to be killed: {processes_with(entry)}")
        for pid in processes_with(entry):
            with suppress(ProcessLookupError):
                process = os.pidfd_open(pid)
                try:
                    if has(pid, entry):
                        signal.pidfd_send_signal(process, signal.SIGKILL)
                        found += 1
                finally:
                    os.close(process)
        killed += found
        quiet = quiet + 1 if found == 0 else 0
        time.sleep(0.02)
    return killed


if __name__ == "__main__":
    sys.stdin.buffer.read()
    reap(sys.argv[1])
