"""A memory plan: what a run takes of a device, by cause, before it takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from pantheraml.plain import plain

#: Causes in the order in which they are shown.
CAUSES = (
    "weights",
    "adapters",
    "gradients",
    "optimizer",
    "activations",
    "workspace",
    "communication",
    "runtime",
)

_OPTIMIZERS = {
    "adamw": "AdamW's moments in 32 bits",
    "adamw_8bit": "AdamW's moments in 8 bits",
    "sgd": "SGD",
}


@dataclass(frozen=True)
class Plan:
    """Memory of one device, and what was chosen so that it has room.

    Attributes
    ----------
    model
        As the user gave it.
    devices
        One for each worker; they all have the same plan.
    optim
        ``"adamw"``, ``"adamw_8bit"`` or ``"sgd"``; of ``optim="adamw_auto"`` what became of it.
    by_cause
        Bytes for each of `CAUSES`.
    total
        Their sum.
    available
        Bytes the plan had to fit in; 0 where there was no limit.
    recompute_layers
        Layers of which something is computed again in the backward pass.
    head_chunk
        Labelled rows whose logits exist at one time.
    parameters, trainable
        Of the model, and of them (or of the adapter) trained.
    recompute
        What those layers make again: "norms", "attention" or the whole "layer"; the
        layers after them stand one level lower.
    pieces
        A micro-batch is run in about so many, cut between documents.
    moments_8bit
        With ``optim="adamw_auto"``: AdamW's moments are in 8 bits.
    unpacked
        With a ``quant`` on a GPU: so many linear layers (four a layer of the model) have their
        weights in memory that was left as products read them: of NF4 the numbers, in place of
        codes to unpack at each use; of FP8 the codes turned round, beside them. The numbers, and
        so the run's bits, are the same.
    offload_layers
        Layers of which what the backward pass reads waits in host memory, copied there and
        back while other layers run.
    offload
        What those layers make again all the same.
    host
        Bytes of host memory, page-locked, that it waits in.
    left
        Bytes that a run may still plan with of its GPU, where that is here; else 0.
    reserved
        Which runs have how much of that GPU, in words.
    unknown
        Why nobody can tell what other processes have of it; empty where that is known.
    """

    model: str
    devices: tuple[str, ...]
    optim: str
    by_cause: Mapping[str, int]
    total: int
    available: int
    recompute_layers: int
    head_chunk: int
    parameters: int
    trainable: int
    recompute: str = "none"
    pieces: int = 1
    moments_8bit: bool = False
    unpacked: int = 0
    offload_layers: int = 0
    offload: str = "none"
    host: int = 0
    left: int = 0
    reserved: str = ""
    unknown: str = ""

    @classmethod
    def of(cls, fields: Mapping[str, Any], run: Mapping[str, Any]) -> Plan:
        """Take a plan for a run.json out of an event or the engine's answer."""
        names = cls.__dataclass_fields__
        optim = run.get("optim", "adamw")
        if optim == "adamw_auto":
            optim = "adamw_8bit" if fields.get("moments_8bit") else "adamw"
        about = {"model": run["model_id"], "devices": tuple(run["devices"]), "optim": optim}
        known = {name: value for name, value in fields.items() if name in names}
        return cls(**{"available": 0, **known, **about})

    def __str__(self) -> str:
        each = "each of " if len(self.devices) > 1 else ""
        lines = [f"plan of {plain(self.model)} on {each}{', '.join(map(plain, self.devices))}"]
        rows = [(cause, self.by_cause.get(cause, 0)) for cause in CAUSES]
        lines += [f"{cause:<14}{size(bytes_):>12}" for cause, bytes_ in rows if bytes_]
        lines.append(f"{'total':<14}{size(self.total):>12}")
        if self.available:
            lines[-1] += f"   of {size(self.available)}"
        lines.append(
            f"{self.parameters:,} parameters, {self.trainable:,} trained; "
            + f"{_OPTIMIZERS[self.optim]}; "
            + (
                f"{self.recompute} recomputed in {self.recompute_layers} layers"
                if self.recompute_layers
                else "nothing recomputed"
            )
            + (f"; micro-batches in {self.pieces} pieces" if self.pieces > 1 else "")
            + (
                f"; weights of {self.unpacked} linear layers unpacked for good"
                if self.unpacked
                else ""
            )
            + (
                f"; activations of {self.offload_layers} layers wait in {size(self.host)}"
                " of host memory"
                if self.offload_layers
                else ""
            )
        )
        if self.left or self.reserved:
            lines.append(
                f"the GPU has {'at most ' if self.unknown else ''}{size(self.left)} left"
                + (f"; reserved by runs: {self.reserved}" if self.reserved else "")
                + (f"; what others have is not known: {self.unknown}" if self.unknown else "")
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def size(value: float) -> str:
    """Write bytes as people read them: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError
