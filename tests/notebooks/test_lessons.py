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


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_committed_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    for each in notebook.cells:
        assert not each.get("outputs") and each.get("execution_count") is None
