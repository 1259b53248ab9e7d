"""Where the time of a step goes: each op beside what the machine can do."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pantheraml import _native, hub
from pantheraml.steps import Program, seconds, short

if TYPE_CHECKING:
    from pantheraml.run import Run

#: Steps in a row that a model is profiled over: as many as workers have timed when they tell of the
#: tenth, and, where a GPU's kernels were still being compiled then, of the thirtieth or later.
_STEPS = 7
#: What those steps have whatever is asked for: none of it is part of what a step costs.
_FIXED: dict[str, Any] = {
    "max_steps": 10**6, "num_train_epochs": None, "learning_rate": 1e-9, "packing": False,
    "lr_scheduler_type": "constant", "lr_scheduler_kwargs": None, "warmup_steps": 0,
    "warmup_ratio": 0.0, "eval_steps": None, "eval_strategy": None, "eval_split": None,
    "save_steps": None, "save_strategy": "no", "load_best_model_at_end": False,
    "early_stopping_patience": None, "overlong": None, "chat_template": None,
    "chat_template_kwargs": None,
}  # fmt: skip


@dataclass(frozen=True)
class OpProfile:
    """Ops of one label, of all layers and micro-batches of a step.

    Attributes
    ----------
    calls, seconds
        In one step.
    share
        Of the step's time.
    flops, bytes
        A second, while it ran. Bytes are counted as if nothing stayed in a cache.
    limit
        What holds it up at best: "gemm" or "memory".
    of_limit
        The least time that the limit allows, as a share of what it took. Above 1 where operands
        came out of a cache.
    """

    label: str
    op: str
    calls: float
    seconds: float
    share: float
    flops: float
    bytes: float
    limit: str
    of_limit: float


@dataclass(frozen=True)
class Profile:
    """What the ops of a step took. Made by :meth:`Run.profile` and :func:`pantheraml.profile`.

    Attributes
    ----------
    ops
        The dearest first.
    step, steps
        Measured over so many steps, up to this one.
    seconds
        Of one step, with all that is not an op.
    tokens
        Of one step.
    gemm_flops, gemm_size
        The machine's peak, measured by the same worker: operations a second of a product of square
        matrices with so many rows. 0: there was no room to measure it.
    copy_bytes, copy_size
        Likewise bytes a second of a copy that reads and writes so many.
    of_peak
        Share of `gemm_flops` that the whole step reached.
    """

    ops: tuple[OpProfile, ...]
    step: int
    steps: int
    seconds: float
    tokens: float
    gemm_flops: float
    gemm_size: int
    copy_bytes: float
    copy_size: int
    of_peak: float
    program: Program

    @classmethod
    def of(cls, program: Program, event: Mapping[str, Any]) -> Profile:
        """Make it of a program with times, and of the profile event that they are from."""
        gemm, copy = float(event.get("gemm_flops", 0)), float(event.get("copy_bytes", 0))
        step = event["seconds"] / event["steps"]
        sums: dict[tuple[str, str], list[float]] = {}
        for op in program:
            if op.seconds is None:
                continue
            row = sums.setdefault((op.name, op.op), [0.0] * 4)
            for i, value in enumerate((1.0, op.seconds, op.flops, op.bytes)):
                row[i] += op.calls * value
        ops = [_one(label, op, row, step, gemm, copy) for (label, op), row in sums.items()]
        ops.sort(key=lambda row: -row.seconds)
        work = sum(row[2] for row in sums.values())
        return cls(
            tuple(ops),
            event["step"],
            event["steps"],
            step,
            event["tokens"] / event["steps"],
            gemm,
            int(event.get("gemm_size", 0)),
            copy,
            int(event.get("copy_size", 0)),
            work / step / gemm if gemm and step else 0.0,
            program,
        )

    def rows(self) -> list[dict[str, Any]]:
        """Give one dict for each row of `ops`, for ``pandas.DataFrame``."""
        return [asdict(op) for op in self.ops]

    def to_trace(self, path: str | os.PathLike[str]) -> Path:
        """Write a step as a Chrome trace file, for chrome://tracing, Perfetto or speedscope.

        The step is put together of the mean of each op: one micro-batch, then the update.
        """
        events: list[dict[str, Any]] = []
        at = 0.0
        for number, (segment, ops) in enumerate(self.program.segments()):
            begun = at
            for op in ops:
                if op.seconds is None:
                    continue
                args = {
                    "op": op.op,
                    "layer": op.layer,
                    "calls in a step": op.calls,
                    "GFLOP/s": round(op.flops / op.seconds * 1e-9, 1) if op.seconds else None,
                    "GB/s": round(op.bytes / op.seconds * 1e-9, 1) if op.seconds else None,
                    "what it does": op.sentence,
                }
                events.append(_span(op.name, op.op, at, op.seconds, 1, args))
                at += op.seconds
            if at > begun:
                events.append(_span(segment, "segment", begun, at - begun, 0, {"order": number}))
        about = {"step": self.step, "of_peak": self.of_peak, "gemm_flops": self.gemm_flops}
        found = Path(path)
        found.write_text(json.dumps({"traceEvents": events, "otherData": about}), encoding="utf-8")
        return found

    def _heading(self) -> list[str]:
        lines = [
            f"a step of {self.tokens:,.0f} tokens took {seconds(self.seconds)} "
            f"(mean of {self.steps} up to step {self.step}); ops "
            f"{100 * sum(op.share for op in self.ops):.1f} % of it"
        ]
        if self.gemm_flops:
            lines.append(
                f"this machine, beside it: GEMM {self.gemm_flops * 1e-9:,.0f} GFLOP/s (square, "
                f"{self.gemm_size}), copy {self.copy_bytes * 1e-9:,.0f} GB/s "
                f"({self.copy_size / 2**20:.0f} MiB)"
            )
            lines.append(f"the whole step reaches {100 * self.of_peak:.1f} % of the GEMM peak")
        return lines

    def __str__(self) -> str:
        lines = self._heading()
        lines.append(
            f"{'what':<28}{'op':<14}{'calls':>6}{'time':>9}{'share':>8}{'GFLOP/s':>9}{'GB/s':>8}"
            "  of its limit"
        )
        for op in self.ops:
            of = f"{100 * op.of_limit:5.0f} % {op.limit}" if op.limit else ""
            lines.append(
                f"{op.label:<28}{op.op:<14}{op.calls:>6.0f}{seconds(op.seconds):>9}"
                f"{100 * op.share:>6.1f} %{op.flops * 1e-9:>9.1f}{op.bytes * 1e-9:>8.1f}  {of}"
            )
        return "\n".join(lines) + "\n"

    def __repr__(self) -> str:
        return (
            f"<Profile: step {self.step}, {seconds(self.seconds)}, "
            f"{100 * self.of_peak:.1f} % of the GEMM peak>"
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<tr><td style="text-align:left">{escape(op.label)}</td><td>{escape(op.op)}</td>'
            f"<td>{op.calls:.0f}</td><td>{seconds(op.seconds)}</td><td>{100 * op.share:.1f} %</td>"
            f"<td>{short(op.flops)}</td><td>{short(op.bytes)}</td>"
            f"<td>{f'{100 * op.of_limit:.0f} % {op.limit}' if op.limit else ''}</td></tr>"
            for op in self.ops
        )
        return (
            "".join(f"<p>{escape(line)}</p>" for line in self._heading())
            + "<table><thead><tr><th>what</th><th>op</th><th>calls</th><th>time</th><th>share</th>"
            f"<th>FLOP/s</th><th>bytes/s</th><th>of its limit</th></tr></thead>"
            f"<tbody>{rows}</tbody></table>"
        )


def _one(label: str, op: str, row: list[float], step: float, gemm: float, copy: float) -> OpProfile:
    calls, took, flops, moved = row
    arithmetic = flops / gemm if gemm else 0.0
    memory = moved / copy if copy else 0.0
    limit = "" if not (arithmetic or memory) else "gemm" if arithmetic > memory else "memory"
    return OpProfile(
        label,
        op,
        calls,
        took,
        took / step if step else 0.0,
        flops / took if took else 0.0,
        moved / took if took else 0.0,
        limit,
        max(arithmetic, memory) / took if took else 0.0,
    )


def _span(
    name: str, kind: str, at: float, took: float, thread: int, args: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": name, "cat": kind, "ph": "X", "ts": at * 1e6, "dur": took * 1e6, "pid": 1,
        "tid": thread, "args": args,
    }  # fmt: skip


def event_of(events: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Give the last profile that was told of whole, its chunks together."""
    whole: dict[str, Any] | None = None
    parts: list[Mapping[str, Any]] = []
    for event in events:
        if event["type"] != "profile":
            continue
        if parts and (parts[0]["step"], parts[0]["timeline"]) != (event["step"], event["timeline"]):
            parts = []
        parts.append(event)
        if event["done"]:
            whole = {**event, "ops": [row for part in parts for row in part["ops"]]}
            parts = []
    return whole


def of_model(model: str | os.PathLike[str], settings: dict[str, Any]) -> Profile:
    """Make steps on random tokens, every row full, until enough of them were timed."""
    import pantheraml as pm
    from pantheraml.aside import runs_in

    resolved = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1} | settings
    length = resolved.setdefault("max_length", 256)
    rows = resolved["per_device_train_batch_size"] * resolved["gradient_accumulation_steps"]
    draw = random.Random(0)
    vocab = int(_native.check_model(hub.resolve(model))["vocab"])
    data = []
    for _ in range(rows):
        ids = [draw.randrange(vocab) for _ in range(length)]
        data.append({"input_ids": ids, "labels": ids})
    with tempfile.TemporaryDirectory(prefix="pml-profile-") as name, runs_in(Path(name)):
        run = pm.finetune(model, data, name="profile", **resolved | _FIXED)
        run._wait_for(lambda: _timed(run) or run._will_not_end(), None, "the times of its ops")
        if not _timed(run):
            run.wait()  # says why it is over
        found = run.profile()
        run.stop(wait=True)
        return found


def _timed(run: Run) -> bool:
    event = event_of(run._notes())
    return event is not None and event["steps"] >= _STEPS
