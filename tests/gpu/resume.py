"""Interrupted runs on a GPU end with the bytes of undisturbed ones, with ``deterministic=True``.

    python3 tests/gpu/resume.py [--device cuda] [--cases lora,nf4,…] [--steps 12]

(all cases, if none is named; float16 needs a GPU, and fp8 one of compute capability 8.9: on others
it is skipped, which is said.)

For every case a small model (heads of 64, grouped; of 128 in the case that says so, for which
attention has kernels of its own on Hopper) is trained three times on the same rows, through
coordinator and worker as any run is:

* undisturbed;
* stopped at half, which writes a checkpoint, and resumed from it by new processes;
* its worker killed (SIGKILL) where it stands at half, replaced by the coordinator, killed once more
  right after it went on, wherever that is.

Every file of the last checkpoint (weights or adapter, optimizer, state but for its count of
restarts and commands) must be the same bytes, every step's loss, rate and norm the same number.
Each case is a process of its own. Exits with 1 when one differs, 77 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pantheraml as pm
from pantheraml import _native, programs
from pantheraml.aside import end, is_alive
from pantheraml.devices import usable_gpus
from pantheraml.tiny import TinyLlama

PATIENCE = 120.0
SKIPPED = 77
FIRST_WITH_E4M3 = 89

CASES: dict[str, dict[str, Any]] = {
    "lora": {"lora": pm.LoRA(r=8, lora_dropout=0.1), "packing": True},
    "nf4": {"lora": pm.LoRA(r=16), "quant": "nf4", "gradient_accumulation_steps": 2},
    "fp8": {"lora": pm.LoRA(r=16), "quant": "fp8"},
    "float16": {"lora": pm.LoRA(r=8), "dtype": "float16"},
    "full": {"method": "full", "weight_decay": 0.1},
    "adamw_8bit": {"method": "full", "optim": "adamw_8bit"},
    "heads_of_128": {"lora": pm.LoRA(r=8), "packing": True},
}
SMALL = TinyLlama(vocab=1024, hidden=256, layers=3, heads=4, kv_heads=2, intermediate=512)
SHAPES = {"heads_of_128": replace(SMALL, hidden=512, kv_heads=1)}


def until(over: Callable[[], object], what: str) -> None:
    """Wait for something; whoever waits so long waits for nothing."""
    deadline = time.monotonic() + PATIENCE
    while not over():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {PATIENCE:g} s for {what}")
        time.sleep(0.01)


class Gate:
    """Workers wait outside until it is open, so that orders are there before the first step."""

    def __init__(self, folder: Path) -> None:
        """Have every worker that this process causes go through it."""
        self.path = folder / "gate"
        script = folder / "pml-worker"
        worker = programs.coordinator().with_name("pml-worker")
        script.write_text(
            f"#!/bin/sh\nwhile [ ! -e {shlex.quote(str(self.path))} ]; do sleep 0.01; done\n"
            f"exec {shlex.quote(str(worker))}\n"
        )
        script.chmod(0o700)
        os.environ["PML_WORKER"] = str(script)

    def start(self, begin: Callable[[], pm.Run], stands: bool) -> pm.Run:
        """Start a run; one that stands makes one step and waits for orders."""
        self.path.unlink(missing_ok=True)
        run = begin()
        pause = run.pause() if stands else None
        self.path.touch()
        if pause is not None:
            pause.wait(PATIENCE)
        return run


def creep(run: pm.Run, step: int) -> None:
    """Let a run that stands go on by single steps until it has made so many; it stands again."""
    while run.step < step:
        run.resume()
        run.pause(wait=True)


def finished(run: pm.Run) -> None:
    """Wait for the end that was meant."""
    run.wait(PATIENCE)
    if run.state != "finished":
        raise SystemExit(f"{run.name}: {run.state}, {run.reason}")


def stopped_and_resumed(run: pm.Run, half: int) -> None:
    """A checkpoint at half, other processes from there on."""
    creep(run, half)
    before = run.workers[0]["pid"]
    run.stop(wait=True)
    if run.step >= run.config["max_steps"]:
        raise SystemExit("it was at its end before it could be stopped")
    run.resume(wait=True)
    if run.workers[0]["pid"] == before:
        raise SystemExit("the same process went on")


def killed_twice(run: pm.Run, half: int) -> None:
    """SIGKILL where it stands, and again where it goes."""
    creep(run, half)
    for running in (False, True):
        if running:
            until(lambda: run.state == "paused", "it to stand again")
            run.resume(wait=True)
        pid = run.workers[0]["pid"]
        timeline = run.events()[-1]["timeline"]
        with suppress(ProcessLookupError):  # the second time it may be at its end
            os.kill(pid, signal.SIGKILL)
        until(lambda: not is_alive(pid), "the worker's death")  # noqa: B023
        until(
            lambda: run.events()[-1]["timeline"] > timeline or run.state == "finished",  # noqa: B023
            "another worker",
        )
    causes = [e["cause"] for e in run.events() if e["type"] == "restart"]
    if not causes or set(causes) != {"died"}:
        raise SystemExit(f"restarts: {causes}")


def numbers(run: pm.Run) -> list[tuple[float, ...]]:
    """What every step said."""
    return [(r["step"], r["loss"], r["learning_rate"], r["grad_norm"]) for r in run.history]


def files(run: pm.Run) -> dict[str, bytes]:
    """Contents of the last checkpoint, by name; how often it was begun and told something is not.

    MANIFEST holds the others' hashes, so it goes with them.
    """
    folder = run.checkpoints[-1].path
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    del found["MANIFEST"]
    state = json.loads(found["state.json"])
    del state["timeline"], state["command"]
    return found | {"state.json": json.dumps(state).encode()}


def compare(case: str, title: str, run: pm.Run, plain: pm.Run) -> bool:
    """Hold a disturbed run against the undisturbed one."""
    want, got = files(plain), files(run)
    other = sorted(n for n in want.keys() | got.keys() if want.get(n) != got.get(n))
    same = numbers(run) == numbers(plain)
    print(
        f"{'ok  ' if same and not other else 'FAIL'} {case:12} {title}: "
        f"{len(want) - len(other)} of {len(want)} files are the same bytes"
        + (f", not {', '.join(other)}" if other else "")
        + ("" if same else "; steps differ")
        + f" ({len(numbers(run))} steps)",
        flush=True,
    )
    return same and not other


def check(case: str, device: str, steps: int, folder: Path) -> bool:
    """Train one case in all ways and compare."""
    os.environ["PANTHERAML_RUNS"] = str(folder / "runs")
    os.environ["PANTHERAML_CACHE"] = str(folder / "cache")
    model = SHAPES.get(case, SMALL).write(folder / "model")
    lists = [[(7 * i + 3 * j * j) % 1000 for j in range(40 + 9 * (i % 11))] for i in range(64)]
    rows = [{"input_ids": ids, "labels": ids} for ids in lists]
    settings: dict[str, Any] = {
        "devices": device, "max_steps": steps, "deterministic": True, "seed": 5, "max_length": 256,
        "per_device_train_batch_size": 4, "learning_rate": 1e-3, "lr_scheduler_type": "cosine",
        "warmup_steps": 2, "max_restarts": 5, "save_steps": 4,
    } | CASES[case]  # fmt: skip
    gate = Gate(folder)
    disturbances = {"plain": None, "resumed": stopped_and_resumed, "killed": killed_twice}
    runs = {}
    for title, disturb in disturbances.items():
        run = gate.start(
            lambda: pm.finetune(model, rows, name=title, **settings),  # noqa: B023
            disturb is not None,
        )
        runs[title] = run
        if disturb is not None:
            disturb(run, steps // 2)
            if run.state == "paused":
                run.resume()
        finished(run)
    good = [compare(case, title, runs[title], runs["plain"]) for title in ("resumed", "killed")]
    for run in runs.values():
        end(run)
    return all(good)


def main() -> int:
    """Check all cases, each in a process, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--alone", action="store_true", help="in this process")
    args = parser.parse_args()
    count, why, _ = usable_gpus()
    if args.device != "cpu" and count == 0:
        print(f"gpu.resume skipped: {why}")
        return SKIPPED
    if args.alone:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="pml-resume-") as folder:
            good = check(args.cases, args.device, args.steps, Path(folder))
        print(f"     {args.cases}: {time.monotonic() - begun:.1f} s", flush=True)
        return 0 if good else 1
    cases = args.cases.split(",")
    capability = _native.device_info(args.device)["capability"]
    strange = sorted(set(cases) - set(CASES))
    if strange:
        parser.error(f"{', '.join(strange)}: there are {', '.join(CASES)}")
    if "fp8" in cases and 0 < capability < FIRST_WITH_E4M3:
        print(f"skip fp8: E4M3 begins with compute capability 8.9, this GPU has {capability / 10}")
        cases.remove("fp8")
    command = [sys.executable, os.path.abspath(__file__), "--alone", "--device", args.device]
    command += ["--steps", str(args.steps), "--cases"]
    children = [subprocess.Popen([*command, case]) for case in cases]
    ends = [child.wait() for child in children]
    for case, status in zip(cases, ends, strict=True):
        if status < 0:  # below every other: a greatest one would hide it
            print(f"FAIL {case:12} ended by {signal.Signals(-status).name}")
    return 1 if any(ends) else 0


if __name__ == "__main__":
    sys.exit(main())
