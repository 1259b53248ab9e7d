"""The step program as an object: every op of a step, what it costs, and what it took."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any, overload

#: What a segment of the program does.
SEGMENTS = {
    "micro": "forward and backward of a micro-batch",
    "norm": "gradients: sum over workers, norm, clipping",
    "update": "the optimizer moves the parameters",
    "clear": "gradients back to zero",
    "eval": "forward and loss on held-out data",
    "generate": "sampling: new tokens against cached keys and values",
}


@dataclass(frozen=True)
class Op:
    """One op of the step program.

    Attributes
    ----------
    node
        Its number.
    segment
        Which part of a step it belongs to: one of `SEGMENTS`.
    label, layer
        What it is there for ("gate_up backward"), and in which layer; None outside the layers.
    op, sentence
        Which kind of op it is, and what that does.
    again
        Whether it makes again what was not kept from the forward pass.
    shapes
        Rows and columns of its operands, for a full micro-batch.
    flops, bytes
        Floating-point operations, and bytes to and from memory if nothing stayed in a cache.
    predicted
        Seconds by the planner's table of rates.
    calls, seconds
        How often it ran in each of the steps that were measured, and seconds of one of these
        calls; 0 and None where nothing was measured.
    """

    node: int
    segment: str
    label: str
    layer: int | None
    op: str
    sentence: str
    again: bool
    shapes: Mapping[str, tuple[int, int]]
    flops: float
    bytes: float
    predicted: float
    calls: float = 0.0
    seconds: float | None = None

    @property
    def name(self) -> str:
        """The label, and whether it is made again."""
        return f"{self.label} (again)" if self.again else self.label


class Program(Sequence[Op]):
    """Every op of a step, in order. Made by :func:`pantheraml.program` and :meth:`Run.program`.

    Its text and its HTML are tables; ``pandas.DataFrame(program.rows())`` is one too.

    Attributes
    ----------
    step, steps
        After which step its times were measured, over how many; 0: they were not.
    """

    def __init__(self, ops: Sequence[Op], document: Mapping[str, Any], event: Any = None) -> None:
        self._ops = tuple(ops)
        self.document = document
        self.step = int(event["step"]) if event else 0
        self.steps = int(event["steps"]) if event else 0

    @classmethod
    def parse(cls, text: str, event: Mapping[str, Any] | None = None) -> Program:
        """Make it of the engine's JSON and, where there is one, of a profile event."""
        document = json.loads(text)
        sentences = document["ops"]
        times = {row["node"]: row for row in event["ops"]} if event else {}
        steps = event["steps"] if event else 1
        ops = []
        for segment in document["segments"]:
            for node in segment["nodes"]:
                shapes = {o["name"]: (o["rows"], o["cols"]) for o in node["operands"]}
                shapes.pop("ws", None)
                took = times.get(node["node"])
                ops.append(
                    Op(
                        node["node"],
                        segment["name"],
                        node["label"],
                        node.get("layer"),
                        node["op"],
                        sentences[node["op"]],
                        node["again"],
                        shapes,
                        took["flops"] / took["calls"] if took else node["flops"],
                        took["bytes"] / took["calls"] if took else node["bytes"],
                        node["predicted"],
                        took["calls"] / steps if took else 0.0,
                        took["seconds"] / took["calls"] if took else None,
                    )
                )
        return cls(ops, document, event)

    @overload
    def __getitem__(self, index: int) -> Op: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Op]: ...
    def __getitem__(self, index: int | slice) -> Op | Sequence[Op]:
        return self._ops[index]

    def __len__(self) -> int:
        return len(self._ops)

    def rows(self) -> list[dict[str, Any]]:
        """Give one dict for each op, for ``pandas.DataFrame``."""
        return [asdict(op) for op in self._ops]

    def segments(self) -> Iterator[tuple[str, list[Op]]]:
        """Give the ops of each segment that has any."""
        for segment in SEGMENTS:
            found = [op for op in self._ops if op.segment == segment]
            if found:
                yield segment, found

    def sentences(self) -> dict[str, str]:
        """Give what each kind of op does, of those that are there."""
        return {op.op: op.sentence for op in self._ops}

    def _measured(self) -> str:
        if not self.steps:
            return f"times are predicted from the rates of {self.document['rates']}"
        return f"times measured, mean of {self.steps} steps up to step {self.step}"

    def __str__(self) -> str:
        lines = [self._measured()]
        for segment, ops in self.segments():
            lines += ["", f"{segment}: {SEGMENTS[segment]}"]
            lines.append(
                f"{'node':>5} {'layer':>5}  {'what':<26}{'op':<14}{'time':>9}"
                f"{'FLOPs':>9}{'bytes':>9}  operands"
            )
            for op in ops:
                shapes = " ".join(f"{k}[{r},{c}]" for k, (r, c) in op.shapes.items())
                layer = "" if op.layer is None else op.layer
                lines.append(
                    f"{op.node:>5} {layer:>5}  {op.name:<26}{op.op:<14}{_time_of(op):>9}"
                    f"{short(op.flops):>9}{short(op.bytes):>9}  {shapes}"
                )
        lines += ["", "ops"]
        lines += [f"  {name:<14}{sentence}" for name, sentence in self.sentences().items()]
        return "\n".join(lines) + "\n"

    def __repr__(self) -> str:
        return f"<Program: {len(self)} ops; {self._measured()}>"

    def _repr_html_(self) -> str:
        parts = [f"<p>{escape(self._measured())}</p>"]
        for segment, ops in self.segments():
            rows = "".join(
                f'<tr title="{escape(op.sentence)}"><td>{op.node}</td>'
                f"<td>{'' if op.layer is None else op.layer}</td><td>{escape(op.name)}</td>"
                f"<td>{escape(op.op)}</td><td>{_time_of(op)}</td><td>{short(op.flops)}</td>"
                f"<td>{short(op.bytes)}</td><td style='text-align:left'>"
                + escape(" ".join(f"{k}[{r}×{c}]" for k, (r, c) in op.shapes.items()))
                + f"<br><small>{escape(op.sentence)}</small></td></tr>"
                for op in ops
            )
            parts.append(
                f"<details{' open' if segment == 'micro' else ''}><summary><b>{segment}</b>: "
                f"{escape(SEGMENTS[segment])} ({len(ops)} ops)</summary>"
                "<div style='max-height:30em;overflow:auto'><table><thead><tr><th>node</th>"
                "<th>layer</th><th>what</th><th>op</th><th>time</th><th>FLOPs</th><th>bytes</th>"
                f"<th>operands</th></tr></thead><tbody>{rows}</tbody></table></div></details>"
            )
        return "".join(parts)


def _time_of(op: Op) -> str:
    return seconds(op.predicted if op.seconds is None else op.seconds)


def short(value: float) -> str:
    """Write 1234567 as ``1.2 M``."""
    for unit in ("", " K", " M", " G", " T"):
        if value < 1000:
            return f"{value:.1f}{unit}" if unit and value < 10 else f"{value:.0f}{unit}"
        value /= 1000
    return f"{value:.1f} P"


def seconds(value: float) -> str:
    """Write seconds as people read them: ``12.3 ms``."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.0f} ns"
