"""Token shards: the file between preparation and the engine.

The layout is the one of ``pml/data/shard.h``: ``input_ids`` and ``labels`` I32 [tokens] with all
rows end to end, ``offsets`` I64 [rows + 1], in one safetensors file. Rows go to the disk as they
come, so that a shard may be larger than memory::

    header, padded with blanks | input_ids | labels | offsets
                               ^ written as rows come: labels into a file of their own, appended
                                 at the end; offsets from memory, 8 bytes a row
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from pantheraml import _native, folders

Ids = npt.NDArray[np.int32]

#: A label that means "no loss here", as in PyTorch's cross entropy.
IGNORE = -100

_WIDEST = 10**18  # stands for numbers that are not known yet
_BUFFER = 1 << 20
_RUN = 1 << 20  # tokens copied at once


class ShardWriter:
    """Writes rows to a file that is there whole at :meth:`finish`, or not at all.

    A context manager: without :meth:`finish` nothing is left.

    Parameters
    ----------
    path
        The shard.
    source
        Where its rows come from, for its metadata.
    """

    def __init__(self, path: Path, source: str) -> None:
        self._path, self._source = path, source
        self._temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        self._offsets = array("q", [0])
        self._max_id = -1
        self.learned = 0
        self._begin = len(self._header(_WIDEST, _WIDEST, _WIDEST))
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._ids: IO[bytes] = open(os.open(self._temporary, flags, 0o600), "r+b", _BUFFER)
        try:
            self._labels: IO[bytes] = tempfile.TemporaryFile(buffering=_BUFFER, dir=path.parent)
            self._ids.write(b" " * self._begin)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def rows(self) -> int:
        """Rows added so far."""
        return len(self._offsets) - 1

    @property
    def tokens(self) -> int:
        """Tokens added so far."""
        return self._offsets[-1]

    def add(self, ids: Ids, labels: Ids) -> None:
        """Add a row. `labels` stand at the position of the id they belong to, not shifted."""
        self.add_rows(ids, labels, (len(ids),))

    def add_rows(self, ids: Ids, labels: Ids, lengths: Sequence[int]) -> None:
        """Add rows that lie end to end."""
        self._ids.write(np.ascontiguousarray(ids, np.int32).data)
        self._labels.write(np.ascontiguousarray(labels, np.int32).data)
        # The first token of a row has nothing before it to be predicted from.
        self.learned += int(np.count_nonzero(labels != IGNORE))
        at = 0
        for length in lengths:
            self.learned -= int(length > 0 and labels[at] != IGNORE)
            at += length
            self._offsets.append(self._offsets[-1] + length)
        self._max_id = max(self._max_id, int(ids.max(initial=-1)))

    @property
    def lengths(self) -> Ids:
        """Tokens of each row."""
        return np.diff(np.frombuffer(self._offsets, np.int64)).astype(np.int32)

    def divide(self, held: npt.NDArray[np.bool_], kept: ShardWriter, out: ShardWriter) -> None:
        """Copy all rows: those where `held` [rows] is true to `out`, the others to `kept`."""
        self._ids.flush()
        self._labels.flush()
        offsets = np.frombuffer(self._offsets, np.int64)
        row = 0
        while row < self.rows:
            last = row + 1
            while (
                last < self.rows
                and held[last] == held[row]
                and offsets[last + 1] - offsets[row] <= _RUN
            ):
                last += 1
            begin, end = int(offsets[row]), int(offsets[last])
            lengths = np.diff(offsets[row : last + 1]).tolist()
            ids = _read(self._ids, self._begin + 4 * begin, end - begin)
            labels = _read(self._labels, 4 * begin, end - begin)
            (out if held[row] else kept).add_rows(ids, labels, lengths)
            row = last

    def finish(self) -> None:
        """Write header and the rest, fsync, rename, fsync the folder.

        Its line of ``b2sum -l 256`` is written beside it first: who finds the shard finds its hash.
        """
        self._labels.flush()
        self._labels.seek(0)
        shutil.copyfileobj(self._labels, self._ids, _BUFFER)
        self._ids.write(memoryview(self._offsets))
        header = self._header(self.tokens, self.rows, self._max_id).ljust(self._begin)
        self._ids.seek(0)
        self._ids.write((self._begin - 8).to_bytes(8, "little") + header[8:])
        self._ids.flush()
        os.fsync(self._ids.fileno())
        write_sum(self._path, _native.hash_file(self._temporary))
        self._temporary.replace(self._path)
        folders.sync(self._path.parent)

    def close(self) -> None:
        """Close the files, and remove what was not finished."""
        for name in ("_ids", "_labels"):
            with suppress(AttributeError):
                getattr(self, name).close()
        self._temporary.unlink(missing_ok=True)

    def _header(self, tokens: int, rows: int, max_id: int) -> bytes:
        """Give room for its length, and the header, padded so that the data is aligned."""
        vector = 4 * tokens
        described: dict[str, Any] = {
            "__metadata__": {
                "format": "pml-shard-1",
                "max_id": str(max_id),
                "source": self._source.encode("utf-8", "replace").decode(),
            },
            "input_ids": {"dtype": "I32", "shape": [tokens], "data_offsets": [0, vector]},
            "labels": {"dtype": "I32", "shape": [tokens], "data_offsets": [vector, 2 * vector]},
            "offsets": {
                "dtype": "I64",
                "shape": [rows + 1],
                "data_offsets": [2 * vector, 2 * vector + 8 * (rows + 1)],
            },
        }
        text = bytes(8) + json.dumps(described, ensure_ascii=False).encode("utf-8")
        return text.ljust((len(text) + 4095) // 4096 * 4096)


def write_sum(shard: Path, digest: str) -> None:
    """Write what a shard's hash is beside it, as ``b2sum -l 256`` prints it."""
    line = f"{digest}  {shard.name}\n"
    folders.write_private(shard.with_name(f"{shard.name}.b2sum"), line.encode())


def _read(file: IO[bytes], at: int, n: int) -> Ids:
    """Read n numbers; not mapped, because mapped pages would count as memory."""
    data = os.pread(file.fileno(), 4 * n, at)
    return np.frombuffer(data, np.int32)
