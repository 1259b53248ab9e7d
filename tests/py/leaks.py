"""Looking for secret keys, in whatever clothes they come.

A key is 32 bytes, and its text (Z85) is what files and messages have. Somebody who writes it down
may do so as text, as bytes, in hexadecimal, in base64 (alone, or within a larger text that is
encoded), or escaped for HTML, JSON or an address.
"""

from __future__ import annotations

import base64
import html
import json
import re
import stat
import urllib.parse
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import zmq
from zmq.utils import z85

# Exactly as long as a key: where it is a part of a longer word, it is found only if it is known.
_TOKEN = re.compile(rb"(?<![0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#])"
                    rb"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}"
                    rb"(?![0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#])")  # fmt: skip


def _within_base64(data: bytes) -> set[bytes]:
    """What base64 makes of these bytes wherever in a text they begin: without its first and last
    characters, which depend on what is beside it."""
    found = set()
    for before in range(3):
        padded = b"\0" * before + data
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            text = encode(padded[: len(padded) // 3 * 3])
            found.add(text[4:] if before else text)
    return found


def forms(secret: str) -> set[bytes]:
    """All that a key may look like."""
    text, raw = secret.encode(), z85.decode(secret.encode())
    escaped = {
        html.escape(secret), json.dumps(secret)[1:-1], urllib.parse.quote(secret),
        urllib.parse.quote(secret, safe=""),
        json.dumps(html.escape(secret))[1:-1],
        re.sub("[<>&/]", lambda m: f"\\u{ord(m[0]):04x}", secret), secret.replace("/", "\\/"),
    }  # fmt: skip
    found = {text, raw, raw.hex().encode(), raw.hex().upper().encode(), text.hex().encode()}
    found |= {form.encode() for form in escaped}
    return found | _within_base64(raw) | _within_base64(text)


class Leaks:
    """Secrets that must be nowhere.

    Parameters
    ----------
    secrets
        The secret halves that are known here, in Z85.
    publics
        Public halves, of which nobody here knows the secret ones (a server's, a worker's): a text
        of the length of a key is turned into its public half and looked up.
    """

    def __init__(self, secrets: Iterable[str], publics: Iterable[str]) -> None:
        self._forms = [form for secret in secrets for form in forms(secret)]
        self._publics = {public.encode() for public in publics}

    def are_in(self, data: bytes) -> bool:
        """Whether any of them is in these bytes."""
        return any(form in data for form in self._forms) or any(
            self._is_secret(token) for token in set(_TOKEN.findall(data))
        )

    def _is_secret(self, token: bytes) -> bool:
        with suppress(ValueError):
            return bool(zmq.curve_public(token) in self._publics)
        return False


def below(folder: Path) -> dict[str, bytes]:
    """All files below a folder, and their names."""
    found = {}
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # somebody's temporary file
            if path.is_file() and not path.is_symlink():
                found[str(path)] = str(path).encode() + b"\n" + path.read_bytes()
    return found


def of_processes(pids: Iterable[int]) -> dict[str, bytes]:
    """What everybody who sees a process, or is started by it, sees of it."""
    found = {}
    for pid in pids:
        with suppress(OSError):
            for name in ("cmdline", "environ", "comm"):
                found[f"{name} of {pid}"] = Path(f"/proc/{pid}/{name}").read_bytes()
    return found


def open_to_others(folder: Path) -> list[str]:
    """Files and folders that anybody but their owner can do anything with."""
    found = []
    for path in (folder, *folder.rglob("*")):
        with suppress(FileNotFoundError):  # somebody's temporary file
            mode = path.lstat().st_mode
            if not stat.S_ISLNK(mode) and mode & 0o077:
                found.append(f"{path}: {oct(mode & 0o777)}")
    return found
