"""What the browser tests do with JupyterLab and with the panel, by the names a person sees."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from conftest import AXE, PATIENCE, Lab
from playwright.sync_api import Locator, Page, expect
from playwright.sync_api import TimeoutError as PatienceError

__all__ = ["STATE", "Notebook", "Panel", "eventually", "write_notebook"]

#: What a notebook's metadata call the state of its widgets.
STATE = "application/vnd.jupyter.widget-state+json"


def eventually(page: Page, over: Callable[[], object], what: str) -> None:
    """Wait for something that no locator tells of."""
    end = time.monotonic() + PATIENCE
    while not over():
        assert time.monotonic() < end, f"waited {PATIENCE} s for {what}"
        page.wait_for_timeout(50)


def write_notebook(path: Path, cells: Sequence[str]) -> None:
    """Write a notebook of code cells."""
    written = [
        {
            "cell_type": "code",
            "execution_count": None,
            "id": f"cell-{i}",
            "metadata": {},
            "outputs": [],
            "source": source,
        }
        for i, source in enumerate(cells)
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    document = {
        "cells": written,
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    path.write_text(json.dumps(document), "utf-8")


class Notebook:
    """A notebook open in JupyterLab.

    Each has a workspace of its own: a shared one would open the others again.
    """

    def __init__(self, page: Page, lab: Lab, path: str) -> None:
        self.page = page
        self.path = lab.folder / path
        workspace = re.sub(r"\W", "-", path)
        page.goto(f"{lab.url}lab/workspaces/{workspace}/tree/{path}?token={lab.token}")
        self._ready()

    def _ready(self) -> None:
        expect(self.page.locator(".jp-Notebook .jp-CodeCell").first).to_be_visible()
        self.page.wait_for_function(
            "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
            "?.connectionStatus === 'connected'"
        )

    def command(self, name: str, **args: Any) -> None:
        """Run one of Lab's commands."""
        self.page.evaluate(
            "([n, a]) => void window.jupyterapp.commands.execute(n, a)", [name, args]
        )

    def run_all(self) -> None:
        self.command("notebook:run-all-cells")

    def run_cell(self, index: int) -> None:
        """Select a cell and run it alone."""
        self._select(index)
        self.command("notebook:run-cell")

    def run_cell_to_its_end(self, index: int) -> None:
        """Run a cell and wait until the kernel is done with it.

        One that ends with an error shows it first, and what the kernel is asked to run between
        the two is thrown away.
        """
        self._select(index)
        self.page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-cell')")

    def _select(self, index: int) -> None:
        self.page.evaluate(
            "i => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = i }", index
        )

    def restart_kernel(self) -> None:
        """Restart the kernel by the menu's command, and agree to it.

        It is idle before it restarts, too: what is waited for is that it was restarting and is
        idle again.
        """
        self.page.evaluate(
            """() => {
                const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
                window.restarted = false;
                let begun = false;
                kernel.statusChanged.connect((_, status) => {
                    begun ||= status === "restarting";
                    window.restarted ||= begun && status === "idle";
                });
            }"""
        )
        self.command("kernelmenu:restart")
        self.page.locator(".jp-Dialog button.jp-mod-accept").click()
        self.page.wait_for_function("() => window.restarted")

    def reload(self) -> None:
        """Load the page anew, until it shows a panel.

        Lab looks for a widget for two seconds. Where it has restored it in the last tenth of these,
        it says that there is none, and stays with that (docs/decisions/0009).
        """
        panel = self.page.locator(".pml-panel")
        missing = self.page.get_by_text("Error displaying widget: model not found")
        for _ in range(5):
            self.page.reload()
            self._ready()
            expect(panel.or_(missing).first).to_be_visible()
            if missing.count() == 0:
                return
        raise AssertionError("five times the page had no model for the panel")

    def theme(self, name: str) -> None:
        """Change Lab's theme and wait for it to be there, and in the panels."""
        self.command("apputils:change-theme", theme=name)
        self.page.wait_for_function("n => document.body.dataset.jpThemeName === n", arg=name)
        shade = "dark" if name.endswith("Dark") else "light"
        for panel in self.page.locator(".pml").all():
            expect(panel).to_have_attribute("data-theme", shade)
            expect(panel).to_be_visible()  # Lab hides everything for a moment
        self.frames()

    def frames(self) -> None:
        """Wait until the page was laid out and drawn, with what is done at a change of size."""
        self.page.evaluate(
            "() => new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))"
        )

    def output(self, index: int) -> Locator:
        return self.page.locator(".jp-Notebook .jp-Cell").nth(index).locator(".jp-Cell-outputArea")

    def saved(self, path: Path | None = None) -> dict[str, Any]:
        """The notebook, or Jupyter's own copy of it, as it is on disk.

        Jupyter writes in place, so what is read may not be whole, or not be there, at first.
        """
        documents: list[dict[str, Any]] = []

        def read() -> bool:
            with contextlib.suppress(FileNotFoundError, ValueError):
                documents.append(json.loads((path or self.path).read_text("utf-8")))
            return bool(documents)

        eventually(self.page, read, f"{path or self.path} to be whole")
        return documents[0]

    def wait_until_saved(self, panels: int = 1, path: Path | None = None) -> None:
        """Wait until the file has the state of so many panels."""

        def has_panels() -> bool:
            widgets = self.saved(path)["metadata"].get("widgets", {}).get(STATE, {"state": {}})
            names = [model["model_name"] for model in widgets["state"].values()]
            return names.count("AnyModel") >= panels

        eventually(self.page, has_panels, f"{path or self.path} to have {panels} panels")


class Panel:
    """A run panel on the page."""

    def __init__(self, scope: Page | Locator) -> None:
        self.root = scope.locator(".pml-panel").last

    @property
    def state(self) -> Locator:
        return self.root.locator(".pml-state")

    @property
    def outcome(self) -> Locator:
        return self.root.locator(".pml-outcome")

    @property
    def slider(self) -> Locator:
        return self.root.get_by_role("slider", name="Curves")

    def button(self, name: str) -> Locator:
        return self.root.get_by_role("button", name=name, exact=True)

    def figure(self, label: str) -> str:
        row = self.root.locator(".pml-figure", has=self.root.page.get_by_text(label, exact=True))
        return row.locator(".pml-figure-value").inner_text()

    def step(self) -> int:
        """The newest step of the curve, as a screen reader hears it."""
        return int(self.slider.get_attribute("aria-valuemax") or 0)

    def wait_for_step(self, step: int) -> None:
        """Wait until the curve has come to a step."""
        self.root.page.wait_for_function(
            "([node, n]) => Number(node.getAttribute('aria-valuemax')) >= n",
            arg=[self.slider.element_handle(), step],
        )

    def values_at(self, step: int) -> str:
        """What the curve says at a step, read with the keyboard as a person would."""
        self.wait_for_step(step)
        slider = self.slider
        slider.focus()
        slider.press("Home")
        first = int(slider.get_attribute("aria-valuenow") or 0)
        for _ in range(step - first):
            slider.press("ArrowRight")
        text = slider.get_attribute("aria-valuetext") or ""
        slider.press("Escape")
        assert text.startswith(f"step {step},"), text
        return text

    def stop(self, answer: Callable[[Locator], None]) -> None:
        """Press Stop and answer the question, which goes away after some seconds."""
        question = self.root.get_by_role("button", name="Really stop?")

        def answered() -> bool:
            if self.state.inner_text() == "stopped":  # the click came, late
                return True
            self.button("Stop").click()
            try:
                answer(question)
            except PatienceError:
                return False
            return True

        eventually(self.root.page, answered, "Stop to be answered")

    def pixels(self) -> int:
        """How many pixels of the loss plot are in the colour of the smoothed curve."""
        found = self.root.locator(".pml-plot canvas").first.evaluate(
            """canvas => {
                const probe = document.createElement("canvas").getContext("2d");
                const style = getComputedStyle(canvas.closest(".pml"));
                probe.fillStyle = style.getPropertyValue("--pml-smooth").trim();
                probe.fillRect(0, 0, 1, 1);
                const [r, g, b] = probe.getImageData(0, 0, 1, 1).data;
                const { width, height } = canvas;
                const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
                let same = 0;
                for (let i = 0; i < data.length; i += 4) {
                    same += data[i] === r && data[i + 1] === g && data[i + 2] === b;
                }
                return same;
            }"""
        )
        return int(found)

    def violations(self) -> list[str]:
        """What axe finds wrong with the panel."""
        page = self.root.page
        if not page.evaluate("() => 'axe' in window"):
            page.evaluate(AXE.read_text("utf-8"))
        handle = self.root.element_handle()
        found = page.evaluate("async node => (await axe.run(node)).violations", handle)
        return [
            f"{v['id']}: {v['help']}: {[n['html'][:160] for n in v['nodes'][:3]]}" for v in found
        ]
