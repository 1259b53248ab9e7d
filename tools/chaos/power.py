"""Power loss: images of a run folder as a disk may have them, and what is loaded from them.

    python tools/chaos/power.py [--images N] [--resumes N] [--seed N]

A real run is recorded: every change to its folder, by every process (libdisk.so). Then its power is
cut at a random point, N times. What was fsynced by then is in the image. What was not may be: bytes
of a file in any 512-byte blocks, names of a folder in any order, or none of it. In every image the
last checkpoint that had been announced must be whole, the log must be readable with every durable
event that had been announced in it, and a resume must go on from that checkpoint or a later one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pantheraml as pm
from pantheraml import programs
from pantheraml.record import LogReader
from pantheraml.tiny import TinyLlama
from reap import at_end
from safetensors import SafetensorError
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent.parent
SHIM = ROOT / "build" / "release" / "tests" / "fault" / "libdisk.so"
BLOCK = 512

# A run with what changes its folder: saves and pruning, a name that is replaced, a full stop, a
# resume. Three of its coordinators are killed right behind a change, and the next ones write on.
# Its steps are long until that is done: a fast machine would end it before its client is back.
VICTIM = """
import os, select, signal, sys, time
from contextlib import suppress
from pathlib import Path
import pantheraml as pm
rows = [{"prompt": f"{n} and {n}", "completion": f" is {2 * n}."} for n in range(36)]
def reach(step):
    while run.step < step and run.state not in ("failed", "stopped", "finished"):
        run.wait_for_change(1)
def strike(ask=lambda: None):
    at, dead = Path(os.environ["PML_DISK_STRIKE"]), run.coordinator_pid
    at.touch()
    with suppress(pm.Error):  # it may die before it answers
        ask()
    deadline = time.monotonic() + 120
    while at.exists() or run.coordinator_pid in (None, dead):
        assert time.monotonic() < deadline, run.reason
        run.wait_for_change(0.1)
    while run.state not in ("running", "paused", "finished"):
        assert time.monotonic() < deadline, run.reason
        run.wait_for_change(0.1)
run = pm.finetune(sys.argv[1], rows, name="victim", max_steps=4000, max_length=64, save_steps=200,
                  save_total_limit=2, threads=1, deterministic=True, generate_length=16,
                  gradient_accumulation_steps=32)
reach(60)
strike()
reach(90)
run.pause(wait=True)
run.checkpoint("kept", wait=True)
run.set(learning_rate=1e-4).wait(600)
run.checkpoint("kept", wait=True)
strike(lambda: run.set(learning_rate=2e-4))
if run.state == "paused":
    run.resume(wait=True)
reach(200)
strike(lambda: run.checkpoint())
reach(260)
run.pause(wait=True)
run.set(gradient_accumulation_steps=1).wait(600)
run.stop(wait=True)
run.resume()
run.wait(600)
assert run.state == "finished", run.reason
restarts = [event for event in run.events() if event["type"] == "restart"]
assert [event["cause"] for event in restarts] == ["coordinator"] * 3, restarts
end = os.pidfd_open(run.coordinator_pid)
os.kill(run.coordinator_pid, signal.SIGTERM)
select.select([end], [], [])  # until then it may write
"""


# ---- what the disk has ------------------------------------------------------------------------


@dataclass(eq=False)
class Node:
    """A file or a folder: its changes in order, and when it was synced."""

    folder: bool
    changes: list[tuple[int, Any]] = field(default_factory=list)
    syncs: list[int] = field(default_factory=list)
    names: dict[str, Node] = field(default_factory=dict)  # of a folder: as programs see it

    def safe(self, cut: int) -> int:
        """Changes before this point of the record are on disk for sure, if power is cut there."""
        at = bisect_left(self.syncs, cut)
        return self.syncs[at - 1] if at else -1


class Disk:
    """The recorded changes of a folder, as nodes."""

    def __init__(self, record: Path, prefix: Path) -> None:
        self.root = Node(folder=True)
        self.prefix = prefix
        self.announced: list[tuple[int, dict[str, Any]]] = []  # (from this point on, event)
        self._pending: list[dict[str, Any]] = []
        self._text = b""
        self.operations = 0
        data = record.read_bytes()
        at = 0
        while at < len(data):
            end = data.index(b"\n", at)
            head = json.loads(data[at:end])
            body = data[end + 1 : end + 1 + head["size"]]
            at = end + 1 + head["size"] + 1
            self._take(self.operations, head, body)
            self.operations += 1

    def _find(self, path: str) -> tuple[Node, str]:
        parts = Path(path).relative_to(self.prefix).parts
        node = self.root
        for part in parts[:-1]:
            node = node.names[part]
        return node, parts[-1] if parts else ""

    def _node(self, path: str) -> Node:
        parent, name = self._find(path)
        return parent.names[name] if name else self.root

    def _name(self, index: int, *changes: tuple[Node, str, Node | None]) -> None:
        """One atomic change of names; it belongs to the folders that it touches."""
        for parent, name, node in changes:
            if node is None:
                parent.names.pop(name, None)
            else:
                parent.names[name] = node
        for parent in {id(parent): parent for parent, _, _ in changes}.values():
            mine = [(name, node) for folder, name, node in changes if folder is parent]
            parent.changes.append((index, mine))

    def _take(self, index: int, head: dict[str, Any], body: bytes) -> None:
        path, kind = head["path"], head["op"]
        if kind in ("create", "mkdir"):
            if path == str(self.prefix):
                return
            parent, name = self._find(path)
            self._name(index, (parent, name, Node(folder=kind == "mkdir")))
        elif kind == "write":
            self._node(path).changes.append((index, (head["at"], body)))
            self._watch_log(path, head["at"], body)
        elif kind in ("ftruncate", "ftruncate64", "empty"):
            self._node(path).changes.append((index, (head["at"], None)))
        elif kind in ("fsync", "fdatasync"):
            self._node(path).syncs.append(index)
            if path.endswith("/events.jsonl"):
                self.announced += [(index, event) for event in self._pending]
                self._pending = []
        elif kind in ("rename", "exchange"):
            (a, old), (b, new) = self._find(path), self._find(head["other"])
            back = b.names[new] if kind == "exchange" else None
            self._name(index, (b, new, a.names[old]), (a, old, back))
        elif kind == "unlink":
            parent, name = self._find(path)
            self._name(index, (parent, name, None))

    def _watch_log(self, path: str, at: int, body: bytes) -> None:
        if not path.endswith("/events.jsonl"):
            return
        self._text = self._text[:at] + body
        for line in body.split(b"\n"):
            if line.startswith(b'{"seq":') and line.endswith(b"}"):
                event = json.loads(line)
                if event["type"] in ("state", "applied", "refused", "checkpoint"):
                    self._pending.append(event)

    # ---- images -------------------------------------------------------------------------------

    def image(self, cut: int, chance: random.Random, target: Path) -> None:
        """Write what the disk may have after a power cut before operation `cut`."""
        self._lay(self.root, cut, chance, target)

    def _lay(self, node: Node, cut: int, chance: random.Random, target: Path) -> None:
        if not node.folder:
            target.write_bytes(self._bytes(node, cut, chance))
            return
        target.mkdir(mode=0o700, exist_ok=True)
        names: dict[str, Node] = {}
        safe = node.safe(cut)
        style = chance.choice(("all", "none", "first", "some"))
        position = -1
        first = chance.randrange(1 + sum(safe < index < cut for index, _ in node.changes))
        for index, changes in node.changes:
            if index >= cut:
                break
            if index > safe:
                position += 1
                kept = {
                    "all": True, "none": False, "first": position < first,
                    "some": chance.random() < 0.5,
                }[style]  # fmt: skip
                if not kept:
                    continue
            for name, child in changes:
                if child is None:
                    names.pop(name, None)
                else:
                    names[name] = child
        for name, child in names.items():
            self._lay(child, cut, chance, target / name)

    def _bytes(self, node: Node, cut: int, chance: random.Random) -> bytes:
        safe = node.safe(cut)
        style = chance.choice(("all", "none", "some", "some", "zeros"))
        data = bytearray()
        for index, (at, body) in node.changes:
            if index >= cut:
                break
            loose = index > safe
            if loose and (style == "none" or (style == "some" and chance.random() < 0.3)):
                continue
            if body is None:
                data[at:] = b"\0" * max(0, at - len(data))
                continue
            if len(data) < at + len(body):
                data.extend(b"\0" * (at + len(body) - len(data)))
            if not loose or style == "all":
                data[at : at + len(body)] = body
                continue
            # The length may be there without the blocks, and blocks in any order.
            for begin in range(at - at % BLOCK, at + len(body), BLOCK):
                low, high = max(begin, at), min(begin + BLOCK, at + len(body))
                if style == "some" and chance.random() < 0.7:
                    data[low:high] = body[low - at : high - at]
        return bytes(data)


# ---- what must hold ---------------------------------------------------------------------------


def is_whole(checkpoint: Path) -> str:
    """Why a checkpoint cannot be loaded; "" when it can. By MANIFEST, without our own reader."""
    try:
        listed = set()
        for line in (checkpoint / "MANIFEST").read_text().splitlines():
            digest, name = line.split("  ", 1)
            text = (checkpoint / name).read_bytes()
            listed.add(name)
            if hashlib.blake2b(text, digest_size=32).hexdigest() != digest:
                return f"{name} is not what MANIFEST says"
        for name in ("adapter_model.safetensors", "optimizer.safetensors"):
            load_file(checkpoint / name)
            listed.remove(name)
        json.loads((checkpoint / "state.json").read_text())
        listed.remove("state.json")
    except KeyError as error:
        return f"MANIFEST does not list {error}"
    except (OSError, ValueError, SafetensorError) as error:
        return str(error)
    return ""


def handed_over(run: Path, step: int) -> list[str]:
    """Give the checkpoints after a step that a dead coordinator's workers told the next one of."""
    path = run / "handover.jsonl"
    reports = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    events = [report.get("event", {}) for report in reports]
    return [e["path"] for e in events if e.get("type") == "checkpoint" and e["step"] > step]


def look_at(image: Path, announced: list[dict[str, Any]]) -> str:
    """What is wrong with an image; "" when nothing is."""
    run = image / "victim"
    checkpoints = [event for event in announced if event["type"] == "checkpoint"]
    last = checkpoints[-1] if checkpoints else None
    if last is not None and (why := is_whole(run / last["path"])):
        # Pruned for later ones, which the workers have told the next coordinator of.
        if not any(is_whole(run / path) == "" for path in handed_over(run, last["step"])):
            return f"{last['path']}: {why}"
    if not announced:
        return ""
    try:
        found = {event["seq"]: event for event in LogReader(run).read()}
    except pm.Error as error:
        return str(error)
    for event in announced:
        if found.get(event["seq"]) != event:
            return f"event {event['seq']} ({event['type']}) is lost"
    return ""


def resumes(image: Path, announced: list[dict[str, Any]]) -> str:
    """Why the image does not go on from the last announced checkpoint; "" when it does."""
    run = image / "victim"
    checkpoints = [event["step"] for event in announced if event["type"] == "checkpoint"]
    before = max((event["seq"] for event in LogReader(run).read()), default=0)
    log = (image / "coordinator.log").open("wb")
    child = subprocess.Popen(
        [str(programs.coordinator()), str(run), "--resume", "--", *programs.prepare()],
        stdout=log, stderr=log,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    wanted = {"running", "finished", "failed", "stopped"}
    state: dict[str, Any] = {}
    start: dict[str, Any] = {}
    try:
        while time.monotonic() < deadline and child.poll() is None and not state:
            time.sleep(0.02)
            events = [
                e for e in LogReader(run).read() if e["type"] == "state" and e["seq"] > before
            ]
            start = next((e for e in reversed(events) if e["state"] == "starting"), {})
            state = next((e for e in events if start and e["seq"] > start["seq"]
                          and e["state"] in wanted), {})  # fmt: skip
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(600)
    if state.get("state") not in ("running", "finished"):
        said = (image / "coordinator.log").read_text()[-300:]
        return f"it does not go on: {state.get('reason', said)}"
    at = int(start.get("checkpoint", "step-0").split("step-")[1].split("-")[0])
    if checkpoints and at < checkpoints[-1]:
        return f"it goes on from step {at}, though step {checkpoints[-1]} was announced"
    return ""


def record(folder: Path) -> Disk:
    """Record a whole run."""
    runs, made = folder / "runs", folder / "record"
    runs.mkdir(mode=0o700)
    model = TinyLlama(hidden=16, layers=1, heads=2, kv_heads=1, intermediate=16).write(
        folder / "model"
    )
    environment = {
        **os.environ, "LD_PRELOAD": str(SHIM), "PML_DISK_RECORD": str(made),
        "PML_DISK_PREFIX": str(runs), "PML_DISK_STRIKE": str(folder / "strike"),
        "PANTHERAML_RUNS": str(runs), "PML_SCOPE": "0",
        "PANTHERAML_CACHE": str(folder / "cache"),  # empty: the shards are made, not linked
    }  # fmt: skip
    subprocess.run([sys.executable, "-P", "-c", VICTIM, str(model)], env=environment, check=True)
    return Disk(made, runs)


def main() -> int:
    """Print one line of figures; the exit status says whether all held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--resumes", type=int, default=100, help="of them, resumed for real")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    at_end()
    if not SHIM.exists():
        print(f"{SHIM} is not there: tools/build -DPML_TESTS=ON", file=sys.stderr)
        return 2
    chance = random.Random(args.seed)
    bad = 0
    with tempfile.TemporaryDirectory(prefix="pml-power-") as name:
        folder = Path(name).resolve()
        disk = record(folder)
        os.environ["PML_SCOPE"] = "0"
        with_checkpoint = resumed = 0
        for number in range(args.images):
            cut = chance.randrange(1, disk.operations + 1)
            image = folder / f"image-{number}"
            disk.image(cut, chance, image)
            announced = [event for index, event in disk.announced if index < cut]
            with_checkpoint += any(e["type"] == "checkpoint" for e in announced)
            why = look_at(image, announced)
            if not why and announced and resumed < args.resumes and number % 2 == 0:
                why = resumes(image, announced)
                resumed += 1
            if why:
                bad += 1
                print(f"image {number}, cut before operation {cut}: {why}")
            shutil.rmtree(image)
    print(
        f"power: {args.images} images of {disk.operations} operations, {with_checkpoint} with an "
        f"announced checkpoint, {resumed} resumed: {bad} bad"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
