"""Data as it is given to a call: looked at, and handed over to the process that prepares it.

A file is named to it. Rows in memory are written into the run folder one after the other, and a
``datasets.Dataset`` batch by batch as the Arrow data that it is, so nothing is there twice. Of rows
in memory only the fields that are used are kept.

``datasets`` is known by what its objects can do, not by import: it is not needed here.
"""

from __future__ import annotations

import json
import numbers
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pantheraml.checks import path_of
from pantheraml.data.readers import SUFFIXES, need_pyarrow, read, source_of, without_nulls
from pantheraml.data.rows import FIELDS, Row, Source, kind_of
from pantheraml.errors import InvalidError, NotFoundError
from pantheraml.folders import private_file

Data = str | os.PathLike[str] | Iterable[Mapping[str, Any]]

_BATCH = 1000  # rows of a dataset written at once


class Given(ABC):
    """Data that a call was given, checked as far as it can be without reading it all.

    Parameters
    ----------
    name
        The parameter that it was given as.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def hand_over(self, folder: Path, stem: str) -> dict[str, Any]:
        """Store what is only in memory as ``data/<stem>.*`` in a run folder; say where it is."""

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """Read it here and now; a ``.txt`` has no rows."""


class GivenFile(Given):
    """A file."""

    def __init__(self, name: str, path: Path) -> None:
        super().__init__(name)
        self.source = source_of(path, name)

    def hand_over(self, folder: Path, stem: str) -> dict[str, Any]:
        """Nothing is stored."""
        seen = self.source.path.stat()
        return {
            "path": str(self.source.path),
            "format": self.source.format,
            "bytes": seen.st_size,
            "modified": seen.st_mtime,
        }

    def rows(self) -> Iterator[Row]:
        """Read the file.

        Raises
        ------
        InvalidError
            The file is one text, without rows.
        """
        if self.source.format == "txt":
            raise InvalidError(f"{self.name}: {self.source.path} is one text without rows")
        return read(self.source)


class GivenRows(Given):
    """Dicts in memory, or anything that yields them."""

    def __init__(self, name: str, data: Iterable[Mapping[str, Any]]) -> None:
        super().__init__(name)
        self._data = data
        self._source = Source(Path(), "list", name)

    def hand_over(self, folder: Path, stem: str) -> dict[str, Any]:
        """Write JSON lines.

        Raises
        ------
        InvalidError
            There are no rows.
        """
        path = Path("data", f"{stem}.jsonl")
        with private_file(folder / path) as file:
            empty = True
            for line in self._lines():
                file.write(line)
                empty = False
            if empty:
                raise InvalidError(f"{self.name}: there are no rows in it")
        return {"path": str(path), "format": "list"}

    def rows(self) -> Iterator[Row]:
        """Take them as they would be read again."""
        for index, line in enumerate(self._lines()):
            yield Row(self._source, index, json.loads(line), 0.0)

    def _lines(self) -> Iterator[bytes]:
        for index, row in enumerate(self._data):
            if not isinstance(row, Mapping):
                raise InvalidError(_no_row(self.name, index, row))
            if index == 0:
                kind_of(Row(self._source, 0, dict(row), 0.0))
            try:
                yield _json_line({name: row[name] for name in FIELDS if name in row})
            except UnicodeEncodeError:
                raise InvalidError(
                    f"{self.name}[{index}]: text with half a surrogate pair"
                ) from None
            except (TypeError, ValueError, RecursionError) as error:
                raise InvalidError(f"{self.name}[{index}] cannot be stored: {error}") from None


class GivenDataset(Given):
    """A ``datasets.Dataset``: Arrow tables of its rows, in the order that it gives them."""

    def __init__(self, name: str, data: Any) -> None:
        super().__init__(name)
        if len(data) == 0:
            raise InvalidError(f"{name}: there are no rows in it")
        known = [column for column in data.column_names if column in FIELDS]
        self._source = Source(Path(), "arrow", name)
        self._data = data.select_columns(known) if known else data
        kind_of(next(self.rows()))

    def hand_over(self, folder: Path, stem: str) -> dict[str, Any]:
        """Write an Arrow stream."""
        need_pyarrow(f"{self.name}: a dataset")
        from pyarrow import ipc

        path = Path("data", f"{stem}.arrow")
        with private_file(folder / path) as file:
            stream = None
            for table in self._data.with_format("arrow").iter(batch_size=_BATCH):
                if stream is None:
                    stream = ipc.new_stream(file, table.schema)
                stream.write_table(table)
            if stream is not None:
                stream.close()
        return {"path": str(path), "format": "arrow"}

    def rows(self) -> Iterator[Row]:
        """Take them from the dataset."""
        for table in self._data.with_format("arrow").iter(batch_size=8):
            for index, row in enumerate(table.to_pylist()):
                fields = {name: without_nulls(value) for name, value in row.items()}
                yield Row(self._source, index, fields, 0.0)


def look_at(data: Data, name: str = "data") -> Given:
    """Say what kind of data this is.

    Raises
    ------
    InvalidError, NotFoundError
        It is none that can be read; the message says what to give instead.
    """
    if isinstance(data, str):
        _refuse_what_is_elsewhere(data, name)
    if isinstance(data, str | os.PathLike):
        return GivenFile(name, path_of(data).absolute())
    if isinstance(data, Mapping):
        parts = ", ".join(map(repr, data))
        if all(_is_table(value) or isinstance(value, Mapping) for value in data.values()):
            first = next(iter(data), "train")
            raise InvalidError(
                f"{name} is a dict of {parts or 'nothing'}; give one of them, such as [{first!r}]"
            )
        if all(isinstance(value, list | tuple) for value in data.values()):
            how = f"give datasets.Dataset.from_dict({name})"
        else:
            how = f"give [{name}] if it is one row"
        raise InvalidError(f"{name} must be a list of dicts, not one dict ({parts}); {how}")
    if _is_table(data):
        return GivenDataset(name, data)
    if hasattr(data, "to_dict") and hasattr(data, "columns"):
        raise InvalidError(f'{name} is a DataFrame; give {name}.to_dict("records")')
    if hasattr(data, "to_pylist"):
        raise InvalidError(f"{name} is Arrow data; give {name}.to_pylist(), or the file it is of")
    if isinstance(data, bytes) or not isinstance(data, Iterable):
        what = type(data).__name__
        raise InvalidError(f"{name} must be a file or a list of dicts, it is {what}")
    if isinstance(data, list | tuple) and not data:
        raise InvalidError(f"{name}: there are no rows in it")
    return GivenRows(name, data)


def _refuse_what_is_elsewhere(text: str, name: str) -> None:
    """An address, or a data set's name on the hub, is no file here: say how to get it."""
    if re.match(r"[a-z0-9+]{2,}://", text):
        raise InvalidError(f"{name}: {text} is an address; download it, and give the file")
    if re.search(r"[*?\[]", text) and not Path(text).exists():
        raise NotFoundError(
            f"{name}: there is no file {text}; patterns are not searched for: one file is read, "
            "and datasets.load_dataset(…) reads several"
        )
    if re.search(r"\s\S+\s", text) and not path_of(text).suffix and not path_of(text).exists():
        raise NotFoundError(
            f"{name}: there is no file {text[:80]!r}; if it is the text itself, give "
            f'[{{"text": …}}]'
        )
    if re.fullmatch(r"[\w-]+/[\w-]+", text) and not Path(text).exists():
        raise NotFoundError(
            f"{name}: there is no file {text}; if it is a data set on the hub, give "
            f'datasets.load_dataset("{text}", split="train")'
        )


def _no_row(name: str, index: int, row: object) -> str:
    """Say what a row is that is no dict, and what it may have been meant as."""
    what, how = type(row).__name__, ""
    if isinstance(row, os.PathLike) or (isinstance(row, str) and Path(row).suffix in SUFFIXES):
        how = "; one file is read: put several together, or give datasets.load_dataset(…)"
    elif isinstance(row, str):
        how = f'; for texts, give [{{"text": text}} for text in {name}]'
    elif isinstance(row, Iterable) and all(isinstance(one, numbers.Integral) for one in row):
        how = f'; for token ids, give [{{"input_ids": ids}} for ids in {name}]'
    return f"{name}[{index}] must be a dict, it is {what}{how}"


def _is_table(data: object) -> bool:
    """Whether it is a ``datasets.Dataset``; one that streams has no length, and is iterated."""
    wanted = ("column_names", "with_format", "select_columns", "iter", "__len__")
    return all(hasattr(data, name) for name in wanted)


def _json_line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False, default=_plain) + "\n").encode("utf-8")


def _plain(value: Any) -> Any:
    """Lists and numbers of NumPy and PyTorch as Python's own."""
    for method in ("tolist", "item"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(f"{type(value).__name__} is no text, number, list or dict")
