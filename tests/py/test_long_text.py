"""A text tokenised in pieces has the tokens of the whole."""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path

import pytest
from pantheraml.data import long_text, tokenise
from real_text import KINDS, corpus, model_folder, trained
from tokenizers import Tokenizer, models, pre_tokenizers


def pieces(text: str, size: int) -> list[str]:
    return [text[begin : begin + size] for begin in range(0, len(text), size)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [3000, 4001])
def test_pieces_have_the_tokens_of_the_whole(kind: str, size: int) -> None:
    tokenizer = Tokenizer.from_str(trained(kind))
    text = corpus(1 << 18)[: 1 << 18]
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    made = [i for part in long_text.encode(tokenizer, pieces(text, size)) for i in part.tolist()]
    assert made == whole


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
        assert [i for part in parts_made for i in part.tolist()] == whole, text[:20]


def test_without_agreement_it_is_one_piece() -> None:
    """Tokens of three letters from the start: most pieces disagree, and are tokenised as one."""
    words = {a + b + c: i for i, (a, b, c) in enumerate(product("abcd", repeat=3))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="aaa"))
    tokenizer.pre_tokenizer = pre_tokenizers.FixedLength(length=3)
    choose = random.Random(1)
    text = "".join(choose.choice("abcd") for _ in range(3000))
    whole = tokenizer.encode(text).ids
    made = list(long_text.encode(tokenizer, pieces(text, 500), overlap=100))
    assert [i for part in made for i in part.tolist()] == whole
    assert 1 < len(made) < 6  # only what begins at a multiple of three agrees


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
