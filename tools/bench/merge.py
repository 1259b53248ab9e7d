"""What merging a large model takes: time and memory.

    .venv/bin/python tools/bench/merge.py FOLDER [--gigabytes 3]

Makes a synthetic Llama of that size in bfloat16 and an adapter in FOLDER, merges them in a process
of its own whose memory is watched, and removes all of it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
from pantheraml.tiny import TinyLlama

MERGE = """
import sys, json
from pantheraml import _native
run, checkpoint, out = sys.argv[1:4]
print(json.dumps(_native.merge(open(run).read(), checkpoint, out, "auto", 5 * 10**9)))
"""


def write_tensors(path: Path, shapes: dict[str, tuple[int, ...]], width: int) -> None:
    """Write random bits that are small numbers, a piece at a time."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * width
        dtype = "BF16" if width == 2 else "F32"
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    noise = (np.random.default_rng(0).standard_normal(1 << 22) * 0.02).astype(np.float32)
    piece = (noise.view(np.uint32) >> 16).astype(np.uint16).tobytes() if width == 2 else None
    piece = piece if piece is not None else noise.tobytes()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while at > 0:
            at -= file.write(piece[:at])


def make(folder: Path, gigabytes: float) -> tuple[Path, Path]:
    """Write model and adapter; give run.json and the adapter's folder."""
    hidden, inner, heads, kv = 2048, 5632, 16, 4
    layer = 2 * hidden * hidden + 2 * hidden * hidden // heads * kv + 3 * hidden * inner
    shape = TinyLlama(
        vocab=32000, hidden=hidden, heads=heads, kv_heads=kv, intermediate=inner, positions=2048,
        layers=max(1, round((gigabytes * 1e9 / 2 - 2 * 32000 * hidden) / layer)),
    )  # fmt: skip
    model, adapter = folder / "model", folder / "adapter"
    small = TinyLlama(vocab=272, hidden=64, layers=1, heads=4, kv_heads=2).write(model)
    config = json.loads((small / "config.json").read_text())
    config |= {
        "vocab_size": shape.vocab, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": shape.layers, "num_attention_heads": heads, "torch_dtype": "bfloat16",
        "num_key_value_heads": kv, "head_dim": hidden // heads, "max_position_embeddings": 2048,
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    linear = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden // heads * kv, hidden),
        "self_attn.v_proj": (hidden // heads * kv, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    weights: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab, hidden), "model.norm.weight": (hidden,),
        "lm_head.weight": (shape.vocab, hidden),
    }  # fmt: skip
    low: dict[str, tuple[int, ...]] = {}
    for i in range(shape.layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{i}.{name}.weight"] = (hidden,)
        for name, (out, into) in linear.items():
            weights[f"model.layers.{i}.{name}.weight"] = (out, into)
            low[f"base_model.model.model.layers.{i}.{name}.lora_A.weight"] = (16, into)
            low[f"base_model.model.model.layers.{i}.{name}.lora_B.weight"] = (out, 16)
    write_tensors(model / "model.safetensors", weights, 2)
    adapter.mkdir()
    write_tensors(adapter / "adapter_model.safetensors", low, 4)
    targets = [name.rpartition(".")[2] for name in linear]
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": targets})
    )
    import pantheraml.api as api

    text, _, _ = api._planned(model, {"max_steps": 1})
    (folder / "run.json").write_text(text)
    return folder / "run.json", adapter


def main() -> None:
    """Measure once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    args = parser.parse_args()
    args.folder.mkdir()
    try:
        run, adapter = make(args.folder, args.gigabytes)
        size = (args.folder / "model" / "model.safetensors").stat().st_size
        (args.folder / "out").mkdir()
        begun = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, "-c", MERGE, str(run), str(adapter), str(args.folder / "out")],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        peak = 0

        def watch() -> None:
            nonlocal peak
            while child.poll() is None:
                for line in Path(f"/proc/{child.pid}/status").read_text().splitlines():
                    if line.startswith("VmRSS:"):
                        peak = max(peak, int(line.split()[1]) * 1024)
                time.sleep(0.01)

        watcher = threading.Thread(target=watch)
        watcher.start()
        answer = child.communicate()[0]
        watcher.join()
        if child.returncode != 0:
            raise SystemExit(child.returncode)
        seconds = time.monotonic() - begun
        print(
            f"{size / 1e9:.2f} GB merged in {seconds:.1f} s ({size / 1e6 / seconds:.0f} MB/s), at "
            f"most {peak / 1e6:.0f} MB in memory; {answer.strip()}"
        )
    finally:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
