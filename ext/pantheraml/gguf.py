"""What a GGUF file says of its tokenizer, made from a model folder's own files.

llama.cpp has two tokenizers that a folder of these families can need: ``gpt2``, byte-level BPE, for
which it must know by name how text is split before the merges; and ``llama``, SentencePiece's BPE
with byte fallback, for which it wants a score for each token. Anything else is refused by name
rather than written so that it tokenises otherwise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pantheraml.data import chat
from pantheraml.errors import InvalidError, NotFoundError, NotInThisVersion

Pair = dict[str, Any]

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: How text is split, by llama.cpp's name for it.
_SPLITS = {
    _WORDS + r"|\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"|\p{N}" + _REST: "qwen2",
    _TEKKEN: "tekken",
}


def pairs(folder: Path, name: str, vocab: int) -> list[Pair]:
    """Give general.name and the tokenizer's pairs, as `_native.gguf` takes them.

    Parameters
    ----------
    folder
        The model folder.
    name
        Of the model, for people.
    vocab
        Rows of the embedding; tokens that the tokenizer has not are written as unused.

    Raises
    ------
    NotInThisVersion
        llama.cpp has no such tokenizer; the message names what is different.
    """
    # The second says whose file it is: an export may take the place of an earlier one only.
    found = [_pair("general.name", "string", name), _pair("pantheraml.run", "string", name)]
    path = folder / "tokenizer.json"
    if not path.is_file():
        return [*found, _pair("tokenizer.ggml.model", "string", "no_vocab")]
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    settings = _read(folder / "tokenizer_config.json")
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise NotInThisVersion(
            f"not in this version: GGUF of a tokenizer of type {model.get('type')!r}; there is BPE"
        )
    tokens, types = _tokens(tokenizer, vocab)
    if model.get("byte_fallback"):
        found += _sentencepiece(tokenizer, tokens)
    else:
        found += _byte_level(tokenizer)
    found.append(_pair("tokenizer.ggml.tokens", "strings", tokens))
    found.append(_pair("tokenizer.ggml.token_type", "i32s", types))
    return found + _special(path, settings, _read(folder / "config.json"), tokens) + _chat(folder)


def _pair(key: str, kind: str, value: Any) -> Pair:
    return {"key": key, "type": kind, "value": value}


def _read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _tokens(tokenizer: dict[str, Any], vocab: int) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding."""
    known: dict[str, int] = dict(tokenizer["model"]["vocab"])
    unknown = tokenizer["model"].get("unk_token")
    tokens = [f"[PAD{i}]" for i in range(vocab)]
    types = [_UNUSED] * vocab
    added = {int(entry["id"]): entry for entry in tokenizer.get("added_tokens", [])}
    for text, index in [*known.items(), *((e["content"], i) for i, e in added.items())]:
        if index >= vocab:
            raise InvalidError(f"the tokenizer's token {index} has no row among the {vocab}")
        tokens[index] = text
        if index in added:
            types[index] = _CONTROL if added[index].get("special") else _USER
        elif text == unknown:
            types[index] = _UNKNOWN
        else:
            types[index] = _NORMAL
        if tokenizer["model"].get("byte_fallback") and len(text) == 6 and text.startswith("<0x"):
            types[index] = _BYTE
    return tokens, types


def _parts(step: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, one or a sequence."""
    if step is None:
        return []
    return list(step[inside]) if step.get("type") == "Sequence" else [step]


def _byte_level(tokenizer: dict[str, Any]) -> list[Pair]:
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    return [
        _pair("tokenizer.ggml.model", "string", "gpt2"),
        _pair("tokenizer.ggml.pre", "string", _split_name(tokenizer)),
        _pair("tokenizer.ggml.merges", "strings", merges),
    ]


def _split_name(tokenizer: dict[str, Any]) -> str:
    steps = _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if not steps or steps[-1].get("type") != "ByteLevel":
        raise _strange("pre_tokenizer", tokenizer.get("pre_tokenizer"))
    if steps[-1].get("add_prefix_space"):
        raise _strange("pre_tokenizer", steps[-1])
    normal = [n for n in _parts(tokenizer.get("normalizer"), "normalizers") if n["type"] != "NFC"]
    if normal:  # NFC is taken by llama.cpp's own file for Qwen2 too: text is in that form already
        raise _strange("normalizer", tokenizer["normalizer"])
    if steps[-1].get("use_regex", True):
        digits = [step.get("type") == "Digits" and step.get("individual_digits") for step in steps]
        if len(steps) == 1:
            return "gpt-2"
        if len(steps) == 2 and digits[0]:
            return "smollm"
    elif len(steps) == 2 and steps[0].get("type") == "Split":
        name = _SPLITS.get(steps[0].get("pattern", {}).get("Regex", ""))
        if name is not None and not steps[0].get("invert"):
            return name
    raise _strange("pre_tokenizer", tokenizer["pre_tokenizer"])


def _sentencepiece(tokenizer: dict[str, Any], tokens: list[str]) -> list[Pair]:
    """Scores by the order of merges, as SentencePiece numbers its own."""
    prefix = False
    for step in _parts(tokenizer.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend" and step.get("prepend") == "\u2581":
            prefix = True
        elif step["type"] != "Replace" or step.get("content") != "\u2581":
            raise _strange("normalizer", step)
    for step in _parts(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] != "Metaspace":
            raise _strange("pre_tokenizer", step)
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space") else "never")
        prefix = prefix or scheme != "never"
    rank: dict[str, int] = {}
    for i, merge in enumerate(tokenizer["model"]["merges"]):
        text = "".join(merge.split(" ")) if isinstance(merge, str) else "".join(merge)
        rank.setdefault(text, i)
    last = len(tokenizer["model"]["merges"])
    scores = [-float(rank.get(token, last)) for token in tokens]
    return [
        _pair("tokenizer.ggml.model", "string", "llama"),
        _pair("tokenizer.ggml.pre", "string", "default"),
        _pair("tokenizer.ggml.scores", "f32s", scores),
        _pair("tokenizer.ggml.add_space_prefix", "bool", prefix),
    ]


def _strange(what: str, value: object) -> NotInThisVersion:
    shown = json.dumps(value, ensure_ascii=False)
    return NotInThisVersion(
        f"not in this version: GGUF with the tokenizer's {what} {shown[:300]}; llama.cpp has no "
        "name for it that we know"
    )


def _special(
    path: Path, settings: dict[str, Any], config: dict[str, Any], tokens: list[str]
) -> list[Pair]:
    """Ids of the special tokens, and which of them the tokenizer adds itself."""
    from tokenizers import Tokenizer

    ids: dict[str, int] = {}
    for what, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        text = settings.get(f"{what}_token")
        text = text.get("content") if isinstance(text, dict) else text
        index = config.get(f"{what}_token_id")
        index = index[0] if isinstance(index, list) and index else index
        if isinstance(text, str) and text in tokens:
            ids[key] = tokens.index(text)
        elif isinstance(index, int) and 0 <= index < len(tokens):
            ids[key] = index
    tokenizer = Tokenizer.from_file(str(path))
    with_special = tokenizer.encode("a").ids
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    begins = bool(with_special) and with_special[0] == ids.get("bos") and with_special != bare
    ends = bool(with_special) and with_special[-1] == ids.get("eos") and with_special != bare
    found = [_pair(f"tokenizer.ggml.{key}_token_id", "u32", value) for key, value in ids.items()]
    return [
        *found,
        _pair("tokenizer.ggml.add_bos_token", "bool", begins),
        _pair("tokenizer.ggml.add_eos_token", "bool", ends),
    ]


def _chat(folder: Path) -> list[Pair]:
    try:
        named = chat.stored(folder)
    except NotFoundError:
        return []
    return [_pair("tokenizer.chat_template", "string", named[chat.DEFAULT])]
