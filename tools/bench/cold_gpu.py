"""From a cold process to the first finished step on a GPU, weights in the page cache.

    python3 tools/bench/cold_gpu.py --bench build/gpu/bench_gpu_step [--folder /dev/shm/pml-bench]
                                    [--only 8bx4,1bx8,1bx1,7bx4-nf4] [--ways bench,finetune]
                                    [--states 4] [--seconds 100]

Each case, LoRA r = 16 on rows of 2048 tokens, from up to four states of what earlier processes
leave behind: the driver's folder of compiled kernels (cuDNN's attention is compiled by NVRTC) and
our file of timed products, each absent or present. The bench is the stepper alone, by its own
clock; ``finetune`` is a new Python that imports pantheraml and starts a run, until it sees the
first step: interpreter, imports, data, coordinator, worker and the way back in it; -nf4 behind a
case is QLoRA. Models are written by tools/bench/gpu.py --write; a folder in /dev/shm is page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

LENGTH = 2048
LONGEST = 120.0  # seconds that a first step may take
#: Driver's folder, file of products: as they are found.
STATES = [("empty", "absent"), ("filled", "present"), ("filled", "absent"), ("empty", "present")]


def child(model: str, rows: int, device: str, length: int, quant: str | None) -> None:
    """Be the user's process: print a line of JSON when the first step is seen, and end the run."""
    begin, date = time.monotonic(), time.time()
    import pantheraml as pm
    from pantheraml import _native

    imported = time.monotonic() - begin
    vocab = int(_native.check_model(model)["vocab"])
    lists = [[(7 * i + 13 * j) % (vocab - 3) + 3 for j in range(length)] for i in range(2 * rows)]
    run = pm.finetune(
        model, [{"input_ids": ids, "labels": ids} for ids in lists], devices=device,
        max_steps=10**6, max_length=length, per_device_train_batch_size=rows,
        lora=pm.LoRA(r=16), quant=quant, save_strategy="no", restart="never",
    )  # fmt: skip
    started = time.monotonic() - begin
    while run.step < 1 and run.state not in ("failed", "stopped"):
        if time.monotonic() - begin > LONGEST:
            break
        run.wait_for_change(0.02)
    first = time.monotonic() - begin
    step = run.history[0]["seconds"] if run.step else 0.0
    words = {"imported": imported, "started": started, "first": first, "step": step}
    for event in run.events():  # the first of a kind
        kind = event.get("what") or event.get("state") or event["type"]
        words.setdefault(f"at {kind}", event["time"] - date)
    error = run.reason or f"{run.state}, no step after {first:.0f} s"
    print(json.dumps(words if run.step else {"error": error}), flush=True)
    pids = [run.coordinator_pid or 0, *(w["pid"] for w in run.workers)]
    run.close()
    for pid in filter(None, pids):  # without the last checkpoint
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def by_finetune(args: argparse.Namespace, model: Path, rows: int, quant: str) -> dict[str, Any]:
    """Seconds from the start of a Python to its word of the first step."""
    command = [sys.executable, "-P", os.path.abspath(__file__), "--child", str(model), str(rows),
               args.device, str(args.length), quant]  # fmt: skip
    begin = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.monotonic() - begin
    found: dict[str, Any] = json.loads(line) if line else {"error": "it ended"}
    if "error" in found:
        return found
    python = seconds - found["first"]  # before the first line of ours
    marks = [f"{key[3:]} {python + at:.2f}" for key, at in found.items() if key.startswith("at ")]
    return {
        "seconds": seconds,
        "words": f"imported {python + found['imported']:.2f}, "
        f"started {python + found['started']:.2f}, step itself {found['step']:.2f}; "
        + ", ".join(marks),
    }


def by_bench(args: argparse.Namespace, model: Path, rows: int, quant: str) -> dict[str, Any]:
    """Seconds until the bench's stepper had its first step, by the bench's clock."""
    command = [args.bench, str(model), "--rows", str(rows), "--steps", "1", "--device", args.device]
    command += ["--length", str(args.length), "--cache", os.environ["PANTHERAML_CACHE"] + "/cuda"]
    command += [f"--{quant}"] if quant else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        return {"error": f"ended after {LONGEST:.0f} s"}
    if done.returncode != 0:
        return {"error": done.stderr.strip()[-120:] or f"status {done.returncode}"}
    found = json.loads(done.stdout.splitlines()[-1])
    words = f"opened {found['open']:.2f}, loaded {found['load']:.2f}"
    if found["compiled"] > 0:  # else before the first step
        words += f", attention compiled {found['compiled']:.2f}"
    return {"seconds": found["first_step"], "words": words}


def prepare(compiled: str, timed: str) -> None:
    """Leave the two folders as a state wants them."""
    for state, name in ((compiled, "CUDA_CACHE_PATH"), (timed, "PANTHERAML_CACHE")):
        if state in ("empty", "absent"):
            shutil.rmtree(os.environ[name], ignore_errors=True)
            Path(os.environ[name]).mkdir()


def main() -> int:
    """Measure every case from every state, and print each as it comes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--bench")
    parser.add_argument("--folder", default="/dev/shm/pml-bench", help="where models lie")
    parser.add_argument("--only", default="8bx4,1bx8,1bx1")
    parser.add_argument("--ways", default="bench,finetune")
    parser.add_argument("--states", type=int, default=len(STATES), help="the first so many")
    parser.add_argument("--seconds", type=float, default=100, help="none is begun after that")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a row")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        model, rows, device, length, quant = args.child
        child(model, int(rows), device, int(length), quant or None)
        return 0
    ways = args.ways.split(",")
    if not set(ways) <= {"bench", "finetune"} or ("bench" in ways and args.bench is None):
        parser.error("--ways bench,finetune; bench wants --bench, where bench_gpu_step is")
    last, bad = time.monotonic() + args.seconds, 0
    with tempfile.TemporaryDirectory(prefix="pml-cold-") as place:
        os.environ["PANTHERAML_RUNS"] = str(Path(place) / "runs")
        os.environ["PANTHERAML_CACHE"] = str(Path(place) / "cache")
        os.environ["CUDA_CACHE_PATH"] = str(Path(place) / "driver")
        for case in args.only.split(","):
            shape, _, quant = case.partition("-")
            name, rows = shape.rsplit("x", maxsplit=1)
            for way in ways:
                for compiled, timed in STATES[: args.states]:
                    if time.monotonic() > last:
                        print(f"{case} {way}: no time left")
                        bad += 1
                        break
                    prepare(compiled, timed)
                    call = by_bench if way == "bench" else by_finetune
                    found = call(args, Path(args.folder) / name, int(rows), quant)
                    bad += "error" in found
                    print(
                        f"{case:6} {way:8} compiled kernels {compiled:6} products {timed:7} "
                        + (found.get("error") or f"{found['seconds']:5.2f} s, {found['words']}"),
                        flush=True,
                    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
