"""The plan against NVML: random configurations on a GPU, each run for a few steps.

    python3 tools/bench/plan_check_gpu.py [--runs 20 | --only 7,13] [--seed 1]
                                          [--side-by-side 5] [--seconds 100] [--folder /dev/shm]

For every configuration a model with random bfloat16 weights is written (Llama, Mistral, Qwen2 or
Qwen3, 0.3 to 3 GiB), a run is started with ``pm.finetune`` and its worker is watched: the peak of
what NVML says that its process has, read every 10 ms. A plan is good when the peak is within 2 % of
its total, and never above a limit that it was made for. Half of the configurations have one of
8.5, 16, 24 or 40 GiB in turn, and rows until their plan without a limit takes more; a quarter have
one that is so tight that activations wait on the host; what cannot reach its limit is drawn again.
A third generate text while they train. Runs stand side by side as long as their plans fit together.

NVML must list processes by the ids that they have here: in a container it often does not, and then
nothing can be measured and this says so. Prints a line for each and the worst at the end; exits
with 1 when one is not good or was not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pantheraml as pm
import pynvml
from pantheraml.aside import is_alive

GIB, MIB = 2**30, 2**20
SHARE = 0.02
LIMITS = (8.5, 16.0, 24.0, 40.0)
MOST_ROWS = 256
SPARE = 8 * GIB  # of the device: left to what others have, and to plans that are a little off
STEPS = 6  # op by op, timed op by op twice, op by op, recorded, replayed
GRACE = 15.0  # seconds beyond --seconds that a run may still have
WARM = 3.0  # seconds from the first step, at least: recorded when all kernels are compiled
PROMPTS = 2  # a sample's, and its tokens
TOKENS = 16

#: (hidden, inner, layers, heads, key and value heads, width of a head)
SIZES = [
    (896, 4864, 24, 14, 2, 64), (1024, 3072, 28, 16, 8, 128), (2048, 8192, 16, 32, 8, 64),
    (1536, 8960, 28, 12, 2, 128), (2560, 9728, 12, 32, 8, 128), (4096, 14336, 6, 32, 8, 128),
    (4096, 12288, 3, 32, 8, 128),
]  # fmt: skip
Size = tuple[int, ...]
Shapes = dict[str, tuple[int, ...]]
#: Where rows go up to a limit, it is these: more memory for less work, so that it takes seconds.
NARROW = SIZES[:4]


def describe_model(folder: Path, draw: random.Random, sizes: list[Size]) -> tuple[str, Shapes]:
    """Write config.json and a file of the right header and size; the model's title and shapes."""
    family = draw.choice(["llama", "mistral", "qwen2", "qwen3"])
    hidden, inner, layers, heads, kv_heads, dim = draw.choice(sizes)
    vocab, tied = draw.choice([32000, 128256, 151936]), hidden <= 2048
    config = {
        "model_type": family, "vocab_size": vocab, "hidden_size": hidden, "head_dim": dim,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
        "tie_word_embeddings": tied, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    if draw.random() < 0.2 and family == "mistral":
        config["sliding_window"] = 1024
    (folder / "config.json").write_text(json.dumps(config))
    queries, keys = heads * dim, kv_heads * dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {
            at + "self_attn.q_proj.weight": (queries, hidden),
            at + "self_attn.k_proj.weight": (keys, hidden),
            at + "self_attn.v_proj.weight": (keys, hidden),
            at + "self_attn.o_proj.weight": (hidden, queries),
            at + "mlp.gate_proj.weight": (inner, hidden),
            at + "mlp.up_proj.weight": (inner, hidden),
            at + "mlp.down_proj.weight": (hidden, inner),
            at + "input_layernorm.weight": (hidden,),
            at + "post_attention_layernorm.weight": (hidden,),
        }  # fmt: skip
        if family == "qwen2":
            for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
                shapes[f"{at}self_attn.{name}.bias"] = (rows,)
        if family == "qwen3":
            shapes |= {f"{at}self_attn.{name}.weight": (dim,) for name in ("q_norm", "k_norm")}
    header: dict[str, Any] = {}
    size = 0
    for name, shape in shapes.items():
        begin, size = size, size + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, size]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + size)
    return f"{family} {hidden} x {layers}, {size / GIB:.1f} GiB", shapes


@cache
def block() -> memoryview:
    """Give eight million random numbers in bfloat16."""
    numbers = (0.02 * np.random.default_rng(1).standard_normal(1 << 23)).astype(np.float32)
    return memoryview((numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes())  # cut


def fill_model(folder: Path, shapes: Shapes) -> None:
    """Write the weights: one block of random numbers again and again."""
    one = b"\x80\x3f"
    with (folder / "model.safetensors").open("r+b", buffering=0) as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        for name, shape in shapes.items():
            left = 2 * int(np.prod(shape))
            if "norm" in name:
                file.write(one * (left // 2))
                continue
            while left > 0:
                left -= file.write(block()[: min(left, len(block()))])


def settings(draw: random.Random) -> dict[str, Any]:
    """Settings of a run, without the model and the data."""
    method = draw.choice(["lora", "lora", "lora", "full"])
    chosen: dict[str, Any] = {
        "method": method,
        "optim": draw.choice(["adamw", "adamw", "adamw_8bit"]),
        "max_length": draw.choice([512, 1024, 2048, 4096]),
        "per_device_train_batch_size": draw.choice([1, 2, 4, 8]),
        "gradient_accumulation_steps": draw.choice([1, 1, 2]),
        "packing": draw.random() < 0.5,
        "devices": "cuda",
    }
    if method == "lora":
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        some = targets if draw.random() < 0.6 else draw.sample(targets, draw.randint(1, 6))
        chosen["lora"] = pm.LoRA(
            r=draw.choice([4, 16, 64]), target_modules=some,
            lora_dropout=draw.choice([0.0, 0.0, 0.1]),
        )  # fmt: skip
        quant = draw.choice([None, None, "nf4", "fp8"])
        if quant is not None:
            chosen["quant"] = quant
        if quant != "fp8" and draw.random() < 0.25:
            chosen["dtype"] = "float16"
    return chosen


def data_for(chosen: dict[str, Any], draw: random.Random) -> list[dict[str, Any]]:
    """Rows of token ids: half of them full, the others of any length."""
    length = chosen["max_length"]
    rows = chosen["per_device_train_batch_size"] * chosen["gradient_accumulation_steps"]
    numbers = [draw.randrange(3, 30000) for _ in range(2 * length)]
    made = []
    for i in range(rows + 4):
        size = length if i == 0 or draw.random() < 0.5 else draw.randint(50, length)
        begin = draw.randrange(length)
        ids = numbers[begin : begin + size]
        made.append({"input_ids": ids, "labels": ids})
    return made


def limited(folder: Path, chosen: dict[str, Any], limit: int) -> dict[str, Any] | None:
    """The settings with rows until a limit is one, and with it; None where it never is one."""
    most = {**chosen}
    while pm.plan(folder, **most).total <= limit:
        most["per_device_train_batch_size"] *= 2
        if most["per_device_train_batch_size"] > MOST_ROWS:
            return None
    most["memory_limit"] = limit
    try:
        pm.plan(folder, **most)
    except MemoryError:  # even the smallest plan is larger
        return None
    return most


def offloading(folder: Path, chosen: dict[str, Any]) -> dict[str, Any] | None:
    """The settings with a limit within which activations wait on the host; None: there is none."""
    free = pm.plan(folder, **chosen).total
    for share in (0.75, 0.65, 0.55, 0.45, 0.35):
        within = {**chosen, "memory_limit": int(share * free)}
        try:
            plan = pm.plan(folder, **within)
        except MemoryError:
            return None
        if plan.offload_layers > 0:
            return within
    return None


def end_now(run: pm.Run, pid: int) -> None:
    """Without the last checkpoint, which would be gigabytes: coordinator first, then its worker."""
    coordinator = run.coordinator_pid
    run.close()
    for process in (coordinator, pid):
        if process:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    while pid and is_alive(pid):
        time.sleep(0.02)


class Watch(threading.Thread):
    """Peaks of what NVML says of each process on the GPU."""

    def __init__(self) -> None:
        """Start watching at once."""
        super().__init__(daemon=True)
        pynvml.nvmlInit()
        self.device = pynvml.nvmlDeviceGetHandleByIndex(0)
        self.peaks: dict[int, int] = {}
        self.readings, self.over = 0, False
        self.start()

    def free(self) -> int:
        """Bytes of the device that nobody has."""
        return int(pynvml.nvmlDeviceGetMemoryInfo(self.device).free)

    def run(self) -> None:
        """Read until told to stop."""
        while not self.over:
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses_v3(self.device):
                used = process.usedGpuMemory or 0
                self.peaks[process.pid] = max(self.peaks.get(process.pid, 0), used)
            self.readings += 1
            time.sleep(0.01)


class Room:
    """Device memory that the plans of the runs side by side take together."""

    def __init__(self, total: int) -> None:
        """Nothing is taken of it yet."""
        self.left, self.total = total, total
        self.changed = threading.Condition()

    @contextmanager
    def taken(self, bytes_: int) -> Iterator[None]:
        """Wait until there is so much, or nobody else; hold it meanwhile."""
        with self.changed:
            self.changed.wait_for(lambda: self.left >= bytes_ or self.left == self.total)
            self.left -= bytes_
        try:
            yield
        finally:
            with self.changed:
                self.left += bytes_
                self.changed.notify_all()


def draw_one(
    draw: random.Random, number: int, folder: Path
) -> tuple[str, Shapes, dict[str, Any], int]:
    """Title, shapes, settings and planned bytes of a configuration; its model is not filled."""
    limit = int(LIMITS[number // 2 % len(LIMITS)] * GIB) if number % 2 == 1 else 0
    waits = number % 4 == 2
    while True:
        title, shapes = describe_model(folder, draw, NARROW if limit else SIZES)
        chosen = settings(draw)
        within: dict[str, Any] | None = chosen
        if limit:
            within = limited(folder, chosen, limit)
        elif waits:
            within = offloading(folder, chosen)
        if within is not None:
            return title, shapes, within, pm.plan(folder, **within).total


class Alive:
    """Runs under way, whose processes would go on without this one."""

    def __init__(self) -> None:
        """There are none."""
        self.runs: dict[pm.Run, int] = {}
        self.until = float("inf")  # nobody is waited for beyond that

    def end(self, number: int, frame: object) -> None:
        """A signal's handler: end with all of them."""
        for run, pid in list(self.runs.items()):
            for process in (run.coordinator_pid, pid):
                if process:
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
        os._exit(128 + number)


ALIVE = Alive()


class Text(threading.Thread):
    """Text asked of a run, on a thread of its own, as it may never come."""

    def __init__(self, run: pm.Run) -> None:
        """Ask at once."""
        super().__init__(daemon=True)
        self.asked, self.came, self.why = run, False, "it had not come yet"
        self.start()

    def run(self) -> None:
        """Ask until each prompt has a token: a model of random weights may end at once."""
        try:
            while not self.came:
                made: Any = self.asked.sample(
                    input_ids=[[5, 6, 7]] * PROMPTS, max_new_tokens=TOKENS
                )
                self.came = all(one.token_ids for one in made)
        except pm.Error as error:
            self.why = str(error)


def watched(run: pm.Run, samples: bool) -> tuple[int, int, str]:
    """Let it make its steps, and generate among them.

    Returns its worker's process, the steps made, and why text that it was asked for is lacking.
    """
    pid, begun, first, text = 0, time.monotonic(), 0.0, None
    while run.state not in ("finished", "failed", "stopped"):
        now = time.monotonic()
        first = first or (now if run.step > 0 else 0.0)
        came = not samples or (text is not None and text.came)
        if now > min(begun + 60, ALIVE.until):
            break
        if came and run.step >= STEPS and now - first > WARM:
            break
        pid = ALIVE.runs[run] = next((w["pid"] for w in run.workers if w["pid"]), pid)
        if samples and text is None and run.step > 1:
            text = Text(run)
        run.wait_for_change(0.05)
    time.sleep(0.05)  # a few readings more
    lacking = samples and not (text is not None and text.came)
    return pid, run.step, (text.why if text else "none was asked for yet") if lacking else ""


def check(draw: random.Random, number: int, watch: Watch, room: Room, place: str) -> dict[str, Any]:
    """One configuration: what was planned, and what NVML saw."""
    begun = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="pml-plan-gpu-", dir=place))
    try:
        title, shapes, chosen, expected = draw_one(draw, number, folder)
        fill_model(folder, shapes)
        rows = data_for(chosen, draw)
        with room.taken(expected):
            run = pm.finetune(
                folder, data=rows, max_steps=10**6, shuffle=False, save_strategy="no",
                restart="never", name=f"check-{number}", **chosen,
            )  # fmt: skip
            ALIVE.runs[run] = 0
            pid, steps, lacking = watched(run, samples=number % 3 == 0)
            plan, state, reason = run.plan, run.state, run.reason
            peak = watch.peaks.get(pid, 0)
            end_now(run, pid)
            del ALIVE.runs[run]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if (
        reason.startswith("the smallest plan needs")
        and "memory_limit" in chosen
        and time.monotonic() < ALIVE.until
    ):
        # Its limit was found without data, which are documents of other lengths.
        print(f"{number:2} drawn again, with its data {reason}", flush=True)
        return check(draw, number, watch, room, place)
    limit = chosen.get("memory_limit", 0)
    planned = plan.total if plan is not None else 0
    off = peak - planned
    measured = state == "running" and steps >= STEPS and peak > 0 and not lacking
    good = measured and abs(off) <= SHARE * planned and (not limit or peak <= limit)
    how = " ".join(
        [str(chosen[key]) for key in ("method", "quant", "dtype") if key in chosen]
        + [chosen["optim"]] * (chosen["optim"] != "adamw")
        + ["sampled"] * (number % 3 == 0)
    )
    print(
        f"{number:2} {'ok ' if good else 'BAD'} planned {planned / MIB:8.0f} NVML "
        f"{peak / MIB:8.0f} MiB {100 * off / planned if planned else 0:+6.2f} %"
        + (f" limit {limit / GIB:4.1f}" if limit else " " * 11)
        + f"  {how} {chosen['per_device_train_batch_size']} x {chosen['max_length']}"
        + (f", {plan.recompute} {plan.recompute_layers}, {plan.pieces} pieces" if plan else "")
        + (f", {plan.offload_layers} offloaded" if plan and plan.offload_layers else "")
        + f"; {title}; {time.monotonic() - begun:.1f} s"
        + ("" if measured else f"; {state} at step {steps}: {reason}")
        + (f"; without text: {lacking}" if lacking else ""),
        flush=True,
    )
    return {"good": good, "planned": planned, "peak": peak, "limit": limit}


def main() -> int:
    """Check as many configurations as asked for, and as there is time for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--only", help="these of a seed's, as 7,13: what had no time in a call")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--side-by-side", type=int, default=5, help="runs at one time")
    parser.add_argument("--seconds", type=float, default=100, help="none is begun after that")
    parser.add_argument("--room", type=float, help="GiB for all plans; else what is free")
    parser.add_argument("--folder", default="/dev/shm", help="where models are written")
    args = parser.parse_args()
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, ALIVE.end)
    numbers = [int(n) for n in args.only.split(",")] if args.only else list(range(args.runs))
    last = time.monotonic() + args.seconds
    ALIVE.until = last + GRACE
    watch = Watch()
    room = Room(int(args.room * GIB) if args.room else watch.free() - SPARE)
    with tempfile.TemporaryDirectory(prefix="pml-plan-runs-") as runs:
        os.environ["PANTHERAML_RUNS"] = runs

        def one(number: int) -> dict[str, Any] | None:
            if time.monotonic() > last:
                return None
            draw = random.Random(args.seed * 1000 + number)
            return check(draw, number, watch, room, args.folder)

        with ThreadPoolExecutor(args.side_by_side) as pool:
            results = [made for made in pool.map(one, numbers) if made is not None]
    watch.over = True
    watch.join()
    if not watch.peaks:
        print("NVML lists no process with its memory here: nothing was measured")
        return 1
    bad = sum(not made["good"] for made in results)
    over = sum(0 < made["limit"] < made["peak"] for made in results)
    worst = max((abs(m["peak"] / m["planned"] - 1) for m in results if m["planned"]), default=0.0)
    limits = sorted(made["limit"] / GIB for made in results if made["limit"])
    print(
        f"{len(results)} configurations of {len(numbers)}, {bad} bad, furthest off "
        f"{100 * worst:.2f} %, limits {', '.join(f'{limit:g}' for limit in limits)} GiB, {over} of "
        f"them exceeded; "
        f"{watch.readings} readings"
    )
    return 1 if bad or len(results) < len(numbers) else 0


if __name__ == "__main__":
    sys.exit(main())
