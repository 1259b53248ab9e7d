"""Token shards that other runs have made of the same data, kept and used again.

::

    $PANTHERAML_CACHE/shards/<key>/      else $XDG_CACHE_HOME/pantheraml, else ~/.cache/pantheraml
        shard.safetensors, held_out.safetensors  links to the files of the run that made them
        entry.json                               their sizes and hashes, and what was said of them

The key is a hash of everything that decides the tokens: the source's bytes, the tokenizer, the chat
template and what it is given, the options, the versions. Each file is hashed again before it is
used; what does not match is made anew. Entries that were used longest ago go when all take more
than ``$PANTHERAML_CACHE_SIZE`` (bytes or "10GiB", which is the default; 0: nothing is kept).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any

from pantheraml import folders
from pantheraml.checks import memory, path_of
from pantheraml.data.shard import write_sum

#: Counts up when the same input makes other tokens than it did before.
FORMAT = 2

_DEFAULT = "10GiB"
_CHUNK = 1 << 22


def location() -> Path:
    """Give the folder that entries are in."""
    own = os.environ.get("PANTHERAML_CACHE")
    if own:
        return path_of(own).absolute() / "shards"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return path_of(base).absolute() / "pantheraml" / "shards"


def bound() -> int:
    """Give the bytes that all entries together may have."""
    given = os.environ.get("PANTHERAML_CACHE_SIZE", _DEFAULT)
    return 0 if given.strip() == "0" else memory(given, "PANTHERAML_CACHE_SIZE")


def hash_file(path: Path, progress: Callable[[float], None] = lambda _: None) -> str:
    """BLAKE2b-256 of a file."""
    made = hashlib.blake2b(digest_size=32)
    size = max(1, path.stat().st_size)
    done = 0
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            made.update(data)
            done += len(data)
            progress(min(1.0, done / size))
    return made.hexdigest()


def key_of(parts: Mapping[str, Any]) -> str:
    """Hash what decides the tokens, given as JSON values."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode("ascii"), digest_size=32).hexdigest()


class Entry:
    """What is or will be kept under one key.

    Parameters
    ----------
    key
        See :func:`key_of`.
    """

    def __init__(self, key: str) -> None:
        self._folder = location() / key

    def take(self, shards: Mapping[str, Path]) -> list[tuple[str, str]] | None:
        """Put the files where they are wanted.

        Parameters
        ----------
        shards
            Where each goes, by its name here: ``{"shard": path}``.

        Returns
        -------
        list or None
            Levels and words of what was said when they were made; None where there is no such
            entry.

        Raises
        ------
        ValueError
            The entry is damaged. It has been removed.
        OSError
            It cannot be read.
        """
        try:
            described = json.loads((self._folder / "entry.json").read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            self._remove()
            raise ValueError(f"entry.json cannot be read ({error})") from None
        try:
            for name in shards:
                path = self._folder / f"{name}.safetensors"
                wanted = described["files"][name]
                seen = path.lstat()  # a link is nothing that was kept here
                size = seen.st_size if S_ISREG(seen.st_mode) else -1
                if size != wanted["bytes"] or hash_file(path) != wanted["blake2b"]:
                    raise ValueError(f"{path.name} does not have the hash it had")
            said = [(str(level), str(words)) for level, words in described["said"]]
            for name, shard in shards.items():
                write_sum(shard, described["files"][name]["blake2b"])
                _link(self._folder / f"{name}.safetensors", shard)
        except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
            self._remove()
            raise ValueError(str(error)) from None
        os.utime(self._folder)  # used last
        return said

    def keep(self, shards: Mapping[str, Path], said: list[tuple[str, str]]) -> None:
        """Keep the files, and make room.

        Raises
        ------
        OSError
            The folder cannot be written to.
        """
        limit = bound()
        if sum(path.stat().st_size for path in shards.values()) > limit:
            return
        parent = self._folder.parent
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix="new-", dir=parent))
        try:
            files = {}
            for name, path in shards.items():
                _link(path, temporary / f"{name}.safetensors")
                files[name] = {"bytes": path.stat().st_size, "blake2b": hash_file(path)}
            text = json.dumps({"files": files, "said": said}, indent=1, ensure_ascii=False)
            folders.write_private(temporary / "entry.json", text.encode("utf-8"))
            with suppress(OSError):  # somebody else has just kept the same
                temporary.rename(self._folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _make_room(parent, limit, self._folder)

    def _remove(self) -> None:
        _remove(self._folder)


def _link(source: Path, target: Path) -> None:
    """Link a file, or copy it where that cannot be: another file system, or one without links."""
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except FileNotFoundError:
            raise
        except OSError:
            shutil.copyfile(source, temporary)
            temporary.chmod(0o600)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(target)
        folders.sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _make_room(parent: Path, limit: int, kept: Path) -> None:
    """Remove the entries used longest ago, until all fit."""
    entries = []
    total = 0
    for folder in parent.iterdir():
        try:
            size = sum(path.stat().st_size for path in folder.iterdir())
            entries.append((folder.stat().st_mtime_ns, size, folder))
        except (FileNotFoundError, NotADirectoryError):
            continue  # gone meanwhile, or nothing of ours
        total += size
    for _, size, folder in sorted(entries):
        if total <= limit:
            return
        if folder != kept:
            _remove(folder)
            total -= size


def _remove(folder: Path) -> None:
    """Remove an entry; nobody sees a part of it."""
    away = Path(tempfile.mkdtemp(prefix="old-", dir=folder.parent))
    try:
        with suppress(FileNotFoundError):
            folder.rename(away / "entry")
    finally:
        shutil.rmtree(away, ignore_errors=True)
