"""Reading: each kind of source as a stream of rows, in memory that does not grow with the file.

``.jsonl``    one JSON object a line; blank lines are passed over
``.json``     a list of objects; one that begins with an object is read as ``.jsonl``
``.parquet``  through pyarrow, the extra ``[parquet]``
``.txt``      one long text (:func:`text_pieces`)

A fault is an :class:`InvalidError` that names file and line, or file and row.
"""

from __future__ import annotations

import codecs
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from pantheraml.data.rows import FIELDS, Format, Row, Source, type_name
from pantheraml.errors import InvalidError, NotFoundError

#: Bytes that one row may have: more is a file that is not what its name says.
MAX_ROW = 256 << 20

_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 20
_BATCH = 256  # rows of Arrow data made into Python's at once
SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".txt": "txt",
}  # fmt: skip
_READ = ".jsonl, .json, .parquet and .txt are read"


def source_of(path: Path, name: str = "data") -> Source:
    """Look at a path's ending and say what it is.

    Raises
    ------
    NotFoundError
        There is no such file, or what reading it needs is not installed.
    InvalidError
        It is not a kind of file that rows can be read from.
    """
    if not path.exists():
        raise NotFoundError(f"{name}: there is no file {path}")
    if not path.is_file():
        raise InvalidError(f"{name}: {path} is not a file; {_folder_hint(path) or _READ}")
    suffix = path.suffix.lower()
    kind = SUFFIXES.get(suffix)
    if kind is None:
        hint = ""
        if suffix in (".csv", ".tsv"):
            sep = ', sep="\\t"' if suffix == ".tsv" else ""
            hint = f'; datasets.load_dataset("csv", data_files=…{sep}, split="train") reads it'
        elif suffix in (".gz", ".zst", ".xz", ".bz2", ".zip"):
            hint = "; unpack it first"
        raise InvalidError(f"{name}: {path} ends in {suffix or 'nothing'}; {_READ}{hint}")
    if kind == "parquet":
        need_pyarrow(f"{name}: reading {path}")
    if kind == "json" and _first_byte(path) == b"{":
        kind = "jsonl"
    return Source(path, kind, name)


def _folder_hint(path: Path) -> str:
    """Say what a folder is that was given as data, where that can be seen."""
    if (path / "config.json").exists():
        return "it is a model's folder: finetune(model, data), preview(data, model)"
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        return "it is a saved data set: give datasets.load_from_disk(…)"
    return ""


def read(source: Source) -> Iterator[Row]:
    """Yield the rows of any source but a ``txt``."""
    if source.format == "json":
        return _json_list(source)
    if source.format == "parquet":
        return _parquet(source)
    if source.format == "arrow":
        return _arrow(source)
    return _json_lines(source)


def need_pyarrow(what: str) -> None:
    """Refuse, with what to install, where pyarrow is not there.

    Raises
    ------
    NotFoundError
        It is not there.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise NotFoundError(f"{what} needs pyarrow: pip install 'pantheraml[parquet]'")


# ---- JSON ------------------------------------------------------------------------------------


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(_BOM).lstrip()[:1]


def _json_lines(source: Source) -> Iterator[Row]:
    size = max(1, source.path.stat().st_size)
    end = 0
    with source.path.open("rb") as file:
        for index in count():
            line = file.readline(MAX_ROW + 1)
            if not line:
                return
            end += len(line)
            where = source.where(index)
            if len(line) > MAX_ROW:
                raise InvalidError(f"{where}: longer than {MAX_ROW >> 20} MiB, which no row may be")
            if index == 0:
                line = line.removeprefix(_BOM)
            if line.strip():
                fields = _object(where, _utf8(where, line, index == 0))
                yield Row(source, index, fields, min(1.0, end / size), len(line))


def _utf8(where: str, line: bytes, first: bool) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        hint = ""
        if first and line[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            hint = "; it looks like UTF-16: save it as UTF-8"
        raise InvalidError(f"{where}: not UTF-8 at byte {error.start} of the line{hint}") from None


def _object(where: str, text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 5,000 digits
        raise InvalidError(f"{where}: not a JSON object ({_reason(error)})") from None
    return _checked(where, fields, text)


def _checked(where: str, fields: object, text: str) -> dict[str, Any]:
    if not isinstance(fields, dict):
        raise InvalidError(f"{where}: a row must be a JSON object, this is {type_name(fields)}")
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(fields, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidError(f"{where}: text with half a surrogate pair") from None
    return fields


def _reason(error: Exception) -> str:
    """Say what is wrong without the line, which is one of the row and not of the file."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return str(error)[:200]


class _Window:
    """Part of a JSON file as text: read on at its end, dropped at its beginning."""

    def __init__(self, source: Source, file: BinaryIO) -> None:
        self._source, self._file = source, file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text = ""
        self.at = 0  # of text
        self._line, self._counted = 0, 0  # lines before text[:_counted], from 0
        self.bytes = 0
        self.ended = False

    def more(self) -> None:
        """Read on, as much again as there is."""
        data = self._file.read(max(_CHUNK, len(self.text) - self.at))
        self.bytes += len(data)
        self.line()
        self.text = self.text[self.at :]
        self.at = self._counted = 0
        self.ended = not data
        try:
            self.text += self._decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            line = self._line + self.text.count("\n") + error.object[: error.start].count(b"\n")
            raise InvalidError(f"{self._source.where(line)}: not UTF-8") from None

    def next(self) -> str:
        """Give the next character that is no white space, "" at the end; it stays the next."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                return ""
            self.more()

    def line(self) -> int:
        """Count lines, from 0, up to where it stands."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def where(self, ahead: int = 0) -> str:
        """Name the line of a place so many characters ahead."""
        line = self.line() + self.text.count("\n", self.at, self.at + ahead)
        return self._source.where(line)

    def value(self) -> tuple[Any, str]:
        """Take a JSON value; returns it and its text."""
        decoder = json.JSONDecoder()
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - 16
                if self.ended or not cut:
                    where = self.where(error.pos - self.at)
                    raise InvalidError(f"{where}: not JSON ({error.msg})") from None
            except (ValueError, RecursionError) as error:
                raise InvalidError(f"{self.where()}: not JSON ({str(error)[:200]})") from None
            else:
                if end < len(self.text) or self.ended:
                    text = self.text[self.at : end]
                    self.at = end
                    return value, text
            if len(self.text) - self.at > MAX_ROW:
                raise InvalidError(
                    f"{self.where()}: a row longer than {MAX_ROW >> 20} MiB, which none may be"
                )
            self.more()


def _json_list(source: Source) -> Iterator[Row]:
    size = max(1, source.path.stat().st_size)
    with source.path.open("rb") as file:
        window = _Window(source, file)
        begin = window.next()
        if begin == "":
            return
        if begin != "[":
            raise InvalidError(f"{window.where()}: a .json file must hold a list of rows, [{{…}}]")
        window.at += 1
        if window.next() == "]":
            window.at += 1
        else:
            yield from _elements(source, window, size)
        if window.next():
            raise InvalidError(f"{window.where()}: something stands after the list's end")


def _elements(source: Source, window: _Window, size: int) -> Iterator[Row]:
    while True:
        window.next()
        index = window.line()
        value, text = window.value()
        left = len(window.text) - window.at
        fields = _checked(source.where(index), value, text)
        yield Row(source, index, fields, min(1.0, max(0, window.bytes - left) / size), len(text))
        after = window.next()
        if after not in ("]", ","):
            what = "the file ends within the list" if not after else f"{after!r} after a row"
            raise InvalidError(f"{window.where()}: not JSON ({what})")
        window.at += 1
        if after == "]":
            return


# ---- Arrow -----------------------------------------------------------------------------------


@contextmanager
def _arrow_errors(source: Source) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = f"it cannot be read as {source.format} ({reason[:200]})"
        raise InvalidError(f"{source.title}: {what}") from None


def _parquet(source: Source) -> Iterator[Row]:
    need_pyarrow(f"{source.name}: reading {source.path}")
    from pyarrow import parquet

    with _arrow_errors(source), source.path.open("rb") as raw:
        # A buffer for each column instead of whole row groups: a file may be one group.
        with parquet.ParquetFile(raw, pre_buffer=False, buffer_size=_CHUNK) as file:
            names = file.schema_arrow.names
            wanted = [name for name in names if name in FIELDS]
            total = max(1, file.metadata.num_rows)
            index = 0
            for batch in file.iter_batches(_BATCH, columns=wanted or names):
                size = batch.nbytes // max(1, batch.num_rows)
                for fields in _python_rows(source, batch, index):
                    index += 1
                    yield Row(source, index - 1, fields, index / total, size)


def _arrow(source: Source) -> Iterator[Row]:
    from pyarrow import ipc

    bytes_in_all = max(1, source.path.stat().st_size)
    with _arrow_errors(source), source.path.open("rb") as file, ipc.open_stream(file) as stream:
        index = 0
        for batch in stream:
            size = batch.nbytes // max(1, batch.num_rows)
            done = min(1.0, file.tell() / bytes_in_all)
            for fields in _python_rows(source, batch, index):
                index += 1
                yield Row(source, index - 1, fields, done, size)


def _python_rows(source: Source, batch: Any, first: int) -> Iterator[dict[str, Any]]:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        rows = [_python_row(source, batch, first, i) for i in range(batch.num_rows)]
    for row in rows:
        yield {name: without_nulls(value) for name, value in row.items()}


def _python_row(source: Source, batch: Any, first: int, i: int) -> dict[str, Any]:
    try:
        row: dict[str, Any] = batch.slice(i, 1).to_pylist()[0]
    except UnicodeDecodeError:
        raise InvalidError(f"{source.where(first + i)}: not UTF-8") from None
    return row


def without_nulls(value: Any) -> Any:
    """Leave out the keys of objects that hold null.

    All objects of an Arrow column have the same keys, those that a row did not have being null in
    it; a chat template must not see them.
    """
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [without_nulls(inner) for inner in value]
    return value


# ---- text ------------------------------------------------------------------------------------


def text_pieces(path: Path, characters: int) -> Iterator[tuple[str, float]]:
    """Read a text piece by piece.

    Yields
    ------
    tuple
        At most so many characters, and the share of the file (0 to 1) that ends with them.

    Raises
    ------
    InvalidError
        It is not UTF-8; the message has the line.
    """
    size = max(1, path.stat().st_size)
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    lines = done = 0
    with path.open("rb") as file:
        while True:
            data = file.read(characters)
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                line = lines + error.object[: error.start].count(b"\n") + 1
                raise InvalidError(f"{path}, line {line}: not UTF-8") from None
            lines += text.count("\n")
            done += len(data)
            if text:
                yield text, min(1.0, done / size)
            if not data:
                return
