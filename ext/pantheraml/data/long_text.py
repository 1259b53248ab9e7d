"""A text too long to be tokenised at once, with the tokens that it would have then.

It is tokenised in pieces that overlap::

    text        ───────────────┼───────────────┼────────
    piece 0     ═══════════════╪══
    piece 1                  ══╪═══════════════╪══
    piece 2                                  ══╪════════
                               joined where both pieces have the same tokens for a while

A tokenizer's choice depends on what is near. Where two pieces agree on a run of tokens, each is
past what its own end did to it, and they are joined in the middle of that run. Where they agree on
none, both are tokenised again as one, together with as much again of what follows: a text whose
pieces never agree costs a few times its length so, and not its square.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: Characters of a piece.
PIECE = 1 << 16
#: Characters on either side of a cut that both pieces have.
OVERLAP = 1 << 10
#: Tokens before and after the place of a join that must be the same.
AGREE = 8

_AT_ONCE = 8  # pieces; each takes a core

Numbers = npt.NDArray[np.int64]


@dataclass
class _Piece:
    """Part of a text: where it begins, where it was cut, and its tokens."""

    begin: int
    text: str
    cut: int  # characters of the whole before the end that is its own; the overlap comes after
    ids: Numbers
    spans: Numbers  # [tokens, 2]: begin and end of each, in characters of the whole

    @classmethod
    def of(cls, begin: int, text: str, cut: int, encoding: Any) -> _Piece:
        spans = np.array(encoding.offsets, np.int64).reshape(-1, 2) + begin
        return cls(begin, text, cut, np.array(encoding.ids, np.int64), spans)

    @property
    def starts(self) -> Numbers:
        return self.spans[:, 0]


def encode(
    tokenizer: Tokenizer, texts: Iterable[str], *, overlap: int = OVERLAP, agree: int = AGREE
) -> Iterator[tuple[Numbers, Numbers]]:
    """Tokenise a text that comes in pieces, without the special tokens that a tokenizer adds.

    Parameters
    ----------
    tokenizer
        Without truncation and padding.
    texts
        The text's pieces in order, each longer than `overlap` (the last may be shorter).
    overlap, agree
        See :data:`OVERLAP` and :data:`AGREE`.

    Yields
    ------
    tuple
        Ids, some at a time, and for each its begin and end in characters of the whole text,
        ``[tokens, 2]``.
    """
    current: _Piece | None = None
    given = 0  # tokens of `current` that have been given already
    pieces = _pieces(tokenizer, texts, overlap)
    for piece in pieces:
        if current is None:
            current = piece
            continue
        joint = _joint(current, piece, overlap, agree)
        if joint is None or joint[0] < given:
            again = _together(tokenizer, current, piece, pieces)
            # What was given of `current` began at a join; the same place is sought in the new one.
            given = _place(again, current, given)
            current = again
            continue
        yield current.ids[given : joint[0]], current.spans[given : joint[0]]
        current, given = piece, joint[1]
    if current is not None:
        yield current.ids[given:], current.spans[given:]


def _together(
    tokenizer: Tokenizer, current: _Piece, piece: _Piece, following: Iterator[_Piece]
) -> _Piece:
    """Tokenise pieces that do not agree as one, with as many after them as `current` is long."""
    parts, cut = [current.text[: piece.begin - current.begin]], piece.cut
    more = piece
    while more.cut - piece.begin < len(current.text):
        after = next(following, None)
        if after is None:
            break
        parts.append(more.text[: after.begin - more.begin])
        more, cut = after, after.cut
    joined = "".join([*parts, more.text])
    encoding = tokenizer.encode(joined, add_special_tokens=False)
    return _Piece.of(current.begin, joined, cut, encoding)


def _pieces(tokenizer: Tokenizer, texts: Iterable[str], overlap: int) -> Iterator[_Piece]:
    windows = _windows(texts, overlap)
    while group := list(islice(windows, _AT_ONCE)):
        encodings = tokenizer.encode_batch([w[1] for w in group], add_special_tokens=False)
        for (begin, text, cut), encoding in zip(group, encodings, strict=True):
            yield _Piece.of(begin, text, cut, encoding)


def _windows(texts: Iterable[str], overlap: int) -> Iterator[tuple[int, str, int]]:
    """Give each text what is before and behind it: where it begins, itself, where it was cut."""
    before, here = "", ""
    begin = 0
    for text in texts:
        if here:
            cut = begin + len(here)
            yield begin - len(before), before + here + text[:overlap], cut
            before, begin = here[-overlap:], cut
        here = text
    if here:
        yield begin - len(before), before + here, begin + len(here)


def _joint(a: _Piece, b: _Piece, overlap: int, agree: int) -> tuple[int, int] | None:
    """Find a place near a's cut with the same tokens around it: its token in `a` and in `b`."""
    low, high = np.searchsorted(a.starts, (a.cut - overlap // 2, a.cut + overlap // 2))
    middle = int(np.searchsorted(a.starts, a.cut))
    for i in sorted(range(int(low), int(high)), key=lambda i: abs(i - middle)):
        if i and a.starts[i] == a.starts[i - 1]:
            continue  # within a character
        j = int(np.searchsorted(b.starts, a.starts[i]))
        if min(i, j) >= agree and _alike(a, i - agree, b, j - agree, 2 * agree):
            return i, j
    return None


def _alike(a: _Piece, i: int, b: _Piece, j: int, n: int) -> bool:
    if i + n > len(a.ids) or j + n > len(b.ids):
        return False
    return bool(
        np.array_equal(a.ids[i : i + n], b.ids[j : j + n])
        and np.array_equal(a.starts[i : i + n], b.starts[j : j + n])
    )


def _place(again: _Piece, current: _Piece, given: int) -> int:
    """Find in a piece tokenised again the token that is next in `current`."""
    if given == 0:
        return 0
    return int(np.searchsorted(again.starts, current.starts[given]))
