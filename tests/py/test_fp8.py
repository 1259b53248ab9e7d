"""Weights in 8 bits, from the call to the export. The CPU runs the reference of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pantheraml as pm
import pytest
from conftest import PATIENCE

ODD = Path(__file__).parent.parent / "parity" / "fixtures" / "llama-bf16-lora" / "model"
ROWS = [{"input_ids": [3 + (7 * i + j * j) % 50 for j in range(24)]} for i in range(8)]


def train(model: Path, quant: str | None, **more: Any) -> pm.Run:
    """Twelve steps on few rows: there is something to learn by heart."""
    return pm.finetune(
        model, data=ROWS, quant=quant, max_steps=12, learning_rate=2e-2, packing=False,
        max_length=32, seed=7, **more,
    )  # fmt: skip


def test_it_learns_nearly_what_whole_weights_learn(model: Path, runs: Path, tmp_path: Path) -> None:
    """Another curve, as the weights are others, but near; exported from the weights as stored."""
    whole = train(model, None).wait(PATIENCE)
    run = train(model, "fp8").wait(PATIENCE)
    line, curve = (np.array([step["loss"] for step in r.history]) for r in (whole, run))
    assert not np.array_equal(line, curve)
    assert np.abs(curve / line - 1).max() < 0.05
    assert curve[-1] < 0.9 * curve[0]
    merged = run.export(tmp_path / "merged", "merged")
    assert any("FP8" in note for note in merged.notes)
    assert merged.difference is not None and merged.difference > 1e-4
    assert run.export(tmp_path / "peft").difference == 0


def test_the_same_call_gives_the_same_bits(model: Path, runs: Path) -> None:
    first, second = (train(model, "fp8").wait(PATIENCE) for _ in range(2))
    assert [s["loss"] for s in first.history] == [s["loss"] for s in second.history]


def test_what_cannot_be_is_refused(model: Path, runs: Path) -> None:
    with pytest.raises(pm.InvalidError, match='quant="fp8" needs method="lora"'):
        train(model, "fp8", method="full")
    with pytest.raises(pm.InvalidError, match="hidden_size is 40"):
        train(ODD, "fp8")
