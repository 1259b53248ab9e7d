"""Comparing: the curves of several runs in one picture, and what was different about them."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from pantheraml import whole
from pantheraml.errors import InvalidError
from pantheraml.notebook import kernel
from pantheraml.plain import complain, say
from pantheraml.report import Curve, chart_svg, held_out, smooth

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pantheraml.run import Run

#: Told apart on light and dark ground, and by those who see fewer colours (Okabe and Ito, 2008).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
#: Of run.json: what says which run it is, not how it was made.
_OWN = {"format", "name", "created", "version", "identity", "prepare", "train_data", "eval_data"}
_CELL = 'style="text-align:left;padding:2px 14px 2px 0;white-space:nowrap"'


class Comparison:
    """Several runs beside one another, as :func:`compare` gives them.

    Shows itself in a notebook, and as text.

    Attributes
    ----------
    runs
        As they were given.
    """

    def __init__(self, runs: tuple[Run, ...]) -> None:
        self.runs = runs

    @property
    def differences(self) -> dict[str, list[Any]]:
        """Settings that are not the same in all runs: one value a run, None for none."""
        names = dict.fromkeys(name for run in self.runs for name in run.config)
        found = {}
        for name in names:
            values = [run.config.get(name) for run in self.runs]
            if name not in _OWN and any(value != values[0] for value in values):
                found[name] = values
        return found

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict a run: ``run, state, step``, the settings that differ, and what came of them.

        ``loss`` is the smoothed one at the last step, ``eval_loss`` the last one on held-out data,
        ``lowest_eval_loss`` the best of them, ``tokens_per_second`` the median; None where there is
        none yet.
        """
        differences = self.differences
        found = []
        for i, run in enumerate(self.runs):
            history, evals = run.history, [e.loss for e in run.evaluations]
            row: dict[str, Any] = {"run": run.name, "state": run.state, "step": run.step}
            row |= {name: values[i] for name, values in differences.items()}
            row["loss"] = smooth([step["loss"] for step in history])[-1] if history else None
            row["eval_loss"] = evals[-1] if evals else None
            row["lowest_eval_loss"] = min(filter(math.isfinite, evals), default=None)
            rates = [step["tokens_per_second"] for step in history]
            row["tokens_per_second"] = statistics.median(rates) if rates else None
            found.append(row)
        return found

    def watch(self, seconds: float | None = None) -> None:
        """Show it, kept up to date, until all runs have ended or stand. Ctrl-C leaves them alone.

        Parameters
        ----------
        seconds
            Look on for so long at most; None: to the end.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        try:
            with _shown_in_place() as show:
                while True:
                    going = any(not run._will_not_end() for run in self.runs)
                    show(self)
                    if not going or (deadline is not None and time.monotonic() > deadline):
                        return
                    time.sleep(0.5)
        except KeyboardInterrupt:
            complain("The runs go on without you; run.stop() ends one.")
            raise

    def plot(self) -> Figure:
        """Draw loss and held-out loss of all runs with matplotlib."""
        whole.load("matplotlib.pyplot")  # NumPy with it
        import matplotlib.pyplot as plt

        made, axis = plt.subplots(figsize=(8, 4.5))
        for run, label, colour in zip(self.runs, self._labels(), self._colours(), strict=True):
            steps = [row["step"] for row in run.history]
            loss = [row["loss"] for row in run.history]
            axis.plot(steps, loss, color=colour, alpha=0.25, linewidth=1)
            axis.plot(steps, smooth(loss), color=colour, linewidth=1.8, label=label)
            axis.plot(*held_out(run), "o--", color=colour)
        axis.set_xlabel("step")
        axis.set_ylabel("loss (points: held-out)")
        axis.grid(alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
        made.tight_layout()
        plt.close(made)  # shown once, as the cell's value
        return made

    def __repr__(self) -> str:
        cells = [list(self.rows[0]), *([_text(v) for v in row.values()] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The curves as inline SVG, and a table; names and settings are set as text."""
        curves, measured = [], []
        for run, colour in zip(self.runs, self._colours(), strict=True):
            steps = [float(row["step"]) for row in run.history]
            loss = [float(row["loss"]) for row in run.history]
            curves += [Curve("", steps, loss, colour, 1, 0.25)]
            curves += [Curve("", steps, smooth(loss), colour, 2)]
            measured.append(Curve("", *held_out(run), colour, 1.5, dots=True))
        head = "".join(f'<th scope="col" {_CELL}>{escape(name)}</th>' for name in self.rows[0])
        body = ""
        for row, colour in zip(self.rows, self._colours(), strict=True):
            swatch = f'<span aria-hidden="true" style="color:{colour}">■</span> '
            cells = [f"<td {_CELL}>{escape(_text(value))}</td>" for value in row.values()]
            cells[0] = f'<th scope="row" {_CELL}>{swatch}{escape(row["run"])}</th>'
            body += f"<tr>{''.join(cells)}</tr>"
        return (
            '<div class="pml-compare" style="color:var(--jp-ui-font-color1,inherit);'
            f'font-family:sans-serif;font-size:13px">{chart_svg("Loss", curves)}'
            f'{chart_svg("Held-out loss", measured)}<div style="overflow-x:auto">'
            f'<table style="border-collapse:collapse"><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div></div>"
        )

    def _labels(self) -> list[str]:
        differences = self.differences
        return [
            ", ".join([run.name, *(f"{name}={_text(v[i])}" for name, v in differences.items())])
            for i, run in enumerate(self.runs)
        ]

    def _colours(self) -> list[str]:
        return [_COLOURS[i % len(_COLOURS)] for i in range(len(self.runs))]


def compare(*runs: Run) -> Comparison:
    """Lay runs beside one another: their curves, what was set differently, what came of it.

    Parameters
    ----------
    *runs
        Two or more, running or over, of any folder.

    Returns
    -------
    Comparison
        The cell's value shows it as it is now; ``watch()`` keeps it up to date, ``plot()`` gives a
        figure, ``rows`` the numbers.

    Raises
    ------
    InvalidError
        Fewer than two, or something that is not a run.
    """
    from pantheraml.run import Run

    wrong = [run for run in runs if not isinstance(run, Run)]
    if wrong:
        raise InvalidError(f"compare takes runs, such as pm.attach(name), not {wrong[0]!r}")
    if len(runs) < 2:
        raise InvalidError("compare takes two runs or more")
    return Comparison(runs)


def _text(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


@contextmanager
def _shown_in_place() -> Iterator[Callable[[Comparison], None]]:
    """Give what shows a comparison in the place of the one before it: in a cell, or a terminal.

    Where nothing can be taken back (a file, a pipe) only the last one is printed.
    """
    if kernel() is not None:
        from IPython.display import display

        handle = display(display_id=True)  # type: ignore[no-untyped-call,unused-ignore]
        yield handle.update
        return
    if not sys.stdout.isatty():
        last: list[Comparison] = []
        yield last.append
        for shown in last[-1:]:
            say(shown)
        return
    from rich.live import Live
    from rich.text import Text

    from pantheraml.terminal import Terminal

    with Live(console=Terminal(), auto_refresh=False) as live:
        yield lambda shown: live.update(Text(repr(shown)), refresh=True)
