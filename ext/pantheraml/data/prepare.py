"""``python -m pantheraml.data.prepare RUNDIR``: a run's data, tokenised in a process of its own.

Started by the run's coordinator; reads ``run.json``, writes the shards that it names, and says on
standard output how far it is, one JSON object a line (docs/protocol.md).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pantheraml.data import tokenise
from pantheraml.data.rows import Row, Source, kind_of, read, read_text, same_kind
from pantheraml.data.shard import Ids, ShardWriter
from pantheraml.errors import BY_CODE, Error, InvalidError

_BATCH = 1024  # rows tokenised at once


def say(kind: str, **fields: Any) -> None:
    """Write one line; the middle of long words is left out, so that it fits into a message."""
    words = fields.get("message", "")
    if len(words) > 600:
        fields["message"] = f"{words[:300]} … {words[-290:]}"
    print(json.dumps({"type": kind, **fields}), flush=True)


class Preparation:
    """One source on its way into one shard.

    Parameters
    ----------
    source
        The rows.
    model
        What they are tokenised for.
    max_length
        Tokens a row may have.
    packing
        Whether rows will be packed; long texts are then cut into rows instead of losing their end.
    what
        ``train`` or ``eval``, for progress.
    """

    def __init__(
        self,
        source: Source,
        model: tokenise.ModelFolder,
        max_length: int,
        packing: bool,
        what: str,
    ) -> None:
        self._source, self._model, self._what = source, model, what
        self._max_length, self._packing = max_length, packing
        self._writer = ShardWriter()
        self._long = self._split = self._empty = 0
        self._told = 0.0

    def run(self, shard: Path) -> None:
        """Read, tokenise, check and write."""
        start = time.monotonic()
        self._progress(0.0)
        if self._source.format == "txt":
            self._one_text()
        else:
            self._rows()
        writer = self._writer
        name = "data" if self._source.format == "list" else str(self._source.path)
        if writer.rows == 0:
            raise InvalidError(f"{name}: there are no rows in it")
        if writer.learned == 0:
            raise InvalidError(
                f"{name}: no token of any row is learned (every label is -100, or stands at a "
                "row's first token, which has nothing before it)"
            )
        writer.write(shard, name)
        self._progress(1.0)
        seconds = time.monotonic() - start
        message = (
            f"{self._what}: {writer.rows:,} rows, {writer.tokens:,} tokens, {writer.learned:,} of "
            f"them learned, tokenised in {seconds:.1f} s"
        )
        say("log", level="info", message=message)
        self._warn()

    def _rows(self) -> None:
        size = max(1, self._source.path.stat().st_size)
        rows = read(self._source)
        tokeniser: tokenise.Tokeniser | None = None
        kind = None
        for batch in _batches(rows):
            if tokeniser is None or kind is None:
                kind = kind_of(batch[0])
                tokeniser = tokenise.Tokeniser(self._model, kind)
            for row in batch:
                same_kind(row, kind)
            for _, (ids, labels) in tokeniser.batch(batch):
                if len(ids) == 0:
                    self._empty += 1
                elif kind == "text" and self._packing and len(ids) > self._max_length:
                    self._split += 1
                    self._cut(ids)
                else:
                    self._long += len(ids) > self._max_length
                    self._writer.add(ids, labels)
            self._progress(batch[-1].end / size)

    def _one_text(self) -> None:
        text = read_text(self._source.path)
        if not text.strip():
            return
        pieces = []
        done = 0
        for ids in tokenise.long_text(self._model, text):
            if len(ids) and int(ids.max()) >= self._model.vocab:
                raise InvalidError(
                    f"{self._source.path}: the tokenizer makes the id {int(ids.max())}, but the "
                    f"model's vocabulary has {self._model.vocab} tokens"
                )
            pieces.append(ids)
            done += tokenise.PIECE
            self._progress(done / len(text))
        self._cut(np.concatenate(pieces))

    def _cut(self, ids: Ids) -> None:
        for begin in range(0, len(ids), self._max_length):
            piece = ids[begin : begin + self._max_length]
            self._writer.add(piece, piece)

    def _progress(self, fraction: float) -> None:
        now = time.monotonic()
        if fraction in (0.0, 1.0) or now - self._told > 0.2:
            self._told = now
            say("progress", what=f"tokenising {self._what}", fraction=round(min(1.0, fraction), 4))

    def _warn(self) -> None:
        if self._long:
            message = (
                f"{self._what}: {self._long:,} rows are longer than max_length={self._max_length} "
                "and lose their end"
            )
            say("log", level="warning", message=message)
        if self._split:
            message = f"{self._what}: {self._split:,} texts longer than max_length were cut in rows"
            say("log", level="info", message=message)
        if self._empty:
            message = f"{self._what}: {self._empty:,} empty rows were left out"
            say("log", level="warning", message=message)


def prepare(folder: Path) -> None:
    """Write the shards of the run in `folder`; those that are there already are kept."""
    config = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    model: tokenise.ModelFolder | None = None
    for what in ("train", "eval"):
        relative = config[f"{what}_data"]
        if not relative or (folder / relative).exists():
            continue
        model = model or tokenise.load_model_folder(Path(config["model"]))
        described = config["data"][what]
        source = Source(folder / described["path"], described["format"])
        task = Preparation(source, model, config["max_length"], config["packing"], what)
        task.run(folder / relative)


def main(arguments: list[str] | None = None) -> int:
    """Prepare one run; an error is one line on standard output and exit status 1."""
    os.umask(0o077)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    (folder,) = sys.argv[1:] if arguments is None else arguments
    try:
        prepare(Path(folder))
    except Error as error:
        code = next((name for name, cls in BY_CODE.items() if type(error) is cls), "internal")
        say("error", code=code, message=str(error))
        return 1
    except OSError as error:
        say("error", code="io", message=f"{error.filename or folder}: {error.strerror or error}")
        return 1
    except MemoryError:
        say("error", code="no memory", message="the data does not fit into memory as tokens")
        return 1
    return 0


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while batch := list(islice(rows, _BATCH)):
        yield batch


if __name__ == "__main__":
    sys.exit(main())
