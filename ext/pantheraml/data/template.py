"""Jinja for strangers: a sandbox in which a template can neither reach out nor go on for ever.

Chat templates come with models. They run in jinja2's immutable sandbox, with the names that
transformers gives them, and within bounds: every turn of a loop, call and filter is counted, what
makes text or numbers longer is looked at before it is done, and the clock is watched.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.visitor
from jinja2 import TemplateError

STEPS = 5_000_000  # turns of loops, calls and filters
SECONDS = 10.0
CHARACTERS = 1 << 25  # of any text that it makes
_SOURCE = 1 << 20  # characters of the template itself
_DIGITS = 8  # of a width in a format
_BITS = 4096  # of a number
_NESTED = r"\{[^{}]*:[^{}]*\{"  # a width that is a value too
_MANY = 1 << 20  # a number that a filter or a text's method may be given

__all__ = ["Sandbox", "TemplateError", "TooMuch"]


class TooMuch(jinja2.TemplateRuntimeError):
    """A template went over a bound."""


class _Generation(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}``: its text is put between two marks."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's interface

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        self.environment.has_marks = True  # type: ignore[attr-defined]
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        begin, end = self.environment.marks  # type: ignore[attr-defined]
        return f"{begin}{caller()}{end}"


class _Counted(jinja2.visitor.NodeTransformer):
    """Loops are counted, and joined text is measured, by filters of ours."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_counted")
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(jinja2.nodes.List(node.nodes, lineno=node.lineno), "_joined")


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment of one template.

    Parameters
    ----------
    marks
        What goes before and behind the text of a generation block.
    today
        What ``strftime_now`` tells; None for the clock's time.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, marks: tuple[str, str], today: datetime | None = None) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self.marks, self.has_marks = marks, False
        self.asked_date = False
        self._today = today
        self._steps, self._end = 0, 0.0
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise, "strftime_now": self._now}
        self.filters["tojson"] = _to_json
        self.filters = {name: self._guarded(f, name) for name, f in self.filters.items()}
        self.filters |= {"_counted": self._counted, "_joined": self._joined}

    def make(self, source: str) -> jinja2.Template:
        """Compile a template.

        Raises
        ------
        TooMuch
            It is too long, or nested too deeply.
        jinja2.TemplateError
            It is none.
        """
        if len(source) > _SOURCE:
            raise TooMuch(f"it has more than {_SOURCE:,} characters")
        self._begin()
        try:
            return self.from_string(_Counted().visit(self.parse(source)))
        except RecursionError:
            raise TooMuch("it is nested too deeply") from None

    def render(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        """Render within the bounds."""
        self._begin()
        parts: list[str] = []
        size = 0
        for part in template.generate(**variables):
            self._tick()
            parts.append(part)
            size += len(part)
            self._measure(size)
        return "".join(parts)

    # ---- bounds ----------------------------------------------------------------------------

    def _begin(self) -> None:
        self._steps, self._end = STEPS, time.monotonic() + SECONDS

    def _tick(self) -> None:
        self._steps -= 1
        if self._steps < 0:
            raise TooMuch(f"it takes more than {STEPS:,} steps")
        if self._steps % 256 == 0 and time.monotonic() > self._end:
            raise TooMuch(f"it takes longer than {SECONDS:g} seconds")

    def _measure(self, size: int) -> None:
        if size > CHARACTERS:
            raise TooMuch(f"it makes a text of more than {CHARACTERS:,} characters")

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._tick()
            yield value

    def _metered(self, values: Iterable[Any]) -> Iterator[Any]:
        size = 0
        for value in values:
            self._tick()
            size += len(value) if isinstance(value, str) else 0
            self._measure(size)
            yield value

    def _joined(self, values: list[Any]) -> str:
        self._tick()
        texts = [str(value) for value in values]
        self._measure(sum(map(len, texts)))
        return "".join(texts)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call something, if the sandbox allows it, and count it."""
        __self._tick()
        if isinstance(getattr(__obj, "__self__", None), str):
            __self._check_arguments(__obj.__self__, __obj.__name__, (*args, *kwargs.values()))
            if __obj.__name__ == "join":
                args = tuple(__self._metered(values) for values in args)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Give jinja's own ``format`` of a text, measured."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def measured(*args: Any, **kwargs: Any) -> str:
            self._check_format(value.__self__, (*args, *kwargs.values()), _NESTED)
            made: str = wrapped(*args, **kwargs)
            self._measure(len(made))
            return made

        return measured

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute, unless what comes out is too large.

        Raises
        ------
        TooMuch
            It is.
        """
        self._tick()
        lengths = [len(value) for value in (left, right) if isinstance(value, str | list | tuple)]
        numbers = [value for value in (left, right) if isinstance(value, int)]
        bits = [value.bit_length() for value in numbers]
        if operator == "+":
            self._measure(sum(lengths))
        elif operator == "*" and lengths and numbers:
            self._measure(lengths[0] * numbers[0])
        elif operator == "*" and sum(bits) > _BITS:
            raise TooMuch(f"it makes a number of more than {_BITS} bits")
        elif operator == "**" and len(bits) == 2 and bits[0] * max(0, right) > _BITS:
            raise TooMuch(f"it makes a number of more than {_BITS} bits")
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, right)
        return super().call_binop(context, operator, left, right)

    def _guarded(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self._tick()
            texts = [value for value in args if isinstance(value, str)]
            self._check_arguments(texts[0] if texts else "", name, (*args, *kwargs.values()))
            if name == "join":  # its first argument is jinja's own
                args = (args[0], self._metered(args[1]), *args[2:])
            made = function(*args, **kwargs)
            if isinstance(made, str):
                self._measure(len(made))
            return made

        return guarded

    def _check_arguments(self, text: str, name: str, given: tuple[Any, ...]) -> None:
        """Look at what a text's method or a filter is given, before it makes something of it."""
        if any(isinstance(value, int) and value > _MANY for value in given):
            raise TooMuch(f"it gives {name} a number above {_MANY:,}")
        if name == "format":
            self._check_format(text, given)
        elif name == "replace":
            old, new = [value for value in ("", "", *given) if isinstance(value, str)][-2:]
            self._measure(len(text) + text.count(old) * len(new))

    def _check_format(self, text: str, given: Any, taken: str = r"\*") -> None:
        """Refuse an immense width: of many digits, or a value where the text has `taken`."""
        values = given if isinstance(given, tuple) else (given,)
        large = any(isinstance(v, int) and v > _MANY for v in values)
        if re.search(rf"\d{{{_DIGITS},}}", text) or (large and re.search(taken, text)):
            raise TooMuch("it formats something to an immense width")

    def _now(self, pattern: str) -> str:
        self.asked_date = self.asked_date or self._today is None
        return (self._today or datetime.now()).strftime(pattern)


def _filter(value: jinja2.nodes.Node, name: str) -> jinja2.nodes.Filter:
    assert isinstance(value, jinja2.nodes.Expr)
    return jinja2.nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:  # fmt: skip
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> str:
    raise jinja2.TemplateError(message)
