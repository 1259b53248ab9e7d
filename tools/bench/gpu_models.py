"""Models of the published shapes with random weights, for tools/bench/gpu.py and its peers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: Shapes of the published models.
MODELS: dict[str, dict[str, Any]] = {
    "8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "7b": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584,
        "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "tie_word_embeddings": False,
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
    "qwen3-8b": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096,
        "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024,
        "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    },
    "mistral-7b": {  # v0.1, which has a window
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "sliding_window": 4096, "tie_word_embeddings": False,
    },
    "tiny": {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def write_model(folder: Path, shape: dict[str, Any]) -> None:
    """Write config.json and random weights of a usual size, made on the GPU."""
    import torch
    from safetensors.torch import save_file

    family = shape["model_type"]
    config = {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
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
            if family == "qwen2" and name[-6] in "qkv":
                tensors[at + name + ".bias"] = torch.zeros(rows, dtype=torch.bfloat16)
        if family == "qwen3":
            tensors[at + "self_attn.q_norm.weight"] = ones(width)
            tensors[at + "self_attn.k_norm.weight"] = ones(width)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
