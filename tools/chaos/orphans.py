"""No orphans: how long processes of a run outlive their reason to live, and what is left of them.

Usage: tools/chaos/orphans.py [--times N] [--limit SECONDS] [--only WORDS] [--short]

A run is brought into a state (its data is tokenised, workers load, train, stand, evaluate, sample,
write a checkpoint), and then what it lives for goes: somebody stops it, its coordinator is asked to
end, its coordinator or its workers are killed, its last viewer is killed. The clock runs from that
moment to the end of the last process that the run has started; where viewers have a time of grace
(`PML_GRACE_SECONDS`), from the end of that.

Which processes are the run's is told by a mark in their environment, which all inherit that are
started for it, and each is held by a process descriptor: never by name, never by number alone. Who
is gone has to have left nothing: no lock that is held, no socket in /proc/net/unix, nothing in
/dev/shm, no half of a checkpoint, no runtime folder. Only who was killed leaves files that nobody
holds: a coordinator its runtime folder, which the run's next one removes, a worker the half of a
checkpoint, which goes with the next whole one.

The workers of a killed coordinator save and start another one where the run is to go on by itself:
then it is they who are timed, and the run has to make further steps.

A state may be over before the blow falls: whether it was not is told by the run's log. A try that
came too late is no end in that state, and is made again; it has to have left nothing, all the same.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pantheraml as pm
from common import marked, reach, wait_for, wait_for_end, work_in
from pantheraml import _native
from pantheraml.tiny import TinyLlama
from reap import at_end, processes_with

GRACE = 1.0  # seconds that a coordinator serves after the last sign of its last viewer
PATIENCE = 240.0
TRIES = 20  # for one end in a state; a state that is missed as often cannot be hit
ROWS = [{"prompt": f"{n} and {n}", "completion": f" is {2 * n}."} for n in range(64)]
MANY = [{"text": f"{n} and again {n}, as ever. " * 40} for n in range(4000)]
SHORT = [("coordinator killed", "tokenising"), ("stopped by a command", "sampling")]
STATES = ("tokenising", "loading", "training", "paused", "evaluating", "sampling", "saving")
VIEWER = """
import sys, time
import pantheraml as pm
run = pm.attach(sys.argv[1])
if sys.argv[2] == "finished":
    run.wait()
print("there", flush=True)
time.sleep(1e6)
"""
Take = Callable[["Subject"], float]


@dataclass
class Case:
    """What is taken from a run, in which state."""

    reason: str
    state: str
    #: Takes it; gives how long it may serve still.
    take: Take
    restart: str = "never"
    goes_on: bool = False


@dataclass
class Subject:
    """A run, and the processes that were started for it."""

    run: pm.Run
    entry: str
    children: list[subprocess.Popen[str]] = field(default_factory=list)

    def processes(self) -> list[int]:
        """All that bear its mark, but for viewers."""
        viewers = {child.pid for child in self.children}
        return [pid for pid in processes_with(self.entry) if pid not in viewers]

    def program(self, name: str) -> list[int]:
        """Those of its processes that run a program."""
        found = []
        for pid in self.processes():
            with suppress(OSError):
                if Path(f"/proc/{pid}/exe").readlink().name.startswith(name):
                    found.append(pid)
        return found

    def kill(self, name: str) -> None:
        """SIGKILL to all of its processes that run a program; there has to be one."""
        pids = self.program(name)
        if not pids:
            raise SystemExit(f"no {name} is there to be killed")
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


# ---- what a run lives for, and how it loses it ---------------------------------------------------


def stop(subject: Subject) -> float:
    """Stop it by a command, and look no further."""
    subject.run.stop()
    subject.run.close()
    return GRACE


def terminate(subject: Subject) -> float:
    """Ask the coordinator to end; nobody is waited for then."""
    subject.run.close()
    pids = subject.program("pml-coordinator")
    os.kill(pids[0], signal.SIGTERM)
    return 0


def kill_coordinator(subject: Subject) -> float:
    """SIGKILL to the coordinator."""
    subject.run.close()
    subject.kill("pml-coordinator")
    return 0


def kill_workers(subject: Subject) -> float:
    """SIGKILL to all workers of a run that is not to go on by itself."""
    subject.run.close()
    subject.kill("pml-worker")
    return GRACE


def kill_one_worker(subject: Subject) -> float:
    """SIGKILL to one of two workers of a run that is not to go on by itself."""
    subject.run.close()
    os.kill(subject.program("pml-worker")[0], signal.SIGKILL)
    return GRACE


def kill_prepare(subject: Subject) -> float:
    """SIGKILL to the child that tokenises."""
    subject.run.close()
    subject.kill("python")
    return GRACE


def kill_viewer(subject: Subject) -> float:
    """SIGKILL to the last viewer of a finished run, of which it says nothing to anybody."""
    subject.run.close()
    subject.children[-1].kill()
    subject.children[-1].wait()
    return GRACE


def cases() -> list[Case]:
    """All reasons, in all states where they can come about."""
    made = []
    for state in STATES:
        made.append(Case("stopped by a command", state, stop))
        made.append(Case("coordinator asked to end", state, terminate))
        made.append(Case("coordinator killed", state, kill_coordinator))
        if state not in ("tokenising", "loading"):
            made.append(Case("coordinator killed, run goes on", state, kill_coordinator,
                             "on-failure", True))  # fmt: skip
            made.append(Case("one of two workers killed", state, kill_one_worker))
        if state != "tokenising":
            made.append(Case("all workers killed", state, kill_workers))
    made.append(Case("tokenising child killed", "tokenising", kill_prepare))
    made.append(Case("last viewer killed", "finished", kill_viewer))
    return made


# ---- states --------------------------------------------------------------------------------------


def is_open(run: pm.Run, verb: str) -> bool:
    """Whether the last command of this verb was accepted, and has no end yet."""
    last, over = None, set()
    for event in run.events():
        if event["type"] == "command" and event["verb"] == verb:
            last = event["command"]
        if event["type"] in ("applied", "refused"):
            over.add(event["command"])
    return last is not None and last not in over


def bring_about(subject: Subject, state: str, chance: random.Random) -> None:
    """Bring a run that was just started into a state."""
    run = subject.run
    if state == "tokenising":
        wait_for(lambda: subject.program("python"), "the child that tokenises", PATIENCE)
        wait_for(
            lambda: any(e["type"] == "progress" for e in run.events()), "its first word", PATIENCE
        )
        return
    if state == "loading":
        wait_for(lambda: subject.program("pml-worker"), "a worker", PATIENCE)
        time.sleep(chance.uniform(0, 0.02))
        return
    if state == "finished":
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", VIEWER, str(run.folder), state],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        subject.children.append(child)
        assert child.stdout is not None and child.stdout.readline() == "there\n"
        return
    reach(run, 1)
    if state == "paused":
        run.pause(wait=True)
    elif state == "evaluating":
        run._command("evaluate", wait=False)
        wait_for(lambda: is_open(run, "evaluate"), "the evaluation", PATIENCE)
        time.sleep(chance.uniform(0.05, 0.3))
    elif state == "sampling":
        run.pause(wait=True)  # a sample that is asked for next is begun at once
        run._command("sample", wait=False, input_ids=[5, 6], max_new_tokens=2000,
                     temperature=1.0, seed=1)  # fmt: skip
        wait_for(
            lambda: any(e["type"] == "sample" for e in run.events()), "the first token", PATIENCE
        )
    elif state == "saving":
        run.checkpoint()
        wait_for(lambda: unfinished(run.folder), "a checkpoint that is being written", PATIENCE)
    time.sleep(chance.uniform(0, 0.05))


def unfinished(folder: Path) -> list[Path]:
    """Checkpoints that have no name yet."""
    return list((folder / "checkpoints").glob(".*.tmp-*"))


def was_in(state: str, run: pm.Run, taken: float) -> bool:
    """Whether a run's log bears out that it was in a state when its reason to live went."""
    events = [event for event in run.events() if event["time"] <= taken]
    kinds = [event["type"] for event in events]
    if state == "evaluating":
        return kinds.index("command") > 0 and "eval" not in kinds[kinds.index("command") :]
    if state == "sampling":
        return "sample" in kinds and not any(e.get("done") for e in events if e["type"] == "sample")
    if state == "saving":
        return "checkpoint" not in kinds
    if state in ("tokenising", "loading"):
        return "step" not in kinds
    last = [event["state"] for event in events if event["type"] == "state"][-1]
    return last == {"training": "running"}.get(state, state)


# ---- what is left --------------------------------------------------------------------------------


def is_locked(path: Path) -> bool:
    """Whether any byte of a file is locked by an open file description."""
    if not path.exists():
        return False
    with path.open("rb+") as file:
        ask = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, ask)
    return struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK


def named_memory(pid: int) -> list[str]:
    """Shared memory of a process that has a name, and so could outlive it."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:  # it has just gone
        return []
    fields = (line.split(maxsplit=5) for line in maps.splitlines())
    paths = {line[5] for line in fields if len(line) == 6}
    return [path for path in paths if path.startswith(("/dev/shm/", "/SYSV"))]


def left_behind(run: pm.Run, runtime: Path, shared: list[str], killed: Take) -> list[str]:
    """What a run whose processes are all gone still has, but for what who was killed leaves."""
    found = [f"{name} is locked" for name in ("lock", "workers") if is_locked(run.folder / name)]
    if str(runtime) in Path("/proc/net/unix").read_text():
        found.append(f"sockets in {runtime}")
    found += [path for path in shared if Path(path).exists()]
    if killed not in (kill_workers, kill_one_worker):
        found += [str(path) for path in unfinished(run.folder)]
    if killed is not kill_coordinator and runtime.exists():
        found.append(str(runtime))
    return found


# ---- the campaign --------------------------------------------------------------------------------


def settings(case: Case) -> dict[str, Any]:
    """What the run is started with."""
    given: dict[str, Any] = {
        "max_steps": 3 if case.state == "finished" else 10**6, "max_length": 64, "threads": 1,
        "packing": False, "devices": 2, "generate_length": 2048, "restart": case.restart,
        "per_device_train_batch_size": 2,
    }  # fmt: skip
    if case.state == "saving":
        given |= {"method": "full"}  # so much that it takes a while
    if case.state == "evaluating":
        given |= {"eval_data": ROWS * 10}  # one takes seconds
    return given


def measure(
    case: Case, model: Path, name: str, chance: random.Random
) -> tuple[float, list[str], bool]:
    """Take a run's reason to live: how long its processes stayed, what is left, whether in time."""
    with marked() as entry:
        rows = MANY if case.state == "tokenising" else ROWS
        run = pm.finetune(model, rows, name=name, **settings(case))
        subject = Subject(run, entry)
        try:
            runtime = Path(_native.connection_file(run.folder)).parent
            bring_about(subject, case.state, chance)
            pids = subject.processes()
            shared = [path for pid in pids for path in named_memory(pid)]
            date, begin = time.time(), time.monotonic()
            grace = case.take(subject)
            if case.goes_on:
                took = wait_for_end(pids, list, PATIENCE) - begin  # it has others then
                left = went_on(run)
            else:
                took = wait_for_end(pids, subject.processes, PATIENCE) - begin - grace
                left = left_behind(run, runtime, shared, case.take)
        finally:
            for child in subject.children:
                child.kill()
                child.communicate()
        return max(took, 0), left, was_in(case.state, run, date)


def went_on(run: pm.Run) -> list[str]:
    """See that a run whose coordinator was lost makes further steps, and end it."""
    again = pm.attach(run.folder, restart=False)
    if again.state == "paused":
        again.resume(wait=True)
    reach(again, again.step + 1)
    pid = again.coordinator_pid
    again.close()
    if pid is None:
        return ["no other coordinator"]
    os.kill(pid, signal.SIGTERM)
    return []


def main() -> int:
    """Print a table, the longest of each; the exit status says whether all held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--limit", type=float, default=10.0, help="seconds that it may take")
    parser.add_argument("--only", default="", help="cases whose names have these words")
    parser.add_argument("--short", action="store_true", help="two of the cases, once")
    parser.add_argument("--seed", type=int, default=20261122)
    args = parser.parse_args()
    at_end()
    os.environ["PML_GRACE_SECONDS"] = str(GRACE)
    chance = random.Random(args.seed)
    chosen = [case for case in cases() if args.only in f"{case.reason} while {case.state}"]
    if args.short:
        chosen = [case for case in chosen if (case.reason, case.state) in SHORT]
        if not args.only and len(chosen) != len(SHORT):
            parser.error(f"some of {SHORT} are no cases any more")
    if not chosen:
        parser.error(f"no case has the words {args.only!r}")
    number, late, bad, longest = 0, 0, 0, 0.0
    with tempfile.TemporaryDirectory(prefix="pml-orphans-") as name:
        work_in(Path(name))
        shape = TinyLlama(hidden=256, layers=4, intermediate=1024, positions=4096)
        model = shape.write(Path(name) / "model")
        for case in chosen:
            times: list[float] = []
            words = f"{case.reason} while {case.state}"
            missed = 0
            while len(times) < (1 if args.short else args.times):
                number += 1
                took, left, in_time = measure(case, model, f"orphans-{number}", chance)
                for what in left:
                    print(f"{words}: left behind: {what}", flush=True)
                if took > args.limit:
                    print(f"{words}: {took:.2f} s", flush=True)
                bad += bool(left) or took > args.limit
                if in_time:
                    times.append(took)
                elif (missed := missed + 1) == TRIES:
                    raise SystemExit(f"{words}: missed {TRIES} times")
            late += missed
            longest = max(longest, *times)
            print(f"{words:<48} {len(times):3} times, {max(times):6.2f} s", flush=True)
    print(f"orphans: {number - late} ends of {len(chosen)} kinds, longest {longest:.2f} s; "
          f"{late} tries came too late and were made again: {bad} bad")  # fmt: skip
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
