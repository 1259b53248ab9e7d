"""Write rope_numbers.h: cosines and sines as transformers computes them, for test_rope.c.

Needs torch and transformers:  python make_rope_numbers.py > rope_numbers.h
"""

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

POSITIONS = [0, 1, 2, 7, 63, 500, 4095, 8191]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 2048,
}
YARN_MSCALE = {
    **YARN, "beta_fast": 24.0, "beta_slow": 2.0, "truncate": False,
    "mscale": 0.8, "mscale_all_dim": 0.5,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.5}
CASES = {
    "default_16": (16, {"rope_type": "default", "rope_theta": 10000.0}),
    "qwen_64": (64, {"rope_type": "default", "rope_theta": 1000000.0}),
    "llama3_64": (64, LLAMA3),
    "linear_16": (16, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}),
    "dynamic_16": (16, DYNAMIC),
    "yarn_64": (64, YARN),
    "yarn_mscale_64": (64, YARN_MSCALE),
}


def table(head_dim: int, rope: dict[str, object]) -> torch.Tensor:
    """Cos | sin of the first half of each head, rows POSITIONS."""
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=2048 if rope is DYNAMIC else 131072,
        rope_parameters=dict(rope),
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor([POSITIONS]))
    half = head_dim // 2
    return torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1)


def main() -> None:
    """Print the header."""
    print("/* Made by make_rope_numbers.py from transformers; rows are rope_positions. */")
    print("// clang-format off")
    print(
        f"static const int rope_positions[{len(POSITIONS)}] = {{{', '.join(map(str, POSITIONS))}}};"
    )
    for name, (head_dim, rope) in CASES.items():
        print(f"static const float rope_{name}[{len(POSITIONS)}][{head_dim}] = {{")
        for row in table(head_dim, rope).tolist():
            print("{" + ", ".join(float(x).hex() + "F" for x in row) + "},")
        print("};")


if __name__ == "__main__":
    main()
