"""Chat templates: a conversation as the model's own text, and which of its characters are learned.

Only what the assistant says is learned. Where a template marks it with ``{% generation %}``, the
marks are used. Elsewhere the conversation is rendered prefix by prefix: the text up to an
assistant's turn (with the generation prompt) and the text up to its end must both be beginnings of
the whole, and what lies between is the turn. A template for which that does not hold (one that
rewrites earlier turns) is refused rather than guessed at.

Templates come with the model, so they are strangers' programs: they run in jinja2's immutable
sandbox, with the names that transformers gives them.
"""

from __future__ import annotations

import json
import secrets
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from pantheraml.errors import InvalidError, NotFoundError

Messages = list[dict[str, Any]]
Span = tuple[int, int]
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class _Generation(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}``: its text is put between two marks.

    The marks are random for each template object, so no text can hold them by chance or intent,
    and they survive what a template may do with the block's text afterwards.
    """

    tags = {"generation"}  # noqa: RUF012 - jinja2's interface

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        self.environment.pml_has_marks = True  # type: ignore[attr-defined]
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        begin, end = self.environment.pml_marks  # type: ignore[attr-defined]
        return f"{begin}{caller()}{end}"


class ChatTemplate:
    """A model's chat template.

    Parameters
    ----------
    source
        The template's text.
    special_tokens
        Names that templates use: ``bos_token``, ``eos_token`` and so on.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self._marks = (f"\x02{secrets.token_hex(8)}\x02", f"\x03{secrets.token_hex(8)}\x03")
        environment.pml_marks = self._marks  # type: ignore[attr-defined]
        environment.pml_has_marks = False  # type: ignore[attr-defined]
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise InvalidError(f"the model's chat template cannot be read: {error}") from None
        self._special = special_tokens
        self._has_marks: bool = environment.pml_has_marks  # type: ignore[attr-defined]

    def render(self, messages: Messages, *, prompt: bool = False, tools: Any = None) -> str:
        """Render a conversation; with `prompt`, up to where the assistant would begin."""
        return self._strip(self._render(messages, prompt, tools))[0]

    def with_spans(
        self, messages: Messages, *, first: int = 0, tools: Any = None
    ) -> tuple[str, list[Span]]:
        """Render a conversation and say which characters are the assistant's.

        Parameters
        ----------
        messages
            The turns.
        first
            Turns before this one are context only.
        tools
            Handed to the template.

        Returns
        -------
        tuple
            The text, and half-open intervals of learned characters.

        Raises
        ------
        InvalidError
            The template refused the conversation, or does not let turns be told apart.
        """
        raw = self._render(messages, False, tools)
        text, spans = self._strip(raw)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
        if self._has_marks:
            return text, spans[len(spans) - len(turns) :] if first else spans
        learned = []
        for turn in turns:
            before = self.render(messages[:turn], prompt=True, tools=tools)
            after = text
            if turn + 1 < len(messages):
                after = self.render(messages[: turn + 1], tools=tools)
            if not (text.startswith(after) and after.startswith(before)):
                raise InvalidError(
                    "the model's chat template renders earlier turns differently once later ones "
                    f"follow, so turn {turn + 1} cannot be found in the whole; split the "
                    "conversation so that it ends with the turn to learn, or use a template with "
                    "{% generation %} marks"
                )
            learned.append((len(before), len(after)))
        return text, learned

    def _render(self, messages: Messages, prompt: bool, tools: Any) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                **self._special,
            )
        except jinja2.TemplateError as error:
            raise InvalidError(f"the model's chat template refuses it: {error}") from None
        except (
            TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError
        ) as error:  # fmt: skip
            raise InvalidError(f"the model's chat template fails on it: {error}") from None

    def _strip(self, raw: str) -> tuple[str, list[Span]]:
        """Take the marks out and remember where they were."""
        begin, end = self._marks
        parts = raw.split(begin)
        text = parts[0]
        spans = []
        for part in parts[1:]:
            inside, _, outside = part.partition(end)
            spans.append((len(text), len(text) + len(inside)))
            text += inside + outside
        return text, spans


def load(folder: Path) -> ChatTemplate:
    """Find a model folder's chat template.

    ``chat_template.jinja`` goes before ``tokenizer_config.json``'s ``chat_template``; of several
    named ones, ``default`` is taken.
    """
    config = special_tokens(folder)
    file = folder / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(file.read_text(encoding="utf-8"), config)
    source = _json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(source, list):
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        raise NotFoundError(
            f"the model folder {folder} has no chat template (chat_template.jinja, or chat_template"
            " in tokenizer_config.json), and rows with messages need one; use prompt/completion"
        )
    return ChatTemplate(source, config)


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
    """Refuse what is not a list of turns with a role and a content."""
    if not isinstance(messages, list) or not messages:
        raise InvalidError("messages must be a list with at least one turn")
    for number, turn in enumerate(messages, 1):
        if not isinstance(turn, dict):
            raise InvalidError(f'turn {number} must be {{"role", "content"}}')
        if not isinstance(turn.get("role"), str):
            raise InvalidError(f'turn {number} has no "role"')
        if "content" not in turn and "tool_calls" not in turn:
            raise InvalidError(f'turn {number} has no "content"')
    return messages


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


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise(message: str) -> str:
    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
