"""What a run costs over its bare steps: coordinator, log, telemetry, control, data.

    python3 tools/bench/run_gpu.py MODEL --bench build/gpu/bench_gpu_step [--rows 1] [--steps 300]
                                   [--pairs 3]

The same model, LoRA r = 16, rows of 2048 tokens: steps of ``bench_gpu_step``, which is the stepper
alone, and of ``pm.finetune`` as a user has it (a worker that reads NVML every second and reports
each step, a coordinator that logs it, this process as a viewer), in turn. A small step is the
hardest case: what is paid for each is paid most often. Prints both medians of each pair, and the
median of the pairs' differences with their range.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pantheraml as pm
from pantheraml import _native
from pantheraml.aside import is_alive

LENGTH, SETTLED = 2048, 60  # graphs are recorded and products timed before that step


def bare(args: argparse.Namespace) -> float:
    """The median step of the stepper alone, in seconds."""
    command = [args.bench, args.model, "--rows", str(args.rows), "--steps", str(args.steps)]
    command += ["--device", args.device]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def whole(args: argparse.Namespace, name: str) -> float:
    """The median step of a run, by when its steps ended on the worker's clock."""
    vocab = int(_native.check_model(args.model)["vocab"])
    lists = [[(7 * i + 13 * j) % (vocab - 3) + 3 for j in range(LENGTH)] for i in range(16)]
    rows = [{"input_ids": ids, "labels": ids} for ids in lists]
    last = SETTLED + args.steps
    run = pm.finetune(
        args.model, rows, devices=args.device, max_steps=10**6, max_length=LENGTH, name=name,
        per_device_train_batch_size=args.rows, lora=pm.LoRA(r=16), save_strategy="no",
        restart="never",
    )  # fmt: skip
    pids = [0]
    try:
        while run.step < last:
            run.wait_for_change(0.2)
            pids = [w["pid"] for w in run.workers] or pids
            if run.state in ("failed", "stopped"):
                raise SystemExit(run.reason or run.state)
        steps = [row["seconds"] for row in run.history if SETTLED < row["step"] <= last]
    finally:
        pids.insert(0, run.coordinator_pid or 0)
        run.close()
        for pid in filter(None, pids):  # without the last checkpoint
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while any(pid and is_alive(pid) for pid in pids):
            time.sleep(0.05)
    return statistics.median(steps)


def main() -> int:
    """Measure in turn and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("model")
    parser.add_argument("--bench", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    more = []
    with tempfile.TemporaryDirectory(prefix="pml-run-gpu-") as runs:
        os.environ["PANTHERAML_RUNS"] = str(Path(runs) / "runs")
        os.environ["PANTHERAML_CACHE"] = str(Path(runs) / "cache")
        for pair in range(args.pairs):
            alone, run = bare(args), whole(args, f"pair-{pair}")
            more.append(run / alone - 1)
            print(f"pair {pair}: alone {1e3 * alone:.3f} ms, in a run {1e3 * run:.3f} ms, "
                  f"{100 * more[-1]:+.2f} %", flush=True)  # fmt: skip
    print(f"a run adds {100 * statistics.median(more):+.2f} % to a step "
          f"({100 * min(more):+.2f} to {100 * max(more):+.2f} in {len(more)} pairs)")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
