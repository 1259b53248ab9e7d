"""Reports: a run's curves as inline SVG with a table beside them, and as a matplotlib figure.

`record_html` is what a saved notebook shows where no widget lives; `page_html` is a page of its
own. Neither needs a script, a style sheet or a network. Text of users and models is escaped, and
colours are the reader's (``currentColor``) or stand out on light and dark alike.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from pantheraml import whole
from pantheraml.memory import size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pantheraml.run import Run

_WIDTH, _HEIGHT = 680, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 26, 30
_POINTS = 600  # of a curve, at most
_BLUE, _ORANGE, _GREEN, _GREY = "#3b82f6", "#ea7a2f", "#2f9e5b", "#8a8f98"
_CELL = 'style="text-align:left;padding:2px 14px 2px 0;font-weight:normal;vertical-align:top"'


@dataclass(frozen=True)
class Curve:
    """One line of a chart; not-finite values are gaps."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    width: float = 1.5
    opacity: float = 1.0
    dots: bool = False


def smooth(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Exponential moving average without the bias of its beginning."""
    result, average, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            average = keep * average + (1 - keep) * value
            weight = keep * weight + (1 - keep)
        result.append(average / weight if weight else math.nan)
    return result


def chart_svg(title: str, curves: Sequence[Curve]) -> str:
    """Draw a chart of curves over optimizer steps."""
    points = [(x, y) for c in curves for x, y in zip(c.x, c.y, strict=True) if math.isfinite(y)]
    if not points:
        return ""
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    ticks = _ticks(min(y for _, y in points), max(y for _, y in points))
    low, high = ticks[0], ticks[-1]
    across = (_WIDTH - _LEFT - _RIGHT) / max(last - first, 1)
    up = (_HEIGHT - _TOP - _BOTTOM) / (high - low)

    def at(x: float, y: float) -> tuple[float, float]:
        return _LEFT + (x - first) * across, _HEIGHT - _BOTTOM - (y - low) * up

    ends = f"from {points[0][1]:.4g} to {points[-1][1]:.4g}"
    parts = [
        f'<svg role="img" aria-label="{escape(title)} over steps {first:.0f} to {last:.0f}, {ends}"'
        f' viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
        ' style="max-width:100%;height:auto" font-family="sans-serif" font-size="11"'
        ' fill="currentColor">',
        f'<text x="{_LEFT}" y="16" font-size="13">{escape(title)}</text>',
    ]
    for tick in ticks:
        _, y = at(first, tick)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
            ' stroke="currentColor" stroke-opacity="0.15"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_label(tick)}</text>'
        )
    for step, anchor in ((first, "start"), (last, "end")):
        x, _ = at(step, low)
        parts.append(
            f'<text x="{x:.1f}" y="{_HEIGHT - 10}" text-anchor="{anchor}">{step:.0f}</text>'
        )
    legend = float(_WIDTH - _RIGHT)
    for curve in curves:
        parts.append(_line(curve, at))
        if curve.label:
            legend -= 7 * len(curve.label) + 22
            parts.append(
                f'<rect x="{legend:.0f}" y="9" width="12" height="4" fill="{curve.colour}"'
                f' fill-opacity="{curve.opacity}"/><text x="{legend + 16:.0f}" y="16">'
                f"{escape(curve.label)}</text>"
            )
    return "".join([*parts, "</svg>"])


def record_html(run: Run) -> str:
    """Give a run's static record: a fragment for a notebook's output."""
    return (
        '<div style="color:var(--jp-ui-font-color1,inherit);font-family:sans-serif;'
        f'font-size:13px">{_heading(run)}{_plan(run)}{_charts(run)}{_summary(run)}{_steps(run)}</div>'
    )


def page_html(run: Run) -> str:
    """Give a page of its own: the record, every setting, and what happened."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(run.name)}</title></head>"
        '<body style="max-width:760px;margin:2em auto;padding:0 1em;font-family:sans-serif;'
        f'font-size:14px">{_heading(run)}{_plan(run)}{_charts(run)}{_summary(run)}{_steps(run)}'
        f"{_happened(run)}{_settings(run)}</body></html>\n"
    )


def figure(run: Run) -> Figure:
    """Draw loss, learning rate and gradient norm with matplotlib."""
    whole.load("matplotlib.pyplot")  # NumPy with it
    import matplotlib.pyplot as plt

    history = run.history
    steps = [row["step"] for row in history]
    made, axes = plt.subplots(3, 1, figsize=(8, 7), sharex=True, height_ratios=(3, 1, 1))
    loss = [row["loss"] for row in history]
    axes[0].plot(steps, loss, color=_BLUE, alpha=0.35, linewidth=1, label="loss")
    axes[0].plot(steps, smooth(loss), color=_BLUE, linewidth=1.8, label="smoothed")
    x, y = held_out(run)
    if x:
        axes[0].plot(x, y, "o-", color=_ORANGE, label="held-out")
    axes[0].legend(frameon=False)
    axes[0].set_title(run.name)
    for axis, name, label in (
        (axes[0], "loss", "loss"),
        (axes[1], "learning_rate", "learning rate"),
        (axes[2], "grad_norm", "gradient norm"),
    ):
        if name != "loss":
            axis.plot(steps, [row[name] for row in history], color=_GREEN, linewidth=1.2)
        axis.set_ylabel(label)
        axis.grid(alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    axes[2].set_xlabel("step")
    made.tight_layout()
    plt.close(made)  # shown once, as the cell's value
    return made


def held_out(run: Run) -> tuple[list[float], list[float]]:
    """Steps and losses of the held-out curve, from left to right.

    What was asked for of the best weights came last, and is of an earlier step.
    """
    evals = sorted(run.evaluations, key=lambda one: one.step)
    return [float(one.step) for one in evals], [one.loss for one in evals]


# ---- parts -----------------------------------------------------------------------------------


def _heading(run: Run) -> str:
    of = f" of {run.max_steps:,}" if run.max_steps else ""
    reason = f" · {escape(run.reason)}" if run.reason else ""
    return (
        f'<div style="font-size:1.15em;margin:0 0 6px"><b>{escape(run.name)}</b> · '
        f"{escape(run.state)}{reason} · step {run.step:,}{of}</div>"
    )


def _plan(run: Run) -> str:
    plan = run.plan
    return "" if plan is None else plan._repr_html_()


def _charts(run: Run) -> str:
    history = run.history
    steps = [float(row["step"]) for row in history]
    loss = [float(row["loss"]) for row in history]
    curves = [
        Curve("loss", steps, loss, _BLUE, 1, 0.4),
        Curve("smoothed", steps, smooth(loss), _BLUE, 2),
    ]
    x, y = held_out(run)
    if x:
        curves.append(Curve("held-out", x, y, _ORANGE, 1.5, dots=True))
    drawn = chart_svg("Loss", curves)
    for title, name in (("Learning rate", "learning_rate"), ("Gradient norm", "grad_norm")):
        values = [float(row[name]) for row in history]
        drawn += chart_svg(title, [Curve("", steps, values, _GREEN)])
    return drawn


def _summary(run: Run) -> str:
    config, history, evals = run.config, run.history, run.evaluations
    rows = [("model", config["model_id"]), ("method", _method(config))]
    if history:
        last, best = history[-1], min(history, key=lambda row: _or_infinite(row["loss"]))
        rows.append(("loss", f"{last['loss']:.4f}, lowest {best['loss']:.4f} at {best['step']}"))
        rates = sorted(row["tokens_per_second"] for row in history)
        tokens = sum(row["tokens"] for row in history)
        rows.append(("tokens", f"{tokens:,}, {rates[len(rates) // 2]:,.0f} a second"))
    if evals:
        rows.append(("held-out loss", f"{evals[0].loss:.4f} → {evals[-1].loss:.4f}"))
    return _table(rows)


def _steps(run: Run) -> str:
    history = run.history
    if not history:
        return ""
    every = max(1, math.ceil(len(history) / 12))
    shown = sorted({*range(0, len(history), every), len(history) - 1})
    names = ("step", "loss", "learning_rate", "grad_norm", "tokens_per_second")
    head = "".join(f'<th scope="col" {_CELL}>{name.replace("_", " ")}</th>' for name in names)
    body = ""
    for index in shown:
        row = history[index]
        cells = (
            f"{row['step']}",
            f"{row['loss']:.4f}",
            f"{row['learning_rate']:.3g}",
            f"{row['grad_norm']:.3g}",
            f"{row['tokens_per_second']:,.0f}",
        )
        body += "<tr>" + "".join(f"<td {_CELL}>{cell}</td>" for cell in cells) + "</tr>"
    return (
        f"<details><summary>{len(history):,} steps</summary>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></details>"
    )


def _happened(run: Run) -> str:
    rows = []
    for event in run._notes():
        text = _sentence(event)
        if text:
            rows.append((time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"])), text))
    return f"<h2>What happened</h2>{_table(rows[-200:])}" if rows else ""


def _sentence(event: dict[str, Any]) -> str:
    kind = event["type"]
    if kind == "state":
        reason = f": {event['reason']}" if event.get("reason") else ""
        return f"{event['state']} at step {event['step']}{reason}"
    if kind == "applied":
        args = ", ".join(f"{k}={v}" for k, v in event.get("args", {}).items())
        return f"{event['verb']}({args}) applied at step {event['step']}"
    if kind == "refused":
        return f"{event['verb']} refused: {event['reason']}"
    if kind == "eval":
        return f"held-out loss {event['loss']:.4f} at step {event['step']}"
    if kind == "checkpoint":
        return f"checkpoint {event['path']}, {size(event['bytes'])}"
    if kind == "log":
        return f"{event['level']}: {event['message']}"
    return ""


def _settings(run: Run) -> str:
    shown = {k: v for k, v in run.config.items() if k not in ("prepare", "identity")}
    rows = [(name, v if isinstance(v, str) else json.dumps(v)) for name, v in shown.items()]
    return f"<h2>Settings</h2>{_table(rows)}"


def _method(config: dict[str, Any]) -> str:
    if config["method"] == "full":
        return "full"
    return f"LoRA, r={config['lora_r']}, alpha={config['lora_alpha']:g}"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(
        f'<tr><th scope="row" {_CELL}>{escape(name).replace(" ", "&nbsp;")}</th>'
        f"<td {_CELL}>{escape(value)}</td></tr>"
        for name, value in rows
    )
    return f'<table style="border-collapse:collapse;margin:6px 0">{body}</table>'


def _line(curve: Curve, at: Any) -> str:
    kept = [(x, y) for x, y in _thin(curve) if math.isfinite(y)]
    places = [at(x, y) for x, y in kept]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = (
        f'<polyline points="{path}" fill="none" stroke="{curve.colour}"'
        f' stroke-width="{curve.width}" stroke-opacity="{curve.opacity}" stroke-linejoin="round"/>'
    )
    if curve.dots or len(places) == 1:
        for x, y in places:
            drawn += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{curve.colour}"/>'
    return drawn


def _thin(curve: Curve) -> list[tuple[float, float]]:
    """Of each stretch of a long curve its least and its greatest value."""
    points = list(zip(curve.x, curve.y, strict=True))
    if len(points) <= _POINTS:
        return points
    kept = {0, len(points) - 1}
    stretches = _POINTS // 2
    for part in range(stretches):
        begin, end = ((part + i) * len(points) // stretches for i in (0, 1))
        stretch = [i for i in range(begin, end) if math.isfinite(points[i][1])]
        if stretch:
            kept |= {
                min(stretch, key=lambda i: points[i][1]),
                max(stretch, key=lambda i: points[i][1]),
            }
    return [points[i] for i in sorted(kept)]


def _ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers around [low, high]."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, last + 1)]


def _label(value: float) -> str:
    return f"{value:.3g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
