"""Sharing: keys for others, and a run as somebody elsewhere sees it.

A run listens on no network until somebody asks for it with an address. Who connects needs a key; a
``view`` key sees everything and can change nothing. The secret half of a key is made here and never
sent: the coordinator is told the public half only.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import ipaddress
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from pantheraml import _native, folders
from pantheraml.checks import path_of
from pantheraml.errors import (
    CorruptError,
    DeniedError,
    Error,
    InvalidError,
    IOFailed,
    NotFoundError,
    PeerError,
    TimedOut,
    TooManyViewers,
    from_code,
)
from pantheraml.link import ANSWER, Link, parsed, problem_of
from pantheraml.plain import complain
from pantheraml.record import ENDED, Event
from pantheraml.run import Run

_PREFIX = "pantheraml:"
_REACH = {
    "loopback": "every user of this machine can connect, and whoever has a tunnel to it",
    "private": "everyone in this machine's own networks can connect",
    "everyone": "everyone who can route to this machine can connect",
}
#: Seconds without a connection after which a coordinator elsewhere counts as gone.
_PATIENCE = 30.0


class Key:
    """A connection, the secret half of a key with it, that does not show what is in it.

    Tracebacks that show variables (``%xmode Verbose``) are saved with a notebook.
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self._parts = dict(parts)

    def __getitem__(self, name: str) -> Any:
        return self._parts[name]

    def __or__(self, parts: Mapping[str, Any]) -> Key:
        return Key(self._parts | dict(parts))

    def __repr__(self) -> str:
        return f"<a key for {self._parts.get('control', 'a run')}>"

    def json(self) -> str:
        """Give it as the text of a connection file."""
        return json.dumps(self._parts, separators=(",", ":"))


class Share:
    """A key that was given out, and where it is good for.

    Hand it on by :meth:`save` or :meth:`text`. Whoever has it gets in, so it is shown nowhere by
    itself.

    Attributes
    ----------
    run, role, name
        Name of the run, ``view`` or ``control``, whom it is for.
    address
        Where viewers connect to, ``tcp://…``.
    reach
        Who can connect, in words; the key decides who gets in.
    """

    def __init__(self, run: Run, key: Key, name: str, reach: str) -> None:
        self._run = run
        self._key = key
        self.run = run.name
        self.role = str(key["role"])
        self.name = name
        self.address = str(key["control"])
        self.reach = _REACH[reach]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the key as a file, mode 0600, that ``pm.attach`` takes. None is overwritten.

        Raises
        ------
        InvalidError
            There is one already.
        IOFailed
            It cannot be written there.
        """
        with _key_file(path) as (target, file):
            file.write(self._json())
        return target

    def text(self) -> str:
        """Give the key as one line that ``pm.attach`` takes.

        It is a secret: do not print it in a cell that is saved.
        """
        return _PREFIX + base64.urlsafe_b64encode(self._json().encode()).decode()

    def revoke(self) -> None:
        """Let nobody in with this key any more, and shut out who is in with it."""
        self._run.unshare(self)

    @property
    def public_key(self) -> str:
        """The half by which the coordinator knows it."""
        return str(self._key["public_key"])

    def _json(self) -> str:
        return self._key.json()

    def __repr__(self) -> str:
        of = f" of {self.name}" if self.name else ""
        return f"<Share of {self.run}: {self.role} key{of} for {self.address}; {self.reach}>"


@contextlib.contextmanager
def _key_file(path: str | os.PathLike[str]) -> Iterator[tuple[Path, TextIO]]:
    """Make a file that is ours alone, mode 0600; where its writing fails, there is none."""
    target = path_of(path).absolute()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        made = open(os.open(target, flags, 0o600), "w", encoding="utf-8")  # noqa: SIM115 - below
    except FileExistsError:
        raise InvalidError(f"{target} is there already; remove it, or take another") from None
    except OSError as error:
        raise IOFailed(f"{target}: {error.strerror or error}") from None
    try:
        with made:
            yield target, made
    except BaseException as error:
        target.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, Error):
            raise IOFailed(f"{target}: {error.strerror or error}") from None
        raise


def share_into(
    path: str | os.PathLike[str],
    run: Run,
    bind: str,
    role: str,
    name: str | None,
    address: str | None,
) -> tuple[Path, Share]:
    """Share a run and write the key; where there is no place for the key, nothing is shared.

    Else a run would listen, and let somebody in with a key that nobody has.

    Raises
    ------
    InvalidError, IOFailed
        As :meth:`Run.share` and :meth:`Share.save`.
    """
    listened = run.sharing is not None
    made: Share | None = None
    try:
        with _key_file(path) as (target, file):
            made = share(run, bind, role, name, address)
            file.write(made._json())
        return target, made
    except BaseException:  # Ctrl-C, too: whoever asked has no key then
        with contextlib.suppress(Error):
            if not listened:
                run.unshare()
            elif made is not None:
                run.unshare(made)
        raise


def share(run: Run, bind: str, role: str, name: str | None, address: str | None) -> Share:
    """Do the work of :meth:`Run.share`.

    Raises
    ------
    InvalidError
        The role is unknown, or nothing can listen there.
    IOFailed
        The address is not this machine's, or a port is taken.
    """
    if role not in ("view", "control"):
        raise InvalidError(f'role must be "view" or "control", it is {role!r}')
    if not isinstance(bind, str):
        raise InvalidError(f'bind must be a text as "tcp://127.0.0.1:*", it is {bind!r}')
    if address is not None and not _is_host(address):
        raise InvalidError(
            f"address must be a host's name or number alone, as viewers reach it, it is {address!r}"
        )
    key = Key(dict(zip(("public_key", "secret_key"), _native.keypair(), strict=True)))
    fields = {} if name is None else {"name": name}
    try:
        answer = run._ask("share", bind=bind, role=role, public_key=key["public_key"], **fields)
    except IOFailed as error:
        raise IOFailed(
            f"{error}; take an address of this machine (0.0.0.0 is all of them), and a port that "
            "is free together with the next one (* takes any)"
        ) from None
    where = answer["sharing"]
    key = key | {
        "format": 1,
        "pid": run.coordinator_pid,
        "run": str(run.folder),
        "control": _reachable(where["control"], address),
        "telemetry": _reachable(where["telemetry"], address),
        "server_key": answer["server_key"],
        "role": role,
    }
    made = Share(run, key, name or "", where["reach"])
    complain(f"{run.name} listens on {where['control']}: {made.reach}.")
    return made


def _is_host(address: object) -> bool:
    """Whether it can stand before ``:PORT``: a name, or an address in numbers."""
    if not isinstance(address, str):
        return False
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(address)
        return True
    return re.fullmatch(r"[\w-]+(\.[\w-]+)*\.?", address) is not None and len(address) < 200


def _reachable(endpoint: str, address: str | None) -> str:
    """Put an address that others can connect to in the place of "all addresses"."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if address is None and host in ("0.0.0.0", "[::]", "*"):  # noqa: S104 - compared, not bound
        address = _own_address()
    if address is None:
        return endpoint
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(address).version == 6:
            address = f"[{address}]"
    return f"tcp://{address}:{port}"


def _own_address() -> str:
    """Give the address that this machine would send from; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # RFC 5737: nobody's
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


# ---- the other side --------------------------------------------------------------------------


def parse(given: str | os.PathLike[str]) -> Key | None:
    """Read what :meth:`Share.text` or :meth:`Share.save` made; None when it is neither.

    Raises
    ------
    InvalidError
        It is one that was damaged on its way, or nothing that could name a run.
    """
    if not isinstance(given, str | os.PathLike):
        raise InvalidError(
            f"a run is named by its name, its folder or a shared key, not by {type(given).__name__}"
        )
    text = os.fsdecode(given)
    if _PREFIX in text:  # copied with quotes, spaces or line breaks around it, perhaps
        text = "".join(text[text.index(_PREFIX) + len(_PREFIX) :].split()).rstrip("\"'")
        try:
            data = base64.b64decode(text, altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raise InvalidError("this is not a whole connection text; copy it again") from None
    elif folders.named(text) is None and _is_file(path := path_of(text)):
        data = _read_private(path)
    else:
        return None
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise InvalidError("this is no key that was shared: not JSON") from None
    if not isinstance(found, dict) or "secret_key" not in found:
        raise InvalidError("this is no key that was shared: there is none in it")
    return Key(found)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # too long for any name
        return False


def _read_private(path: Path) -> bytes:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        seen = os.fstat(file.fileno())
        if seen.st_uid != os.geteuid() or seen.st_mode & 0o077:
            raise DeniedError(f"{path} holds a key: make it yours alone (chmod 600 {path})")
        return file.read(1 << 17)


class _FarLink(Link):
    """A link to a coordinator whose process cannot be looked at."""

    def __init__(self, key: Key, run: SharedRun) -> None:
        self._key = key
        super().__init__("", run, run.name)

    def _open(self) -> tuple[int, _native.Client]:
        return int(self._key["pid"]), _native.Client(connection=self._key.json())

    def _is_there(self) -> bool:
        return time.monotonic() - self._down_since < _PATIENCE


class SharedRun(Run):
    """A run that lives elsewhere, by a key that was given out.

    It has everything that comes by events: history, memory, evaluations, samples. What needs the
    run's folder (checkpoints, export, tokenising a prompt) is where the run is. With a ``view``
    key every command is a :class:`DeniedError`.
    """

    def __init__(self, key: Key) -> None:
        self._key = key
        config = _ask_configuration(key)
        self._begin(Path(key["run"]), config)
        self._why = ""
        self._kind: type[Error] = PeerError  # what whoever asks hears without a connection

    @property
    def state(self) -> str:
        """As in :class:`Run`; while there is no connection, the last that was heard."""
        with self._changed:
            return self._record.state

    @property
    def reason(self) -> str:
        """As in :class:`Run`; while there is no connection, that, and why."""
        with self._changed:
            if self._gone and self._record.state not in ENDED:
                return f"not connected any more, this is the last that was heard: {self._why}"
            said, link = super().reason, self._link
            if link is None or not link.deaf:
                return said
            deaf = (
                f"no events come from {self._key['telemetry']}, so news is late: something "
                "between here and there must let this port through, too"
            )
            return f"{deaf}; {said}" if said else deaf

    def decode(self, token_ids: list[int]) -> str:
        """Make text of token ids where the model's tokenizer is at hand, else show the ids."""
        with contextlib.suppress(NotFoundError):
            return super().decode(token_ids)
        return " ".join(map(str, token_ids))

    def on_gone(self, link: Link) -> None:
        """Hear that there is no connection any more (for the link)."""
        with self._changed:
            if self._link is not link:
                return
            self._link, self._gone = None, True
            told = isinstance(link.error, DeniedError | TooManyViewers)
            self._kind = type(link.error) if link.error is not None and told else PeerError
            self._why = self._explained(link.error)
            self._changed.notify_all()
        self._tell({"type": "gone", "state": self.state, "step": self._record.step})

    def _explained(self, error: Error | None) -> str:
        if isinstance(error, DeniedError):
            return "its key is not let in any more; somebody who has the run can share another"
        if isinstance(error, PeerError):
            return (
                f"nobody answers at {self._key['control']}; the run has ended, or is shared no more"
            )
        return str(error)

    def _there(self) -> Link:
        if self._link is None and self._gone:
            raise self._kind(
                f"run {self.name} is elsewhere, and not connected any more: {self._why}"
            )
        return super()._there()

    def _nothing_comes(self) -> bool:
        """Without a connection nothing is heard, whatever happens there."""
        return self._gone or super()._nothing_comes()

    def _connected(self) -> None:
        if self._gone and not self._is_over():
            self._there()

    def _read_log(self) -> None:
        """There is none here: everything comes by replay."""

    def _logged(self) -> Iterator[Event]:
        return iter(())

    def _connect(self, timeout: float = ANSWER) -> bool:
        return self._catch_up(_FarLink(self._key, self), timeout)

    def _follow(self, go_on: bool = False) -> None:
        with self._or_closed():
            self._closed = False
            if self._link is None:
                self._connect()

    def _start_again(self, checkpoint: str, accept_changes: bool) -> bool:
        raise PeerError(f"run {self.name} can be started again only where it lives")


def _ask_configuration(key: Key) -> dict[str, Any]:
    """Ask once for what a run folder's owner reads from run.json."""
    with _native.Client(connection=key.json()) as client:
        client.send('{"type":"configuration","id":"configuration"}')
        deadline = time.monotonic() + ANSWER
        while time.monotonic() < deadline:
            for kind, text in client.receive(0.5):
                if kind == "denied":
                    raise from_code("denied", "this key is not, or no longer, let in")
                if kind != "answer":
                    continue
                answer = parsed(kind, text)
                if answer["type"] == "error":
                    raise problem_of(answer)
                config = {**answer["run"], "data": {}}
                try:
                    _native.check_message("run", json.dumps(config))
                except InvalidError as problem:
                    raise CorruptError(f"the coordinator sent what is no run: {problem}") from None
                return config
    raise TimedOut(
        f"nobody answers at {key['control']}: the run has ended or listens there no more, or "
        "something between here and there lets nobody through"
    )
