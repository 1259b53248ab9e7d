"""resume(wait=True) where a run goes on and stands again before all workers have said so."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from pantheraml.asking import Asking


@pytest.mark.parametrize(("step", "over"), [(1, False), (2, True)])
def test_a_step_made_since_is_enough(step: int, over: bool) -> None:
    # As logged: the step, not finite, was heard of before the second worker's "applied".
    notes = [{"type": "command", "command": 2}, {"type": "applied", "command": 2, "step": 2}]
    heard: list[bool] = []
    run: Any = SimpleNamespace(
        _record=SimpleNamespace(notes=notes), state="paused", step=step,
        _is_over=lambda: False, _leave_alone=nullcontext,
        _wait_for=lambda shows, timeout, what: heard.append(shows()),
    )  # fmt: skip
    command: Any = SimpleNamespace(number=2, verb="resume")
    Asking._stand(run, command, "running", wait=True)
    Asking._stand(run, command, "paused", wait=True)
    assert heard == [over, True]
