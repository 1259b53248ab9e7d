"""No allocation inside a step: the real worker with its training thread's memory calls counted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pantheraml as pm
import pytest
from conftest import FOREVER, PATIENCE, at_step, until
from pantheraml import programs

BUILD = Path(__file__).parents[2] / "build" / "release"
WORKER = BUILD / "tests" / "fault" / "counted_worker"
FIRST, LAST = 3, 20

Start = Callable[..., pm.Run]


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs whose worker counts; the file it writes."""
    programs_folder = tmp_path / "bin"
    programs_folder.mkdir()
    shutil.copy(programs.coordinator(), programs_folder)  # it looks for the worker beside itself
    (programs_folder / "pml-worker").symlink_to(WORKER)
    monkeypatch.setenv("PML_BIN", str(programs_folder))
    monkeypatch.setenv("PML_COUNT", str(tmp_path / "count"))
    monkeypatch.setenv("PML_COUNT_FROM", str(FIRST))
    monkeypatch.setenv("PML_COUNT_TO", str(LAST))
    return tmp_path / "count"


#: OpenBLAS maps a buffer when more threads multiply at one moment than ever before, which chance
#: decides: at most one for each thread, and not ours to place.
BLAS_BUFFERS = 2


def nothing(count: Path) -> None:
    """The counts are zero; what OpenBLAS mapped for itself is taken off them."""
    text = count.read_text()
    first, _, traces = text.partition("\n")
    words = first.split()
    of_blas = sum("libopenblas" in trace for trace in traces.split("\n\n"))
    assert words[:-1] == "allocations 0 frees 0 maps".split() and of_blas <= BLAS_BUFFERS, text
    assert int(words[-1]) == of_blas, text


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "full", "packing": True, "threads": 2},
        {"lora": pm.LoRA(r=4, lora_dropout=0.1), "gradient_accumulation_steps": 3},
    ],
    ids=["full, packed", "lora, accumulated"],
)
def test_steps_allocate_nothing(start: Start, counted: Path, settings: dict[str, Any]) -> None:
    start(max_steps=LAST + 2, **settings).wait(PATIENCE)
    nothing(counted)


def test_nor_do_commands_events_and_snapshots_between_them(
    start: Start, counted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied = tmp_path / "applied"
    monkeypatch.setenv("PML_COUNT_WAIT", str(applied))
    run = start(max_steps=FOREVER)
    at_step(run, FIRST)
    for rate in range(1, 9):
        run.set(learning_rate=rate * 1e-4, weight_decay=0.1, wait=False)
    command = run.set(
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-5}, wait=True
    )
    assert (command.step or 0) > FIRST
    applied.touch()  # and it counts until snapshots have been taken, one a second
    until(counted.exists, "the counts")
    run.stop(wait=True)  # at a step's end, so they are written
    nothing(counted)
