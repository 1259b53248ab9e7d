"""Sampling: prompts to tokens, tokens to text as they come, and an end at a stop string.

The worker knows tokens, not text. So stop strings are watched for here, in the text as it arrives,
and the worker is told when it is enough.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pantheraml import config
from pantheraml.commands import Command, Sample
from pantheraml.errors import Error, InvalidError
from pantheraml.record import Event

if TYPE_CHECKING:
    from pantheraml.run import Run

#: What one request can hold (docs/messages.md).
MOST_TOKENS, MOST_PROMPTS = 8192, 256

_HALF = "\ufffd"  # what a tokenizer shows for bytes that are no whole character yet


def prompts(
    run: Run,
    text: str | Sequence[str] | None,
    messages: Sequence[Any] | None,
    input_ids: Sequence[Any] | None,
) -> tuple[list[list[int]], bool]:
    """Token ids of each prompt, and whether several were asked for.

    Raises
    ------
    TypeError
        None of the three was given, or more than one.
    InvalidError
        It is not what its parameter takes, or has too many tokens.
    """
    if sum(prompt is not None for prompt in (text, messages, input_ids)) != 1:
        raise TypeError("sample() takes one of text, messages=, input_ids=")
    if text is not None:
        if not isinstance(text, str | Sequence):
            raise InvalidError(f"a prompt must be text, or a list of texts, it is {text!r}")
        if text and isinstance(text[0], Mapping):
            raise InvalidError("a prompt must be text; a conversation is given as messages=")
        several = not isinstance(text, str)
        found = [run._text.encode(one) for one in ([text] if isinstance(text, str) else text)]
    elif messages is not None:
        listed = isinstance(messages, Sequence) and not isinstance(messages, str)
        several = listed and bool(messages) and not isinstance(messages[0], Mapping)
        found = [run._text.encode_messages(one) for one in (messages if several else [messages])]
    else:
        ids: Any = input_ids
        ids = ids.tolist() if hasattr(ids, "tolist") else ids  # NumPy's, PyTorch's
        if not isinstance(ids, Iterable):
            raise InvalidError(f"input_ids must be a list of token ids, it is {input_ids!r}")
        given = list(ids)
        several = bool(given) and isinstance(given[0], Sequence) and not isinstance(given[0], str)
        found = [
            [config.whole("input_ids", i, 0, 2**31 - 1) for i in one]
            for one in (given if several else [given])
        ]
    for ids in found:
        if not 1 <= len(ids) <= MOST_TOKENS:
            raise InvalidError(f"the prompt has {len(ids)} tokens; 1 to {MOST_TOKENS} are possible")
    if not found:
        raise InvalidError("there are no prompts in the list")
    return found, several


def together(found: list[list[int]]) -> Iterator[list[list[int]]]:
    """Divide prompts into as many as one request can hold."""
    group: list[list[int]] = []
    for ids in found:
        if len(group) == MOST_PROMPTS or sum(map(len, group)) + len(ids) > MOST_TOKENS:
            yield group
            group = []
        group.append(ids)
    yield group


def ask(
    run: Run, group: list[list[int]], fields: dict[str, Any], stop: tuple[str, ...]
) -> list[SampleStream]:
    """Ask for answers to prompts that the worker continues side by side."""
    if len(group) > 1:
        fields = fields | {"lengths": [len(ids) for ids in group]}
    command = run._serve("sample", input_ids=[i for ids in group for i in ids], **fields)
    return [SampleStream(run, command, stop, row) for row in range(len(group))]


def choices(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float | None,
    seed: int,
) -> dict[str, Any]:
    """The request's fields but for the prompt."""
    fields: dict[str, Any] = {
        "max_new_tokens": config.whole("max_new_tokens", max_new_tokens, 1, 65536),
        "temperature": config.number("temperature", temperature, 0, 100),
        "seed": config.whole("seed", seed, 0, 2**53),
    }
    if top_k is not None:
        fields["top_k"] = config.whole("top_k", top_k, 1, 2**31 - 1)
    if top_p is not None:
        fields["top_p"] = config.number("top_p", top_p, 0, 1, above=True)
    if repetition_penalty is not None:
        fields["repetition_penalty"] = config.number(
            "repetition_penalty", repetition_penalty, 1e-3, 1e3
        )
    return fields


def stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as a tuple, none of them empty.

    Raises
    ------
    InvalidError
        One of them is, or is no text.
    """
    several = isinstance(stop, Iterable) and not isinstance(stop, str)
    found: tuple[Any, ...] = tuple(stop or ()) if several else () if stop is None else (stop,)
    if not all(isinstance(one, str) and one for one in found):
        raise InvalidError(f"stop must be texts that are not empty, it is {stop!r}")
    return found


class SampleStream(Iterator[str]):
    """Text as the model writes it. Made by ``run.sample(…, stream=True)``.

    Iterating gives pieces of text; a piece that may be the beginning of a stop string is held back
    until it is clear whether it is one. :meth:`result` waits for the rest.
    """

    def __init__(self, run: Run, command: Command, stop: tuple[str, ...], row: int = 0) -> None:
        self._run = run
        self._command = command
        self._row = row  # which of the command's prompts
        self._key = (command.number, row)
        self._stop = stop
        self._given = 0  # characters
        self._seen = 0  # tokens
        self._sample: Sample | None = None

    @property
    def token_ids(self) -> list[int]:
        """New tokens so far."""
        if self._sample is not None:
            return list(self._sample.token_ids)
        return [] if self._command.is_lost else list(self._run._record.samples.get(self._key, []))

    def __next__(self) -> str:
        """Wait for the next piece of text."""
        while not (piece := self._piece()):
            if self._sample is not None:
                raise StopIteration
            self._run._wait_for(self._has_more, None, "sample")
        return piece

    def result(self) -> Sample:
        """Wait until it is over; what was written."""
        for _ in self:
            pass
        assert self._sample is not None
        return self._sample

    def tokens(self) -> Sample:
        """Wait until it is over, for a model without a tokenizer (and so without stop strings)."""
        if self._sample is None:
            self._run._event_of(self._command, "sample", self._ends)
            self._finish(None)
        assert self._sample is not None
        return self._sample

    def close(self) -> None:
        """Let the model end after its next token."""
        if self._sample is None and not self._is_over():
            with suppress(Error):
                self._run._ask("enough", command=self._command.number, row=self._row)

    def __del__(self) -> None:
        """A stream that nobody reads any more need not be written."""
        with suppress(Exception):
            self.close()

    # ---- helpers -----------------------------------------------------------------------------

    def _piece(self) -> str:
        """Give what has been written since, "" where nothing is certain yet or it is over."""
        if self._sample is None:
            over, ids = self._is_over(), self.token_ids
            self._seen = len(ids)
            text = self._run.decode(ids) if ids else ""
            at = _first(text, self._stop)
            if at is None and not over:
                return self._give(_settled(text, self._stop))
            self._finish(at)
        assert self._sample is not None
        return self._give(self._sample.text)

    def _has_more(self) -> bool:
        """Say whether there are tokens that the last piece was without, or it is over."""
        return self._sample is None and (len(self.token_ids) > self._seen or self._is_over())

    def _give(self, text: str) -> str:
        piece, self._given = text[self._given :], max(self._given, len(text))
        return piece

    def _ends(self, event: Event) -> bool:
        return event["done"] is True and event.get("row", 0) == self._row

    def _is_over(self) -> bool:
        over = self._key in self._run._record.samples_done
        return over or self._command.state == "refused" or self._run._link is None

    def _finish(self, at: int | None) -> None:
        """Take the tokens up to the stop string, if one ended it; else all of them."""
        ids = self.token_ids
        if at is not None:
            self.close()
        event = self._run._event_of(self._command, "sample", self._ends)
        if at is None:
            ids = list(self._run._record.samples[self._key])
            text = self._run.decode(ids) if self._stop else ""
            at = _first(text, self._stop)
        if at is not None:
            ids = self._shortest(ids)
        self._sample = Sample(ids, event["step"], self._run.decode, self._stop)

    def _shortest(self, ids: list[int]) -> list[int]:
        """The fewest tokens whose text has a stop string in it."""
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            if _first(self._run.decode(ids[:middle]), self._stop) is None:
                low = middle + 1
            else:
                high = middle
        return ids[:low]


class SampleStreams(Iterator[tuple[int, str]]):
    """Texts of several prompts as the model writes them. Made by ``run.sample([…], stream=True)``.

    Iterating gives the prompt's place in the list, from 0, and a piece of its text, in the order in
    which they are written. ``streams[i]`` is the stream of one prompt; what was read there does not
    come again here. :meth:`result` waits for the rest.
    """

    def __init__(self, run: Run, streams: Sequence[SampleStream]) -> None:
        self._run, self._streams = run, tuple(streams)
        self._pieces: deque[tuple[int, str]] = deque()

    def __len__(self) -> int:
        """Count the prompts."""
        return len(self._streams)

    def __getitem__(self, index: int) -> SampleStream:
        """Give the stream of one prompt."""
        return self._streams[index]

    def __next__(self) -> tuple[int, str]:
        """Wait for the next piece of any text."""
        while not self._pieces:
            pieces = [(i, stream._piece()) for i, stream in enumerate(self._streams)]
            self._pieces.extend((i, piece) for i, piece in pieces if piece)
            if not self._pieces:
                if all(stream._sample is not None for stream in self._streams):
                    raise StopIteration
                self._run._wait_for(
                    lambda: any(stream._has_more() for stream in self._streams), None, "sample"
                )
        return self._pieces.popleft()

    def result(self) -> list[Sample]:
        """Wait until all are over; what was written, a sample for each prompt."""
        return [stream.result() for stream in self._streams]

    def close(self) -> None:
        """Let the model end each text after its next token."""
        for stream in self._streams:
            stream.close()


def _first(text: str, stop: tuple[str, ...]) -> int | None:
    """Where the first stop string begins."""
    found = [at for at in (text.find(one) for one in stop) if at >= 0]
    return min(found, default=None)


def _settled(text: str, stop: tuple[str, ...]) -> str:
    """The text but for an end that may become something else."""
    text = text.rstrip(_HALF)
    held = 0
    for one in stop:
        for n in range(min(len(one) - 1, len(text)), 0, -1):
            if text.endswith(one[:n]):
                held = max(held, n)
                break
    return text[: len(text) - held]
