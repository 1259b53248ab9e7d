"""Ids and labels of each kind of row.

============== ========================================= ==================================
row            ids                                       learned
============== ========================================= ==================================
text           tokens of the text, end-of-text           all
prompt,        tokens of prompt + completion as one      tokens that hold a character of
completion     text, end-of-text                         the completion, and end-of-text
messages       tokens of the rendered chat template      tokens of the assistant's turns
input_ids      as they are                               labels; all where there are none
============== ========================================= ==================================

As TRL does: the end-of-text token is added to text and completion unless it is there already,
never to a chat (its template ends turns itself); the tokenizer adds its own special tokens to text
and prompt, not to a chat.

A .txt file is one long text, cut into rows of ``max_length`` tokens. What is done with other rows
that are longer than that is the preparation's matter (:mod:`pantheraml.data.prepare`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pantheraml.data import chat
from pantheraml.data import long_text as long
from pantheraml.data.rows import Kind, Row, string
from pantheraml.data.shard import IGNORE, Ids
from pantheraml.errors import Error, InvalidError, NotFoundError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Pair = tuple[Ids, Ids]

#: Characters of a row from which on it is tokenised in pieces, so that it takes little memory.
LONG = 1 << 20
#: Characters of a prompt with its completion, or of a conversation, at the most.
LONGEST = 1 << 24

#: Begin and end of each token in characters of its text, ``[tokens, 2]``.
Spans = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ModelFolder:
    """What tokenising needs to know of a model.

    Attributes
    ----------
    path
        The folder.
    vocab
        ``vocab_size`` of config.json: ids at or above it have no embedding.
    tokenizer
        None where the folder has no tokenizer.json.
    eos
        The end-of-text token's id, None if the model has none.
    template, variables
        A chat template in place of the folder's own, and what it is given (`chat_template` and
        `chat_template_kwargs`).
    """

    path: Path
    vocab: int
    tokenizer: Tokenizer | None
    eos: int | None
    template: str | None = None
    variables: Mapping[str, Any] | None = None

    def need_tokenizer(self) -> Tokenizer:
        """Give the tokenizer, or say that the folder has none.

        Raises
        ------
        NotFoundError
            It has none.
        """
        if self.tokenizer is None:
            raise NotFoundError(
                f"the model folder {self.path} has no tokenizer.json, which text needs; "
                "transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…) writes one of "
                'other files; rows of {"input_ids", "labels"} do without'
            )
        return self.tokenizer


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """Load a folder's tokenizer.json without its padding and truncation, None if there is none.

    Raises
    ------
    InvalidError
        The library cannot read it.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer  # rows of ids do without

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InvalidError(f"{path}: cannot be read ({error})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def load_model_folder(
    folder: Path, template: str | None = None, variables: Mapping[str, Any] | None = None
) -> ModelFolder:
    """Read config.json's vocabulary, the tokenizer and the end-of-text token.

    Raises
    ------
    NotFoundError
        There is no config.json.
    InvalidError
        config.json has no vocabulary, or a file cannot be read.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        vocab = int(config["vocab_size"])
    except FileNotFoundError:
        raise NotFoundError(f"the model folder {folder} has no config.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidError(f"{path}: no vocab_size to be read ({error})") from None
    tokenizer = load_tokenizer(folder)
    eos: int | None = None
    name = chat.special_tokens(folder).get("eos_token")
    if tokenizer is not None and name is not None:
        eos = tokenizer.token_to_id(name)
    if eos is None:
        given = config.get("eos_token_id")
        given = given[0] if isinstance(given, list) and given else given
        eos = given if isinstance(given, int) else None
    return ModelFolder(folder, vocab, tokenizer, eos, template, variables)


def identity(model: ModelFolder) -> dict[str, Any]:
    """Give what decides how this model's rows become tokens, as JSON values."""
    try:
        template: Any = model.template
        if template is None:
            template = chat.stored(model.path)
    except NotFoundError:
        template = None  # rows with messages are refused
    return {
        "tokenizer": None if model.tokenizer is None else model.tokenizer.to_str(),
        "vocab": model.vocab,
        "eos": model.eos,
        "special": chat.special_tokens(model.path),
        "template": template,
        "variables": dict(model.variables or {}),
        "libraries": [
            None if model.tokenizer is None else import_module("tokenizers").__version__,
            None if template is None else import_module("jinja2").__version__,
        ],
    }


class Tokeniser:
    """Turns rows of one kind into ids and labels.

    Parameters
    ----------
    model
        The model folder.
    kind
        What the rows are.
    moved
        Called while long rows are tokenised, with the share (0 to 1) of the batch's long texts
        that is done.
    """

    def __init__(
        self, model: ModelFolder, kind: Kind, moved: Callable[[float], None] = lambda _: None
    ) -> None:
        self._model = model
        self._moved = moved
        self._encode = {
            "text": self._text,
            "prompt_completion": self._prompt_completion,
            "messages": self._messages,
            "tokens": self._tokens,
        }[kind]
        self._template: chat.ChatTemplate | None = None

    def batch(self, rows: Sequence[Row]) -> Iterator[tuple[Row, Pair]]:
        """Yield each row with its ids and labels, every one checked against the vocabulary."""
        for row, (ids, labels) in zip(rows, self._encode(rows), strict=True):
            self._check(row, "input_ids", ids, ids)
            yield row, (ids, labels)

    def _check(self, row: Row, name: str, ids: Ids, shown: Ids) -> None:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self._model.vocab:
            place = int(np.flatnonzero((ids < 0) | (ids >= self._model.vocab))[0])
            raise row.fail(
                f"{name}[{place}] is {int(shown[place])}, but the model's vocabulary has "
                f"{self._model.vocab} tokens (0 to {self._model.vocab - 1})"
            )

    # ---- kinds -----------------------------------------------------------------------------

    def _text(self, rows: Sequence[Row]) -> Iterator[Pair]:
        texts = [string(row, "text") for row in rows]
        short = [text for text in texts if len(text) < LONG]
        encodings = iter(self._model.need_tokenizer().encode_batch_fast(short))
        for pieces in self._cut(texts):
            if pieces is None:
                ids = self._ended(np.array(next(encodings).ids, np.int32))
            else:
                ids = np.concatenate(list(long_text(self._model, pieces)))
            yield ids, ids

    def _prompt_completion(self, rows: Sequence[Row]) -> Iterator[Pair]:
        if isinstance(rows[0].fields["prompt"], list):
            yield from self._conversations(rows)
            return
        texts, begins = [], []
        for row in rows:
            prompt = string(row, "prompt")
            texts.append(_not_too_long(row, prompt + string(row, "completion")))
            begins.append(len(prompt))
        encoded = self._encoded(texts, special=True)
        for (ids, places), text, begin in zip(encoded, texts, begins, strict=True):
            labels = np.where(_inside(places, len(text), [(begin, len(text))]), ids, IGNORE)
            ended = self._ended(ids)
            if len(ended) > len(ids) or (len(ids) and ids[-1] == self._model.eos):
                labels = np.append(labels[: len(ended) - 1], ended[-1])
            yield ended, labels.astype(np.int32)

    def _conversations(self, rows: Sequence[Row]) -> Iterator[Pair]:
        """Prompt and completion that are both lists of turns."""
        template = self._need_template()
        rendered = []
        for row in rows:
            prompt = _turns(row, "prompt")
            turns = prompt + _turns(row, "completion")
            rendered.append(_render(template, row, turns, len(prompt)))
        yield from self._learn(rendered)

    def _messages(self, rows: Sequence[Row]) -> Iterator[Pair]:
        template = self._need_template()
        yield from self._learn([_render(template, row, _turns(row, "messages"), 0) for row in rows])

    def _learn(self, rendered: list[tuple[str, list[chat.Span]]]) -> Iterator[Pair]:
        encoded = self._encoded([text for text, _ in rendered], special=False)
        for (ids, places), (text, spans) in zip(encoded, rendered, strict=True):
            yield ids, np.where(_inside(places, len(text), spans), ids, IGNORE).astype(np.int32)

    def _tokens(self, rows: Sequence[Row]) -> Iterator[Pair]:
        for row in rows:
            ids = _integers(row, "input_ids")
            self._check(row, "input_ids", ids.clip(-1, 2**31 - 1).astype(np.int32), ids)
            labels = ids
            if row.fields.get("labels") is not None:
                labels = _integers(row, "labels")
                if len(labels) != len(ids):
                    raise row.fail(f"{len(ids)} input_ids but {len(labels)} labels")
                learned = labels[labels != IGNORE]
                if len(learned) and not 0 <= learned.min() <= learned.max() < self._model.vocab:
                    bad = learned[(learned < 0) | (learned >= self._model.vocab)][0]
                    raise row.fail(
                        f"labels has {bad}; a label is -100 (no loss) or a token id from 0 to "
                        f"{self._model.vocab - 1}"
                    )
            mask = row.fields.get("attention_mask")
            if mask is not None and (not isinstance(mask, list) or len(mask) != len(ids)):
                raise row.fail("'attention_mask' must be a list as long as input_ids")
            if 0 in (mask or ()):
                raise row.fail("attention_mask has zeros; give rows without padding")
            yield ids.astype(np.int32), labels.astype(np.int32)

    # ---- helpers ---------------------------------------------------------------------------

    def _cut(self, texts: Sequence[str]) -> Iterator[Iterator[str] | None]:
        """Give each text's pieces, None for one that is short enough to be one."""
        all_of_them = sum(len(text) for text in texts if len(text) >= LONG)
        done = 0

        def pieces(text: str) -> Iterator[str]:
            for start in range(0, len(text), long.PIECE):
                self._moved((done + start) / all_of_them)
                yield text[start : start + long.PIECE]

        for text in texts:
            yield pieces(text) if len(text) >= LONG else None
            done += len(text) if len(text) >= LONG else 0

    def _encoded(self, texts: Sequence[str], *, special: bool) -> Iterator[tuple[Ids, Spans]]:
        """Yield each text's ids and their places, those of special tokens being (-1, -1)."""
        tokenizer = self._model.need_tokenizer()
        short = [text for text in texts if len(text) < LONG]
        encodings = iter(tokenizer.encode_batch(short, add_special_tokens=special))
        for pieces in self._cut(texts):
            if pieces is None:
                encoding = next(encodings)
                spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
                spans[np.array(encoding.special_tokens_mask, bool)] = -1
                yield np.array(encoding.ids, np.int32), spans
                continue
            front, back = _added(tokenizer) if special else ([], [])
            parts = list(long.encode(tokenizer, pieces))
            ids = np.concatenate([front, *(ids for ids, _ in parts), back])
            spans = np.full((len(ids), 2), -1, np.int64)
            spans[len(front) : len(ids) - len(back)] = np.concatenate([at for _, at in parts])
            yield ids.astype(np.int32), spans

    def _need_template(self) -> chat.ChatTemplate:
        if self._template is None:
            model = self._model
            self._template = chat.load(model.path, model.template, model.variables)
        return self._template

    def _ended(self, ids: Ids) -> Ids:
        """Add the end-of-text token, unless the model has none or it stands there already."""
        eos = self._model.eos
        if eos is None or (len(ids) and ids[-1] == eos):
            return ids
        return np.append(ids, np.int32(eos))


def long_text(model: ModelFolder, texts: Iterable[str]) -> Iterator[Ids]:
    """Tokenise one text that comes in pieces; yields its ids some at a time, end-of-text last.

    The ids are those of the whole text (:mod:`pantheraml.data.long_text`), with the special tokens
    that the tokenizer adds by itself.
    """
    tokenizer = model.need_tokenizer()
    front, back = _added(tokenizer)
    yield np.array(front, np.int32)
    last = None
    for ids, _ in long.encode(tokenizer, texts):
        yield ids.astype(np.int32)
        last = int(ids[-1]) if len(ids) else last
    last = back[-1] if back else last
    if model.eos is not None and last != model.eos:
        back.append(model.eos)
    yield np.array(back, np.int32)


def _added(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Give the special tokens that a tokenizer adds in front of a text and behind it."""
    example = tokenizer.encode("a")
    added = example.special_tokens_mask
    if 0 not in added:
        return list(example.ids), []
    return example.ids[: added.index(0)], example.ids[len(added) - added[::-1].index(0) :]


def _inside(places: Spans, length: int, spans: list[chat.Span]) -> Any:
    """Say for each token whether it holds a character of any span.

    A tokenizer may report a token's place without the white space at its ends, so a token is taken
    to begin where the one before it ended. Tokens that the tokenizer itself added (at -1) hold
    nothing.
    """
    learned = np.zeros(length + 1, np.int64)
    for begin, end in spans:
        learned[begin + 1 : end + 1] = 1
    before = np.cumsum(learned)  # learned characters before each place
    added = places[:, 1] < 0
    ends = np.where(added, 0, places[:, 1])
    reached = np.maximum.accumulate(ends) if len(ends) else ends
    previous = np.concatenate([[0], reached[:-1]]) if len(ends) else ends
    begins = np.minimum(np.where(added, 0, places[:, 0]), previous)
    return (before[ends] > before[np.minimum(begins, ends)]) & ~added


def _render(
    template: chat.ChatTemplate, row: Row, turns: chat.Messages, first: int
) -> tuple[str, list[chat.Span]]:
    variables = row.fields.get("chat_template_kwargs")
    if variables is not None and not isinstance(variables, dict):
        raise row.fail("'chat_template_kwargs' must be an object")
    if chat.DATE in (variables or ()):
        raise row.fail(f"{chat.DATE!r} can be given to the call only, not row by row")
    try:
        tools = chat.tools_of(row.fields.get("tools"))
        text, spans = template.with_spans(turns, first=first, tools=tools, variables=variables)
    except Error as error:
        raise type(error)(f"{row.source.where(row.index)}: {error}") from None
    return _not_too_long(row, text), spans


def _not_too_long(row: Row, text: str) -> str:
    if len(text) > LONGEST:
        raise row.fail(f"{len(text):,} characters; {LONGEST:,} are the most, unless it is a text")
    return text


def _turns(row: Row, name: str) -> chat.Messages:
    try:
        return chat.check(row.fields[name])
    except Error as error:
        raise type(error)(f"{row.source.where(row.index)}: {error}") from None


def _integers(row: Row, name: str) -> Any:
    values = row.fields[name]
    if not isinstance(values, list):
        raise row.fail(f"{name!r} must be a list of token ids")
    if not values:
        raise row.fail(f"{name!r} is empty")
    if not all(type(value) is int for value in values):
        raise row.fail(f"{name!r} must hold whole numbers only")
    try:
        return np.array(values, np.int64)
    except OverflowError:
        raise row.fail(f"{name!r} holds a number that no token id can be") from None
