"""transformers + PEFT on a GPU, eager or compiled, as processes that take orders.

    python3 tools/bench/gpu_peers.py MODEL eager|compile LENGTH

The peer is what a careful user writes: bfloat16, LoRA r = 16 on all linear layers, no padding, SDPA
attention, fused AdamW, no checkpointing; and the same through ``torch.compile``, the model whole, a
shape at a time. Its memory is what its allocator had at most, and 0.5 GiB for its context.
"""

from __future__ import annotations

import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

RANK = 16
CONTEXT = 1 << 29  # bytes of a peer's CUDA context and libraries
COMPILERS = 6  # processes of inductor's a peer, several peers compile side by side
TRIES, PAUSE = 4, 5.0  # seconds, for memory that a peer beside it is about to give back


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
        for tried in range(1, TRIES + 1):
            try:
                self.step(rows)
                self.step(rows)
                break
            except self.torch.OutOfMemoryError:
                if tried == TRIES:
                    raise
            self.optimizer.zero_grad()  # not where the error still holds what it failed with
            self.torch.cuda.empty_cache()
            time.sleep(PAUSE)
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


def serve(model_dir: str, way: str, length: str) -> None:
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
        command = [sys.executable, os.path.abspath(__file__), str(folder), way, str(length)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(COMPILERS)},
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
            return {"error": f"ended after {max(seconds, 0):.0f} s"}
        if line == "":
            self.lines.put("")
            return {"error": " ".join(self.words)[-120:] or "it ended"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """End it; all its memory is free then."""
        self.process.kill()
        self.process.wait()


if __name__ == "__main__":
    serve(*sys.argv[1:])
