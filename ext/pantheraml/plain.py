"""Text of others on a terminal: models, data, folders and coordinators elsewhere write it.

A terminal obeys what it is sent: an escape sequence in a run's name, or in what a model wrote,
could clear the screen, change the window's title, or hide the words before it. So everything that
is printed goes through :func:`say`, a :class:`pantheraml.terminal.Terminal`, or an
:class:`pantheraml.Error`, which has plain words only.
"""

from __future__ import annotations

import sys
from typing import TextIO

# What a terminal obeys, or shows in another place than it stands: control characters (C0 but tab
# and line feed, DEL, C1), line and paragraph separators, what embeds, isolates or overrides a
# writing direction; and half surrogates, which cannot be printed at all. The marks U+061C, U+200E
# and U+200F stay: people who write from right to left use them, and they do no more than a letter.
_OBEYED = [
    *range(0x00, 0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0), *range(0x2028, 0x202F),
    *range(0x2066, 0x206A), *range(0xD800, 0xE000),
]  # fmt: skip
# JSON has no \x, and of these only DEL stands in it as it is.
_SHOWN = {c: f"\\x{c:02x}" if c < 0x100 and c != 0x7F else f"\\u{c:04x}" for c in _OBEYED}


def plain(text: str) -> str:
    """Give a text that a terminal shows and does not obey: what it would is written as escaped."""
    return text.translate(_SHOWN)


def say(
    text: object = "", *, end: str = "\n", file: TextIO | None = None, flush: bool = False
) -> None:
    """Print, to standard output where no `file` is given, what a terminal only shows."""
    print(plain(str(text)), end=end, file=file, flush=flush)


def complain(text: object) -> None:
    """Say something on standard error."""
    say(text, file=sys.stderr)
