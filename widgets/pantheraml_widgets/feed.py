"""A run's events as what a panel needs: columns of numbers and the few events that matter.

A :class:`Feed` takes events in order, one at a time, from any thread. :meth:`Feed.tick` says what
is new since it was last asked; :meth:`Feed.snapshot` says everything, at a bounded size.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

__all__ = ["COLUMNS", "Feed", "thin"]

#: Columns of the curve, in the order of the front end (``widgets/js/src/protocol.ts``).
COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds")

#: Points of a snapshot. Two thousand are more than a panel has pixels.
MAX_POINTS = 2000

#: Rows that are kept at most: beyond them the curve is thinned to twice a snapshot's.
MAX_ROWS = 8 * MAX_POINTS

#: Of all events that are lines of the panel's list the newest ``KEEP`` are kept (the front end
#: shows 200), and as many of those that mark a step in the curve.
KEEP = 300

#: Samples that are kept, which is as many as the front end shows.
SAMPLES = 8

#: Of these types the last event is kept, however long ago: it says how the run stands. A state is a
#: line as well. What is in none of the sets no panel shows.
_LATEST = {"plan", "workers", "progress", "state"}
_LISTED = {"state", "restart", "command", "applied", "refused", "eval", "checkpoint", "log"}
_SHOWN = _LATEST | _LISTED | {"sample"}

Event = Mapping[str, Any]


def _number(value: object) -> float | str:
    """A number as it may stand in JSON: six digits, and names for what JSON has not."""
    if isinstance(value, str):
        return value
    if not isinstance(value, int | float):
        return "NaN"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value if isinstance(value, int) else float(f"{value:.6g}")


def thin(columns: Mapping[str, Sequence[Any]], most: int = MAX_POINTS) -> dict[str, list[Any]]:
    """Fewer rows that look the same: of each stretch the rows of least and greatest loss.

    Stretches are of equally many steps, so that what was thinned before is not thinned more than
    what has come since.

    Parameters
    ----------
    columns : mapping of str to sequence
        Columns of equal length, in the order of ``step``; ``loss`` decides.
    most : int
        Rows to have at most. The first and the last row are always kept.
    """
    order = _kept(columns, most)
    return {name: [values[row] for row in order] for name, values in columns.items()}


def _kept(columns: Mapping[str, Sequence[Any]], most: int) -> list[int]:
    rows = len(columns["loss"])
    if rows <= most:
        return list(range(rows))
    loss = [v if isinstance(v, int | float) else math.nan for v in columns["loss"]]
    steps = [float(step) for step in columns["step"]]
    stretches = max(1, (most - 2) // 2)
    width = (steps[-1] - steps[0] + 1) / stretches
    found: dict[int, list[int]] = {}
    for row, step in enumerate(steps):
        found.setdefault(int((step - steps[0]) / width), []).append(row)
    keep = {0, rows - 1}
    for stretch in found.values():
        finite = [row for row in stretch if not math.isnan(loss[row])] or stretch
        keep.add(min(finite, key=loss.__getitem__))
        keep.add(max(finite, key=loss.__getitem__))
    return sorted(keep)


class Feed:
    """The state behind a panel, of bounded size.

    Parameters
    ----------
    name : str
        The run's name.
    max_steps : callable
        Says how many steps the run has, 0 while that is not known.
    decode : callable, optional
        Makes text of token ids; without it samples are shown as their ids.
    plan : callable, optional
        Makes text of a plan event; without it a plan is shown as figures of memory only.
    """

    def __init__(
        self,
        name: str,
        max_steps: Callable[[], int | None],
        decode: Callable[[list[int]], str] | None = None,
        plan: Callable[[Event], str] | None = None,
    ) -> None:
        self._name = name
        self._max_steps = max_steps
        self._decode = decode
        self._plan = plan
        self._lock = threading.Lock()
        self._seq = 0
        self._sent = 0  # every tick up to here went out
        self._columns: dict[str, list[float | str]] = {name: [] for name in COLUMNS}
        self._evals: dict[str, list[Any]] = {"step": [], "loss": []}
        self._events: list[dict[str, Any]] = []
        self._marks: list[dict[str, Any]] = []  # settings and checkpoints
        self._latest: dict[str, dict[str, Any]] = {}
        self._samples: dict[Any, list[int]] = {}  # token ids of rows that are not done
        self._texts: dict[Any, dict[str, Any]] = {}  # of each row its last event, the oldest first
        self._memory: list[Any] = []
        self._gpus: list[dict[str, Any]] = []
        self._scale: float | str | None = None  # float16's loss scale; None: there is none
        self._skipped: list[int] = []  # steps that updated nothing
        self._state = ""
        self._reason = ""
        self._new_reason = False
        self._new_rows = 0  # rows at the end of the columns that no tick has had
        self._new_events: list[dict[str, Any]] = []
        self._new_memory = False
        self._new_gpus = False
        self._new_scale = False
        self._gone_back = False

    @property
    def gone_back(self) -> bool:
        """Whether somebody went back, and what came before may be another branch's."""
        return self._gone_back

    @property
    def seq(self) -> int:
        """Number of the last event."""
        return self._seq

    @property
    def state(self) -> str:
        """State of the last state event."""
        return self._state

    def add(self, event: Event) -> bool:
        """Take one event. Returns False for one that is known already or shows nothing."""
        if event.get("type") == "heartbeat":
            return self._add_gpus([w["gpu"] for w in event.get("workers", []) if "gpu" in w])
        seq = event.get("seq")
        if not isinstance(seq, int):
            return False
        with self._lock:
            if seq <= self._seq:
                return False
            self._seq = seq
            kind = event.get("type")
            if kind == "step":
                self._add_step(event)
            elif kind in _SHOWN:
                self._add_event(event)
            return True

    def settle(self, state: str, reason: str, now: float) -> bool:
        """Show a state that no event tells: a run whose coordinator went without a word.

        Returns False where the events say the same.
        """
        with self._lock:
            if state == self._state:
                return False
            rows = self._columns["step"]
            step = int(rows[-1]) if rows else 0
            fields = {"state": state, "reason": reason, "step": step}
            self._add_event({"seq": self._seq, "time": now, "type": "state", **fields})
            return True

    def restore(self, steps: Iterable[Event], evals: Iterable[Event]) -> None:
        """Take the whole past, as events, in place of what is kept of it; a snapshot shows it."""
        with self._lock:
            self._forget_after(-1)
            self._forget_evals(-1)
            for step in steps:
                self._add_step(step)
            for one in evals:
                self._add_eval({**one, "loss": _number(one.get("loss"))})
            self._gone_back = False

    def say(self, reason: str) -> bool:
        """Take what the run says of how it stands, which not every event tells.

        A full disk, a lost connection: then no event comes. Returns False where nothing changed.
        """
        with self._lock:
            if reason == self._reason:
                return False
            self._reason, self._new_reason = reason, True
            return True

    def tick(self) -> dict[str, Any] | None:
        """What is new since the last tick or snapshot, or None."""
        with self._lock:
            quiet = not (self._new_events or self._new_gpus or self._new_reason)
            if self._seq == self._sent and quiet:
                return None
            start = len(self._columns["step"]) - self._new_rows
            new = {
                "after": self._sent,
                "seq": self._seq,
                "columns": {name: values[start:] for name, values in self._columns.items()},
                "events": self._new_events,
                "memory": self._memory if self._new_memory else None,
                "gpus": self._gpus if self._new_gpus else None,
                "scale": self._scale_now() if self._new_scale else None,
                "reason": self._reason,
            }
            self._mark_sent()
            return new

    def snapshot(self) -> dict[str, Any]:
        """Everything, thinned to :data:`MAX_POINTS` rows. The next tick goes on from here."""
        with self._lock:
            whole = {
                "seq": self._seq,
                "name": self._name,
                "max_steps": int(self._max_steps() or 0),
                "columns": thin(self._columns),
                "evals": thin(self._evals),
                "events": self._kept_events(),
                "memory": self._memory,
                "gpus": self._gpus,
                "scale": self._scale_now(),
                "reason": self._reason,
            }
            self._mark_sent()
            return whole

    def _kept_events(self) -> list[dict[str, Any]]:
        """Each event once and in order; samples come last, behind the states that they outlived."""
        kept = {id(e): e for e in (*self._events, *self._marks, *self._latest.values())}
        told = sorted(kept.values(), key=lambda e: int(e["seq"]))
        return [*told, *self._texts.values()]

    def _mark_sent(self) -> None:
        self._sent = self._seq
        self._new_rows = 0
        self._new_events = []
        self._new_memory = False
        self._new_gpus = False
        self._new_scale = False
        self._new_reason = False

    def _scale_now(self) -> dict[str, Any] | None:
        """Give the loss scale and how many steps were skipped; None: not a run in float16."""
        if self._scale is None:
            return None
        return {"value": self._scale, "skipped": len(self._skipped)}

    def _add_gpus(self, gpus: Sequence[Event]) -> bool:
        """What drivers say of GPUs, live; the log has it every ten seconds."""
        if not gpus:
            return False
        with self._lock:
            self._gpus = [
                {k: _number(v) if isinstance(v, float) else v for k, v in gpu.items()}
                for gpu in gpus
            ]
            self._new_gpus = True
        return True

    def _add_step(self, event: Event) -> None:
        self._forget_after(int(event["step"]) - 1)
        for name, values in self._columns.items():
            values.append(_number(event.get(name)))
        self._new_rows += 1
        if len(self._columns["step"]) > MAX_ROWS:
            self._thin()
        if event.get("skipped"):
            self._skipped.append(int(event["step"]))
        if "loss_scale" in event:
            self._new_scale |= self._scale != event["loss_scale"] or bool(event.get("skipped"))
            self._scale = _number(event["loss_scale"])
        memory = event.get("memory")
        if memory:
            self._memory = list(memory)
            self._new_memory = True
        if "gpus" in event and not self._gpus:  # a log that is read; live ones are newer
            self._gpus = list(event["gpus"])
            self._new_gpus = True

    def _thin(self) -> None:
        """Keep fewer rows, so that a long run's curve takes no more memory than a short one's."""
        order = _kept(self._columns, 2 * MAX_POINTS)
        start = len(self._columns["step"]) - self._new_rows
        self._new_rows = sum(row >= start for row in order)
        self._columns = {n: [values[row] for row in order] for n, values in self._columns.items()}

    def _forget_after(self, step: int) -> None:
        """Drop the rows of a past that is told anew."""
        steps = self._columns["step"]
        keep = len(steps)
        while keep and float(steps[keep - 1]) > step:
            keep -= 1
        self._new_rows = max(0, self._new_rows - (len(steps) - keep))
        for values in self._columns.values():
            del values[keep:]
        while self._skipped and self._skipped[-1] > step:
            self._skipped.pop()
            self._new_scale = True

    def _add_event(self, event: Event) -> None:
        kept = {
            name: _number(value) if isinstance(value, float) and name != "time" else value
            for name, value in event.items()
        }
        kind = str(kept.get("type"))
        if kind == "state":
            self._add_state(kept)
        elif kind == "sample":
            kept = self._whole_sample(kept)
        elif kind == "plan" and self._plan:
            kept["text"] = self._plan(event)
        elif kind == "eval":
            self._add_eval(kept)
        elif kind in ("applied", "refused"):
            self._end_samples(kept)
        self._keep(kind, kept)
        self._new_events.append(kept)

    def _keep(self, kind: str, event: dict[str, Any]) -> None:
        if kind in _LATEST:
            self._latest[kind] = event
        if kind in _LISTED:
            self._events.append(event)
            del self._events[:-KEEP]
        if kind == "checkpoint" or _is_setting(event):
            self._marks.append(event)
            del self._marks[:-KEEP]

    def _add_state(self, event: dict[str, Any]) -> None:
        before, self._state = self._state, str(event.get("state"))
        if (before, self._state) != ("starting", "starting"):
            self._latest.pop("progress", None)  # it is over, however far it came
        if self._state == "starting":
            self._begin_again(int(event.get("step", 0)), bool(event.get("rewound")))

    def _begin_again(self, step: int, rewound: bool) -> None:
        """From a checkpoint: what came after it goes, and an answer without an end begins again."""
        self._gone_back |= rewound
        self._forget_after(step)
        self._forget_evals(step)
        # What was set is in force again from its step on, unless somebody has gone back.
        self._marks = [
            e for e in self._marks if e["step"] <= step or (_is_setting(e) and not rewound)
        ]
        self._samples.clear()
        self._texts = {row: e for row, e in self._texts.items() if e.get("ended")}

    def _add_eval(self, event: dict[str, Any]) -> None:
        step = int(event["step"])
        if "command" in event and any(s >= step for s in self._evals["step"][-1:]):
            return  # it adds nothing to the run's own, and may be of the best weights' step
        self._forget_evals(step - 1)
        self._evals["step"].append(step)
        self._evals["loss"].append(event.get("loss"))
        if len(self._evals["step"]) > MAX_ROWS:
            self._evals = thin(self._evals, 2 * MAX_POINTS)

    def _forget_evals(self, step: int) -> None:
        steps = self._evals["step"]
        keep = len(steps)
        while keep and steps[keep - 1] > step:
            keep -= 1
        for values in self._evals.values():
            del values[keep:]

    def _end_samples(self, event: dict[str, Any]) -> None:
        """Nothing is added to what this command has written: by its end, or because of a stop."""
        if event.get("verb") != "sample":
            return
        command = event.get("command")
        for row in [row for row in self._samples if row[0] == command]:
            del self._samples[row]
        for row, text in self._texts.items():
            if row[0] == command:
                self._texts[row] = {**text, "done": True, "ended": True}

    def _whole_sample(self, event: dict[str, Any]) -> dict[str, Any]:
        """A chunk becomes the text so far: a token need not end where a character does."""
        row = _row(event)
        ids = self._samples.setdefault(row, [])
        ids += [int(token) for token in event.pop("token_ids", [])]
        text = " ".join(map(str, ids))
        if self._decode:
            try:
                text = self._decode(ids)
            # A model folder need not have a tokenizer; the curve must not stop for its sake.
            except Exception as problem:
                text = f"{text} ({problem})"
        if event.get("done"):
            del self._samples[row]
        whole = {**event, "text": text[:8000]}
        self._texts[row] = whole
        if len(self._texts) > SAMPLES:
            del self._texts[next(iter(self._texts))]
        return whole


def _row(event: dict[str, Any]) -> tuple[Any, Any]:
    """Whose answer a sample event goes on with: its command, and which of that one's prompts."""
    return event.get("command"), event.get("row", 0)


def _is_setting(event: dict[str, Any]) -> bool:
    """Whether something was set, which a panel marks in the curve."""
    return event.get("type") == "applied" and event.get("verb") == "set"
