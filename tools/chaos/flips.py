"""Flipped bits in a run folder: each is detected by name, and nothing damaged is loaded.

Usage: tools/chaos/flips.py [--flips N] [--seed S]

One bit of one file of a real run is flipped, anywhere in checkpoints, shards, log or run.json. The
doctor must see it, and the run is resumed so that the damaged part is what it would go on from:

- a checkpoint is asked for by its name: refused, with the name of its file, and nothing starts;
- the newest one also by nobody: the one before it is loaded, and the log names what was damaged;
- of shards, log and run.json there is no other: refused by name, or a torn end cut, and said.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import end, make_model, reach, rows, work_in
from reap import at_end

BY_NAME, PASSED_OVER, REFUSED, TORN = (
    "checkpoints asked for refused by the name of the file and nothing started",
    "newest checkpoints passed over for the one before and named in the log",
    "other files refused by name",
    "torn ends of the log cut and said",
)


def main() -> int:
    """Print one line of figures; the exit status says whether all held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=9)
    args = parser.parse_args()
    at_end()
    chance = random.Random(args.seed)
    told: Counter[str] = Counter()
    seen = missed = 0
    with tempfile.TemporaryDirectory(prefix="pml-flips-") as name:
        work_in(Path(name))
        from pantheraml.autopsy import examine_run

        folder = train(Path(name))
        files = sorted(folder.rglob("*"))  # so that a seed means the same bits on every disk
        kept = {p: p.read_bytes() for p in files if p.is_file() and "log" not in p.parts}
        targets = [
            p for p in kept
            if p.parent.parent.name == "checkpoints" or p.suffix == ".safetensors"
            or p.name in ("events.jsonl", "run.json")
        ]  # fmt: skip
        order = sorted(p.name for p in (folder / "checkpoints").iterdir())
        for _ in range(args.flips):
            path = chance.choice(targets)
            text = bytearray(kept[path])
            bit = chance.randrange(8 * len(text))
            text[bit // 8] ^= 1 << bit % 8
            kept_now = kept | {path: bytes(text)}
            put_back(folder, kept_now)
            part = path.relative_to(folder)
            checkpoint = part.parent.name if part.parts[0] == "checkpoints" else ""
            found = {p.name: p.verdict for p in examine_run(folder).parts}
            if found.get(f"checkpoints/{checkpoint}" if checkpoint else str(part)) in (
                "bad",
                "note",
            ):
                seen += 1
            else:
                missed += 1
                print(f"bit {bit} of {part}: not seen by the doctor")
            verdicts = []
            if checkpoint:
                verdicts.append(by_name(resume(folder, checkpoint), part))
                put_back(folder, kept_now)  # what has been tried has left a log
            if checkpoint == order[-1]:
                verdicts.append(passed_over(resume(folder), part, order[-2]))
            if not checkpoint:
                verdicts.append(refused_or_torn(resume(folder), part))
            for verdict in verdicts:
                if verdict in (BY_NAME, PASSED_OVER, REFUSED, TORN):
                    told[verdict] += 1
                else:
                    missed += 1
                    print(f"bit {bit} of {part}: {verdict}")
    words = "; ".join(f"{told[what]} {what}" for what in (BY_NAME, PASSED_OVER, REFUSED, TORN))
    print(f"flips: {args.flips} bits, {seen} seen by the doctor: {words}; {missed} missed")
    return 1 if missed else 0


def train(place: Path) -> Path:
    """Folder of a run of two timelines, with checkpoints of both."""
    import pantheraml as pm

    run = pm.finetune(
        make_model(place), rows(), name="flips", max_steps=10**9, max_length=64, threads=1,
        generate_length=16, save_steps=100,
    )  # fmt: skip
    reach(run, 110)
    run.stop(wait=True)
    run.resume(wait=True)
    reach(run, 310)
    run.stop(wait=True)
    end(run)
    return run.folder


def put_back(folder: Path, kept: dict[Path, bytes]) -> None:
    """Have these files there, with these bytes, and no other ones but what processes said."""
    for other in folder.rglob("*"):
        if other.is_file() and other not in kept and "log" not in other.parts:
            other.unlink()
    for other, data in kept.items():
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(data)
    for left in (folder / "checkpoints").iterdir():
        if not any(left.iterdir()):
            left.rmdir()


@dataclass
class Outcome:
    """What came of a resume."""

    started: bool = False  # workers were started, whatever became of them
    running: bool = False  # it trains
    used: str = ""  # the checkpoint that it started from
    logged: str = ""  # what is new in the log as words
    reason: str = ""  # of the state `failed`
    status: int | None = None  # of the coordinator, None: it goes on
    stderr: str = ""


def resume(folder: Path, checkpoint: str = "") -> Outcome:
    """Resume for real, until it trains or has ended; its processes are gone then."""
    from pantheraml import programs
    from pantheraml.errors import Error
    from pantheraml.record import LogReader

    before = (folder / "events.jsonl").read_bytes().count(b"\n")
    out = Outcome()
    named = [checkpoint] if checkpoint else []
    with tempfile.TemporaryFile("w+", errors="backslashreplace") as stderr:
        child = subprocess.Popen(
            [str(programs.coordinator()), str(folder), "--resume", *named],
            stdout=subprocess.DEVNULL, stderr=stderr,
        )  # fmt: skip
        deadline = time.monotonic() + 600
        try:
            last = False
            while not last and not out.running and not out.reason and time.monotonic() < deadline:
                last = child.poll() is not None  # then once more: nothing comes after that
                try:
                    events = LogReader(folder).read()
                except Error:  # the log itself is damaged: its own words count
                    time.sleep(0.02)
                    continue
                take(out, [e for e in events if e["seq"] > before - 2])
                time.sleep(0 if last else 0.02)
        finally:
            out.status = child.poll()
            child.terminate()
            child.wait(600)
        stderr.seek(0)
        out.stderr = stderr.read()
    return out


def take(out: Outcome, new: list[dict[str, Any]]) -> None:
    """Learn from what a resume has logged. A torn end makes its first event one that was there."""
    states = [e for e in new if e["type"] == "state"]
    names = [e["state"] for e in states]
    out.logged = " ".join(e["message"] for e in new if e["type"] == "log")
    if "failed" in names[1:]:
        out.reason = " ".join(e.get("reason", "") for e in states)
    if "starting" in names:
        at = names.index("starting")
        out.started = True
        out.used = states[at].get("checkpoint", "")
        out.running = "running" in names[at:]


def by_name(out: Outcome, part: Path) -> str:
    """Tell whether a damaged checkpoint that was asked for was refused, and nothing started."""
    if out.started:
        return f"{part.parent} was asked for, and a start made from {out.used or 'nothing'}"
    if str(part.parent) not in out.stderr:
        return f"refused without the name of its checkpoint: {out.stderr[-300:]}"
    verdict = judge(out.status, out.reason, out.stderr, part)
    return BY_NAME if verdict == "refused" else verdict


def passed_over(out: Outcome, part: Path, before: str) -> str:
    """Tell whether the checkpoint before the damaged newest one was loaded, and the log says so."""
    if not out.running:
        return judge(out.status, out.reason, out.stderr, part) + ", and not passed over"
    if out.used != f"checkpoints/{before}":
        return f"loaded {out.used or 'nothing'}, not checkpoints/{before}"
    if f"checkpoint {part.parent.name} is not used" not in out.logged:
        return f"passed over without a word: {out.logged[-300:]}"
    if part.name not in out.logged:
        return f"passed over without the name of its file: {out.logged[-300:]}"
    return PASSED_OVER


def refused_or_torn(out: Outcome, part: Path) -> str:
    """Tell whether what stands once was refused; the end of the log may be cut, and said."""
    if out.running:
        torn = part.name == "events.jsonl" and "torn end" in out.logged
        return TORN if torn else "loaded"
    verdict = judge(out.status, out.reason, out.stderr, part)
    return REFUSED if verdict == "refused" else verdict


def judge(status: int | None, reason: str, stderr: str, part: Path) -> str:
    """Tell a refusal that names the damaged file from a crash, a hang and a vague end.

    Refused is only what ends in order, with exit status 1 or the state `failed`, and names the
    damaged file. A coordinator that crashes, hangs or says nothing is none of these.
    """
    words = reason + stderr
    if not reason and status is None:
        return "hung"
    if not reason and status != 1:
        return f"ended with status {status}: {words[-300:]}"
    return "refused" if part.name in words else f"refused without its name: {words[-300:]}"


if __name__ == "__main__":
    sys.exit(main())
