"""Rows as people write them: reading, and saying exactly where something is wrong.

A source is a ``.jsonl`` file (one JSON object a line, blank lines allowed), a ``.txt`` file (one
long text), or a list of dicts that the API has stored as ``data/source.jsonl``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pantheraml.errors import InvalidError, NotFoundError, NotInThisVersion

Kind = Literal["text", "prompt_completion", "messages", "tokens"]
Format = Literal["jsonl", "txt", "list"]

#: What a row must have to be of a kind, in the order in which it is looked for.
KINDS: dict[Kind, tuple[str, ...]] = {
    "tokens": ("input_ids",),
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
_EXPECTED = '{"text"}, {"prompt", "completion"}, {"messages"} or {"input_ids", "labels"}'


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes
    ----------
    path
        The file.
    format
        ``jsonl``, ``txt``, or ``list``: a ``jsonl`` whose rows are named as list items.
    """

    path: Path
    format: Format

    def where(self, index: int) -> str:
        """Name a row for a message; `index` is the 0-based line."""
        if self.format == "list":
            return f"data[{index}]"
        return f"{self.path}, line {index + 1}"


@dataclass(frozen=True)
class Row:
    """One row, its place in the source, and how far into the file it ends (bytes)."""

    source: Source
    index: int
    fields: dict[str, Any]
    end: int

    def fail(self, what: str) -> InvalidError:
        """Make an error that names this row."""
        return InvalidError(f"{self.source.where(self.index)}: {what}")


def source_of(path: Path) -> Source:
    """Look at a path's ending and say what it is.

    Raises
    ------
    NotFoundError
        There is no such file.
    InvalidError
        It is not a kind of file that rows can be read from.
    """
    if not path.exists():
        raise NotFoundError(f"data: there is no file {path}")
    if not path.is_file():
        raise InvalidError(f"data: {path} is not a file; give a .jsonl or .txt file")
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return Source(path, "jsonl")
    if suffix == ".txt":
        return Source(path, "txt")
    if suffix == ".parquet":
        raise NotInThisVersion("not in this version: .parquet data; write the rows as .jsonl")
    raise InvalidError(f"data: {path} ends in {suffix or 'nothing'}; .jsonl and .txt are read")


def read(source: Source) -> Iterator[Row]:
    """Yield the rows of a ``jsonl`` or ``list`` source; blank lines are passed over."""
    end = 0
    with source.path.open("rb") as file:
        for index, line in enumerate(file):
            end += len(line)
            if index == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield Row(source, index, _parse(source, index, line), end)


def _parse(source: Source, index: int, line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        where = source.where(index)
        raise InvalidError(f"{where}: not UTF-8 at byte {error.start} of the line") from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 5,000 digits
        raise InvalidError(f"{source.where(index)}: not a JSON object ({error})") from None
    if not isinstance(fields, dict):
        raise InvalidError(
            f"{source.where(index)}: a row must be a JSON object, this is {_name(fields)}"
        )
    if b"\\ud" in line.lower():
        try:
            json.dumps(fields, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            where = source.where(index)
            raise InvalidError(f"{where}: text with half a surrogate pair") from None
    return fields


def kind_of(row: Row) -> Kind:
    """Say which of the four kinds a row is, by its fields."""
    for kind, needed in KINDS.items():
        if all(row.fields.get(name) is not None for name in needed):
            return kind
    have = ", ".join(repr(name) for name in row.fields) or "nothing"
    raise row.fail(f"a row must be {_EXPECTED}; this one has {have}")


def same_kind(row: Row, kind: Kind) -> None:
    """Refuse a row that is not of the kind that the first row was."""
    missing = [name for name in KINDS[kind] if row.fields.get(name) is None]
    if missing:
        raise row.fail(f"no {missing[0]!r}, which the rows before it have; all rows must be alike")


def string(row: Row, name: str) -> str:
    """Take a field that must be text."""
    value = row.fields[name]
    if not isinstance(value, str):
        raise row.fail(f"{name!r} must be a string, it is {_name(value)}")
    return value


def read_text(path: Path) -> str:
    """Read a ``.txt`` source whole."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidError(f"{path}, line {line}: not UTF-8") from None


def _name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    if value is None:
        return "null"
    return names.get(type(value), "a number")
