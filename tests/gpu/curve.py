"""The same run on a GPU gives the curve that it gives on the CPU.

    python3 tests/gpu/curve.py [--device cuda] [--cases lora,dropout,full,bfloat16] [--steps 30]

(``--device cpu`` tries the script where there is no GPU: both runs are then the same.)

A small model (heads of 64, grouped) is trained on the same rows with the same settings by a run
with ``devices="cpu"`` and by one with the device, all cases side by side, and the losses are
compared step by step. tests/parity holds each by itself to the curve that transformers has in
float32 (parity.c): the first loss to 1e-5 and every later one to 1e-4, so two of ours are at most
twice as far from each other. A GPU in bfloat16 is held to the CPU in float32, which has no
bfloat16, by parity's bounds for it, 5e-3 and 5e-2. What is not computed must be the same: learning
rates, and tokens of each step.

Exits with 1 when one is farther away, 77 without a GPU; bfloat16 is skipped, which is said, on a
device that has none.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pantheraml as pm
from pantheraml import _native
from pantheraml.aside import end
from pantheraml.devices import usable_gpus
from pantheraml.tiny import TinyLlama

PATIENCE = 120.0
SKIPPED = 77
#: Of the first loss, which nothing was learned before, and of every other; relative.
LIMITS = {"float32": (2e-5, 2e-4), "bfloat16": (5e-3, 5e-2)}
#: Who learns nothing has the same curve anywhere: the last loss is at most so much of the first.
LEARNED = 0.95

CASES: dict[str, dict[str, Any]] = {
    "lora": {"lora": pm.LoRA(r=8), "gradient_accumulation_steps": 2},
    "dropout": {"lora": pm.LoRA(r=8, lora_dropout=0.1), "packing": True},
    "full": {"method": "full", "weight_decay": 0.1, "learning_rate": 3e-4},
    "bfloat16": {"lora": pm.LoRA(r=8)},
}


def rows() -> list[dict[str, list[int]]]:
    """Sequences that can be learned, of several lengths."""
    lists = [[(7 * i + 3 * j * j) % 1000 for j in range(20 + 9 * (i % 11))] for i in range(64)]
    return [{"input_ids": ids, "labels": ids} for ids in lists]


def compare(case: str, dtype: str, one: pm.Run, other: pm.Run) -> bool:
    """Print and judge the largest distance of two curves."""
    for run in (one, other):
        run.wait(PATIENCE)
    pairs = list(zip(one.history, other.history, strict=True))
    apart = [abs(b["loss"] - a["loss"]) / a["loss"] for a, b in pairs]
    norms = [abs(b["grad_norm"] - a["grad_norm"]) / a["grad_norm"] for a, b in pairs]
    first, later = LIMITS[dtype]
    farthest = max(range(len(apart)), key=apart.__getitem__)
    losses = [row["loss"] for row, _ in pairs]
    same = all(a[name] == b[name] for a, b in pairs for name in ("step", "learning_rate", "tokens"))
    learned = losses[-1] <= LEARNED * losses[0]
    good = same and learned and apart[0] <= first and max(apart) <= later
    print(
        f"{'ok  ' if good else 'FAIL'} {case:10} {len(pairs)} steps in {dtype}, loss "
        f"{losses[0]:.4f} to {losses[-1]:.4f}: {apart[0]:.1e} apart at the first (at most "
        f"{first:g}), {apart[farthest]:.1e} at step {farthest + 1} (at most {later:g}), norms "
        f"{max(norms):.1e}"
        + ("" if same else "; other rates or tokens")
        + ("" if learned else "; nothing was learned"),
        flush=True,
    )
    return good


def check(cases: list[str], device: str, steps: int, folder: Path) -> bool:
    """Start all runs, then compare them two by two."""
    os.environ["PANTHERAML_RUNS"] = str(folder / "runs")
    os.environ["PANTHERAML_CACHE"] = str(folder / "cache")
    shape = TinyLlama(vocab=1024, hidden=256, layers=3, heads=4, kv_heads=2, intermediate=512)
    model = shape.write(folder / "model")
    common: dict[str, Any] = {
        "max_steps": steps, "seed": 5, "max_length": 128, "learning_rate": 4e-3,
        "per_device_train_batch_size": 4, "lr_scheduler_type": "cosine", "warmup_steps": 2,
    }  # fmt: skip
    dtypes = {case: case if case in LIMITS else "float32" for case in cases}
    threads = min(4, len(os.sched_getaffinity(0)))  # of each, and they are side by side
    pairs = {}
    for case in cases:
        settings = common | CASES[case]
        on_cpu = {"devices": "cpu", "threads": threads, "dtype": "float32", "name": f"{case}-cpu"}
        on_device = {"devices": device, "dtype": dtypes[case], "name": f"{case}-device"}
        one = pm.finetune(model, rows(), **settings | on_cpu)
        pairs[case] = one, pm.finetune(model, rows(), **settings | on_device)
    good = [compare(case, dtypes[case], *pair) for case, pair in pairs.items()]
    for pair in pairs.values():
        for run in pair:
            end(run)
    return all(good)


def main() -> int:
    """Compare all cases."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    count, why, _ = usable_gpus()
    if args.device != "cpu" and count == 0:
        print(f"gpu.curve skipped: {why}")
        return SKIPPED
    cases = args.cases.split(",")
    strange = sorted(set(cases) - set(CASES))
    if strange:
        parser.error(f"{', '.join(strange)}: there are {', '.join(CASES)}")
    has = [] if args.device == "cpu" else _native.gpu_dtypes(0)
    if "bfloat16" in cases and "bfloat16" not in has:
        print(f"skip bfloat16: {args.device} has none (GPUs do from compute capability 8.0 on)")
        cases.remove("bfloat16")
    with tempfile.TemporaryDirectory(prefix="pml-curve-") as folder:
        return 0 if check(cases, args.device, args.steps, Path(folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
