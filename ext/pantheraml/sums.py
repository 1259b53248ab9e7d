"""The checksum that run.json and every line of the log carry as their last field.

``{"seq":7,…,"sum":"0f1e2d3c4b5a6978"}``: the first 16 hex digits of BLAKE2b-256 of all bytes before
the comma (``pml/json/sum.h``). It tells damage, not forgery.
"""

from __future__ import annotations

import re
from hashlib import blake2b

_SUM = re.compile(rb',"sum":"(.{16})"\}\s*\Z', re.DOTALL)


def add(text: bytes) -> bytes:
    """Give a JSON object with at least one field its sum."""
    body = text.rstrip()[:-1].rstrip()
    return body + b',"sum":"' + _of(body) + b'"}'


def carries(text: bytes) -> bool:
    """Whether there is a sum, right or wrong."""
    return _SUM.search(text, max(0, len(text) - 40)) is not None


def is_right(text: bytes) -> bool:
    """Whether it is what was written. False too where there is no sum."""
    found = _SUM.search(text, max(0, len(text) - 40))
    return found is not None and found[1] == _of(text[: found.start()])


def _of(body: bytes) -> bytes:
    return blake2b(body, digest_size=32).hexdigest()[:16].encode()
