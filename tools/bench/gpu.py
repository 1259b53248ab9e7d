"""Training speed on one GPU, side by side with transformers + PEFT in one call.

    python3 tools/bench/gpu.py --bench build/gpu/bench_gpu_step [--cases 8b,1b,0.5b]
                               [--only 8bx4,1bx1] [--peers eager,compile] [--seconds 330]
                               [--profile]

The models are random weights at the real shapes, bfloat16, LoRA r = 16 on all seven projections,
rows of 2048 tokens, all tokens counted; the figure is the median step. The peer is what a careful
user writes: no padding, SDPA attention, fused AdamW, no checkpointing; and the same through
``torch.compile``, the model whole, a shape at a time. Ours is a process a case; a peer is one for a
model and way, which tells each case as it has it. One thing is measured at a time, with nothing
beside it; only what is not measured (loading, compiling) goes on side by side. A peer's memory is
what its allocator had at most, and 0.5 GiB for its context. Each case has a time limit, and
--seconds is one for all: what is left then says so. Needs torch, transformers and peft; ours needs
none of them.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RANK = 16
CONTEXT = 1 << 29  # bytes of a peer's CUDA context and libraries
LOADING, COMPILING, MEASURING = 90.0, 200.0, 40.0  # seconds at most

#: Shapes of the published models.
MODELS: dict[str, dict[str, Any]] = {
    "8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "1b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048,
        "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "0.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896,
        "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
}  # fmt: skip

#: (model, rows of a step); tiny is for a try without a GPU
CASES = [("8b", 4), ("1b", 8), ("1b", 2), ("1b", 1), ("0.5b", 8), ("0.5b", 1), ("tiny", 1)]
#: What is compiled side by side: what fits into the card together, the longest with the others.
ROUNDS = [[("8b", 4), ("1b", 2), ("0.5b", 1), ("tiny", 1)], [("1b", 8), ("0.5b", 8)], [("1b", 1)]]
Case = tuple[str, int]


def write_model(folder: Path, shape: dict[str, Any]) -> None:
    """Write config.json and random weights of a usual size, made on the GPU."""
    import torch
    from safetensors.torch import save_file

    llama = shape["model_type"] == "llama"
    config = {
        "architectures": ["LlamaForCausalLM" if llama else "Qwen2ForCausalLM"],
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "max_position_embeddings": 8192, "torch_dtype": "bfloat16", "eos_token_id": 2,
        "bos_token_id": 1, "use_sliding_window": False, **shape,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    width = shape.get("head_dim", hidden // shape["num_attention_heads"])
    q, kv = shape["num_attention_heads"] * width, shape["num_key_value_heads"] * width
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def matrix(rows: int, cols: int) -> Any:
        return (torch.randn(rows, cols, device=device, dtype=torch.bfloat16) * 0.02).cpu()

    def ones(size: int) -> Any:
        return torch.ones(size, dtype=torch.bfloat16)

    tensors = {"model.embed_tokens.weight": matrix(shape["vocab_size"], hidden)}
    tensors["model.norm.weight"] = ones(hidden)
    if not shape["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(shape["vocab_size"], hidden)
    for layer in range(shape["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        tensors[at + "input_layernorm.weight"] = ones(hidden)
        tensors[at + "post_attention_layernorm.weight"] = ones(hidden)
        for name, rows, cols in (
            ("self_attn.q_proj", q, hidden), ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden), ("self_attn.o_proj", hidden, q),
            ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):  # fmt: skip
            tensors[at + name + ".weight"] = matrix(rows, cols)
            if (
                not llama
                and name[-6] in "qkv"
                and name.startswith("self_attn")
                and "o_" not in name
            ):
                tensors[at + name + ".bias"] = torch.zeros(rows, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class Trainer:
    """The peer: a loaded model with its adapter and optimizer."""

    def __init__(self, model_dir: str, compiled: bool, length: int) -> None:
        """Load the model onto the GPU, or the CPU where there is none."""
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        self.torch, self.length = torch, length
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.bfloat16, attn_implementation="sdpa", device_map=self.device
        )
        self.vocabulary = model.config.vocab_size
        model.config.use_cache = False
        model.train()
        config = LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        self.model = get_peft_model(model, config)
        if compiled:
            torch._dynamo.config.cache_size_limit = 64
            self.model.compile(dynamic=False)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.0, fused=True)

    def step(self, rows: int) -> tuple[float, float]:
        """Seconds and loss of one step on random tokens."""
        torch, cuda = self.torch, self.device == "cuda"
        ids = torch.randint(0, self.vocabulary, (rows, self.length), device=self.device)
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        value = loss.item()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start, value

    def warm(self, rows: int) -> dict[str, Any]:
        """Two steps, in which what is compiled is compiled; its memory goes back to the others."""
        begin = time.perf_counter()
        for _ in range(2):
            self.step(rows)
        if self.device == "cuda":
            self.torch.cuda.empty_cache()
        return {"warm": time.perf_counter() - begin}

    def measure(self, rows: int, steps: int) -> dict[str, Any]:
        """The median step, after two more."""
        if self.device == "cuda":
            self.torch.cuda.reset_peak_memory_stats()
        made = [self.step(rows) for _ in range(steps + 2)][2:]
        used = self.torch.cuda.max_memory_reserved() + CONTEXT if self.device == "cuda" else 0
        if self.device == "cuda":
            self.torch.cuda.empty_cache()
        seconds = statistics.median(second for second, _ in made)
        return {
            "tokens_per_second": rows * self.length / seconds,
            "used": used,
            "loss": made[-1][1],
        }


def serve_peer(model_dir: str, way: str, length: str) -> None:
    """Be a peer: an order a line (warm ROWS, measure ROWS STEPS), an answer a line."""
    import torch
    import transformers

    trainer = Trainer(model_dir, way == "compile", int(length))
    print(json.dumps({"versions": [torch.__version__, transformers.__version__]}), flush=True)
    for line in sys.stdin:
        order, *numbers = line.split()
        call = trainer.warm if order == "warm" else trainer.measure
        try:
            answer = call(*map(int, numbers))
        except torch.OutOfMemoryError as error:
            answer = {"error": str(error).splitlines()[0][:80]}
        print(json.dumps(answer), flush=True)


class Peer:
    """A peer's process, asked with a time limit; one that is late is ended."""

    def __init__(self, folder: Path, way: str, length: int) -> None:
        """Start it: it loads."""
        command = [
            sys.executable,
            os.path.abspath(__file__),
            "--peer",
            str(folder),
            way,
            str(length),
        ]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: queue.Queue[str] = queue.Queue()
        self.words: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._overhear, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.lines.put(line)
        self.lines.put("")

    def _overhear(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.words = [*self.words[-5:], line.strip()]

    def tell(self, *order: object) -> None:
        """Give an order; its answer is heard later."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(" ".join(map(str, order)) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.lines.put("")

    def hear(self, seconds: float) -> dict[str, Any]:
        """Its next answer, or {"error": why there is none}."""
        try:
            line = self.lines.get(timeout=max(seconds, 0.1))
        except queue.Empty:
            self.end()
            return {"error": f"ended after {seconds:.0f} s"}
        if line == "":
            self.lines.put("")
            return {"error": " ".join(self.words)[-120:] or "it ended"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """End it; all its memory is free then."""
        self.process.kill()
        self.process.wait()


def run_ours(args: argparse.Namespace, name: str, rows: int, seconds: float) -> dict[str, Any]:
    """One case of ours: the program's last line, and its profile where one was asked for."""
    command = [args.bench, str(Path(args.folder) / name), "--rows", str(rows)]
    command += ["--steps", str(args.steps), "--device", args.device, "--length", str(args.length)]
    command += ["--profile"] if args.profile else []
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=max(seconds, 0.1)
        )
    except subprocess.TimeoutExpired:
        return {"error": f"ended after {seconds:.0f} s"}
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        return {"error": done.stderr.strip()[-120:] or f"status {done.returncode}"}
    if args.profile:
        print("\n".join(lines[:-1]), flush=True)
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


class Bench:
    """The cases, the clock and what came."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Choose the cases."""
        self.args, self.folder = args, Path(args.folder)
        self.last = time.monotonic() + args.seconds
        models = args.cases.split(",")
        only = args.only.split(",") if args.only else []
        self.cases = [c for c in CASES if c[0] in models and (not only or f"{c[0]}x{c[1]}" in only)]
        self.found: dict[tuple[str, Case], dict[str, Any]] = {}

    def left(self) -> float:
        """Seconds until all must be over."""
        return self.last - time.monotonic()

    def keep(self, way: str, case: Case, answer: dict[str, Any]) -> None:
        """Keep what came, and say it at once."""
        self.found[way, case] = answer
        said = answer.get("error") or (
            f"{answer['tokens_per_second']:,.0f} tok/s, {answer['used'] / 2**30:.1f} GiB"
            + "".join(
                f", {words} {answer[key]:.1f}{unit}"
                for key, words, unit in (
                    ("load", "load", " s"), ("first_step", "first step", " s"),
                    ("warm", "warmed up in", " s"), ("loss", "loss", ""),
                )
                if key in answer
            )
        )  # fmt: skip
        print(f"{case[0]} x {case[1]} {way}: {said}", flush=True)

    def measure(self, peer: Peer, way: str, case: Case, warm: dict[str, Any]) -> None:
        """Measure a case that is warm, alone."""
        if "error" in warm:
            self.keep(way, case, warm)
            return
        peer.tell("measure", case[1], self.args.steps)
        self.keep(way, case, warm | peer.hear(min(MEASURING, self.left())))

    def rounds(self, way: str) -> Iterator[list[Case]]:
        """Cases that are warmed up side by side: one by one where nothing is compiled."""
        if way == "compile":
            yield from ([c for c in cases if c in self.cases] for cases in ROUNDS)
        else:
            yield from ([case] for case in self.cases)

    def peers(self, way: str) -> None:
        """All cases of transformers in one way."""
        peers = {name: Peer(self.folder / name, way, self.args.length) for name in dict(self.cases)}
        try:
            for peer in peers.values():
                first = peer.hear(min(LOADING, self.left()))
                print(f"{way}: {first.get('error') or first['versions']}", flush=True)
            for cases in self.rounds(way):
                for name, rows in cases:
                    peers[name].tell("warm", rows)
                warm = {c: peers[c[0]].hear(min(COMPILING, self.left())) for c in cases}
                for case in cases:
                    self.measure(peers[case[0]], way, case, warm[case])
        finally:
            for peer in peers.values():
                peer.end()

    def table(self) -> None:
        """Everything side by side."""
        ways = ["ours", *[way for way in self.args.peers.split(",") if way]]
        print(f"\n{'case':10}" + "".join(f"{way + ' tok/s':>16}{'GiB':>7}" for way in ways)
              + f"{'plan':>7}{'x best':>8}")  # fmt: skip
        for case in self.cases:
            line = f"{case[0] + ' x ' + str(case[1]):10}"
            rates = []
            for way in ways:
                answer = self.found.get((way, case), {"error": "no time"})
                rates.append(answer.get("tokens_per_second", 0.0))
                line += f"{rates[-1]:16,.0f}" if rates[-1] else f"{answer['error'][:15]:>16}"
                line += f"{answer.get('used', 0) / 2**30:7.1f}"
            line += f"{self.found.get(('ours', case), {}).get('planned', 0) / 2**30:7.1f}"
            print(line + (f"{rates[0] / max(rates[1:]):8.2f}" if any(rates[1:]) else ""))


def main() -> None:
    """Parse arguments; measure all sides, or be a peer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--bench", help="the program bench_gpu_step")
    parser.add_argument("--cases", default="8b,1b,0.5b", help="models")
    parser.add_argument("--only", help="cases of them, as 8bx4,1bx1")
    parser.add_argument("--peers", default="eager,compile", help='ways; "": ours alone')
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=330, help="for all")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--device", default="cuda", help="of ours")
    parser.add_argument("--folder", default="/dev/shm/pml-bench", help="where models are written")
    parser.add_argument("--profile", action="store_true", help="ours: device time by op")
    parser.add_argument("--peer", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        write_model(Path(args.folder) / args.write, MODELS[args.write])
        return
    if args.peer:
        serve_peer(*args.peer)
        return
    bench = Bench(args)
    for name in dict(bench.cases):
        if not (bench.folder / name).exists():
            me = [sys.executable, os.path.abspath(__file__), "--folder", args.folder]
            subprocess.run([*me, "--write", name], check=True, timeout=max(bench.left(), 0.1))
    for case in bench.cases:
        bench.keep("ours", case, run_ours(args, *case, min(LOADING, bench.left())))
    for way in filter(None, args.peers.split(",")):
        if bench.left() > 0:
            bench.peers(way)
    bench.table()


if __name__ == "__main__":
    main()
