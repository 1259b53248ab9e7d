"""The panel alone, over a run that pretends, in a real JupyterLab."""

from __future__ import annotations

import re
from pathlib import Path

from conftest import Lab
from notebook import STATE, Notebook, Panel, eventually, write_notebook
from playwright.sync_api import Page, expect

FAKES = Path(__file__).resolve().parents[1] / "notebooks"

SHOW = f"""
import sys
sys.path.insert(0, {str(FAKES)!r})
from fake_run import FakeRun
from pantheraml.memory import Plan
from pantheraml_widgets.run_panel import RunPanel

run = FakeRun("fake-lesson", max_steps=20_000, seconds=0.05, workers=2, done=120)
panel = RunPanel(
    run, record=lambda: "<p>static record</p>", decode=run.decode,
    plan=lambda event: str(Plan.of(event, run.config)),
)
panel
"""

# Two more panels of that run at once, and enough beside them that a save takes a while.
TWO_MORE = """
from IPython.display import display

more = [RunPanel(run, record=lambda: "<p>static record</p>", decode=run.decode) for _ in range(2)]
display(more[0], "x" * 400_000)
display(more[1])
"""

# A run that has its plan, and makes no step before the gate is opened.
BEHIND_A_GATE = f"""
import sys, threading
sys.path.insert(0, {str(FAKES)!r})
from fake_run import FakeRun
from pantheraml.memory import Plan
from pantheraml_widgets.run_panel import RunPanel

gate = threading.Event()

class Gated(FakeRun):
    def _train(self):
        gate.wait()
        super()._train()

run = Gated("gated", max_steps=20_000)
panel = RunPanel(run, plan=lambda event: str(Plan.of(event, run.config)))
panel
"""

# A cell that keeps the main thread busy, as an impatient person's would.
BUSY = "import time; print('asleep', flush=True); time.sleep(600); print('awake')"


def open_fake(page: Page, lab: Lab, name: str, *cells: str) -> tuple[Notebook, Panel]:
    write_notebook(lab.folder / name, [SHOW, *cells])
    notebook = Notebook(page, lab, name)
    notebook.run_cell(0)
    panel = Panel(page)
    expect(panel.state).to_have_text("running")
    panel.wait_for_step(120)
    return notebook, panel


def test_the_panel_lives(page: Page, lab: Lab) -> None:
    notebook, panel = open_fake(page, lab, "lives.ipynb", "run.sample('def <b>f</b>(): é')")
    first = panel.step()
    assert first >= 120
    eventually(page, lambda: panel.pixels() > 100, "the curve")
    panel.wait_for_step(first + 20)

    panel.button("Pause").click()
    expect(panel.state).to_have_text("paused")
    expect(panel.outcome).to_have_text(re.compile(r"pause: applied at step \d+ on 2/2 workers"))
    stands = panel.step()
    page.wait_for_timeout(600)
    assert panel.step() == stands

    field = panel.root.get_by_label("Learning rate", exact=True)
    field.fill("nonsense")
    field.press("Enter")
    expect(panel.root.locator(".pml-problem")).to_have_text("Not a number: try 1e-4.")
    field.fill("0.9")
    panel.button("Apply").click()
    expect(panel.outcome).to_have_text(
        "learning rate 0.9: refused. learning_rate must be at most 0.5"
    )
    panel.button("Resume").click()
    expect(panel.state).to_have_text("running")
    field.fill("5e-5")
    field.press("Enter")
    expect(panel.outcome).to_have_text(
        re.compile(r"learning rate 5e-5: applied at step \d+ on 2/2 workers")
    )
    expect(panel.root.locator(".pml-station.pml-reached")).to_have_text(
        ["sent", "accepted", "applied"]
    )
    panel.button("Checkpoint").click()
    expect(panel.root.get_by_text(re.compile(r"checkpoints/step-\d+ on disk"))).to_be_visible()

    # What a model writes is text, also where it looks like markup.
    notebook.run_cell(1)
    expect(panel.root.locator(".pml-sample-text")).to_have_text("def <b>f</b>(): é")
    assert panel.root.locator(".pml-sample-text b").count() == 0

    # Stop asks once more.
    panel.stop(lambda question: question.press("Escape", timeout=3000))
    expect(panel.button("Stop")).to_be_visible()
    panel.stop(lambda question: question.click(timeout=3000))
    expect(panel.state).to_have_text("stopped")
    expect(panel.button("Pause")).to_be_disabled()


def test_the_plan_is_read_before_the_first_step(page: Page, lab: Lab) -> None:
    write_notebook(lab.folder / "plan.ipynb", [BEHIND_A_GATE, "gate.set()", "panel"])
    notebook = Notebook(page, lab, "plan.ipynb")
    notebook.run_cell(0)
    panel = Panel(page)
    plan = panel.root.locator(".pml-plan")
    expect(plan.locator("pre")).to_be_visible()
    expect(plan).to_contain_text("plan of fake/model on cpu\nweights")
    expect(plan).to_contain_text("724,992 trained; AdamW's moments in 32 bits; nothing recomputed")
    assert panel.step() == 0
    notebook.run_cell(1)
    panel.wait_for_step(1)
    expect(plan.locator("pre")).to_be_visible()  # nothing moves under a person's eyes
    notebook.run_cell(2)
    late = Panel(notebook.output(2)).root.locator(".pml-plan")
    expect(late.locator("summary")).to_be_visible()
    expect(late.locator("pre")).to_be_hidden()
    late.locator("summary").click()
    expect(late.locator("pre")).to_contain_text("plan of fake/model on cpu")


def test_a_reload_and_a_second_view_show_the_same_curve(page: Page, lab: Lab) -> None:
    notebook, panel = open_fake(page, lab, "reload.ipynb", "panel")
    panel.button("Pause").click()
    expect(panel.state).to_have_text("paused")
    before = [panel.values_at(step) for step in (1, 7, 40)]
    figures = [panel.figure(label) for label in ("Loss", "Gradient norm", "Learning rate")]
    last = panel.step()

    # It was saved by itself after display; nobody pressed Ctrl-S.
    def record() -> str:
        saved = notebook.saved()["cells"][0]["outputs"]
        return "".join(saved[0]["data"]["text/html"]) if saved else ""

    eventually(page, lambda: "static record" in record(), "the notebook to be saved")

    notebook.reload()
    panel = Panel(page)
    expect(panel.state).to_have_text("paused")
    assert [panel.values_at(step) for step in (1, 7, 40)] == before
    assert [panel.figure(label) for label in ("Loss", "Gradient norm", "Learning rate")] == figures
    assert panel.step() == last

    notebook.run_cell(1)
    expect(page.locator(".pml-panel")).to_have_count(2)
    first, second = Panel(notebook.output(0)), Panel(notebook.output(1))
    second.button("Resume").click()
    for view in (first, second):
        expect(view.state).to_have_text("running")
    first.button("Pause").click()
    for view in (first, second):
        expect(view.state).to_have_text("paused")
        expect(view.outcome).to_have_text(re.compile("pause: applied"))


def test_what_the_keyboard_reads_stays_while_the_run_goes_on(page: Page, lab: Lab) -> None:
    _, panel = open_fake(page, lab, "reading.ipynb")
    panel.slider.focus()
    panel.slider.press("Home")
    for _ in range(40):
        panel.slider.press("ArrowRight")
    read = panel.slider.get_attribute("aria-valuetext")
    assert read is not None and read.startswith("step 41,")
    panel.wait_for_step(panel.step() + 60)
    assert panel.slider.get_attribute("aria-valuetext") == read
    panel.slider.press("ArrowRight")
    assert str(panel.slider.get_attribute("aria-valuetext")).startswith("step 42,")


def test_buttons_answer_while_a_cell_is_busy(page: Page, lab: Lab) -> None:
    notebook, panel = open_fake(page, lab, "busy.ipynb", BUSY)
    notebook.run_cell(1)
    expect(notebook.output(1)).to_contain_text("asleep")
    panel.button("Pause").click()
    expect(panel.state).to_have_text("paused")
    expect(notebook.output(1)).not_to_contain_text("awake", timeout=1)


def test_panels_shown_at_once_save_the_notebook_one_after_the_other(page: Page, lab: Lab) -> None:
    write_notebook(lab.folder / "panels.ipynb", [SHOW, TWO_MORE])
    notebook = Notebook(page, lab, "panels.ipynb")
    page.evaluate(
        """() => {
            window.saves = [];
            const { context } = window.jupyterapp.shell.currentWidget;
            context.saveState.connect((_, state) => window.saves.push(state));
        }"""
    )
    notebook.run_all()
    notebook.wait_until_saved(panels=3)
    # Two beside each other are what Lab takes for a change on disk, and asks whether to overwrite.
    saves = page.wait_for_function(
        "() => window.saves.at(-1) === 'completed' && window.saves"
    ).json_value()
    assert saves == ["started", "completed"] * (len(saves) // 2)
    assert page.locator(".jp-Dialog").count() == 0


def test_a_kernel_that_went_leaves_the_last_state_and_says_so(page: Page, lab: Lab) -> None:
    notebook, panel = open_fake(page, lab, "restart.ipynb")
    notebook.restart_kernel()
    expect(panel.root.locator(".pml-notice")).to_contain_text("Not connected")
    expect(panel.button("Pause")).to_be_disabled()
    # Opened again without that kernel it is the same: the state is in the file, once. The restart
    # came before the save that follows the display, which has to have the state all the same.
    notebook.wait_until_saved()
    notebook.reload()
    panel = Panel(page)
    expect(panel.root.locator(".pml-notice")).to_contain_text("Not connected")
    panel.wait_for_step(120)
    eventually(page, lambda: panel.pixels() > 100, "the curve")
    state = notebook.saved()["metadata"]["widgets"][STATE]["state"]
    kinds = [model["model_name"] for model in state.values()]
    assert sorted(kinds) == ["AnyModel", "LayoutModel"]
    # Whoever does not trust the file sees the record beside it.
    assert "static record" in "".join(
        notebook.saved()["cells"][0]["outputs"][0]["data"]["text/html"]
    )


def test_accessible_in_both_themes_and_when_narrow(page: Page, lab: Lab) -> None:
    notebook, panel = open_fake(page, lab, "axe.ipynb")
    panel.root.locator(".pml-plan summary").click()
    field = panel.root.get_by_label("Learning rate", exact=True)
    field.fill("x")
    field.press("Enter")
    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        notebook.theme(theme)
        assert panel.violations() == []
    page.set_viewport_size({"width": 700, "height": 1000})
    notebook.frames()
    assert panel.violations() == []
    width = panel.root.evaluate("node => [node.scrollWidth, node.clientWidth]")
    assert width[0] <= width[1]
    notebook.theme("JupyterLab Light")


def test_nothing_moves(page: Page, lab: Lab) -> None:
    """Updates, answers and a hover change texts, never the places of things."""
    notebook, panel = open_fake(page, lab, "still.ipynb")

    def boxes() -> list[object]:
        found: list[object] = panel.root.evaluate(
            """node => [...node.querySelectorAll("section, button, h3, canvas, [class^=pml-]")]
                .filter(n => !n.closest(".pml-scroll, .pml-bar, .pml-stack, .pml-gauge, .uplot"))
                .filter(n => !n.matches(".pml-hidden, .pml-event"))
                .map(n => n.getBoundingClientRect())
                .map(b => [b.x, b.y, b.width, b.height].map(Math.round))"""
        )
        return found

    notebook.frames()
    before = boxes()
    panel.wait_for_step(panel.step() + 10)
    panel.root.locator(".u-over").first.hover(position={"x": 60, "y": 60})
    field = panel.root.get_by_label("Learning rate", exact=True)
    field.fill("3e-5")
    field.press("Enter")
    expect(panel.outcome).to_contain_text("applied")
    panel.button("Pause").click()
    expect(panel.state).to_have_text("paused")
    assert boxes() == before
