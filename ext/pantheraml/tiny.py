"""A tiny Llama with random weights, as an ordinary Hugging Face folder.

For `pantheraml doctor` and for tests: real enough for every layer to do its work, small enough to
take seconds. Its tokenizer is bytes, so any text has ids.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class TinyLlama:
    """Shape of the model; `vocab` has room for 256 bytes and the special tokens."""

    vocab: int = 272
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 128
    positions: int = 256
    seed: int = 0

    def write(self, folder: Path, *, tokenizer: bool = True) -> Path:
        """Write config.json, model.safetensors and (if wanted) the tokenizer's files."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": 256,
            "torch_dtype": "float32",
        }
        _write_json(folder / "config.json", config)
        save_file(self.tensors(), folder / "model.safetensors", {"format": "pt"})
        if tokenizer:
            write_tokenizer(folder)
        return folder

    def tensors(self) -> dict[str, np.ndarray]:
        """Random weights under the names that Hugging Face gives them."""
        random = np.random.default_rng(self.seed)
        kv = self.hidden // self.heads * self.kv_heads

        def normal(*shape: int) -> np.ndarray:
            return (random.standard_normal(shape) * 0.05).astype(np.float32)

        ones = np.ones(self.hidden, np.float32)
        found = {
            "model.embed_tokens.weight": normal(self.vocab, self.hidden),
            "model.norm.weight": ones,
            "lm_head.weight": normal(self.vocab, self.hidden),
        }
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            found |= {
                at + "input_layernorm.weight": ones,
                at + "post_attention_layernorm.weight": ones,
                at + "self_attn.q_proj.weight": normal(self.hidden, self.hidden),
                at + "self_attn.k_proj.weight": normal(kv, self.hidden),
                at + "self_attn.v_proj.weight": normal(kv, self.hidden),
                at + "self_attn.o_proj.weight": normal(self.hidden, self.hidden),
                at + "mlp.gate_proj.weight": normal(self.intermediate, self.hidden),
                at + "mlp.up_proj.weight": normal(self.intermediate, self.hidden),
                at + "mlp.down_proj.weight": normal(self.hidden, self.intermediate),
            }
        return found


def write_tokenizer(folder: Path) -> None:
    """Write a byte tokenizer (ids 0 to 255), its special tokens (256 …) and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": SPECIAL[0], "pad_token": SPECIAL[0], "chat_template": CHATML}
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
