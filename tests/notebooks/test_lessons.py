"""The lessons run from top to bottom, with fewer steps than a student takes."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
VIEW = "application/vnd.jupyter.widget-view+json"


def execute(path: Path, folder: Path) -> Any:
    """Run a copy of a notebook in a folder of its own; a cell that fails fails the test."""
    copy = shutil.copy(path, folder)
    notebook = nbformat.read(copy, as_version=4)  # type: ignore[no-untyped-call]
    client = NotebookClient(notebook, timeout=800, resources={"metadata": {"path": str(folder)}})
    return client.execute(env={**os.environ, "PANTHERAML_RUNS": str(folder / "runs")})


def cell(notebook: Any, name: str) -> tuple[str, list[dict[str, Any]]]:
    """What a cell printed, and what it displayed."""
    outputs = next(c.outputs for c in notebook.cells if c.id == name)
    printed = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    return printed, [o.data for o in outputs if "data" in o]


def test_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PANTHERAML_LESSON_STEPS", "10")
    notebook = execute(NOTEBOOKS / "01-first-run.ipynb", tmp_path)
    printed, _ = cell(notebook, "wait")
    losses = re.search(r"held-out loss ([\d.]+) → ([\d.]+)", printed)
    assert losses, printed
    assert float(losses[2]) < float(losses[1]) - 0.5
    for name in ("scratch", "attach", "answers"):
        _, shown = cell(notebook, name)
        assert len(shown) == 1, name
        # The live view for whoever has a kernel, the record for whoever has not.
        assert VIEW in shown[0]
        assert "<svg" in shown[0]["text/html"]
    printed, _ = cell(notebook, "ask")
    assert printed.startswith("before: ")
    assert "image/png" in cell(notebook, "keep")[1][0]
    assert (tmp_path / "answers-adapter" / "adapter_model.safetensors").is_file()


def test_data(tmp_path: Path) -> None:
    """Twice in one folder, as Run All is pressed again: the second finds everything there."""
    path = NOTEBOOKS / "02-data.ipynb"
    for number in (1, 2):
        notebook = execute(path, tmp_path)
        _, shown = cell(notebook, "preview")
        assert "pml-learned" in shown[0]["text/html"] and "⟦0<|im_end|>" in shown[0]["text/plain"]
        assert "pml-cut" in cell(notebook, "long")[1][0]["text/html"]
        printed, _ = cell(notebook, "refuse")
        assert "data[0]" in printed and "think" in printed
        shown = cell(notebook, "marked")[1][0]["text/plain"]
        assert "⟦4<|im_end|>⟧" in shown and "⟦<think>4 + 1</think>5<|im_end|>⟧" in shown
        assert "broken.jsonl, line 2" in cell(notebook, "wrong")[0]
        printed, _ = cell(notebook, "run")
        packed = re.search(r"packed into .* ([\d.]+)% full", printed)
        assert (packed and float(packed[1]) > 75) or (number == 2 and "nothing was tok" in printed)
        printed, shown = cell(notebook, "again")
        assert "nothing was tokenised" in printed and shown[0]["text/plain"] == "True"


def test_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PANTHERAML_LESSON_STEPS", "16")
    notebook = execute(NOTEBOOKS / "03-compare.ipynb", tmp_path)
    _, shown = cell(notebook, "watch")
    assert len(shown) == 1 and shown[0]["text/html"].count("finished") == 3
    assert shown[0]["text/html"].count("<svg") == 2
    printed, shown = cell(notebook, "best")
    assert printed.startswith("learning_rate=") and "image/png" in shown[0]
    assert "best" in cell(notebook, "ask")[0]


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_committed_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    for each in notebook.cells:
        assert not each.get("outputs") and each.get("execution_count") is None
