"""The live view of a run in a terminal: progress, loss, tokens per second, memory by cause."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pantheraml.columns import Columns
from pantheraml.memory import CAUSES, Plan, size
from pantheraml.record import ENDED
from pantheraml.run import Run
from pantheraml.terminal import Terminal

_BLOCKS = "▁▂▃▄▅▆▇█"
_PERIOD = 0.25  # seconds between two pictures
_STALE = 5.0  # seconds; a reading is a second old at most where the driver answers
_LINE_PERIOD = 5.0  # seconds between two lines where there is no terminal
_COLOURS = {"running": "green", "paused": "yellow", "failed": "red", "stopped": "red"}


def watch(
    run: Run,
    until: Callable[[], bool] | None = None,
    console: Console | None = None,
    *,
    whole: bool = False,
) -> None:
    """Show a run until it has ended, or until `until` says so.

    Its plan is printed before anything of the steps that are made by it.

    Parameters
    ----------
    run
        The run. Ctrl-C leaves it alone and raises KeyboardInterrupt.
    until
        Asked after each change.
    console
        Where to; without a terminal a line is printed every few seconds instead.
    whole
        Print what was said of the run before its first steps, too, however many it has made: for
        who has just begun it. Who comes late has not asked for it.
    """
    console = console or Terminal()

    def over() -> bool:
        return run.state in ENDED or (until is not None and until())

    # A picture has words of its own for what goes on; a warning would leave with the next one.
    but = "info" if console.is_terminal else ""

    def said_so_far() -> list[str]:
        return _said(run, ("log", "plan"), but)

    told = 0 if whole or not run._curve(1) else len(said_so_far())

    def tell() -> None:
        nonlocal told
        said = said_so_far()
        for line in said[told:]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        told = len(said)

    # A picture, or a line, is made first and shown last: what was said before the steps in it is
    # printed above it, however many were made meanwhile.
    if not console.is_terminal:
        _lines(run, over, console, tell)
        return
    picture = view(run)
    tell()
    with Live(picture, console=console, refresh_per_second=8, transient=False) as live:
        while not over():
            run.wait_for_change(_PERIOD)
            picture = view(run)
            tell()
            live.update(picture)
            time.sleep(_PERIOD / 4)
        picture = view(run)
        tell()
        live.update(picture)


def view(run: Run) -> RenderableType:
    """Draw a run as it stands."""
    colour = _COLOURS.get(run.state, "cyan")
    title = f"[bold]{escape(run.name)}[/] · [{colour}]{run.state}[/]"
    parts: list[RenderableType] = [_progress(run)]
    history = run._curve()
    if history:
        parts.append(_numbers(run, history))
    parts.append(_memory(run))
    parts += [Text(line, style="dim") for line in gpu_lines(run.gpus)]
    if run.state == "starting" or not history:
        parts += [Text(line, style="dim") for line in notes(run)[-4:]]
    if run.reason:
        parts.append(Text(run.reason, style=colour))
    return Panel(Group(*parts), title=title, title_align="left", border_style=colour)


def sparkline(values: list[float], width: int = 40) -> str:
    """Draw values as blocks, the newest on the right; each block is the mean of its share."""
    if not values:
        return ""
    width = min(width, len(values))
    shares = [
        values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)
    ]
    means = [_mean(share) for share in shares]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return "?" * width
    low, high = min(finite), max(finite)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(
        _BLOCKS[round((mean - low) * scale)] if math.isfinite(mean) else "?" for mean in means
    )


def eta(run: Run) -> float | None:
    """Seconds until the last step, by the median of the last steps; None while unknown."""
    recent = sorted(run._curve(30).column("seconds"))
    if not recent or not run.max_steps:
        return None
    return max(0, run.max_steps - run.step) * float(recent[len(recent) // 2])


def clock(seconds: float) -> str:
    """Write seconds as ``1:02:03`` or ``2:03``."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _progress(run: Run) -> RenderableType:
    total = run.max_steps
    doing = run.doing
    row = Table.grid(padding=(0, 1))
    if doing is not None:
        row.add_row(escape(doing[0]), ProgressBar(total=1.0, completed=doing[1], width=40))
    if doing is not None and run.state == "starting":
        return row
    left = eta(run)
    remaining = f"{clock(left)} left" if left is not None and run.state == "running" else ""
    of = f"{run.step:,}/{total:,}" if total else f"{run.step:,}"
    row.add_row(
        f"step {of}", ProgressBar(total=total or 1, completed=run.step, width=40), remaining
    )
    return row


def _numbers(run: Run, history: Columns) -> RenderableType:
    recent = list(history.copy(10).rows())
    last = recent[-1]
    table = Table.grid(padding=(0, 2))
    losses = history.column("loss")
    table.add_row("loss", f"[bold]{last['loss']:.4f}[/]", sparkline(losses))
    evals = run.evaluations
    if evals:
        table.add_row("held-out", f"{evals[-1].loss:.4f}", f"at step {evals[-1].step}")
    table.add_row("learning rate", f"{last['learning_rate']:.3g}", "")
    rate = sum(row["tokens"] for row in recent) / max(1e-9, sum(row["seconds"] for row in recent))
    table.add_row("tokens/s", f"{rate:,.0f}", f"gradient norm {last['grad_norm']:.3g}")
    if history.loss_scale is not None:
        skipped = f"{history.skipped} skipped" if history.skipped else ""
        table.add_row("loss scale", f"{history.loss_scale:g}", skipped)
    return table


def _memory(run: Run) -> RenderableType:
    plan = run.plan
    if plan is None:
        return Text("")
    table = Table.grid(padding=(0, 1))
    for cause in CAUSES:
        taken = plan.by_cause.get(cause, 0)
        if taken:
            bar = Bar(plan.total, 0, taken, width=30, color="blue")
            table.add_row(cause, Text(size(taken), justify="right"), bar)
    used = [worker["rss"] for worker in run.memory() if worker.get("rss")]
    note = f"workers' processes have {' + '.join(size(rss) for rss in used)}" if used else ""
    table.add_row("in all", Text(size(plan.total), justify="right"), Text(note, style="dim"))
    return table


def gpu_lines(gpus: list[dict[str, Any]]) -> list[str]:
    """Say what is known of each GPU, one line each."""
    return [f"GPU {gpu['rank']}: {_gpu(gpu)}" for gpu in gpus]


def _gpu(gpu: Mapping[str, Any]) -> str:
    words = []
    if "utilisation" in gpu:
        words.append(f"{gpu['utilisation']:.0%} busy")
    if "mfu" in gpu:
        words.append(f"MFU {gpu['mfu']:.0%}")
    if "temperature" in gpu:
        words.append(f"{gpu['temperature']:.0f} °C")
    if "power" in gpu:
        limit = f" of {gpu['power_limit']:.0f}" if "power_limit" in gpu else ""
        words.append(f"{gpu['power']:.0f}{limit} W")
    if "clock" in gpu:
        words.append(f"{gpu['clock']:,} MHz")
    if gpu.get("throttle"):
        words.append(f"slowed down by {gpu['throttle']}")
    if gpu.get("memory_others"):
        words.append(f"other processes have {size(gpu['memory_others'])}")
    if gpu.get("age", 0) > _STALE:
        words.append(f"as of {gpu['age']:.0f} s ago")
    if "trouble" in gpu:
        words.append(gpu["trouble"])
    elif "age" not in gpu:
        words.append("its driver has not answered yet")
    elif "missing" in gpu:
        words.append(f"not said: {', '.join(_names(gpu['missing']))}")
    return ", ".join(words)


def _names(missing: str) -> list[str]:
    return [part.partition(":")[0].replace("_", " ") for part in missing.split("; ")]


def notes(run: Run) -> list[str]:
    """What was said of the run so far besides its numbers and its plan, oldest first."""
    return _said(run, ("log",))


_MARKS = {"info": "", "warning": "warning: ", "error": "error: "}


def _said(run: Run, kinds: Sequence[str], but: str = "") -> list[str]:
    """Plans and words of the log, oldest first; `but`: a level whose words are left out."""
    lines = []
    for event in run._notes():
        if event["type"] not in kinds:
            continue
        if event["type"] == "plan":
            lines.append(str(Plan.of(event, run.config)))
        elif event["level"] != but:
            lines.append(f"{_MARKS.get(event['level'], '')}{event['message']}")
    return lines


def _lines(run: Run, over: Callable[[], bool], console: Console, tell: Callable[[], None]) -> None:
    shown = -math.inf
    while not over():
        line, now = _line(run), time.monotonic()
        tell()
        if now - shown >= _LINE_PERIOD:
            shown = now
            console.print(line, markup=False, highlight=False)
        console.file.flush()
        run.wait_for_change(_PERIOD)
    line = _line(run)
    tell()
    console.print(line, markup=False, highlight=False)


def _line(run: Run) -> str:
    of = f"/{run.max_steps}" if run.max_steps else ""
    line = f"{run.name}: {run.state}, step {run.step}{of}"
    for last in run._curve(1).rows():
        line += f", loss {last['loss']:.4f}, {last['tokens_per_second']:,.0f} tokens/s"
        for gpu in run.gpus[:1]:
            line += f"; GPU {_gpu(gpu)}"
    if run.doing is not None:
        line += f", {run.doing[0]} {run.doing[1]:.0%}"
    return f"{line} ({run.reason})" if run.reason else line


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
