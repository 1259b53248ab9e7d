"""Real text that is on every machine with a Python, and tokenizers trained on it."""

from __future__ import annotations

import json
import sysconfig
from functools import cache
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

EOS = "<|endoftext|>"
#: Words, numbers of up to three digits, signs with the line ends behind them, blanks.
PIECES = (
    r"'s|'t|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = ("byte-level", "split", "metaspace")


def sources(least: int) -> list[Path]:
    """Files of the standard library, in the order of their names, of so many bytes or more."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found, size = [], 0
    for path in sorted(folder.rglob("*.py")):
        if "site-packages" in path.parts or "dist-packages" in path.parts:
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            found.append(path)
            size += len(text)
        if size >= least:
            break
    return found


@cache
def corpus(least: int) -> str:
    """Their text, end to end."""
    return "\n".join(path.read_text("utf-8") for path in sources(least))


@cache
def trained(kind: str, least: int = 1 << 18, vocab: int = 1500) -> str:
    """Train a tokenizer of a kind that models have; returns it as JSON."""
    made = Tokenizer(models.BPE(byte_fallback=kind == "metaspace", fuse_unk=False))
    alphabet: list[str] = []
    special = [EOS, "<|im_start|>", "<|im_end|>"]
    if kind == "metaspace":  # as Llama 2: one word is the whole text, blanks are underlines
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        split = pre_tokenizers.Metaspace(prepend_scheme="never")
        made.pre_tokenizer = split  # for training only
    elif kind == "split":  # as Llama 3 and Qwen 2.5
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PIECES), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:  # as GPT-2 and SmolLM 2
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(corpus(least).splitlines(keepends=True), trainer)
    if kind == "metaspace":
        value = json.loads(made.to_str())
        value["pre_tokenizer"] = None
        made = Tokenizer.from_str(json.dumps(value))
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
        made.post_processor = processors.TemplateProcessing(
            single=f"{EOS} $A", special_tokens=[(EOS, 0)]
        )
    else:
        made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True) for text in special[:3]])
    return made.to_str()


def model_folder(folder: Path, kind: str) -> Path:
    """Write what preparation reads of a model."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_str(trained(kind))
    tokenizer.save(str(folder / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    (folder / "config.json").write_text(json.dumps({"vocab_size": size, "eos_token_id": 0}))
    return folder
