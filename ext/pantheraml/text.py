"""Text of a model folder's tokenizer, loaded when it is first needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pantheraml import whole
from pantheraml.errors import InvalidError, NotFoundError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Text:
    """Prompts to token ids and back.

    Parameters
    ----------
    folder
        The model folder.
    run, data
        A run's folder and ``data`` of its run.json, for the chat template that was given to it.
    """

    def __init__(self, folder: Path, run: Path, data: Mapping[str, Any]) -> None:
        self._folder, self._run, self._data = folder, run, data

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        whole.load("numpy", "tokenizers")
        from pantheraml.data.tokenise import load_tokenizer

        tokenizer = load_tokenizer(self._folder)
        if tokenizer is None:
            raise NotFoundError(
                f"the model folder {self._folder} has no tokenizer.json; use input_ids= and "
                ".token_ids"
            )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Tokenise a prompt as it is, with the special tokens that the tokenizer adds itself."""
        return list(self._tokenizer.encode(_whole(text)).ids)

    def encode_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokenise a conversation up to where the assistant begins."""
        from pantheraml.data import chat

        many = isinstance(messages, Iterable) and not isinstance(messages, str)
        turns = chat.check(
            [dict(turn) if isinstance(turn, Mapping) else turn for turn in messages]
            if many
            else messages
        )
        given = chat.of_run(self._run, self._data)
        prompt = chat.load(self._folder, *given).render(turns, prompt=True)
        return list(self._tokenizer.encode(_whole(prompt), add_special_tokens=False).ids)

    def decode(self, token_ids: list[int]) -> str:
        """Make text, without special tokens."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))


def _whole(text: object) -> str:
    """Refuse what no tokenizer takes."""
    if not isinstance(text, str):
        raise InvalidError(f"a prompt must be text, it is {text!r}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidError("the prompt has half a surrogate pair, which is no text") from None
    return text
