"""Kill what can be killed, and compare what is left with a run that was let alone.

Usage: tools/chaos/kill.py [--kills N] [--steps N] [--seed S] [--load L] [--keep]

Runs with two workers in deterministic mode are steered by a client with 20 random commands each.
At random moments the client, a worker, the coordinator or all of them get SIGKILL, or are stopped
for a while (SIGSTOP, SIGCONT). Moments are counted in the run's steps, not in seconds: a slow
machine gives as many commands and strikes to a run as a fast one. Nobody helps: the run has to end
by itself, and then

- its weights and optimizer state are bitwise those of an undisturbed run with the same settings
  from the same steps on, and so is every number of its history, which has no gap, and of its
  evaluations, of which none is missing;
- every checkpoint that was asked for was written, or the log says why not;
- its log has every event once, and no more restarts than something of it was killed;
- when nobody looks at it any more, every process that was started for it and for the undisturbed
  run ends by itself: all that bear a mark that they inherit are looked for, whoever started them.

The undisturbed run starts from a log that holds nothing but the settings, as `applied` at their
steps. Which those are is worked out here from the disturbed run's log, not by the engine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pantheraml as pm
from common import load, marked, wait_for, wait_for_end, work_in
from pantheraml import sums
from pantheraml.tiny import TinyLlama
from reap import at_end, processes_with

COMMANDS = 20  # a run
FIRST_SETS = 3  # the first of them change settings, before the first strike
KILLS = 10  # a run, at most
GRACE = 1.0  # seconds that a coordinator serves after the last sign of its last viewer
PATIENCE = 600.0  # seconds: longer than anything takes on a machine that works
ROWS = [
    {"prompt": f"{a} plus {b} is ", "completion": f"{a + b}."} for a in range(8) for b in range(8)
]
SETTINGS: dict[str, Any] = {
    "deterministic": True, "shuffle": True, "eval_data": ROWS[:4], "eval_steps": 50,
    "lr_scheduler_type": "cosine", "warmup_steps": 5, "per_device_train_batch_size": 2,
    "learning_rate": 1e-3, "max_length": 64, "packing": False, "threads": 1, "generate_length": 64,
    "devices": 2, "max_restarts": 1000, "save_total_limit": 3,
}  # fmt: skip

# What is set while it trains: every setting that later steps depend on.
SET: dict[str, Callable[[random.Random], Any]] = {
    "learning_rate": lambda chance: chance.uniform(1e-4, 5e-3),
    "weight_decay": lambda chance: chance.uniform(1e-4, 5e-3),
    "max_grad_norm": lambda chance: chance.uniform(1e-4, 5e-3),
    "lora_dropout": lambda chance: chance.uniform(0, 0.5),
    "gradient_accumulation_steps": lambda chance: chance.randint(1, 3),
    "warmup_steps": lambda chance: chance.randint(0, 20),
    "lr_scheduler_type": lambda chance: chance.choice(["linear", "cosine", "constant"]),
}


def go_ahead(run: pm.Run, steps: int, also: Callable[[], bool] = lambda: False) -> None:
    """Wait until a run has made so many steps more, has ended, or something else is so."""
    goal = run.step + steps
    wait_for(
        lambda: run.step >= goal or run.state in ("finished", "failed") or also(),
        f"step {goal} of {run.name}, which is {run.state} at step {run.step}",
        PATIENCE,
    )


# ---- the client: another process, that may be killed ---------------------------------------------


def command(run: pm.Run, chance: random.Random) -> None:
    """Give one random command; what has an answer waits for it."""
    verb = chance.choice(["set"] * 5 + ["pause", "checkpoint", "evaluate", "sample"])
    if verb == "set":
        change(run, chance)
    elif verb == "pause":
        run.pause()
        time.sleep(chance.uniform(0, 0.1))
        run.resume()
    elif verb == "checkpoint":
        run.checkpoint()
    elif verb == "evaluate":
        run.evaluate()
    else:
        run.sample(input_ids=[5, 6], max_new_tokens=8, temperature=1.0)


def change(run: pm.Run, chance: random.Random, wait: bool = False) -> None:
    """Change one setting."""
    name = chance.choice(list(SET))
    run.set(wait=wait, **{name: SET[name](chance)})


def client(folder: Path, seed: int, first: int) -> None:
    """Give the commands from number `first` on, and say which were given.

    The run stands when the first client comes, until the first settings are in force.
    """
    run = pm.attach(folder)
    for number in range(first, COMMANDS):
        chance = random.Random(f"{seed}-{number}")
        if number < FIRST_SETS:
            change(run, chance, wait=True)
            print(number + 1, flush=True)
            continue
        if number > FIRST_SETS:
            ahead = chance.randint(0, run.max_steps // COMMANDS)
            go_ahead(run, ahead, also=lambda: run.state == "paused")
        if run.state in ("finished", "failed"):
            break
        with suppress(pm.Error):  # refused, or its coordinator was killed: the log has what counts
            if run.state == "paused":
                run.resume()
            command(run, chance)
        print(number + 1, flush=True)


class Client:
    """The client's process, started again when it was killed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed, self._given = folder, seed, 0
        self._start()

    def _start(self) -> None:
        call = [sys.executable, __file__, "--client", str(self._folder), "--seed", str(self._seed)]
        self.process = subprocess.Popen(
            [*call, "--first", str(self._given)], stdout=subprocess.PIPE, text=True
        )

    def kill(self) -> None:
        """Kill it, and let another one give the rest."""
        self.process.kill()
        self._read()
        self._start()

    def is_done(self) -> bool:
        """Whether it has given all of them."""
        return self.process.poll() is not None

    def wait(self) -> None:
        """Let it give all of them."""
        wait_for(self.is_done, "the client", PATIENCE)
        self._read()
        if self.process.returncode != 0:
            raise SystemExit(f"the client ended with status {self.process.returncode}")

    def _read(self) -> None:
        text, _ = self.process.communicate()
        self._given = max([self._given, *map(int, text.split())])


# ---- what is done to a run -----------------------------------------------------------------------


def processes(run: pm.Run) -> list[int]:
    """Give the coordinator's process id and the workers', as far as they are there."""
    found = [run.coordinator_pid, *(worker["pid"] for worker in run.workers)]
    return [pid for pid in found if pid]


def is_ours(pid: int, run: pm.Run) -> bool:
    """Whether a process id is still one of this run's: it may be a stranger's by now."""
    with suppress(OSError):
        name = Path(f"/proc/{pid}/exe").readlink().name
        open_files = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        return name in ("pml-coordinator", "pml-worker") and any(
            path.startswith(str(run.folder)) for path in open_files
        )
    return False


def strike(run: pm.Run, steering: Client, chance: random.Random) -> int:
    """Kill or stop something; returns how many of its processes were killed."""
    what = chance.choice(["client", "stop", "all"] + ["worker"] * 3 + ["coordinator"] * 3)
    there = [pid for pid in processes(run) if is_ours(pid, run)]
    if what == "client" or not there:
        steering.kill()
        return 0
    coordinator, workers = run.coordinator_pid, [w["pid"] for w in run.workers]
    if what == "stop":
        stopped = chance.sample(there, chance.randint(1, len(there)))
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        time.sleep(chance.uniform(0.2, 1.5))
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        return 0
    victims = there if what == "all" else [coordinator] if what == "coordinator" else workers
    victims = [pid for pid in victims if pid in there]
    if what == "worker" and victims:
        victims = [chance.choice(victims)]
    killed = 0
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            killed += 1
    return killed


def sets(run: pm.Run) -> int:
    """Count the settings that were changed and came into force."""
    return sum(e["type"] == "applied" and e["verb"] == "set" for e in run.events())


def is_left(run: pm.Run, steering: Client) -> bool:
    """Whether a run stands and nobody will have it go on: the last client's `resume` was lost."""
    return steering.is_done() and run.state == "paused"


def release(run: pm.Run, steering: Client) -> None:
    """Let a run go on that was left."""
    with suppress(pm.Error):  # its coordinator is gone just now
        if is_left(run, steering):
            run.resume()


def disturbed(model: Path, name: str, seed: int, steps: int, most: int) -> tuple[pm.Run, int, int]:
    """Make a run and strike it; returns it with the strikes, and the restarts they may cost."""
    chance = random.Random(f"strikes-{seed}")
    run = pm.finetune(
        model, ROWS, name=name, seed=seed, lora=pm.LoRA(r=4, lora_dropout=0.1),
        max_steps=steps, save_steps=min(200, steps // 3), **SETTINGS,
    )  # fmt: skip
    run.pause(wait=True)  # or it might be over before the client is there
    steering = Client(run.folder, seed)
    wait_for(lambda: sets(run) >= FIRST_SETS or steering.is_done(), "the first settings", PATIENCE)
    strikes = allowed = 0
    while strikes < most and run.state not in ("finished", "failed"):
        go_ahead(run, chance.randint(0, steps // most), also=lambda: is_left(run, steering))
        release(run, steering)
        time.sleep(chance.uniform(0, 0.01))  # anywhere within a step
        allowed += strike(run, steering, chance)
        strikes += 1
        if chance.random() < 0.7:  # else it is struck while it comes back
            wait_for(
                lambda: run.state in ("running", "paused", "finished", "failed"),
                f"{name} to go on after strike {strikes}",
                PATIENCE,
            )
    steering.wait()
    while run.state not in ("finished", "failed"):
        release(run, steering)
        run.wait_for_change(1)
    return run, strikes, allowed


# ---- what must be so afterwards ------------------------------------------------------------------


def settings_in_force(events: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """Give the settings by the steps from which they hold, in the past that the run has at its end.

    One that took effect before others that were in the log for later steps (the run had gone back
    by then) takes their place.
    """
    found: list[tuple[int, dict[str, Any]]] = []
    for event in events:
        if event["type"] != "applied" or event["verb"] != "set":
            continue
        for step, args in found:
            if step > event["step"]:
                gone = set(event["args"])
                if "lr_scheduler_type" in gone:  # without keywords it has none
                    gone.add("lr_scheduler_kwargs")
                for field in gone:
                    args.pop(field, None)
        found.append((event["step"], dict(event["args"])))
    return sorted(((step, args) for step, args in found if args), key=lambda pair: pair[0])


def undisturbed(run: pm.Run, name: str) -> pm.Run:
    """Make the same run again, let alone, with the settings in its log from the beginning."""
    folder = run.folder.with_name(name)
    shutil.copytree(run.folder / "data", folder / "data")
    config = json.loads((run.folder / "run.json").read_text()) | {"name": name}
    config.pop("sum", None)
    (folder / "run.json").write_text(json.dumps(config))
    events: list[dict[str, Any]] = [{"type": "state", "state": "starting", "step": 0}]
    for number, (step, args) in enumerate(settings_in_force(run.events()), 1):
        about = {"command": number, "verb": "set"}
        events.append({"type": "command", **about, "id": f"set-{number}", "args": args})
        events.append({"type": "applied", **about, "step": step, "workers": [0, 1], "args": args})
    with (folder / "events.jsonl").open("wb") as log:
        for seq, event in enumerate(events, 1):
            line = json.dumps(
                {"seq": seq, "time": 1.5, "timeline": 0, **event}, separators=(",", ":")
            )
            log.write(sums.add(line.encode()) + b"\n")
    for path in (folder, *folder.iterdir()):
        path.chmod(0o700 if path.is_dir() else 0o600)
    other = pm.resume(folder)
    other.wait(PATIENCE)
    return other


def numbers(run: pm.Run) -> list[tuple[Any, ...]]:
    """Give what a history is compared by."""
    return [(r["step"], r["loss"], r["learning_rate"], r["grad_norm"]) for r in run.history]


def evaluations(run: pm.Run) -> dict[int, float]:
    """Give the losses that a run has measured of itself, by steps."""
    own = [e for e in run.events() if e["type"] == "eval" and "command" not in e]
    return {e["step"]: e["loss"] for e in own}


def unwritten(run: pm.Run) -> set[int]:
    """Give the checkpoint commands that were applied and that the log has no end of."""
    events = run.events()
    ends = {e.get("command") for e in events if e["type"] in ("checkpoint", "log")}
    begun = {e["command"] for e in events if e["type"] == "applied" and e["verb"] == "checkpoint"}
    return begun - ends


def is_written(run: pm.Run) -> bool:
    """Whether it has them all. One struck behind its end is resumed: who comes next writes them."""
    left = unwritten(run)
    if left and not any(is_ours(pid, run) for pid in processes(run)):
        run.resume()
    return not left


def check(run: pm.Run, other: pm.Run, allowed: int) -> None:
    """Compare a run that was struck with one that was let alone."""
    last = run.max_steps
    assert run.state == "finished", f"{run.name} is {run.state}: {run.reason}"
    assert [row["step"] for row in run.history] == list(range(1, last + 1)), "history has a gap"
    sequence = [event["seq"] for event in run.events()]
    assert sequence == list(range(1, len(sequence) + 1)), "the log has a gap"
    restarts = [event for event in run.events() if event["type"] == "restart"]
    assert len(restarts) <= allowed, f"{len(restarts)} restarts for {allowed} kills: {restarts}"
    open_commands = {e["command"] for e in run.events() if e["type"] == "command"} - {
        e["command"] for e in run.events() if e["type"] in ("applied", "refused")
    }
    assert not open_commands, f"commands {sorted(open_commands)} have no end"
    wait_for(lambda: is_written(run), f"the checkpoints of commands {unwritten(run)}", PATIENCE)
    assert sets(run) >= FIRST_SETS, f"only {sets(run)} of its commands changed a setting"
    mine, theirs = evaluations(run), evaluations(other)
    assert mine == theirs, f"evaluations {mine} are not {theirs}"
    for a, b in zip(numbers(run), numbers(other), strict=True):
        assert a == b, f"{a} is not {b}"
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        left, right = (
            (r.folder / "checkpoints" / f"step-{last:06d}" / name).read_bytes()
            for r in (run, other)
        )
        assert left == right, f"{name} differs"


def strike_runs(options: argparse.Namespace, root: Path) -> str:
    """Strike runs until there were enough strikes; what came of it."""
    model = TinyLlama().write(root / "model")
    done = number = restarts = killed = applied = 0
    begin = time.monotonic()
    while done < options.kills or restarts == 0:  # strikes may find runs that are over
        number += 1
        most = max(1, min(KILLS, options.kills - done))
        name, seed = f"struck-{number}", options.seed + number
        with marked() as entry:
            run, strikes, allowed = disturbed(model, name, seed, options.steps, most)
            other = undisturbed(run, f"alone-{number}")
            check(run, other, allowed)
            restarts += sum(event["type"] == "restart" for event in run.events())
            applied += sets(run)
            for each in (run, other):
                each.close()
            wait_for_end([], lambda: processes_with(entry), PATIENCE)
        done += strikes
        killed += allowed
        if not options.keep:
            for each in (run, other):
                shutil.rmtree(each.folder)
        print(
            f"run {number}: {done} strikes, {killed} processes killed, "
            f"{applied} settings applied, {restarts} restarts, equal bit for bit",
            flush=True,
        )
    return (
        f"{done} strikes, {killed} processes killed, {applied} settings applied, "
        f"{restarts} restarts, {number} runs, {time.monotonic() - begin:.0f} s"
    )


def main() -> None:
    """Strike runs, or be the client of one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=1500, help="of a run")
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--load", type=int, default=0, help="processes that only burn time")
    parser.add_argument("--keep", action="store_true", help="do not remove the runs")
    parser.add_argument("--client", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client is not None:
        client(options.client, options.seed, options.first)
        return
    at_end()
    os.environ["PML_GRACE_SECONDS"] = str(GRACE)
    root = Path(tempfile.mkdtemp(prefix="pml-chaos-"))
    work_in(root)
    try:
        with load(options.load):
            said = strike_runs(options, root)
    except BaseException:
        print(f"seed {options.seed}; the runs are in {root}", file=sys.stderr)
        raise
    print(said)
    if not options.keep:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
