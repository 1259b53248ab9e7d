"""Run folders: where they are, what they are called, how their files are written."""

from __future__ import annotations

import difflib
import errno
import json
import os
import random
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from stat import S_ISLNK, S_ISREG
from typing import Any, BinaryIO

from pantheraml import _native, sums
from pantheraml.checks import path_of
from pantheraml.errors import (
    BusyError,
    CorruptError,
    Error,
    InvalidError,
    IOFailed,
    NotFoundError,
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_ADJECTIVES = (
    "amber", "bold", "brisk", "calm", "clear", "dusky", "eager", "fleet", "gentle", "keen",
    "light", "lucid", "mellow", "nimble", "patient", "quick", "quiet", "rapid", "sleek", "steady",
    "sunny", "supple", "swift", "tawny", "velvet", "vivid", "wild", "wise",
)  # fmt: skip


def runs_folder() -> Path:
    """``$PANTHERAML_RUNS``, else ``runs`` in the current folder; absolute."""
    return path_of(os.environ.get("PANTHERAML_RUNS") or "runs").absolute()


def check_name(name: str) -> str:
    """Refuse a run name that could not be a folder's name everywhere.

    Raises
    ------
    InvalidError
        It is one.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidError(
            f"name: {name!r} must be 1 to 100 letters (a to z, A to Z), digits, dots, dashes or "
            "underlines, and begin with a letter or digit"
        )
    return name


def create(name: str | None, model: str) -> Path:
    """Make a new run folder, mode 0700.

    Parameters
    ----------
    name
        As the user gave it; None: one is made from the model's, as in ``smollm2-swift-17``.
    model
        As the user gave it.

    Raises
    ------
    BusyError
        A run of that name is there already.
    IOFailed
        The folder of runs cannot be made or written to.
    """
    parent = runs_folder()
    try:
        return _create(parent, name, model)
    except (FileExistsError, NotADirectoryError):
        raise IOFailed(f"{parent} cannot hold runs: it, or what it is in, is a file") from None
    except OSError as error:
        if isinstance(error, Error):
            raise
        raise IOFailed(
            f"no run can be made in {parent} ({error.strerror or error}); set PANTHERAML_RUNS to a "
            "folder that can be written to"
        ) from None


def _create(parent: Path, name: str | None, model: str) -> Path:
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if name is not None:
        folder = parent / check_name(name)
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            if not (folder / "run.json").is_file():
                raise BusyError(
                    f"{folder} is there already, without a run in it: remove it, or give another "
                    "name"
                ) from None
            raise BusyError(
                f"there is a run {name!r} already, in {folder}: give another name, or go on with "
                f"it by pm.attach({name!r})"
            ) from None
        return _with_data(folder)
    stem = re.sub(r"[^a-z0-9.]+", "-", Path(model).name.lower()).strip("-.")[:60] or "run"
    choose = random.Random(time.time_ns())  # noqa: S311 - a name, not a secret
    while True:
        folder = parent / f"{stem}-{choose.choice(_ADJECTIVES)}-{choose.randrange(10, 1000)}"
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            continue
        return _with_data(folder)


def _with_data(folder: Path) -> Path:
    try:
        (folder / "data").mkdir(mode=0o700)
        sync(folder.parent)
        sync(folder)
    except BaseException:  # Ctrl-C too: a folder without a run would keep the name from the next
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def find(name: str | os.PathLike[str] | None) -> Path:
    """Find a run's folder by its name, by its path, or (None) the latest.

    Raises
    ------
    NotFoundError
        There is none; the nearest name is suggested.
    """
    parent = runs_folder()
    if name is None:
        folders = every()
        if not folders:
            raise NotFoundError(f"there are no runs in {parent}")
        return folders[0]
    found = named(name)
    if found is not None:
        return found
    near = difflib.get_close_matches(str(name), [f.name for f in every()], n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise NotFoundError(f"there is no run {str(name)!r} in {parent}{hint}")


def named(name: str | os.PathLike[str]) -> Path | None:
    """Give the folder of the run that is meant by a name or a path; None: there is none."""
    path = path_of(name)
    for folder in (runs_folder() / path, path.absolute()):
        try:
            if S_ISREG((folder / "run.json").stat().st_mode):
                return folder
        except (ValueError, PermissionError):  # a name that no folder can have; somebody else's
            continue
        except OSError as error:
            if not is_absent(error):
                raise
    return None


def every() -> list[Path]:
    """All run folders, the one that began last first.

    That is in run.json, which a coordinator writes again when its workers are ready.
    """
    parent = runs_folder()
    if not parent.is_dir():
        return []
    found = []
    for folder in parent.iterdir():
        try:
            written = (folder / "run.json").stat().st_mtime
            found.append((_created(folder, written), folder.name, folder))
        except PermissionError:
            continue  # somebody else's
        except OSError as error:
            if not is_absent(error):  # a run, perhaps: who reads it says what is the matter
                found.append((0.0, folder.name, folder))
    return [folder for _, _, folder in sorted(found, reverse=True)]


def _created(folder: Path, otherwise: float) -> float:
    with suppress(Error, KeyError, TypeError, ValueError, OSError):
        return float(read_config(folder)["created"])
    return otherwise  # who reads it says what is the matter


def write_private(path: Path, data: bytes) -> None:
    """Write a file of mode 0600, whole or not at all, and fsync it and its folder."""
    with private_file(path) as file:
        file.write(data)


@contextmanager
def private_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file of mode 0600 for writing; it is there at the end, fsynced, or not at all."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(temporary, flags, 0o600), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``run.json``.

    Raises
    ------
    NotFoundError
        It is no run folder.
    CorruptError
        It is not what was written, or no run's configuration. A file without a sum was edited, and
        is taken as it is.
    """
    path = folder / "run.json"
    try:
        with reading(folder, path.name) as file:
            text = file.read()
        if sums.carries(text) and not sums.is_right(text):
            raise CorruptError(
                f"{path} is not what was written (its sum does not match); pantheraml doctor says "
                "what can be done"
            )
        _native.check_message("run", text)
        config: dict[str, Any] = json.loads(text)
    except FileNotFoundError:
        raise NotFoundError(f"{folder} is no run folder: it has no run.json") from None
    except NotOurs as error:
        raise CorruptError(f"{path}: {error.strerror}") from None
    except InvalidError as error:
        raise CorruptError(f"{path}: {error}") from None
    except CorruptError as error:
        named = str(path) in str(error)
        raise CorruptError(str(error) if named else f"{path}: {error}") from None
    config.pop("sum", None)
    return config


class NotOurs(OSError):
    """In the place of a run's own file or folder is something that a run does not make."""


def is_absent(error: OSError) -> bool:
    """Whether it says that there is no such file, or that something else is in its place.

    Any other (a disk that fails, no descriptors, no permission) says nothing of the file.
    """
    nothing = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)
    return isinstance(error, (NotOurs, FileNotFoundError)) or error.errno in nothing


def opened(folder: Path, name: str, flags: int = os.O_RDONLY) -> int:
    """Open something below a run's folder, part by part; no part of its name may be a link.

    The folder may be from somebody else: what a link in it led to would not be the run's.

    Raises
    ------
    NotOurs
        A part of it is a link; it says which, and what to do.
    OSError
        It is not there, or cannot be opened.
    """
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise NotOurs(errno.EINVAL, "it does not name something in its folder", str(folder / name))
    way = os.O_RDONLY | os.O_DIRECTORY
    at = os.open(folder, way | os.O_CLOEXEC)
    for n, part in enumerate(parts, 1):
        wanted = flags if n == len(parts) else way
        try:
            below = os.open(part, wanted | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
        except OSError as error:
            path = str(folder.joinpath(*parts[:n]))
            if _is_link(part, at):
                words = "it is a link, which is not followed here: remove it, or put what it leads "
                raise NotOurs(errno.ELOOP, words + "to in its place", path) from None
            raise OSError(error.errno, error.strerror, path) from None
        finally:
            os.close(at)
        at = below
    return at


def _is_link(name: str, at: int) -> bool:
    with suppress(OSError):
        return S_ISLNK(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode)
    return False


def reading(folder: Path, name: str) -> BinaryIO:
    """Open a file below a run's folder to read it, as :func:`opened` does.

    Raises
    ------
    NotOurs
        It is no file (a pipe or a device could take for ever), or a part of its name is a link.
    OSError
        It is not there, or cannot be opened.
    """
    fd = opened(folder, name)
    if S_ISREG(os.fstat(fd).st_mode):
        return open(fd, "rb")
    os.close(fd)
    raise NotOurs(errno.EINVAL, "it is no file", str(folder / name))


@contextmanager
def entered(folder: Path, name: str) -> Iterator[Path]:
    """Make the folder that `name` is in, below `folder`, the current one; gives the name in it.

    What is written by that alone lands where it should, whatever becomes of the path meanwhile. For
    processes that do nothing else: the current folder is that of all threads.
    """
    before = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        path = PurePosixPath(name)
        inside = opened(folder, str(path.parent), os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fchdir(inside)
        finally:
            os.close(inside)
        yield Path(path.name)
    finally:
        os.fchdir(before)
        os.close(before)


def sync(folder: Path) -> None:
    """Put the names in a folder on disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such thing
            raise
    finally:
        os.close(fd)
