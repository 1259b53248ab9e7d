"""The log as a client reads it: torn, damaged, whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from pantheraml.errors import CorruptError
from pantheraml.record import LogReader


def test_damaged_lines(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    log.write_bytes(b'{"seq":1}\n{"seq":2}\n\0\0\0\n')
    assert [e["seq"] for e in LogReader(tmp_path).read()] == [1, 2]
    log.write_bytes(b'{"seq":1}\n{"se\n{"seq":3}\n')
    with pytest.raises(CorruptError, match="line 2"):
        LogReader(tmp_path).read()
