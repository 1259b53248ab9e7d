"""Flipped bits in a run folder: each is detected by name, and nothing damaged is loaded.

Usage: tools/chaos/flips.py [--flips N] [--seed S]

One bit of one file of a real run is flipped, anywhere in checkpoints, shards, log or run.json, and
the run is resumed. It must refuse, or go on without the damaged part and say so.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from common import end, make_model, reach, rows, work_in
from reap import at_end


def main() -> int:
    """Print one line of figures; the exit status says whether all held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=9)
    args = parser.parse_args()
    at_end()
    chance = random.Random(args.seed)
    told: Counter[str] = Counter()
    missed = 0
    with tempfile.TemporaryDirectory(prefix="pml-flips-") as name:
        work_in(Path(name))
        import pantheraml as pm
        from pantheraml.autopsy import examine_run

        run = pm.finetune(
            make_model(Path(name)), rows(), name="flips", max_steps=10**9, max_length=64,
            threads=1, generate_length=16, save_steps=100,
        )  # fmt: skip
        reach(run, 310)
        run.stop(wait=True)
        end(run)
        folder = run.folder
        kept = {
            p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "log" not in p.parts
        }
        targets = [
            p for p in kept
            if p.parent.parent.name == "checkpoints" or p.suffix == ".safetensors"
            or p.name in ("events.jsonl", "run.json")
        ]  # fmt: skip
        for _ in range(args.flips):
            path = chance.choice(targets)
            text = bytearray(kept[path])
            bit = chance.randrange(8 * len(text))
            text[bit // 8] ^= 1 << bit % 8
            path.write_bytes(text)
            part = path.relative_to(folder).as_posix()
            where = f"checkpoints/{path.parent.name}" if "checkpoints" in part else part
            found = {p.name: p.verdict for p in examine_run(folder).parts}
            if found.get(where) not in ("bad", "note"):
                missed += 1
                print(f"bit {bit} of {part}: not seen by the doctor")
            verdict = resume(pm, folder, part)
            told[verdict] += 1
            if verdict not in ("refused", "passed over", "torn"):
                missed += 1
                print(f"bit {bit} of {part}: {verdict}")
            for other in folder.rglob("*"):
                if other.is_file() and other not in kept and "log" not in other.parts:
                    other.unlink()
            for other, data in kept.items():
                other.parent.mkdir(exist_ok=True)
                other.write_bytes(data)
    words = ", ".join(f"{n} {verdict}" for verdict, n in sorted(told.items()))
    print(f"flips: {args.flips} bits: {words}; {missed} missed")
    return 1 if missed else 0


def resume(pm: object, folder: Path, part: str) -> str:
    """Resume for real: "refused" or "passed over" (by name), "torn" (cut, said), or what is bad.

    Refused is only what ends in order, with exit status 1 or the state `failed`, and names the
    damaged file. A coordinator that crashes, hangs or says nothing is none of these.
    """
    import subprocess

    from pantheraml import programs
    from pantheraml.errors import Error
    from pantheraml.record import LogReader

    before = (folder / "events.jsonl").read_bytes().count(b"\n")
    said_at_end = tempfile.TemporaryFile("w+")
    child = subprocess.Popen(
        [str(programs.coordinator()), str(folder), "--resume"],
        stdout=subprocess.DEVNULL, stderr=said_at_end,
    )  # fmt: skip
    fate, reason = "", ""
    deadline = time.monotonic() + 600
    try:
        while child.poll() is None and time.monotonic() < deadline:
            try:
                events = LogReader(folder).read()
            except Error:  # the log itself is damaged: its own words count
                time.sleep(0.02)
                continue
            new = [e for e in events if e["seq"] > before - 2]
            states = [e["state"] for e in new if e["type"] == "state"]
            if "failed" in states[1:]:
                reason = " ".join(e.get("reason", "") for e in new if e["type"] == "state")
                break
            if "starting" in states and "running" in states[states.index("starting") :]:
                said = " ".join(e["message"] for e in new if e["type"] == "log")
                name = Path(part).parent.name
                fate = "torn" if "torn end" in said and part == "events.jsonl" else "loaded"
                if "checkpoints/" in part:
                    start = [e for e in new if e["type"] == "state" and e["state"] == "starting"][
                        -1
                    ]
                    used = start.get("checkpoint", "")
                    fate = "loaded" if used == f"checkpoints/{name}" else "passed over"
                break
            time.sleep(0.02)
    finally:
        status = child.poll()  # None: it goes on
        child.terminate()
        child.wait(600)
    with said_at_end:
        said_at_end.seek(0)
        return fate or judge(status, reason, said_at_end.read(), Path(part))


def judge(status: int | None, reason: str, stderr: str, part: Path) -> str:
    """Tell a refusal that names the damaged file from a crash, a hang and a vague end."""
    words = reason + stderr
    if not reason and status is None:
        return "hung"
    if not reason and status != 1:
        return f"ended with status {status}: {words[-300:]}"
    return "refused" if part.name in words else f"refused without its name: {words[-300:]}"


if __name__ == "__main__":
    sys.exit(main())
