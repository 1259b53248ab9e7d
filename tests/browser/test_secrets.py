"""A notebook that was saved after a real run holds no key of it, and nothing else does."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import pantheraml as pm
from conftest import ROOT, Lab
from notebook import Notebook, Panel, write_notebook
from pantheraml import _native
from pantheraml.tiny import TinyLlama
from playwright.sync_api import Page, expect
from reap import processes_with

sys.path.append(str(ROOT / "tests" / "py"))
from leaks import Leaks, below, of_processes, open_to_others

START = """
import pantheraml as pm
rows = [{"prompt": f"{n} and {n}", "completion": f" is {2 * n}."} for n in range(36)]
run = pm.finetune("model", rows, name="shared", max_steps=10**6, max_length=64, threads=1,
                  gradient_accumulation_steps=16, generate_length=16, devices=["cpu", "cpu"])
run
"""
# It stands wherever no step is waited for: one that goes on takes the processors from the browser.
SHARE = """
run.pause(wait=True)
given = run.share("tcp://127.0.0.1:*", name="class")
saved = given.save("class.json")
display(given, saved, run.sharing, run.config, vars(pm), run.events(), run.workers)
print(given, repr(run), vars(given).keys())
"""
# What is shown where something went wrong, with a key in the hand.
WRONG = """
for wrong in (given.text()[:-4], "x" + given.text(), {"key": 1}):
    try:
        pm.attach(wrong)
    except pm.Error as error:
        print(type(error).__name__, error)
pm.attach(given.text()[:-4])
"""
SEEN = """
seen = pm.attach(given.text())
run.set(weight_decay=0.5, wait=True)
run.resume(wait=True)
seen
"""


def in_notebook(document: object) -> list[str]:
    """All texts of a notebook, and what those are that hold JSON or base64 themselves."""
    if isinstance(document, dict):
        return [text for pair in document.items() for part in pair for text in in_notebook(part)]
    if isinstance(document, list):
        texts = [text for part in document for text in in_notebook(part)]
        return [*texts, "".join(part for part in document if isinstance(part, str))]
    if not isinstance(document, str):
        return []
    try:
        return [document, base64.b64decode(document, validate=True).decode("latin-1")]
    except ValueError:
        return [document]


def test_a_saved_notebook_holds_no_key(page: Page, lab: Lab) -> None:
    TinyLlama(hidden=16, layers=1, heads=2, kv_heads=1, intermediate=16).write(lab.folder / "model")
    write_notebook(lab.folder / "shared.ipynb", [START, SHARE, WRONG, SEEN])
    notebook = Notebook(page, lab, "shared.ipynb")
    notebook.run_cell(0)
    panel = Panel(notebook.output(0))
    expect(panel.state).to_have_text("running")
    panel.wait_for_step(5)
    notebook.run_cell(1)
    expect(notebook.output(1)).to_contain_text("Share of shared")
    notebook.run_cell_to_its_end(2)
    expect(notebook.output(2)).to_contain_text("Traceback")
    notebook.run_cell(3)
    viewer = Panel(notebook.output(3))
    expect(viewer.state).to_have_text("running")
    viewer.wait_for_step(panel.step() + 3)
    panel.button("Pause").click()
    expect(panel.state).to_have_text("paused")
    panel.button("Checkpoint").click()
    expect(panel.root.get_by_text("on disk").first).to_be_visible()
    # It was saved by itself after display, and once more Jupyter makes its own copy.
    notebook.wait_until_saved(panels=2)
    page.wait_for_function("() => !window.jupyterapp.shell.currentWidget.context.model.dirty")
    notebook.command("docmanager:save")
    copy = lab.folder / ".ipynb_checkpoints" / "shared-checkpoint.ipynb"
    notebook.wait_until_saved(panels=2, path=copy)

    folder, key = lab.folder / "runs" / "shared", lab.folder / "class.json"
    file = Path(_native.connection_file(folder))
    own, others = json.loads(file.read_text()), json.loads(key.read_text())
    publics = [each[half] for each in (own, others) for half in ("server_key", "public_key")]
    leaks = Leaks([own["secret_key"], others["secret_key"]], publics)
    assert leaks.are_in(file.read_bytes()) and leaks.are_in(key.read_bytes())

    everywhere = below(lab.folder.parent)  # the lab's own files are there, too
    assert everywhere.pop(str(key)) and key.stat().st_mode & 0o777 == 0o600
    notebooks = [name for name in everywhere if Path(name).match("shared*.ipynb")]
    assert sorted(notebooks) == sorted([str(notebook.path), str(copy)])
    for name in notebooks:
        document = notebook.saved(Path(name))
        everywhere[f"texts of {name}"] = "\n".join(in_notebook(document)).encode()
    processes = of_processes(processes_with(f"PANTHERAML_RUNS={lab.folder / 'runs'}"))
    assert sum(name.startswith("cmdline") for name in processes) >= 5  # lab, kernel, the run's
    assert len(everywhere) > 15
    for where, text in (everywhere | processes).items():
        assert not leaks.are_in(text), where
    assert open_to_others(folder) == [] and open_to_others(file.parent) == []

    with_key = pm.attach(folder, restart=False)
    with_key.stop(wait=True)
    with_key.close()
