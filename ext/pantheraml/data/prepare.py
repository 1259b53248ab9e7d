"""``python -m pantheraml.data.prepare RUNDIR``: a run's data, tokenised in a process of its own.

Started by the run's coordinator; reads ``run.json``, writes the shards that it names, and says on
standard output how far it is, one JSON object a line (docs/protocol.md).
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from pantheraml import _native
from pantheraml.data import cache, chat, tokenise
from pantheraml.data.long_text import PIECE
from pantheraml.data.readers import read, text_pieces
from pantheraml.data.rows import Kind, Row, Source, kind_of, same_kind
from pantheraml.data.shard import IGNORE, Ids, ShardWriter
from pantheraml.errors import BY_CODE, Error, InvalidError
from pantheraml.folders import entered, read_config

_ROWS = 1024  # tokenised at once,
_BYTES = 1 << 20  # or fewer, where they have so many


def say(kind: str, **fields: Any) -> None:
    """Write one line; the middle of long words is left out, so that it fits into a message."""
    words = fields.get("message", "")
    if len(words) > 600:
        fields["message"] = f"{words[:300]} … {words[-290:]}"
    print(json.dumps({"type": kind, **fields}), flush=True)


@dataclass(frozen=True)
class Options:
    """What `run.json` says of how rows become tokens.

    Attributes
    ----------
    max_length
        Tokens that a row may have.
    overlong
        What is done with longer ones: ``cut`` keeps the beginning, ``split`` makes rows of it,
        ``drop`` leaves the row out, ``refuse`` ends the preparation. None: ``split`` for texts that
        will be packed, else ``cut``.
    packing
        Whether rows will be packed.
    eval_split
        Share (below 1) or number of documents to hold out of the training data; None for none.
    seed
        Of the choice of those.
    """

    max_length: int
    packing: bool
    overlong: str | None = None
    eval_split: float | None = None
    seed: int = 0

    @classmethod
    def of(cls, config: dict[str, Any]) -> Options:
        """Take them from a run's configuration."""
        data = config["data"]
        return cls(
            config["max_length"], config["packing"], data.get("overlong"), data.get("eval_split"),
            config.get("seed", 0),
        )  # fmt: skip

    def overlong_for(self, kind: Kind) -> str:
        """Say what is done with long rows of a kind."""
        return self.overlong or ("split" if kind == "text" and self.packing else "cut")


class Counts:
    """What a preparation has to tell besides rows and tokens."""

    def __init__(self) -> None:
        self.empty = self.cut = self.split = self.dropped = 0
        self.lost = 0  # tokens of rows that were cut or dropped
        self.hollow = 0  # rows that have nothing left to learn after they were cut


class Preparation:
    """One source on its way into one shard, or (with `eval_split`) into two.

    Parameters
    ----------
    source
        The rows.
    model
        What they are tokenised for.
    options
        How.
    what
        ``train`` or ``eval``, for progress.
    """

    def __init__(
        self, source: Source, model: tokenise.ModelFolder, options: Options, what: str
    ) -> None:
        self._source, self._model, self._options, self._what = source, model, options, what
        self._counts = Counts()
        self._roles: set[str] = set()  # of turns, until there is an assistant's
        self._documents = array("q")  # first row of each
        self._said: list[tuple[str, str]] = []
        self._told = 0.0

    def run(self, shard: Path, held_out: Path | None = None) -> None:
        """Write the shard, or take the one of an earlier run.

        `held_out` is the shard of `eval_split`.
        """
        shards = {"shard": shard}
        if held_out is not None:
            shards["held_out"] = held_out
        start = time.monotonic()
        entry = cache.Entry(self._key())
        try:
            said = entry.take(shards)
        except ValueError as error:
            said = None
            self._log("warning", f"kept shards were damaged ({error}) and are made anew")
        except OSError as error:
            said = None
            self._log("warning", f"kept shards cannot be read: {error}")
        if said is not None:
            for level, message in said:
                say("log", level=level, message=f"{self._what}: {message}")
            self._log("info", f"nothing was tokenised: {cache.location()} had the shards")
            return
        self._make(shard, held_out)
        seconds = time.monotonic() - start
        self._progress(1.0)
        for level, message in self._said:
            self._log(level, message)
        self._log("info", f"tokenised in {seconds:.1f} s")
        try:
            entry.keep(shards, self._said)
        except OSError as error:
            self._log("warning", f"the shards are not kept for other runs: {error}")

    def _key(self) -> str:
        """Hash everything that decides the tokens."""
        options = asdict(self._options)
        if self._options.eval_split is None:
            del options["seed"]
        return cache.key_of(
            {
                "source": cache.hash_file(
                    self._source.path, lambda f: self._progress(f, "looking at")
                ),
                "kind": self._source.format,
                "options": options,
                **tokenise.identity(self._model),
            }
        )

    def _make(self, shard: Path, held_out: Path | None) -> None:
        self._progress(0.0)
        title = self._source.title
        # What is divided into two is not a shard of its own.
        whole = shard if held_out is None else shard.with_name(f"{shard.name}.all")
        with ShardWriter(whole, title) as writer:
            if self._source.format == "txt":
                self._one_text(writer)
            else:
                self._rows(writer)
            _check(title, writer, self._roles)
            if held_out is None:
                writer.finish()
                made = [(self._what, writer)]
            else:
                made = self._divide(writer, shard, held_out)
        for what, part in made:
            also = "" if what == self._what else f"held out for {what}: "
            counts = f"{part.rows:,} rows, {part.tokens:,} tokens, {part.learned:,} of them learned"
            self._note("info", also + counts + self._packed(part))
        self._tell()

    def _rows(self, writer: ShardWriter) -> None:
        tokeniser: tokenise.Tokeniser | None = None
        kind: Kind | None = None
        done = 0.0

        def moved(share: float) -> None:
            self._progress(done + share * (batch[-1].done - done))

        for batch in _batches(read(self._source)):
            if tokeniser is None or kind is None:
                kind = kind_of(batch[0])
                tokeniser = tokenise.Tokeniser(self._model, kind, moved)
            for row in batch:
                same_kind(row, kind)
            for row, (ids, labels) in tokeniser.batch(batch):
                if kind == "messages" and "assistant" not in self._roles:
                    self._roles.update(turn["role"] for turn in row.fields["messages"])
                if len(ids) == 0:
                    self._counts.empty += 1
                    continue
                self._documents.append(writer.rows)
                if len(ids) > self._options.max_length:
                    self._overlong(writer, row, kind, ids, labels)
                else:
                    writer.add(ids, labels)
            done = batch[-1].done
            self._progress(done)

    def _overlong(self, writer: ShardWriter, row: Row, kind: Kind, ids: Ids, labels: Ids) -> None:
        most, counts = self._options.max_length, self._counts
        policy = self._options.overlong_for(kind)
        if policy == "refuse":
            raise row.fail(
                f"{len(ids):,} tokens, but max_length={most:,}; raise it, or let overlong= cut, "
                "split or drop such rows"
            )
        if policy == "split":
            counts.split += 1
            for begin in range(0, len(ids), most):
                writer.add(ids[begin : begin + most], labels[begin : begin + most])
        elif policy == "drop":
            counts.dropped += 1
            counts.lost += len(ids)
            self._documents.pop()
        else:
            counts.cut += 1
            counts.lost += len(ids) - most
            counts.hollow += bool((labels[1:] != IGNORE).any() and not _learns(labels[:most]))
            writer.add(ids[:most], labels[:most])

    def _one_text(self, writer: ShardWriter) -> None:
        most, path = self._options.max_length, self._source.path
        blank = True

        def texts() -> Iterator[str]:
            nonlocal blank
            for text, done in text_pieces(path, PIECE):
                blank = blank and not text.strip()
                self._progress(done)
                yield text

        left = np.empty(0, np.int32)
        for ids in tokenise.long_text(self._model, texts()):
            if len(ids) and int(ids.max()) >= self._model.vocab:
                raise InvalidError(
                    f"{path}: the tokenizer makes the id {int(ids.max())}, but the model's "
                    f"vocabulary has {self._model.vocab} tokens"
                )
            left = np.concatenate([left, ids])
            whole = len(left) // most * most
            if whole:
                writer.add_rows(left[:whole], left[:whole], [most] * (whole // most))
            left = left[whole:]
        if blank:
            raise InvalidError(f"{path}: there are no rows in it")
        if len(left):
            writer.add(left, left)

    def _divide(
        self, writer: ShardWriter, shard: Path, held_out: Path
    ) -> list[tuple[str, ShardWriter]]:
        share = self._options.eval_split
        assert share is not None
        if self._source.format == "txt":  # one document: its end, so that neither side knows it
            held = np.zeros(writer.rows, np.bool_)
            held[writer.rows - _held_out(share, writer.rows, "rows of max_length tokens") :] = True
        else:
            starts = np.append(np.frombuffer(self._documents, np.int64), writer.rows)
            n = _held_out(share, len(starts) - 1, "documents")
            chosen = choose(len(starts) - 1, n, self._options.seed)
            held = np.repeat(chosen, np.diff(starts))
        title = self._source.title
        with (
            ShardWriter(shard, title) as kept,
            ShardWriter(held_out, title) as out,
        ):
            writer.divide(held, kept, out)
            for part, name in ((kept, "train"), (out, "held out")):
                _check(f"{title} ({name}, eval_split={share})", part, self._roles)
            out.finish()
            kept.finish()
        return [("train", kept), ("eval", out)]

    def _progress(self, fraction: float, doing: str = "tokenising") -> None:
        now = time.monotonic()
        ends = fraction in (0.0, 1.0) and doing == "tokenising"
        if ends or now - self._told > 0.2:
            self._told = now
            say("progress", what=f"{doing} {self._what}", fraction=round(fraction, 4))

    def _tell(self) -> None:
        counts, most = self._counts, self._options.max_length
        longer = f"longer than max_length={most:,}"
        if counts.cut:
            hollow = f"; {counts.hollow:,} of them have nothing left to learn"
            self._note(
                "warning",
                f"{counts.cut:,} rows are {longer} and lose their end, {counts.lost:,} tokens in "
                f"all{hollow if counts.hollow else ''}",
            )
        if counts.dropped:
            self._note(
                "warning",
                f"{counts.dropped:,} rows with {counts.lost:,} tokens are {longer} and left out",
            )
        if counts.split:
            self._note("info", f"{counts.split:,} rows {longer} were made into several")
        if counts.empty:
            self._note("warning", f"{counts.empty:,} empty rows were left out")

    def _packed(self, part: ShardWriter) -> str:
        if not self._options.packing:
            return ""
        most = self._options.max_length
        bins = _native.packed(part.lengths.data, most)
        return f", packed into {bins:,} of {most:,}, {part.tokens / (bins * most):.1%} full"

    def _note(self, level: str, message: str) -> None:
        self._said.append((level, message))

    def _log(self, level: str, message: str) -> None:
        say("log", level=level, message=f"{self._what}: {message}")


def choose(n: int, k: int, seed: int) -> npt.NDArray[np.bool_]:
    """Choose k of n, at random and always the same.

    Each number is hashed with the seed (splitmix64; Steele, Lea and Flood, 2014), and those with
    the smallest hashes are chosen: no library's generator is in it, so no version changes it.
    """
    with np.errstate(over="ignore"):
        x = np.arange(n, dtype=np.uint64) + np.uint64(seed + 1) * np.uint64(0xD1B54A32D192ED03)
        x *= np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    chosen = np.zeros(n, np.bool_)
    chosen[np.argsort(x, kind="stable")[:k]] = True
    return chosen


def prepare(folder: Path) -> None:
    """Write the shards of the run in `folder`; those that are there already are kept.

    Raises
    ------
    InvalidError
        What is to be made is not for one folder, or the data is not as it has to be.
    """
    config = read_config(folder)
    options = Options.of(config)
    model: tokenise.ModelFolder | None = None
    for what in ("train", "eval"):
        relative = config[f"{what}_data"]
        described = config["data"].get(what)
        if not relative or described is None or (folder / relative).exists():
            continue
        model = model or tokenise.load_model_folder(
            Path(config["model"]), *chat.of_run(folder, config["data"])
        )
        name = "data" if what == "train" else "eval_data"
        source = Source(folder / described["path"], described["format"], name)
        divided = what == "train" and options.eval_split is not None
        task = Preparation(source, model, options, what)
        held_out = PurePosixPath(config["eval_data"])
        if divided and held_out.parent != PurePosixPath(relative).parent:
            raise InvalidError("run.json: train_data and eval_data are not in one folder")
        with entered(folder, relative) as shard:
            task.run(shard, Path(held_out.name) if divided else None)


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
        where = Path(folder) / (error.filename or "")  # a name alone is one in the run's folder
        say("error", code="io", message=f"{where}: {error.strerror or error}")
        return 1
    except MemoryError:
        say("error", code="no memory", message="there is not enough memory to tokenise the data")
        return 1
    return 0


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += row.size
        if len(batch) == _ROWS or size >= _BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _check(title: str, writer: ShardWriter, roles: set[str]) -> None:
    if writer.rows == 0:
        raise InvalidError(f"{title}: there are no rows in it")
    if writer.learned == 0 and roles and "assistant" not in roles:
        raise InvalidError(
            f'{title}: only turns of the role "assistant" are learned, and there is none: the '
            f"roles are {', '.join(map(repr, sorted(roles)))[:200]}"
        )
    if writer.learned == 0:
        raise InvalidError(
            f"{title}: no token of any row is learned (every label is -100, beyond max_length, or "
            "at a row's first token, which has nothing before it)"
        )


def _held_out(share: float, n: int, what: str) -> int:
    held = int(share) if share >= 1 else math.ceil(share * n)
    if held >= n:
        raise InvalidError(
            f"eval_split={share:g} holds out all of the data, {n:,} {what}; hold out fewer"
        )
    return held


def _learns(labels: Ids) -> bool:
    return bool((labels[1:] != IGNORE).any())


if __name__ == "__main__":
    sys.exit(main())
