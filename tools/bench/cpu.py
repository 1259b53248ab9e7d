"""Training speed on the CPU, side by side with transformers + PEFT in one call.

    .venv/bin/python tools/bench/cpu.py [--peer-python PYTHON_WITH_TORCH] [--threads 2]

Without a peer only this engine is measured.

Each round runs the two one after the other, each in a process of its own, so that neither
inherits the other's threads or memory and a slow spell of the machine hits both. The figure is
the median step of all rounds; tokens count every row in full.

The model: a Llama of 8 layers, hidden 256, intermediate 704, 8 heads, 4 key/value heads,
vocabulary 4096 (8.0 M parameters), random weights, 8 rows of 256 tokens, float32.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS, LENGTH, VOCABULARY, WARMUP = 8, 256, 4096, 3


def peer(model_dir: str, method: str, threads: int, steps: int) -> dict[str, Any]:
    """Eager PyTorch, as a careful user writes it: no padding, fused AdamW, no checkpointing."""
    import resource

    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.config.use_cache = False
    model.train()
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model,
            LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=True)
    seconds = []
    for _ in range(steps + WARMUP):
        ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - start)
    versions = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds[WARMUP:], "rss": rss, "versions": versions}


def ours(model_dir: str, method: str, threads: int, steps: int) -> dict[str, Any]:
    """The same work through the public API: worker process, telemetry and all."""
    import random

    import pantheraml as pm

    random.seed(0)
    rows = []
    for _ in range(ROWS * (steps + WARMUP)):
        ids = [random.randrange(VOCABULARY) for _ in range(LENGTH)]
        rows.append({"input_ids": ids, "labels": ids})
    os.environ["PANTHERAML_RUNS"] = tempfile.mkdtemp(prefix="pml-bench-")
    run = pm.finetune(
        model_dir, data=rows, method=method,
        lora=pm.LoRA(r=16, lora_alpha=16) if method == "lora" else None,
        max_steps=steps + WARMUP, per_device_train_batch_size=ROWS, max_length=LENGTH,
        packing=False, shuffle=False, devices="cpu", threads=threads,
    )  # fmt: skip
    run.wait()
    memory = [event["memory"] for event in run.events() if event.get("memory")]
    rss = max((device.get("rss", 0) for devices in memory for device in devices), default=0)
    seconds = [float(record["seconds"]) for record in run.history]
    return {"seconds": seconds[WARMUP:], "rss": rss, "versions": f"pantheraml {pm.__version__}"}


def measure(side: str, python: str, *arguments: str, threads: int) -> dict[str, Any]:
    """Run one side in a fresh process and return its JSON answer."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="false")
    command = [python, str(Path(__file__).resolve()), "--side", side, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(
            f"{side} failed ({' '.join(command)}):\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    """Parse arguments; measure both sides, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--peer-python", help="an interpreter with torch, transformers and peft")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--side", choices=["peer", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--method", default="full", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        run = {"peer": peer, "ours": ours}[args.side]
        print(json.dumps(run(args.model, args.method, args.threads, args.steps)))
        return
    from pantheraml.lessons.stdlib import write_model

    with tempfile.TemporaryDirectory(prefix="pml-bench-") as folder:
        write_model(Path(folder), vocabulary=VOCABULARY)
        print(
            f"{platform.processor() or platform.machine()}, {args.threads} threads, {ROWS} rows of "
            f"{LENGTH}, float32, median of {args.rounds} x {args.steps} steps"
        )
        sides = {"ours": sys.executable}
        if args.peer_python:
            sides = {"peer": args.peer_python, **sides}
        columns = (f"{side + ' tok/s':>12}{side + ' MiB':>10}" for side in sides)
        print(f"{'method':8}" + "".join(columns))
        versions = set()
        for method in ("full", "lora"):
            taken: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
            for _ in range(args.rounds):
                for side, python in sides.items():
                    arguments = ["--model", folder, "--method", method, "--steps", str(args.steps)]
                    arguments += ["--threads", str(args.threads)]
                    taken[side].append(measure(side, python, *arguments, threads=args.threads))
            rate, line = {}, f"{method:8}"
            for side, answers in taken.items():
                seconds = statistics.median(s for a in answers for s in a["seconds"])
                rate[side] = ROWS * LENGTH / seconds
                rss = max(a["rss"] for a in answers) / 2**20
                versions |= {a["versions"] for a in answers}
                line += f"{rate[side]:12,.0f}{rss:10,.0f}"
            print(line + (f"   {rate['ours'] / rate['peer']:.2f} x" if "peer" in rate else ""))
        print("; ".join(sorted(versions)))


if __name__ == "__main__":
    main()
