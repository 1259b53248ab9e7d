"""Errors: one Python class for each status of the engine.

Every one is a :class:`Error`, and also the built-in exception that a Python programmer would
expect, so ``except ValueError`` works. The C extension raises these same classes.
"""

from __future__ import annotations

from pantheraml.plain import plain


class Error(Exception):
    """Base of all errors of PantheraML.

    Its words may be another's (a coordinator's elsewhere, a file's), and tracebacks show them on
    terminals: as text they are plain.
    """

    def __str__(self) -> str:
        return plain(super().__str__())


class InvalidError(Error, ValueError):
    """Something that was given cannot be used; the message says what to change."""


class NotFoundError(Error, FileNotFoundError):
    """A file, tensor or run that was named does not exist."""


class NotInThisVersion(Error, NotImplementedError):  # noqa: N818 - says what it is
    """Understood, but not built yet or not possible on this device."""


class NoMemoryError(Error, MemoryError):
    """Memory was refused, or a plan does not fit."""


class IOFailed(Error, OSError):  # noqa: N818
    """The operating system refused a read, a write or a rename."""


class CorruptError(Error, ValueError):
    """A file or a message is damaged."""


class DeniedError(Error, PermissionError):
    """The key's role or the file's owner does not allow it."""


class BusyError(Error, RuntimeError):
    """Somebody else holds the lock, or the run's state does not allow it now."""


class TooManyViewers(BusyError):  # noqa: N818
    """As many are connected with this key, or with view keys, as there may be."""


class TimedOut(Error, TimeoutError):  # noqa: N818
    """A deadline passed."""


class PeerError(Error, ConnectionError):
    """A worker, the coordinator or the device is gone."""


class InternalError(Error, RuntimeError):
    """A fault of PantheraML's own; please report it."""


class RunFailed(Error, RuntimeError):  # noqa: N818
    """The run ended in the state ``failed``; the message is its reason."""


#: Class for each code as it travels in messages (``pml_status_name``).
BY_CODE: dict[str, type[Error]] = {
    "invalid": InvalidError,
    "not found": NotFoundError,
    "unsupported": NotInThisVersion,
    "no memory": NoMemoryError,
    "io": IOFailed,
    "corrupt": CorruptError,
    "denied": DeniedError,
    "busy": BusyError,
    "timeout": TimedOut,
    "peer": PeerError,
    "internal": InternalError,
}


def from_code(code: str, message: str) -> Error:
    """Make the error for a status name that came in a message."""
    return BY_CODE.get(code, InternalError)(message)
