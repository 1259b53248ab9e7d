"""Reports: what a page may not do, and that it shows what there is."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import examples
import pantheraml as pm
import pytest
from pantheraml import live, sums
from pantheraml.live import clock, notes, sparkline, view, watch
from pantheraml.report import Curve, chart_svg, page_html, record_html, smooth
from rich.console import Console

EVIL = "<script>alert(1)</script>\"'&"


@pytest.fixture
def run(runs: Path, tmp_path: Path, model: Path) -> pm.Run:
    """A run that ended long ago: only its log is there."""
    folder = runs / "old"
    (folder / "data").mkdir(parents=True)
    config = examples.RUN | {
        "name": "old", "model": str(model), "model_id": EVIL, "max_steps": 3000,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(config))
    base = {"time": 1.0, "timeline": 0}
    events: list[dict[str, Any]] = [
        {"type": "step", "step": n, "loss": 3.0 / n if n != 7 else "NaN", "learning_rate": 1e-3,
         "grad_norm": 1.0, "tokens": 64, "labels": 64, "seconds": 0.5, "tokens_per_second": 128.0,
         "epoch": 0.1}
        for n in range(1, 2001)
    ]  # fmt: skip
    events.append({"type": "eval", "step": 2000, "loss": 0.5, "labels": 9, "seconds": 1.0})
    events.append({"type": "log", "level": "warning", "message": EVIL})
    events.append({"type": "state", "state": "failed", "step": 2000, "reason": EVIL})
    stamped = [json.dumps({"seq": i, **base, **event}) for i, event in enumerate(events, 1)]
    lines = [sums.add(line.encode()) for line in stamped]
    (folder / "events.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return pm.attach("old")


class Checker(HTMLParser):
    """Collects tags, and refuses what a self-contained page without scripts may not have."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe", "object"), tag
        for name, value in attrs:
            assert not name.startswith("on") and name not in ("src", "href"), (name, value)
            assert "url(" not in (value or "")
        self.tags.append(tag)


@pytest.mark.parametrize("make", [record_html, page_html])
def test_page_is_safe_and_whole(run: pm.Run, make: Any) -> None:
    page = make(run)
    checker = Checker()
    checker.feed(page)
    assert checker.tags.count("svg") == 3 and "table" in checker.tags
    assert "&lt;script&gt;" in page and "<script" not in page
    assert len(page) < 120_000  # 2000 steps do not make it heavier than a picture
    for begin in [i for i in range(len(page)) if page.startswith("<svg", i)]:
        ElementTree.fromstring(page[begin : page.index("</svg>", begin) + 6])


def test_old_run_reads_from_its_log(run: pm.Run) -> None:
    assert run.state == "failed" and run.step == 2000 and len(run.history) == 2000
    assert math.isnan(run.history[6]["loss"])
    assert run.evaluations[0].loss == 0.5
    assert run.coordinator_pid is None and run.workers == []
    with pytest.raises(pm.RunFailed, match="alert"):
        run.wait()
    with pytest.raises(pm.PeerError, match="workers are gone"):
        run.pause()
    assert "failed" in repr(run)
    (info,) = pm.runs()
    assert (info.name, info.state, info.step) == ("old", "failed", 2000)


def test_terminal_view(run: pm.Run) -> None:
    console = Console(width=100, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(view(run))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "old" in shown and "step 2,000/3,000" in shown and "held-out" in shown
    assert EVIL[:20] in shown  # a terminal takes it as text
    watch(run, console=Console(file=console.file, force_terminal=False))
    assert "old: failed, step 2000/3000, loss 0.0015" in console.file.getvalue()  # type: ignore[attr-defined]


def test_who_began_a_run_is_told_all_that_was_said(run: pm.Run) -> None:
    """However many steps it had made before anybody looked; who comes late is told nothing old."""

    def lines(whole: bool) -> list[str]:
        console = Console(width=1000, file=io.StringIO(), force_terminal=False)
        watch(run, console=console, whole=whole)
        return console.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]

    said = [line for note in notes(run) for line in note.splitlines()]
    assert said and lines(whole=True) == [*said, *lines(whole=False)]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_warning_stays_and_a_reason_is_told(run: pm.Run, terminal: bool) -> None:
    """Above the picture, which has only a run's last words, and only before its first step."""
    for level in ("info", "warning"):
        said = {"type": "log", "level": level, "message": f"{level} of old", "time": 1.0}
        run.on_events([{**said, "seq": run.last_seq() + 1, "timeline": 0}])
    console = Console(width=200, file=io.StringIO(), force_terminal=terminal, color_system=None)
    watch(run, console=console, whole=True)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "warning: warning of old\n" in text
    assert ("info of old" in text) != terminal
    assert run.reason and run.reason in text


PLAN = examples.KINDS["plan"] | {"type": "plan", "time": 1.0, "timeline": 0, "max_steps": 3000}


@pytest.mark.parametrize("terminal", [False, True])
def test_a_plan_is_shown_before_the_steps_made_by_it(
    run: pm.Run, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where plan and steps come between two looks, just when what is shown next is made."""
    made = live.view if terminal else live._line
    come = iter([PLAN, {**PLAN, "head_chunk": 1, "available": 77}])

    def late(run: pm.Run) -> Any:
        event = next(come, None)
        if event is not None:
            run.on_events([{**event, "seq": run.last_seq() + 1}])
        return made(run)

    monkeypatch.setattr(live, "view" if terminal else "_line", late)
    looks = iter([False, True])
    monkeypatch.setattr(live, "ENDED", set())
    console = Console(width=200, file=io.StringIO(), force_terminal=terminal, color_system=None)
    watch(run, lambda: next(looks), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert run.plan is not None and run.plan.available == 77
    planned = [text.index(f"of {available} B\n") for available in (99, 77)]
    assert planned == sorted(planned) and str(run.plan) in text
    assert planned[0] < text.index("2,000/3,000" if terminal else "step 2000/3000")


def test_a_plan_stands_above_the_curves(run: pm.Run) -> None:
    run.on_events([{**PLAN, "seq": run.last_seq() + 1}])
    assert run.plan is not None
    for page in (record_html(run), page_html(run)):
        assert page.count("<pre>") == 1
        assert page.index(run.plan._repr_html_()) < page.index("<svg")


def test_figure(run: pm.Run) -> None:
    figure = run.plot()
    assert [axis.get_ylabel() for axis in figure.axes] == ["loss", "learning rate", "gradient norm"]
    assert len(figure.axes[0].lines) == 3


def test_charts_of_odd_numbers() -> None:
    assert chart_svg("x", [Curve("", [1.0], [math.nan], "red")]) == ""
    for values in ([0.0], [1e-12, 1e-12], [5.0, math.inf, -5.0], [1e30, 2e30]):
        steps = [float(i) for i in range(len(values))]
        ElementTree.fromstring(chart_svg("x", [Curve("a", steps, values, "red", dots=True)]))


def test_smoothing_has_no_bias_and_passes_over_gaps() -> None:
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert math.isnan(smooth([math.nan, 1.0])[0]) and smooth([math.nan, 1.0])[1] == pytest.approx(
        1.0
    )


def test_terminal_parts() -> None:
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█"
    assert sparkline([1, math.nan]) == "▁?" and sparkline([]) == ""
    assert len(sparkline([float(i) for i in range(1000)], width=30)) == 30
    assert clock(3723) == "1:02:03" and clock(61) == "1:01"


def test_runs_are_compared(
    start: Callable[..., pm.Run], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"{a} plus 1 is ", "completion": f"{a + 1}."} for a in range(30)]
    runs = [
        start(rows, name=f"rate-{i}", learning_rate=rate, eval_split=6, eval_steps=2, max_steps=4)
        for i, rate in enumerate((1e-3, 1e-5))
    ]
    both = pm.compare(*runs)
    both.watch()
    assert both.differences == {"learning_rate": [1e-3, 1e-5]}
    said = capsys.readouterr().out
    assert said == f"{both}\n" and said.splitlines()[1].startswith("rate-0  finished  4")
    first, second = both.rows
    assert first["loss"] < second["loss"] and first["eval_loss"] == first["lowest_eval_loss"]
    assert first["eval_loss"] == runs[0].evaluations[-1].loss
    page = both._repr_html_()
    ElementTree.fromstring(page)  # every tag is closed
    assert page.count("<svg") == 2 and page.count('scope="row"') == 2
    lines = both.plot().axes[0].get_lines()
    assert [line.get_label() for line in lines][1] == "rate-0, learning_rate=0.001"
    for wrong in ((), (runs[0],), (runs[0], "rate-1")):
        with pytest.raises(pm.InvalidError, match="compare takes"):
            pm.compare(*wrong)  # type: ignore[arg-type]


def test_comparison_sets_names_as_text(run: pm.Run) -> None:
    other = copy.copy(run)
    other.config = run.config | {"model_id": "plain"}
    page = pm.compare(run, other)._repr_html_()
    assert "<script" not in page and "&lt;script" in page
