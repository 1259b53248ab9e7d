"""Rows as people write them, and saying exactly where something is wrong with one.

A source is a file or what the API has stored for its preparation; :mod:`pantheraml.data.readers`
reads them, here is what they give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pantheraml.errors import InvalidError

Kind = Literal["text", "prompt_completion", "messages", "tokens"]
Format = Literal["jsonl", "json", "parquet", "txt", "list", "arrow"]

#: What a row must have to be of a kind, in the order in which it is looked for.
KINDS: dict[Kind, tuple[str, ...]] = {
    "tokens": ("input_ids",),
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}

#: Every field that is read of a row; others are left where they are.
FIELDS = (
    "text", "prompt", "completion", "messages", "tools", "chat_template_kwargs",
    "input_ids", "labels", "attention_mask",
)  # fmt: skip

#: Names that others have for a prompt and its completion.
_PAIRS = (
    ("instruction", "output"), ("instruction", "response"), ("question", "answer"),
    ("input", "output"), ("query", "response"), ("prompt", "response"),
)  # fmt: skip

_EXPECTED = '{"text"}, {"prompt", "completion"}, {"messages"} or {"input_ids", "labels"}'


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes
    ----------
    path
        The file.
    format
        What it is. ``list`` is a ``jsonl`` and ``arrow`` an Arrow stream that the API has stored of
        data which was given in memory; their rows are named as list items.
    name
        The parameter that it was given as.
    """

    path: Path
    format: Format
    name: str = "data"

    @property
    def title(self) -> str:
        """What a message about the whole calls it."""
        return self.name if self.format in ("list", "arrow") else str(self.path)

    def where(self, index: int) -> str:
        """Name a row for a message; `index` is the 0-based line, or row where there are none."""
        if self.format in ("list", "arrow"):
            return f"{self.name}[{index}]"
        return f"{self.path}, {'row' if self.format == 'parquet' else 'line'} {index + 1}"


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes
    ----------
    source, index
        Its place.
    fields
        What it holds.
    done
        Share of the source (0 to 1) that ends with it.
    size
        Bytes it takes, about.
    """

    source: Source
    index: int
    fields: dict[str, Any]
    done: float
    size: int = 0

    def fail(self, what: str) -> InvalidError:
        """Make an error that names this row."""
        return InvalidError(f"{self.source.where(self.index)}: {what}")


def kind_of(row: Row) -> Kind:
    """Say which of the four kinds a row is, by its fields.

    Raises
    ------
    Error
        It is none of them: :meth:`Row.fail` says which row, and what it has.
    """
    for kind, needed in KINDS.items():
        if all(row.fields.get(name) is not None for name in needed):
            return kind
    have = ", ".join(map(_named, row.fields.items())) or "nothing"
    raise row.fail(f"a row must be {_EXPECTED}; this one has {have[:300]}{_meant(row.fields)}")


def _meant(fields: Mapping[str, Any]) -> str:
    """Say how rows as other tools have them are written here."""
    if "conversations" in fields:
        return '; "messages" is a list of {"role", "content"}, and "assistant" the role that learns'
    if "chosen" in fields and "rejected" in fields:
        return "; preferences are not trained on in this version"
    for asked, said in _PAIRS:
        if asked in fields and said in fields:
            return f'; {asked!r} may be the "prompt", {said!r} the "completion"'
    if isinstance(fields.get("content"), str) and "role" not in fields:
        return '; "content" may be the "text"'
    return ""


def _named(field: tuple[str, Any]) -> str:
    name, value = field
    return f"{name!r} (null)" if value is None else repr(name)


def same_kind(row: Row, kind: Kind) -> None:
    """Refuse a row that is not of the kind that the first row was.

    Raises
    ------
    Error
        It is not: :meth:`Row.fail` says which row, and what is missing.
    """
    missing = [name for name in KINDS[kind] if row.fields.get(name) is None]
    if missing:
        raise row.fail(f"no {missing[0]!r}, which the rows before it have; all rows must be alike")


def string(row: Row, name: str) -> str:
    """Take a field that must be text.

    Raises
    ------
    Error
        It is none: :meth:`Row.fail` says which row.
    """
    value = row.fields[name]
    if not isinstance(value, str):
        raise row.fail(f"{name!r} must be a string, it is {type_name(value)}")
    return value


def type_name(value: object) -> str:
    """Call a value's type by its name in JSON."""
    names = {
        dict: "an object", list: "a list", str: "a string", bool: "a truth value", bytes: "bytes",
        int: "a number", float: "a number",
    }  # fmt: skip
    if value is None:
        return "null"
    return names.get(type(value), type(value).__name__)
