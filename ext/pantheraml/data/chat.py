"""Chat templates: a conversation as the model's own text, and which of its characters are learned.

Only what the assistant says is learned. Where a template marks it with ``{% generation %}``, the
marks are used. Elsewhere the conversation is rendered prefix by prefix: the text up to an
assistant's turn (with the generation prompt) and the text up to its end must both be beginnings of
the whole, and what lies between is the turn. A template for which that does not hold (one that
rewrites earlier turns, as those that drop earlier reasoning) is refused rather than guessed at. So
is one that prints today's date, unless it is told which date to print: the same row would be other
tokens tomorrow.

This is the one place where a template's effect is computed: preparation, :func:`pantheraml.preview`
and :meth:`Run.sample` all ask here.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from pantheraml.errors import InvalidError, NotFoundError, NotInThisVersion

Messages = list[dict[str, Any]]
Span = tuple[int, int]
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")

#: A variable of ours: the date that ``strftime_now`` tells.
DATE = "strftime_now"

#: The template that transformers takes, and the one in its place where there are tools.
DEFAULT, TOOL_USE = "default", "tool_use"

#: The names that a turn's reasoning goes by, as transformers looks for it.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A model's chat template.

    Parameters
    ----------
    source
        The template's text.
    special_tokens
        Names that templates use: ``bos_token``, ``eos_token`` and so on.
    variables
        What else it is given: `chat_template_kwargs`.
    for_tools
        The template that takes its place where there are tools.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        variables: Mapping[str, Any] | None = None,
        for_tools: ChatTemplate | None = None,
    ) -> None:
        # Here and not above: rows that are no conversations do without jinja2.
        from pantheraml.data.template import Sandbox, TemplateError

        self._variables = dict(variables or {})
        # Random for each template, so no text can hold them by chance or intent, and they survive
        # what a template may do with a block's text afterwards.
        self._marks = (f"\x02{secrets.token_hex(8)}\x02", f"\x03{secrets.token_hex(8)}\x03")
        self._sandbox = Sandbox(self._marks, _date(self._variables.pop(DATE, None)))
        try:
            self._template = self._sandbox.make(source)
        except TemplateError as error:
            raise InvalidError(f"the chat template cannot be read: {error}") from None
        self._special = dict(special_tokens)
        self._for_tools = for_tools

    def render(
        self,
        messages: Messages,
        *,
        prompt: bool = False,
        tools: Any = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Render a conversation; with `prompt`, up to where the assistant would begin."""
        if tools is not None and self._for_tools is not None:
            return self._for_tools.render(messages, prompt=prompt, tools=tools, variables=variables)
        return self._strip(self._render(messages, prompt, tools, variables))[0]

    def with_spans(
        self,
        messages: Messages,
        *,
        first: int = 0,
        tools: Any = None,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[Span]]:
        """Render a conversation and say which characters are the assistant's.

        Parameters
        ----------
        messages
            The turns.
        first
            Turns before this one, and what the template puts behind them, are context only.
        tools, variables
            Handed to the template.

        Returns
        -------
        tuple
            The text, and half-open intervals of learned characters.

        Raises
        ------
        InvalidError
            The template refused the conversation, does not let turns be told apart, prints the
            date, or does not come to an end.
        """
        if tools is not None and self._for_tools is not None:
            return self._for_tools.with_spans(
                messages, first=first, tools=tools, variables=variables
            )
        self._sandbox.asked_date = False
        text, spans = self._strip(self._render(messages, False, tools, variables))
        if self._sandbox.asked_date:
            raise InvalidError(
                "the chat template prints today's date, so the same row would be other "
                "tokens tomorrow; say which date it is to print, as in "
                f'chat_template_kwargs={{"{DATE}": "2024-07-26"}}'
            )
        if self._sandbox.has_marks and first > 0:
            answers = first < len(messages) and messages[first]["role"] == "assistant"
            begin = self.render(messages[:first], prompt=answers, tools=tools, variables=variables)
            if answers and not text.startswith(begin):
                # Some ask for reasoning there ("<think>") that this turn, or any that is past, has
                # not: then all that is marked behind the turns before is the completion's.
                begin = self.render(messages[:first], tools=tools, variables=variables)
            if not text.startswith(begin):
                raise InvalidError(_rewritten(text, begin, f"before turn {first + 1}"))
            return text, [(max(at, len(begin)), end) for at, end in spans if end > len(begin)]
        if self._sandbox.has_marks:
            return text, spans
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
        learned = []
        for turn in turns:
            begin = self._before(messages, turn, text, tools, variables)
            end = text
            if turn + 1 < len(messages):
                end = self.render(messages[: turn + 1], tools=tools, variables=variables)
            for part, what in ((begin, "before"), (end, "up to and with")):
                if not text.startswith(part):
                    raise InvalidError(_rewritten(text, part, f"{what} turn {turn + 1}"))
            if len(end) < len(begin):
                raise InvalidError(_rewritten(begin, end, f"up to and with turn {turn + 1}"))
            learned.append((len(begin), len(end)))
        return text, learned

    def _before(
        self, messages: Messages, turn: int, text: str, tools: Any,
        variables: Mapping[str, Any] | None,
    ) -> str:  # fmt: skip
        """Render what an assistant's turn is the answer to."""
        if turn > 0:
            return self.render(messages[:turn], prompt=True, tools=tools, variables=variables)
        try:
            begin = self.render([], prompt=True, tools=tools, variables=variables)
        except InvalidError:
            begin = None  # most templates look at the first turn
        if begin is None or not text.startswith(begin):
            raise InvalidError(
                "the conversation begins with the assistant, and the chat template does not say "
                "what stands before its first words, so what is to be learned cannot be told; put "
                "a turn before it, or give chat_template= with {% generation %} marks"
            )
        return begin

    def _render(
        self, messages: Messages, prompt: bool, tools: Any, variables: Mapping[str, Any] | None
    ) -> str:
        from pantheraml.data.template import TemplateError, TooMuch

        given = {
            "messages": [_as_templates_see_it(turn) for turn in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": prompt,
            **self._special,
            **self._variables,
            **(variables or {}),
        }
        try:
            return self._sandbox.render(self._template, given)
        except TooMuch as error:
            raise InvalidError(f"the chat template was stopped: {error}") from None
        except TemplateError as error:
            raise InvalidError(f"the chat template refuses it: {error}") from None
        except MemoryError:
            raise InvalidError("the chat template was stopped: out of memory") from None
        except (
            TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError
        ) as error:  # fmt: skip
            raise InvalidError(f"the chat template fails on it: {error}") from None

    def _strip(self, raw: str) -> tuple[str, list[Span]]:
        """Take the marks out and remember where they were."""
        begin, end = self._marks
        parts = raw.split(begin)
        text = [parts[0]]
        at = len(parts[0])
        spans = []
        for part in parts[1:]:
            inside, _, outside = part.partition(end)
            spans.append((at, at + len(inside)))
            text += [inside, outside]
            at += len(inside) + len(outside)
        return "".join(text), spans


def of_run(folder: Path, data: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any]]:
    """Give the template and its variables that a run's ``data`` has, for :func:`load`."""
    path = data.get("chat_template")
    source = None if path is None else (folder / path).read_text(encoding="utf-8")
    return source, data.get("chat_template_kwargs") or {}


def load(
    folder: Path, source: str | None = None, variables: Mapping[str, Any] | None = None
) -> ChatTemplate:
    """Find a model folder's chat template, or take the one that is given in its place."""
    special = special_tokens(folder)
    if source is not None:
        return ChatTemplate(source, special, variables)
    named = stored(folder)
    tool_use = named.get(TOOL_USE)
    for_tools = None if tool_use is None else ChatTemplate(tool_use, special, variables)
    return ChatTemplate(named[DEFAULT], special, variables, for_tools)


def stored(folder: Path) -> dict[str, str]:
    """Give the texts of a model folder's chat templates by name, one of which is ``default``.

    ``chat_template.jinja`` and ``additional_chat_templates/*.jinja`` go before
    ``tokenizer_config.json``'s ``chat_template``, which may be a text or a list of named ones.

    Raises
    ------
    NotFoundError
        It has no default one.
    """
    found: dict[object, object] = {}
    file = folder / "chat_template.jinja"
    if file.is_file():
        found = {path.stem: path.read_text(encoding="utf-8") for path in additional(folder)}
        found[DEFAULT] = file.read_text(encoding="utf-8")
    else:
        given = _json(folder / "tokenizer_config.json").get("chat_template")
        if isinstance(given, list):
            found = {t.get("name"): t.get("template") for t in given if isinstance(t, dict)}
        else:
            found = {DEFAULT: given}
    named = {
        name: text
        for name, text in found.items()
        if isinstance(name, str) and isinstance(text, str) and text.strip()
    }
    if DEFAULT not in named:
        raise NotFoundError(
            f"the model folder {folder} has no chat template (chat_template.jinja, or chat_template"
            " in tokenizer_config.json), and rows with messages need one; give chat_template=, or "
            "use prompt/completion"
        )
    return named


def additional(folder: Path) -> list[Path]:
    """Give the files of a model folder's templates beside ``chat_template.jinja``."""
    return sorted((folder / "additional_chat_templates").glob("*.jinja"))


def special_tokens(folder: Path) -> dict[str, str]:
    """Names and texts of a folder's special tokens."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        config = _json(folder / name)
        for key in _SPECIAL:
            value = config.get(key)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                found[key] = value
    return found


def check(messages: object) -> Messages:
    """Refuse what is not a list of turns with a role and a content.

    Raises
    ------
    InvalidError
        It is none; the message counts the turns from 1.
    NotInThisVersion
        A turn has pictures or other content that is not text.
    """
    if not isinstance(messages, list) or not messages:
        hint = "; it is a text: json.loads(…) makes a list of it" if _is_json(messages) else ""
        raise InvalidError(f"messages must be a list with at least one turn{hint}")
    for number, turn in enumerate(messages, 1):
        if not isinstance(turn, dict):
            raise InvalidError(f'turn {number} must be {{"role", "content"}}')
        if not isinstance(turn.get("role"), str):
            raise InvalidError(f'turn {number} has no "role"')
        if "content" not in turn and "tool_calls" not in turn:
            raise InvalidError(f'turn {number} has no "content"')
        says = (key for key, value in turn.items() if key != "role" and value is not None)
        if next(says, None) is None:  # no tool_calls either, nor reasoning beside it
            raise InvalidError(f'turn {number}: "content" is null')
        for part in turn["content"] if isinstance(turn.get("content"), list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text":
                raise NotInThisVersion(f"turn {number}: not in this version: content of {kind!r}")
    return messages


def _as_templates_see_it(turn: dict[str, Any]) -> dict[str, Any]:
    """Give a turn as transformers hands it to a template.

    What is null is not there: templates print None, or fail on it, where they know what to do
    without the key. Reasoning has the names that templates read, whichever it came under.
    """
    said = {name: value for name, value in turn.items() if value is not None}
    reasoning = next((said[name] for name in _REASONING if name in said), None)
    if reasoning is not None:
        said = {"thinking": reasoning, **said, "reasoning_content": reasoning}
    return said


def _is_json(value: object) -> bool:
    return isinstance(value, str) and value.lstrip()[:1] == "["


def tools_of(value: object) -> Any:
    """Give a row's tools as transformers hands them to a template; they may be JSON in a text.

    Raises
    ------
    InvalidError
        They are neither a list of objects nor a text that is one in JSON.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise InvalidError("'tools' is a text that is not JSON") from None
    if value is None or (isinstance(value, list) and all(isinstance(v, dict) for v in value)):
        return value
    raise InvalidError("'tools' must be a list of objects, each the JSON schema of a function")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InvalidError(f"{path}: not a JSON object")
    return value


def _date(value: object) -> datetime | None:
    if value is None:
        return None
    try:
        return datetime.fromisoformat(str(value))
    except ValueError:
        raise InvalidError(
            f'chat_template_kwargs: "{DATE}" must be a date such as "2024-07-26", it is {value!r}'
        ) from None


def _rewritten(whole: str, part: str, what: str) -> str:
    """Say where a prefix of a conversation is no prefix of its text."""
    same = next(
        (i for i, (a, b) in enumerate(zip(whole, part, strict=False)) if a != b),
        min(len(whole), len(part)),
    )
    return (
        "the chat template renders earlier turns differently once later ones follow (some "
        f"drop earlier reasoning): {what} it gives {part[same : same + 40]!r} where the whole "
        f"conversation has {whole[same : same + 40]!r}, so what is to be learned cannot be told; "
        "split conversations so that each ends with the turn to learn, or give chat_template= "
        "with {% generation %} marks"
    )
