"""The whole product as a person meets it: the first notebook, in JupyterLab, in Chromium.

Run it, see the curve move, press Pause, change the learning rate, see where it was applied, reload
the page, see the same curve, restart the kernel, attach, stop.

``PANTHERAML_SCREENSHOTS=FOLDER`` keeps pictures of the panel in both themes there; for those of the
documentation the run has the lesson's own length, ``PANTHERAML_LESSON_STEPS=220``.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from conftest import ROOT, Lab
from notebook import Notebook, Panel, eventually
from playwright.sync_api import Page, expect

NAME = "01-first-run.ipynb"
#: The notebook's code cells by their place among all cells.
PREPARE, SCRATCH, ATTACH = 1, 3, 5
APPLIED = re.compile(r"learning rate 5e-4: applied at step (\d+) on 1/1 workers")
STEPS = (1, 3, 5)


def screenshots(page: Page, notebook: Notebook, panel: Panel) -> None:
    folder = os.environ.get("PANTHERAML_SCREENSHOTS")
    if not folder:
        return
    for theme in ("Dark", "Light"):
        notebook.theme(f"JupyterLab {theme}")
        page.mouse.move(5, 5)
        eventually(page, panel.pixels, "the curve in the colours of the theme")
        panel.root.screenshot(path=Path(folder) / f"panel-{theme.lower()}.png")


def test_first_run(page: Page, lab: Lab) -> None:
    shutil.copy(ROOT / "notebooks" / NAME, lab.folder)
    notebook = Notebook(page, lab, NAME)
    notebook.run_cell(PREPARE)
    expect(notebook.output(PREPARE)).to_contain_text("million weights")
    notebook.run_cell(SCRATCH)
    panel = Panel(page)
    expect(panel.state).to_have_text("running")

    # The curve moves.
    panel.wait_for_step(8)
    drawn = panel.pixels()
    assert drawn > 0
    eventually(page, lambda: panel.pixels() != drawn, "another curve")
    assert float(panel.figure("Loss")) > 0
    assert panel.figure("Tokens/s") != "–"
    expect(panel.root.locator(".pml-device-value")).to_contain_text("MiB of")

    # Pause: it stands, and says at which step.
    panel.button("Pause").click()
    expect(panel.state).to_have_text("paused")
    expect(panel.outcome).to_have_text(re.compile(r"pause: applied at step \d+ on 1/1 workers"))
    stands = panel.step()

    # A learning rate set while it stands is in force for the step that comes next.
    field = panel.root.get_by_label("Learning rate", exact=True)
    field.fill("5e-4")
    field.press("Enter")
    expect(panel.outcome).to_have_text(APPLIED)
    applied = APPLIED.search(panel.outcome.inner_text())
    assert applied is not None and int(applied[1]) == stands + 1
    before = [panel.values_at(step) for step in STEPS]
    assert panel.step() == stands
    assert panel.violations() == []

    # Reload the page: the same curve, still paused.
    notebook.reload()
    panel = Panel(page)
    expect(panel.state).to_have_text("paused")
    assert [panel.values_at(step) for step in STEPS] == before
    assert panel.step() == stands

    panel.button("Resume").click()
    expect(panel.state).to_have_text("running")
    panel.wait_for_step(stands + 3)
    panel.button("Checkpoint").click()
    expect(panel.root.get_by_text(re.compile(r"checkpoints/step-\d+ on disk"))).to_be_visible()
    after = panel.values_at(stands + 1)
    assert "learning rate 5.00e-4" in after
    screenshots(page, notebook, panel)

    # Restart the kernel: the old panel knows that it is cut off, the run knows nothing of it.
    notebook.restart_kernel()
    expect(panel.root.locator(".pml-notice")).to_contain_text("Not connected")
    seen = panel.step()
    notebook.run_cell(PREPARE)
    notebook.run_cell(ATTACH)
    again = Panel(notebook.output(ATTACH))
    expect(again.state).to_have_text("running")
    again.wait_for_step(seen + 1)
    assert [again.values_at(step) for step in (*STEPS, stands + 1)] == [*before, after]

    again.stop(lambda question: question.click(timeout=3000))
    expect(again.state).to_have_text("stopped")
    expect(again.button("Pause")).to_be_disabled()
