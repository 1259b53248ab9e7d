"""A run's steps in columns: what a notebook keeps of each of them, however many there are."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

#: What is told of a step, in this order.
NAMES = ("step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds")

_WHOLE = ("seq", "step", "tokens")
_REAL = ("loss", "learning_rate", "grad_norm", "seconds")


class Columns:
    """Steps, one behind the other.

    A step takes 44 bytes: four numbers of 8, three of 4 (8 where one does not fit any more).
    ``tokens_per_second`` is made when it is asked for, by the division that the worker made. A run
    on GPUs takes 8 more for ``mfu``, and what drivers say every ten seconds, as JSON; one in
    float16 takes 8 for ``loss_scale``. Which steps were skipped is kept of any run.
    """

    def __init__(self) -> None:
        self._whole = {name: array("I") for name in _WHOLE}
        self._real = {name: array("d") for name in _REAL}
        # Empty, or of every step; NaN where it was not told.
        self._some = {name: array("d") for name in ("mfu", "loss_scale")}
        self._skipped: set[int] = set()  # by seq
        self._gpus: dict[int, str] = {}  # by seq

    def append(self, event: Mapping[str, Any]) -> None:
        """Take a step event in."""
        for name, some in self._some.items():
            if name in event or some:
                some.extend([math.nan] * (len(self) - len(some)))
                some.append(event.get(name, math.nan))
        if event.get("skipped"):
            self._skipped.add(event["seq"])
        if "gpus" in event:
            self._gpus[event["seq"]] = json.dumps(event["gpus"], separators=(",", ":"))
        for name, column in self._real.items():
            column.append(event[name])
        for name in _WHOLE:
            try:
                self._whole[name].append(event[name])
            except OverflowError:
                self._whole[name] = array("q", self._whole[name])
                self._whole[name].append(event[name])

    def forget_after(self, step: int) -> None:
        """Drop the steps beyond this one, at the end."""
        steps = self._whole["step"]
        keep = len(steps)
        while keep and steps[keep - 1] > step:
            keep -= 1
        for whole in self._whole.values():
            del whole[keep:]
        for real in (*self._real.values(), *self._some.values()):
            del real[keep:]
        last = self._whole["seq"][-1] if keep else 0
        for seq in [seq for seq in reversed(self._gpus) if seq > last]:
            del self._gpus[seq]
        self._skipped = {seq for seq in self._skipped if seq <= last}

    def copy(self, last: int | None = None) -> Columns:
        """Give the last so many steps (None: all), which nobody changes any more."""
        made = Columns()
        rows = slice(0 if last is None else max(0, len(self) - last), None)
        made._whole = {name: column[rows] for name, column in self._whole.items()}
        made._real = {name: column[rows] for name, column in self._real.items()}
        made._some = {name: some[rows] for name, some in self._some.items()}
        made._skipped = set(self._skipped)
        made._gpus = dict(self._gpus)
        return made

    def column(self, name: str) -> list[Any]:
        """Give one column: ``seq``, or one of `NAMES`."""
        if name == "tokens_per_second":
            return list(map(_rate, self._whole["tokens"], self._real["seconds"]))
        return list(self._whole[name] if name in self._whole else self._real[name])

    def rows(self, *names: str) -> Iterator[dict[str, Any]]:
        """Give one dict for each step: these names (none: `NAMES`), and what not all have."""
        names = names or NAMES
        values = zip(*map(self.column, names), strict=True)
        for at, (seq, row) in enumerate(zip(self._whole["seq"], values, strict=True)):
            told = dict(zip(names, row, strict=True))
            for name, some in self._some.items():
                if some and not math.isnan(some[at]):
                    told[name] = some[at]
            if seq in self._skipped:
                told["skipped"] = True
            if seq in self._gpus:
                told["gpus"] = json.loads(self._gpus[seq])
            yield told

    @property
    def loss_scale(self) -> float | None:
        """Give that of the last step; None: the run has none."""
        scales = self._some["loss_scale"]
        return scales[-1] if scales and not math.isnan(scales[-1]) else None

    @property
    def skipped(self) -> int:
        """Count the steps that updated nothing."""
        return len(self._skipped)

    def __len__(self) -> int:
        return len(self._whole["step"])


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0
