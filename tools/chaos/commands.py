"""Clients that die in the midst of a command: it has its one effect or none, and never two.

Usage: tools/chaos/commands.py [--kills N] [--seed S]

Each client connects, sends one command and gets SIGKILL, at a random moment between before its
message has left it and after the answer has come. Commands set the learning rate to a value of
their own, or ask for a checkpoint of their own name; every second one is sent again by another
client under the same id, as one does that was killed and wants to be sure. Another process of the
same user, that follows the run all the while, has to see it as the log has it. Then, of each id:

- there is one event `command` at most, and exactly one for each id that was sent again, by whose
  number the repeated one was answered;
- each of those has one end, and it is `applied`, for there is nothing here that a run refuses; each
  step was made with the rate that was applied last before it, so none took effect twice or in
  secret;
- there is one checkpoint of a name, and it is whole, or none.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pantheraml as pm
from common import end, make_model, reach, rows, work_in
from pantheraml import _native
from reap import at_end

PATIENCE = 240.0
LONGEST = 0.006  # seconds that a client lives after it has sent, at most
CLIENT = """
import os, signal, sys, time
from pantheraml import _native
client = _native.Client(sys.argv[1])
while not any(kind == "up" for kind, _ in client.receive(0.1)):
    pass
print("there", flush=True)
delay, text = sys.stdin.readline().split(" ", 1)
client.send(text.strip())
over = time.perf_counter() + float(delay)
while time.perf_counter() < over:
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""
WATCHER = """
import json, sys
import pantheraml as pm
run = pm.attach(sys.argv[1])
print("there", flush=True)
last = int(sys.stdin.readline())
while run.last_seq() < last:
    run.wait_for_change(1)
print(json.dumps([event for event in run.events() if event["seq"] <= last]))
"""


@dataclass
class Sent:
    """A command of a client that was killed."""

    id: str
    message: dict[str, Any]
    again: bool


def begin(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a Python that says when it is there."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    if process.stdout.readline() != "there\n":
        raise SystemExit("a client did not come up")
    return process


def command(number: int) -> dict[str, Any]:
    """One that leaves a trace which no other one leaves."""
    if number % 5 == 4:
        return {"type": "checkpoint", "name": f"kill-{number}"}
    return {"type": "set", "learning_rate": (1 + number) * 1e-6}


def ask_again(client: _native.Client, message: dict[str, Any]) -> dict[str, Any]:
    """Send a message from here; its answer."""
    client.send(json.dumps(message))
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for kind, text in client.receive(0.1):
            answer = json.loads(text) if kind == "answer" else {}
            if answer.get("id") == message["id"]:
                return dict(answer)
    raise SystemExit(f"no answer to {message}")


def strike(run: pm.Run, kills: int, chance: random.Random) -> tuple[list[Sent], dict[str, int]]:
    """Have clients killed; what they sent, and the numbers by which repeated ones were answered."""
    file = _native.connection_file(run.folder)
    sent: list[Sent] = []
    answered: dict[str, int] = {}
    with _native.Client(file) as here:
        for number in range(kills):
            process = begin(CLIENT, file)
            message = {"id": f"killed-{number}", **command(number)}
            delay = 0.0 if chance.random() < 0.3 else chance.uniform(0, LONGEST)
            again = number % 2 == 1
            process.communicate(f"{delay} {json.dumps(message)}\n")
            if again:  # at once: the first may be on its way still
                answer = ask_again(here, message)
                if answer["type"] != "accepted":
                    raise SystemExit(f"{message} sent again: {answer}")
                answered[message["id"]] = answer["command"]
            sent.append(Sent(message["id"], message, again))
            reach(run, run.step + chance.randint(0, 3))
    return sent, answered


def wrong_rates(events: list[dict[str, Any]]) -> list[int]:
    """Steps that were made with another rate than the last that was applied for them."""
    rates: dict[int, float] = {}  # from this step on
    for event in events:
        if event["type"] == "applied" and "learning_rate" in event.get("args", {}):
            rates[event["step"]] = event["args"]["learning_rate"]
    wrong, now = [], None
    for event in events:
        if event["type"] == "step":
            now = rates.get(event["step"], now)
            if now is not None and abs(event["learning_rate"] - now) > 1e-12:
                wrong.append(event["step"])
    return wrong


def judge(
    run: pm.Run, sent: list[Sent], answered: dict[str, int], events: list[dict[str, Any]]
) -> tuple[Counter[tuple[str, bool]], list[str]]:
    """How many commands came to which end, by whether they were sent again; what was not so."""
    bad = [f"step {step} has another rate" for step in wrong_rates(events)]
    came: Counter[tuple[str, bool]] = Counter()
    for one in sent:
        taken = [e["command"] for e in events if e["type"] == "command" and e["id"] == one.id]
        if len(taken) > 1 or (one.again and taken != [answered[one.id]]):
            bad.append(f"{one.id} is command {taken}, answered {answered.get(one.id)}")
        ends = [e for e in events if e["type"] in ("applied", "refused") and e["command"] in taken]
        kinds = [e["type"] for e in ends]
        if kinds != ["applied"] * len(taken):
            bad.append(f"{one.id} is command {taken}, and its ends are {ends}")
        came[" ".join(kinds), one.again] += 1
        if one.message["type"] == "checkpoint":
            made = {c.path for c in run.checkpoints if c.name == one.message["name"]}
            if len(made) != kinds.count("applied") or not all(path.exists() for path in made):
                bad.append(f"{one.id} made {made}")
    return came, bad


def campaign(folder: Path, kills: int, chance: random.Random) -> tuple[str, bool]:
    """Do it; what came of it, and whether all held."""
    run = pm.finetune(
        make_model(folder), rows(), name="killed", max_steps=10**9, max_length=64, threads=1,
        devices=2, generate_length=16, gradient_accumulation_steps=8, lr_scheduler_type="constant",
    )  # fmt: skip
    watcher = None
    try:
        reach(run, 1)
        watcher = begin(WATCHER, run.folder)
        sent, answered = strike(run, kills, chance)
        run.set(weight_decay=0.25, wait=True)  # what was on its way has come before the end of this
        run.checkpoint(wait=True)
        reach(run, run.step + 3)
        run.stop(wait=True)
        last = run.last_seq()
        events = [event for event in run.events() if event["seq"] <= last]
        seen = json.loads(watcher.communicate(f"{last}\n", timeout=PATIENCE)[0])
        came, bad = judge(run, sent, answered, events)
        if seen != events:
            bad.append("another client has seen something else")
        for what in bad:
            print(what, flush=True)
    finally:
        if watcher is not None:
            watcher.kill()
            watcher.wait()
        end(run)
    once, again = came["applied", False], came["applied", True]
    refused = sum(n for (ends, _), n in came.items() if "refused" in ends)
    return (
        f"commands: {kills} clients killed; of {sum(not one.again for one in sent)} that nobody"
        f" sent again {once} took effect once and {came['', False]} not at all, of"
        f" {sum(one.again for one in sent)} sent again {again} took effect once; {refused} refused:"
        f" {len(bad)} bad",
        not bad,
    )


def main() -> int:
    """Print one line of figures; the exit status says whether all held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=20261122)
    args = parser.parse_args()
    at_end()
    with tempfile.TemporaryDirectory(prefix="pml-commands-") as name:
        work_in(Path(name))
        said, good = campaign(Path(name), args.kills, random.Random(args.seed))
    print(said)
    return not good


if __name__ == "__main__":
    sys.exit(main())
