"""Training speed on the CPU, side by side with transformers + PEFT in one call.

    .venv/bin/python tools/bench/cpu.py [--peer-python PYTHON_WITH_TORCH] [--threads 2]

Without a peer only this engine is measured.

Each round runs the two one after the other, so that a slow spell of the machine hits both: the
peer is one process that makes some steps when it is asked to, and waits, its threads asleep; ours
is a run of its own each round. The figure is the median step of all rounds; beside the ratio stand
the least and the greatest of a round's. Tokens count every row in full.

Two models with random weights, trained in float32 by both: a Llama of 8 layers, hidden 256,
intermediate 704, 8 heads, 4 key/value heads, vocabulary 4096 (8.0 M parameters), 8 rows of 256
tokens, full and LoRA; and one of SmolLM2-135M's shape, 2 rows of 256, LoRA, whose folder holds
bfloat16 as the published one does (--stored float32: as the other). "first" is the time from
before the imports to the end of the first step.

Memory is the peak of what a process has for itself, RssAnon + RssShmem, looked at 500 times a
second; "all" is the peak with the pages of files, as getrusage has it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

LENGTH, WARMUP = 256, 3
MODELS: dict[str, tuple[int, int, tuple[str, ...]]] = {  # vocabulary, rows of a step, methods
    "8M": (4096, 8, ("full", "lora")),
    "SmolLM2-135M": (49152, 2, ("lora",)),
}


class Watch(threading.Thread):
    """Peak of RssAnon + RssShmem of a process, in bytes."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.status, self.peak, self.on = Path(f"/proc/{pid}/status"), 0, True

    def run(self) -> None:
        """Look until told to stop, or the process is gone."""
        while self.on:
            try:
                lines = dict(x.split(":", 1) for x in self.status.read_text().splitlines())
                kib = sum(int(lines[k].split()[0]) for k in ("RssAnon", "RssShmem"))
            except (OSError, KeyError, ValueError):
                return  # it has ended
            self.peak = max(self.peak, kib * 1024)
            time.sleep(0.002)

    def stop(self) -> int:
        """End, with the peak."""
        self.on = False
        self.join()
        return self.peak


def peer(
    model_dir: str, method: str, threads: int, steps: int, rows: int, vocabulary: int
) -> dict[str, Any]:
    """Eager PyTorch, as a careful user writes it: no padding, fused AdamW, no checkpointing."""
    import resource

    watch = Watch(os.getpid())
    watch.start()
    begin = time.perf_counter()
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

    def step() -> float:
        ids = torch.randint(0, vocabulary, (rows, LENGTH))
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        return time.perf_counter() - start

    step()
    first = time.perf_counter() - begin
    for _ in range(WARMUP - 1):
        step()
    print("ready", flush=True)
    while sys.stdin.readline():  # a line asks for a round
        step()  # its threads wake up
        print(json.dumps([step() for _ in range(steps)]), flush=True)
    versions = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    own = watch.stop()
    return {"seconds": [], "rss": own, "all": rss, "first": first,
            "versions": versions}  # fmt: skip


def ours(
    model_dir: str,
    method: str,
    threads: int,
    steps: int,
    rows: int,
    vocabulary: int,
    memory_limit: str | None,
) -> dict[str, Any]:
    """The same work through the public API: worker process, telemetry and all."""
    import random

    random.seed(0)
    data = []
    for _ in range(rows * (steps + WARMUP)):
        ids = [random.randrange(vocabulary) for _ in range(LENGTH)]
        data.append({"input_ids": ids, "labels": ids})
    begin = time.perf_counter()
    import pantheraml as pm

    os.environ["PANTHERAML_RUNS"] = tempfile.mkdtemp(prefix="pml-bench-")
    run = pm.finetune(
        model_dir, data=data, method=method,
        lora=pm.LoRA(r=16, lora_alpha=16) if method == "lora" else None,
        max_steps=steps + WARMUP, per_device_train_batch_size=rows, max_length=LENGTH,
        packing=False, shuffle=False, devices="cpu", threads=threads, memory_limit=memory_limit,
    )  # fmt: skip
    watch, high = None, 0
    while run.step < 1 and run.state not in ("finished", "failed"):
        if watch is None and run.workers and run.workers[0].get("pid"):
            watch = Watch(run.workers[0]["pid"])
            watch.start()
        high = max(high, peak_of(watch))
        time.sleep(0.01)
    first = time.perf_counter() - begin
    while run.state not in ("finished", "failed", "stopped"):
        high = max(high, peak_of(watch))
        time.sleep(0.05)
    run.wait()
    own = watch.stop() if watch is not None else 0
    seconds = [float(record["seconds"]) for record in run.history]
    version = f"pantheraml {pm.__version__}"
    return {"seconds": seconds[WARMUP:], "rss": own, "all": high, "first": first,
            "versions": version}  # fmt: skip


def peak_of(watch: Watch | None) -> int:
    """The kernel's own peak of that process, files and all; 0 where there is none (yet)."""
    try:
        text = watch.status.read_text() if watch is not None else ""
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+)", text)
    return int(found[1]) * 1024 if found else 0


class Side:
    """One of the two, in a process of its own each time it is measured; a peer stays."""

    def __init__(self, side: str, python: str, arguments: list[str], threads: int) -> None:
        self.side, self.answers = side, list[dict[str, Any]]()
        self.environment = dict(
            os.environ, OMP_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="false"
        )
        self.command = [python, str(Path(__file__).resolve()), "--side", side, *arguments]
        self.rounds: list[list[float]] = []
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start a peer; it says when it is ready."""
        if self.side == "peer":
            self.process = subprocess.Popen(
                self.command, env=self.environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            self._line()

    def _line(self) -> str:
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.side} has ended: {' '.join(self.command)}")
        return line

    def round(self) -> None:
        """Measure some steps."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            self.rounds.append(json.loads(self._line()))
            return
        done = subprocess.run(
            self.command, env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            sys.exit(
                f"{self.side} failed ({' '.join(self.command)}):\n"
                f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        self.answers.append(json.loads(done.stdout.splitlines()[-1]))
        self.rounds.append(self.answers[-1]["seconds"])

    def end(self) -> None:
        """End a peer, which says what it took."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.answers.append(json.loads(self._line()))
            self.process.wait()


def write_smollm2(folder: Path, stored: str = "bfloat16") -> None:
    """SmolLM2-135M's shape with random weights."""
    import numpy as np

    hidden, inner, layers, heads, kv_heads, vocabulary = 576, 1536, 30, 9, 3, 49152
    config = {
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": 8192, "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu",
        "torch_dtype": stored, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    numbers, keys = np.random.default_rng(0), hidden // heads * kv_heads
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():  # fmt: skip
            shapes[f"{at}{name}.weight"] = shape
    tensors = {n: 0.02 * numbers.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}
    for layer in range(layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ones(hidden, np.float32)
    tensors["model.norm.weight"] = np.ones(hidden, np.float32)
    if stored == "bfloat16":  # which numpy does not know: the upper halves of what is rounded
        halves = {n: (t.view(np.uint32) + 0x8000) >> 16 for n, t in tensors.items()}
        stored_as: dict[str, Any] = {n: t.astype("<u2") for n, t in halves.items()}
        tensors = stored_as
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for key, tensor in tensors.items():
        header[key] = {
            "dtype": "BF16" if stored == "bfloat16" else "F32",
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin + tensor.nbytes],
        }
        begin += tensor.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors.values():
            file.write(tensor.tobytes())


def compare(sides: dict[str, str], folder: str, model: str, method: str, threads: int,
            rounds: int, steps: int, limit: str | None) -> set[str]:  # fmt: skip
    """Measure one line of the table and print it; who took part."""
    vocabulary, rows, _ = MODELS[model]
    arguments = ["--model", folder, "--method", method, "--steps", str(steps)]
    arguments += ["--threads", str(threads), "--rows", str(rows)]
    arguments += ["--vocabulary", str(vocabulary)]
    arguments += ["--memory-limit", limit] if limit else []
    taken = [Side(side, python, arguments, threads) for side, python in sides.items()]
    for side in taken:
        side.start()
    for _ in range(rounds):
        for side in taken:
            side.round()
    line = f"{model:13}{method:6}{threads:8}"
    for side in taken:
        side.end()
        seconds = statistics.median(s for a in side.rounds for s in a)
        rss, whole = (max(a[k] for a in side.answers) / 2**20 for k in ("rss", "all"))
        first = min(a["first"] for a in side.answers)
        line += f"{rows * LENGTH / seconds:12,.0f}{rss:10,.0f}{whole:10,.0f}{first:8.1f}"
    print(line + (ratios(*(side.rounds for side in taken)) if len(taken) == 2 else ""), flush=True)
    return {a["versions"] for side in taken for a in side.answers}


def ratios(peers: list[list[float]], own: list[list[float]]) -> str:
    """How much faster we are: all steps, and the least and greatest of the rounds."""
    whole = statistics.median(sum(peers, [])) / statistics.median(sum(own, []))
    each = [statistics.median(p) / statistics.median(o) for p, o in zip(peers, own, strict=True)]
    return f"   {whole:.2f} x ({min(each):.2f} to {max(each):.2f})"


def main() -> None:
    """Parse arguments; measure both sides, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--peer-python", help="an interpreter with torch, transformers and peft")
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["8M"])
    parser.add_argument("--methods", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--memory-limit", help='what ours may take, as "460MiB"')
    parser.add_argument("--stored", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--side", choices=["peer", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--method", default="full", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=8, help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, default=4096, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        what = (args.model, args.method, args.threads[0], args.steps, args.rows, args.vocabulary)
        answer = peer(*what) if args.side == "peer" else ours(*what, args.memory_limit)
        print(json.dumps(answer))
        return
    from pantheraml.lessons.stdlib import write_model

    sides = {"ours": sys.executable}
    if args.peer_python:
        sides = {"peer": args.peer_python, **sides}
    print(
        f"{platform.processor() or platform.machine()}, rows of {LENGTH}, float32, median of "
        f"{args.rounds} x {args.steps} steps"
    )
    columns = (
        f"{side + ' tok/s':>12}{side + ' MiB':>10}{'all':>10}{'first s':>8}" for side in sides
    )
    print(f"{'model':13}{'method':6}{'threads':>8}" + "".join(columns))
    versions = set()
    for model in args.models:
        with tempfile.TemporaryDirectory(prefix="pml-bench-") as folder:
            if model == "8M":
                write_model(Path(folder), vocabulary=MODELS[model][0])
            else:
                write_smollm2(Path(folder), args.stored)
            for threads in args.threads:
                for method in (m for m in MODELS[model][2] if m in args.methods):
                    versions |= compare(
                        sides, folder, model, method, threads, args.rounds, args.steps,
                        args.memory_limit,
                    )  # fmt: skip
    print("; ".join(sorted(versions)))


if __name__ == "__main__":
    main()
