"""Training speed on one GPU, side by side with transformers + PEFT in one call.

    python3 tools/bench/gpu.py --bench build/gpu/bench_gpu_step [--cases 8b,1b,0.5b] [--profile]

The models are random weights at the real shapes, bfloat16, LoRA r = 16 on all seven projections,
rows of 2048 tokens, all tokens counted. Each side is a process of its own, one after the other;
the figure is the median step. The peer is what a careful user writes: no padding, SDPA attention,
fused AdamW, no checkpointing. Needs torch, transformers and peft; ours needs none of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LENGTH, RANK, WARMUP = 2048, 16, 3

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
}  # fmt: skip

#: (model, rows of a step, peer figures measured elsewhere are in docs/performance/gpu.md)
CASES = [("8b", 4), ("1b", 8), ("1b", 2), ("1b", 1), ("0.5b", 8), ("0.5b", 1)]


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

    def matrix(rows: int, cols: int) -> Any:
        return (torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16) * 0.02).cpu()

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


def peer(model_dir: str, rows: int, steps: int) -> dict[str, Any]:
    """Eager PyTorch with PEFT."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.bfloat16, attn_implementation="sdpa", device_map="cuda"
    )
    vocabulary = model.config.vocab_size
    model.config.use_cache = False
    model.train()
    model = get_peft_model(
        model,
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    seconds = []
    for _ in range(steps + WARMUP):
        ids = torch.randint(0, vocabulary, (rows, LENGTH), device="cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    free, total = torch.cuda.mem_get_info()
    return {
        "tokens_per_second": rows * LENGTH / statistics.median(seconds[WARMUP:]),
        "loss": value, "used": total - free,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }  # fmt: skip


def last_json(command: list[str]) -> tuple[dict[str, Any], str]:
    """Run a side; its answer is its last line."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
    lines = done.stdout.splitlines()
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer, "\n".join(lines[:-1])


def main() -> None:
    """Parse arguments; measure both sides, or be the peer."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--bench", help="the program bench_gpu_step")
    parser.add_argument("--cases", default="8b,1b,0.5b", help="models")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--folder", default="/dev/shm/pml-bench", help="where models are written")
    parser.add_argument("--profile", action="store_true", help="ours: device time by op")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--peer", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        write_model(Path(args.folder) / args.write, MODELS[args.write])
        print("{}")
        return
    if args.peer:
        print(json.dumps(peer(args.peer[0], int(args.peer[1]), int(args.peer[2]))))
        return
    wanted = args.cases.split(",")
    columns = ("ours tok/s", 12), ("GiB", 7), ("plan", 7), ("peer tok/s", 12), ("GiB", 7), ("x", 7)
    print(f"{'case':14}" + "".join(f"{title:>{width}}" for title, width in columns))
    table = []
    for name, rows in CASES:
        if name not in wanted:
            continue
        folder = Path(args.folder) / name
        me = [sys.executable, os.path.abspath(__file__), "--folder", args.folder]
        if not folder.exists():
            last_json([*me, "--write", name])
        command = [args.bench, str(folder), "--rows", str(rows), "--steps", str(args.steps)]
        ours, profile = last_json(command + (["--profile"] if args.profile else []))
        if profile:
            print(profile)
        line = f"{name + ' x ' + str(rows):14}{ours['tokens_per_second']:12,.0f}"
        line += f"{ours['used'] / 2**30:7.1f}{ours['planned'] / 2**30:7.1f}"
        if not args.no_peer:
            other, _ = last_json([*me, "--peer", str(folder), str(rows), str(args.steps)])
            rate = ours["tokens_per_second"] / other["tokens_per_second"]
            line += f"{other['tokens_per_second']:12,.0f}{other['used'] / 2**30:7.1f}{rate:7.2f}"
        line += f"  load {ours['load']:.1f} s, first step {ours['first_step']:.1f} s"
        print(line, flush=True)
        table.append(line)
    print("\n".join(["", "summary", *table]))


if __name__ == "__main__":
    main()
