"""pause(wait=True) and resume(wait=True) where somebody else asks for the opposite at once."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from pantheraml.asking import Asking


@pytest.mark.parametrize(
    ("verb", "state", "later", "over"),
    [
        ("resume", "running", "pause", True),
        ("resume", "running", "resume", False),
        ("resume", "running", "set", False),
        ("pause", "paused", "resume", True),
        ("pause", "paused", "pause", False),
    ],
)
def test_what_was_taken_back_is_not_waited_for(
    verb: str, state: str, later: str, over: bool
) -> None:
    # Both in force between the same two steps: the run was never in the state that was asked for.
    notes = [
        {"type": "command", "command": 2, "verb": verb},
        {"type": "command", "command": 3, "verb": later},
        {"type": "applied", "command": 2, "verb": verb, "step": 2},
    ]
    heard: list[bool] = []
    run: Any = SimpleNamespace(
        _record=SimpleNamespace(notes=notes), state="neither", step=2, _nothing_comes=lambda: False,
        _leave_alone=nullcontext, _connected=lambda: None,
        _wait_for=lambda shows, timeout, what: heard.append(shows()),
    )  # fmt: skip
    command: Any = SimpleNamespace(number=2, verb=verb)
    Asking._stand(run, command, state, wait=True)
    notes.append({"type": "applied", "command": 3, "verb": later, "step": 2})
    Asking._stand(run, command, state, wait=True)
    notes.append({"type": "state", "state": state})
    Asking._stand(run, command, state, wait=True)
    assert heard == [False, over, True]
