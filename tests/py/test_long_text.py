"""A text tokenised in pieces has the tokens of the whole."""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from pantheraml.data import long_text, tokenise
from pantheraml.data.rows import Kind, Row, Source
from real_text import KINDS, corpus, model_folder, trained
from tokenizers import Tokenizer, models, pre_tokenizers


def pieces(text: str, size: int) -> list[str]:
    return [text[begin : begin + size] for begin in range(0, len(text), size)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [3000, 4001])
def test_pieces_have_the_tokens_of_the_whole(kind: str, size: int) -> None:
    tokenizer = Tokenizer.from_str(trained(kind))
    text = corpus(1 << 18)[: 1 << 18]
    encoded = tokenizer.encode(text, add_special_tokens=False)
    parts = list(long_text.encode(tokenizer, pieces(text, size)))
    assert [i for ids, _ in parts for i in ids.tolist()] == encoded.ids
    assert [tuple(at) for _, spans in parts for at in spans.tolist()] == encoded.offsets


@pytest.mark.parametrize("kind", KINDS)
def test_odd_texts(kind: str) -> None:
    """Blanks, line ends, one letter again and again, many bytes a character, the tokens' names."""
    tokenizer = Tokenizer.from_str(trained(kind))
    choose = random.Random(7)
    parts = [
        " ",
        "\n",
        "\n\n",
        "a",
        "é",
        "日本",
        "👋🏽",
        "\t",
        "def ",
        "0",
        "<|endoftext|>",
        "\r\n",
        "=" * 9,
    ]
    texts = [
        " " * 9000, "\n" * 9000, "ab" * 5000, "é" * 9000,
        "".join(choose.choice(parts) for _ in range(6000)),
    ]  # fmt: skip
    for text in texts:
        whole = tokenizer.encode(text, add_special_tokens=False).ids
        parts_made = long_text.encode(tokenizer, pieces(text, 2500))
        assert [i for part, _ in parts_made for i in part.tolist()] == whole, text[:20]


def test_without_agreement_it_is_one_piece() -> None:
    """Tokens of three letters from the start: most pieces disagree, and are tokenised as one."""
    words = {a + b + c: i for i, (a, b, c) in enumerate(product("abcd", repeat=3))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="aaa"))
    tokenizer.pre_tokenizer = pre_tokenizers.FixedLength(length=3)
    choose = random.Random(1)
    text = "".join(choose.choice("abcd") for _ in range(3000))
    whole = tokenizer.encode(text).ids
    made = list(long_text.encode(tokenizer, pieces(text, 500), overlap=100))
    assert [i for part, _ in made for i in part.tolist()] == whole
    assert 1 < len(made) < 6  # only what begins at a multiple of three agrees


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.characters = tokenizer, 0

    def encode(self, text: str, **how: Any) -> Any:
        self.characters += len(text)
        return self.tokenizer.encode(text, **how)

    def encode_batch(self, texts: list[str], **how: Any) -> Any:
        self.characters += sum(map(len, texts))
        return self.tokenizer.encode_batch(texts, **how)


def test_pieces_that_never_agree_cost_a_few_times_the_text() -> None:
    """Tokens of 1009 letters from the start: no two pieces have one in common for 80 pieces."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.FixedLength(length=1009)
    choose = random.Random(1)
    text = "".join(choose.choice("abcd") for _ in range(80_000))
    counting = Counting(tokenizer)
    parts = list(long_text.encode(cast(Tokenizer, counting), pieces(text, 1000), overlap=100))
    assert [i for ids, _ in parts for i in ids.tolist()] == tokenizer.encode(text).ids
    assert counting.characters < 6 * len(text)  # each again with all before it: 40 times


def test_long_rows_of_every_kind_are_as_short_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces or at once: the same ids and labels, and the pieces tell how far they are."""
    folder = model_folder(tmp_path / "m", "metaspace")
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    model = tokenise.load_model_folder(folder, template)
    text = corpus(1 << 18)[:60000]
    before, after = text[:9000], text[9000:]
    turns = [{"role": "user", "content": before}, {"role": "assistant", "content": after}]
    rows: dict[Kind, dict[str, Any]] = {
        "text": {"text": text},
        "prompt_completion": {"prompt": before, "completion": after},
        "messages": {"messages": turns},
    }
    source = Source(tmp_path / "rows.jsonl", "jsonl")
    for kind, fields in rows.items():
        batch = [Row(source, i, fields, 1.0) for i in range(2)]
        at_once = list(tokenise.Tokeniser(model, kind).batch(batch))
        shares: list[float] = []
        with monkeypatch.context() as small:
            small.setattr(tokenise, "LONG", 10_000)
            small.setattr(long_text, "PIECE", 5_000)
            in_pieces = list(tokenise.Tokeniser(model, kind, shares.append).batch(batch))
        for (_, whole), (_, made) in zip(at_once, in_pieces, strict=True):
            assert np.array_equal(whole[0], made[0]), kind
            assert np.array_equal(whole[1], made[1]), kind
        assert len(shares) >= 24 and shares == sorted(shares) and 0 <= shares[0] < shares[-1] < 1


def test_a_long_row_is_as_a_short_one(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "metaspace")
    model = tokenise.load_model_folder(folder)
    text = corpus(1 << 18)[:30000]
    whole = [*model.need_tokenizer().encode(text).ids, 0]
    starts = range(0, len(text), 5000)
    made = list(tokenise.long_text(model, (text[at : at + 5000] for at in starts)))
    assert [i for part in made for i in part.tolist()] == whole
    ended = list(tokenise.long_text(model, ["x" * 5000, "y<|endoftext|>"]))
    assert [i for part in ended for i in part.tolist()].count(0) == 2  # one in front, one behind
