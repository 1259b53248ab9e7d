"""A disk that is really full, and then has room again: a run on a small tmpfs, without any shim.

Usage: tools/chaos/full.py [--times N]     as root, or where a user may mount in a namespace

Somebody else's file takes the last byte of the disk that a run writes to. The run trains on, says
what is wrong and what to do, and is paused by itself when too many events wait in memory. Then the
file is removed, and nobody touches the run: it has to say for how long it waited, to go on by
itself, and to announce its next checkpoint. Times are from the removal. At the end the log has
every event once and each step, and the last checkpoint is whole.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pantheraml as pm
from common import end, make_model, reach, rows, wait_for, work_in
from reap import at_end

PATIENCE = 240.0
MIB = 1 << 20
SIZE = 8 * MIB
HELD = 16 << 10  # bytes of events that may wait before the run is paused


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount one; who may not is told so."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "pml", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(path: Path) -> None:
    """Take what is left of a disk, to the last byte: what was freed meanwhile, too."""
    with path.open("ab", buffering=0) as file:
        size = MIB
        while size > 0:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2


def since(run: pm.Run, seq: int, kind: str, **fields: object) -> bool:
    """Whether an event of this kind has come after another one."""
    return any(
        event["type"] == kind and all(event.get(name) == fields[name] for name in fields)
        for event in run.events()
        if event["seq"] > seq
    )


def once(run: pm.Run, disk: Path) -> tuple[float, float, float, list[str]]:
    """Fill it and free it; seconds to the warning, to the next step, to the checkpoint."""
    bad = []
    blob = disk / "somebody-elses"
    reach(run, run.step + 5)

    def stands() -> bool:
        fill(blob)
        return run.state == "paused" and "No space left" in run.reason

    wait_for(stands, "the run to stand by itself", PATIENCE)
    said = run.reason
    if "make room" not in said or "events wait in memory" not in said:
        bad.append(f"what is said is: {said}")
    refused = run.checkpoint()
    wait_for(lambda: refused.trouble or refused.state != "accepted", "its answer", PATIENCE)
    if "No space left" not in refused.trouble:
        bad.append(f"a command that waits is answered without why: {refused.trouble!r}")
    seq, step = run.last_seq(), run.step
    blob.unlink()
    begin = time.monotonic()
    wait_for(lambda: since(run, seq, "log", level="warning"), "the word that it is over", PATIENCE)
    told = time.monotonic() - begin
    wait_for(lambda: run.state == "running" and run.step > step, "the next step", PATIENCE)
    steps = time.monotonic() - begin
    wait_for(lambda: since(run, seq, "checkpoint"), "the next checkpoint", PATIENCE)
    saved = time.monotonic() - begin
    messages = [e["message"] for e in run.events() if e["type"] == "log" and e["seq"] > seq]
    for words in ("events waited in memory and are in the log now", "the run goes on"):
        if not any(words in message for message in messages):
            bad.append(f"nobody says that {words}: {messages}")
    return told, steps, saved, bad


def campaign(times: int) -> int:
    """Print one line of figures; the exit status says whether all held."""
    worst, bad = [0.0, 0.0, 0.0], []
    with tempfile.TemporaryDirectory(prefix="pml-full-") as name:
        work_in(Path(name))
        with small_disk(Path(name) / "disk") as disk:
            os.environ |= {"PANTHERAML_RUNS": str(disk / "runs"), "PML_HELD_BYTES": str(HELD)}
            run = pm.finetune(
                make_model(Path(name)), rows(), name="full", max_steps=10**9, max_length=64,
                threads=1, devices=2, generate_length=16, gradient_accumulation_steps=4,
                save_steps=10**9, save_total_limit=2,
            )  # fmt: skip
            try:
                for _ in range(times):
                    *seconds, wrong = once(run, disk)
                    worst = [max(pair) for pair in zip(worst, seconds, strict=True)]
                    bad += wrong
                run.stop(wait=True)
                sequence = [event["seq"] for event in run.events()]
                if sequence != list(range(1, len(sequence) + 1)):
                    bad.append("the log has a gap")
                if [row["step"] for row in run.history] != list(range(1, run.step + 1)):
                    bad.append("the history has a gap")
                newest = run.checkpoints[-1].path
                again = pm.resume(run.folder)
                reach(again, again.step + 1)
                begun = [e for e in again.events() if e.get("state") == "starting"][-1]
                if run.folder / begun.get("checkpoint", "") != newest:
                    bad.append(f"it does not go on from {newest}: {begun}")
            finally:
                end(run)
    for what in dict.fromkeys(bad):
        print(what, flush=True)
    print(
        f"full: {times} times a disk was full until the run stood; with room again it said so"
        f" after {worst[0]:.2f} s, made its next step after {worst[1]:.2f} s and announced its next"
        f" checkpoint after {worst[2]:.2f} s at most: {len(bad)} bad"
    )
    return bool(bad)


def main() -> int:
    """Do it, in a namespace of our own: the disk goes with the last process that has it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--apart", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "--apart" not in sys.argv:
        apart = ["unshare", "-m" if os.geteuid() == 0 else "-rm", sys.executable, *sys.argv]
        return subprocess.run([*apart, "--apart"], check=False).returncode
    at_end()
    return campaign(args.times)


if __name__ == "__main__":
    sys.exit(main())
