"""What sampling from a live run costs, on a GPU (or on the CPU, with --device cpu).

    python3 tools/bench/sample_gpu.py MODEL [--tokens 128] [--prompts 1,8,32] [--length 512]

A run is started on random tokens, paused after its third step, and asked for samples: greedy, from
prompts of 32 tokens each, with room for --length tokens of each. The time is the client's, from the
question to the last token, so the way through coordinator and worker is in it; the best of three.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import pantheraml as pm
from pantheraml import _native
from pantheraml.aside import end


def main() -> int:
    """Measure each number of prompts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", default="1,8,32")
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    draw = random.Random(0)
    vocab = int(_native.check_model(args.model)["vocab"])

    def ids(count: int) -> list[int]:
        return [draw.randrange(3, vocab) for _ in range(count)]

    with tempfile.TemporaryDirectory(prefix="pml-sample-") as runs:
        os.environ["PANTHERAML_RUNS"] = str(Path(runs))
        row = ids(256)
        run = pm.finetune(
            args.model, [{"input_ids": row, "labels": row}] * 4, devices=args.device,
            max_steps=10**6, per_device_train_batch_size=1, max_length=256, packing=False,
            save_strategy="no", generate_length=args.length,
        )  # fmt: skip
        try:
            while run.step < 3:
                run.wait_for_change(0.1)
                if run.state in ("failed", "stopped"):
                    print(run.reason or run.state)
                    return 1
            run.pause(wait=True)
            for count in [int(word) for word in args.prompts.split(",")]:
                best, made = float("inf"), 0
                for _ in range(3):
                    prompts = [ids(32) for _ in range(count)]
                    begin = time.perf_counter()
                    samples = run.sample(input_ids=prompts, max_new_tokens=args.tokens)
                    seconds = time.perf_counter() - begin
                    tokens = sum(len(sample.token_ids) for sample in samples)
                    if tokens / seconds > made / best:  # one that ends early has fewer
                        best, made = seconds, tokens
                print(
                    f"{count:3} prompts: {made} tokens in {best:.3f} s, "
                    f"{made / best:,.0f} tokens/s, {1e3 * best / max(1, args.tokens):.2f} ms for "
                    "one of each",
                    flush=True,
                )
        finally:
            end(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
