"""The plan against the process: random configurations, each run for a few steps.

    .venv/bin/python tools/bench/plan_check.py [--runs 60] [--seed 1]

For every configuration the plan is made first (`pm.plan`), then a run is started with the same
settings and its worker is watched: the peak of RssAnon + RssShmem, read from /proc as often as
that goes. A plan is good when the peak is within 2 % of its total or 8 MiB, whichever is more, and
never above the limit it was made for. Half of the configurations have a memory_limit between
what the smallest and the fastest plan need.

Prints a line for each and the worst at the end; exits with 1 when one is not good.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pantheraml as pm
from safetensors.numpy import save_file

MIB = 2**20
SLACK = 8 * MIB


def write_model(folder: Path, draw: random.Random) -> None:
    """A model with random weights, of one of the four families."""
    family = draw.choice(["llama", "mistral", "qwen2", "qwen3"])
    dim, kv_heads = draw.choice([16, 32, 64]), draw.choice([1, 2, 4])
    heads = kv_heads * draw.choice([1, 2, 3])
    hidden, inner = heads * dim, draw.choice([128, 256, 704])
    layers, vocab = draw.choice([1, 2, 4, 8, 16]), draw.choice([300, 4096, 16000])
    tied = draw.random() < 0.5
    config: dict[str, Any] = {
        "model_type": family, "vocab_size": vocab, "hidden_size": hidden, "head_dim": dim,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": 2048,
        "tie_word_embeddings": tied, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        queries, keys = heads * dim, kv_heads * dim
        for name, shape in {
            "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }.items():  # fmt: skip
            shapes[f"{at}{name}.weight"] = shape
        if family == "qwen2":
            for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
                shapes[f"{at}self_attn.{name}.bias"] = (rows,)
        if family == "qwen3":
            for name in ("q_norm", "k_norm"):
                shapes[f"{at}self_attn.{name}.weight"] = (dim,)
    numbers = np.random.default_rng(draw.randrange(2**32))
    tensors = {
        name: (0.02 * numbers.standard_normal(shape)).astype(np.float32) + ("norm" in name)
        for name, shape in shapes.items()
    }
    save_file({name: t.astype(np.float32) for name, t in tensors.items()},
              folder / "model.safetensors")  # fmt: skip


def settings(draw: random.Random) -> dict[str, Any]:
    """Settings of a run, without the model and the data."""
    method = draw.choice(["lora", "lora", "full"])
    chosen: dict[str, Any] = {
        "method": method,
        "max_length": draw.choice([32, 128, 256, 700]),
        "per_device_train_batch_size": draw.choice([1, 2, 4, 8]),
        "gradient_accumulation_steps": draw.choice([1, 1, 2]),
        "packing": draw.random() < 0.3,
        "threads": draw.choice([1, 2, 4]),
    }
    if method == "lora":
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        some = draw.sample(targets, draw.randint(1, 7))
        chosen["lora"] = pm.LoRA(
            r=draw.choice([1, 8, 32]), target_modules=some,
            lora_dropout=draw.choice([0.0, 0.0, 0.1]),
        )  # fmt: skip
    return chosen


class Watch(threading.Thread):
    """Peak of RssAnon + RssShmem of the worker, as often as it can be read."""

    def __init__(self, run: pm.Run) -> None:
        """Start watching at once."""
        super().__init__(daemon=True)
        self.run_watched, self.peak, self.over = run, 0, False
        self.start()

    def run(self) -> None:
        """Read until told to stop, and once more: the worker of a finished run has it all still.

        On a machine that does other things, too, the whole run may be over before the next look.
        """
        pid, last = 0, False
        while not last:
            last = self.over
            pid = pid or next((w["pid"] for w in self.run_watched.workers if w["pid"]), 0)
            try:
                lines = Path(f"/proc/{pid}/status").read_text().splitlines() if pid else []
            except OSError:
                lines = []
            held = sum(
                int(line.split()[1]) * 1024
                for line in lines
                if line.startswith(("RssAnon:", "RssShmem:"))
            )
            self.peak = max(self.peak, held)
            time.sleep(0.0002)


def end(run: pm.Run) -> None:
    """End its coordinator, and wait until that has gone."""
    pid = run.coordinator_pid
    run.close()
    if pid is not None:
        with suppress(ProcessLookupError):
            gone = os.pidfd_open(pid)
            os.kill(pid, signal.SIGTERM)
            select.select([gone], [], [], 60)
            os.close(gone)


def check(draw: random.Random, number: int) -> tuple[bool, float]:
    """One configuration: whether the plan was good, and how far it was off."""
    with tempfile.TemporaryDirectory(prefix="pml-plan-", dir="/var/tmp") as name:
        folder = Path(name) / "model"
        folder.mkdir()
        os.environ["PANTHERAML_RUNS"] = str(Path(name) / "runs")
        write_model(folder, draw)
        vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
        chosen = settings(draw)
        length, rows = chosen["max_length"], []
        for _ in range(24):
            size = length if draw.random() < 0.5 else draw.randint(2, length)
            ids = [draw.randrange(3, vocab) for _ in range(size)]
            rows.append({"input_ids": ids, "labels": ids})
        rows[0] = {"input_ids": (rows[0]["input_ids"] * length)[:length]}
        rows[0]["labels"] = rows[0]["input_ids"]
        if draw.random() < 0.5:
            chosen["memory_limit"] = limit_between(folder, chosen, draw)
        run = pm.finetune(
            folder, data=rows, max_steps=4, shuffle=False, devices="cpu",
            save_steps=2, name="check", **chosen,
        )  # fmt: skip
        watch = Watch(run)
        try:
            run.wait(300)
        finally:
            watch.over = True
            watch.join()
            end(run)  # before its folder is removed under it
        planned = run.plan.total
        limit = chosen.get("memory_limit", 0)
        off = watch.peak - planned
        bound = max(SLACK, 0.02 * planned)
        good = abs(off) <= bound and (not limit or watch.peak <= limit)
        print(
            f"{number:3} {'ok ' if good else 'BAD'} planned {planned / MIB:7.1f} peak "
            f"{watch.peak / MIB:7.1f} off {off / MIB:+6.1f} MiB"
            + (f" limit {limit / MIB:.1f}" if limit else "")
            + f"  {chosen['method']}, {chosen['per_device_train_batch_size']} x {length}, "
            f"{chosen['threads']} threads",
            flush=True,
        )
        return good, off / MIB


def limit_between(folder: Path, chosen: dict[str, Any], draw: random.Random) -> int:
    """A limit that makes the planner work: below what it would like, above the least it needs."""
    most = pm.plan(folder, **chosen).total
    least, most = most // 8, 2 * most + 16 * MIB
    for _ in range(12):  # the smallest that fits, to within a few percent
        try:
            pm.plan(folder, memory_limit=(least + most) // 2, **chosen)
        except MemoryError:
            least = (least + most) // 2
        else:
            most = (least + most) // 2
    return int(most * draw.uniform(1.0, 1.4)) + MIB


def main() -> int:
    """Check as many configurations as asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    results = [check(random.Random(args.seed * 1000 + i), i) for i in range(args.runs)]
    worst = max(results, key=lambda r: abs(r[1]))
    bad = sum(not good for good, _ in results)
    print(f"{args.runs} configurations, {bad} bad, furthest off {worst[1]:+.1f} MiB")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
