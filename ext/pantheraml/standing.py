"""How a run stands: what its events add up to, in the words that people ask for it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pantheraml import _native
from pantheraml.columns import NAMES, Columns
from pantheraml.commands import Evaluation
from pantheraml.connecting import Connecting
from pantheraml.errors import NotFoundError, PeerError
from pantheraml.memory import Plan
from pantheraml.record import Checkpoint, Event, LogReader, numbered

if TYPE_CHECKING:
    from pantheraml.profiles import Profile
    from pantheraml.steps import Program


class Standing(Connecting):
    """What can be read of a run; every value is a copy, and may be kept."""

    @property
    def step(self) -> int:
        """Optimizer steps made; `history` has them once the disk has taken what tells of them."""
        said = self._unlogged()
        return self._record.step if said is None else max(self._record.step, int(said["step"]))

    @property
    def max_steps(self) -> int:
        """Optimizer steps wanted; 0 while that is not known yet."""
        return self._record.max_steps or int(self.config["max_steps"])

    @property
    def history(self) -> list[dict[str, Any]]:
        """One dict for each optimizer step of the current timeline.

        Keys: ``step, loss, learning_rate, grad_norm, tokens, tokens_per_second, seconds``. The
        loss is the token-weighted mean over the step's global batch, before its update.

        On a GPU also ``mfu``, where the card's peak is known: what the model asked of rank 0's
        card, a second, as a share of it. And ``gpus``, every ten seconds: as :attr:`gpus` then.
        """
        return list(self._curve().rows())

    def _curve(self, last: int | None = None) -> Columns:
        """Give the steps of the current timeline (the last so many of them) as columns."""
        with self._changed:
            return self._record.history.copy(last)

    def events(self) -> list[Event]:
        """Give all events so far, as in ``events.jsonl``: they are read there.

        Where there is no such file (the run is elsewhere, or its folder was removed) the
        coordinator is asked for them; where it is gone too, :meth:`kept_events` are all.
        """
        last = self._record.seq
        found = [event for event in self._logged() if event["seq"] <= last]
        if not found and last > 0:
            found = self.kept_events() if self._link is None else self._replayed(last)
        return found

    def kept_events(self) -> list[Event]:
        """Give the events that this process has kept, without reading or asking for anything.

        All but the steps, as they are, and the steps of the current timeline with what `history`
        has of them. The last of these has the newest figures of memory.
        """
        notes, steps, _, memory = self._kept()
        return sorted(notes + _told(steps, memory), key=lambda event: int(event["seq"]))

    def kept_past(self) -> tuple[list[Event], list[Event]]:
        """Give the steps and the evaluations that have happened, as events of these types.

        They are those of `history` and `evaluations`. Who goes by the events alone may have others:
        after somebody went back to a checkpoint that was gone back from before.
        """
        _, steps, evals, memory = self._kept()
        return _told(steps, memory), evals

    def _kept(self) -> tuple[list[Event], Columns, list[Event], Any]:
        """Give copies of one moment; what is made of them is made without the lock."""
        with self._changed:
            record = self._record
            return list(record.notes), record.history.copy(), list(record.evals), record.memory

    def _notes(self) -> list[Event]:
        """Give every event but the steps."""
        with self._changed:
            return list(self._record.notes)

    def _logged(self) -> Iterator[Event]:
        for piece in LogReader(self.folder).pieces():
            yield from map(numbered, piece)

    def _replayed(self, last: int) -> list[Event]:
        found: list[Event] = []
        while len(found) < last:
            answer = self._ask("replay", **{"from": len(found) + 1})
            if not answer["events"]:
                raise PeerError(f"the coordinator of {self.name} has no event {len(found) + 1}")
            found += map(numbered, answer["events"])
        return found[:last]

    def memory(self) -> list[dict[str, int]]:
        """Bytes by cause for each worker, and what its process has (``rss``).

        Before the first step these are the plan's. On a GPU also what its driver says, as far as
        it does: ``memory_total``, ``memory_used``, ``memory_ours`` and ``memory_others`` (of other
        processes) of the card.
        """
        with self._changed:
            if self._record.memory:
                workers = [dict(worker) for worker in self._record.memory]
            elif self._record.plan is not None:
                planned = self._record.plan["by_cause"]
                workers = [dict(planned) for _ in self.config["devices"]]
            else:
                return []
            for gpu in self.gpus:
                if gpu["rank"] < len(workers):
                    said = {k: v for k, v in gpu.items() if k.startswith("memory_")}
                    said.pop("memory_clock", None)
                    workers[gpu["rank"]] |= said
            return workers

    @property
    def gpus(self) -> list[dict[str, Any]]:
        """What the driver last said of each worker's GPU; empty where none runs on one.

        ``rank``, ``name``, ``age`` (seconds since it was read), ``utilisation`` (0 to 1),
        ``memory_total``, ``memory_used``, ``memory_ours``, ``memory_others`` (bytes),
        ``temperature`` (°C), ``power``, ``power_limit`` (watts), ``clock``, ``clock_most``,
        ``memory_clock`` (MHz), ``throttle`` (why clocks are lower than they could be; may be
        empty), ``peak_flops`` (the card's data sheet), ``mfu``. What the driver does not say is
        not there, and named in ``missing``; ``trouble`` says why it says nothing.
        """
        with self._changed:
            beating = [] if self._heartbeat is None else self._heartbeat.get("workers", [])
            live = [dict(worker["gpu"]) for worker in beating if "gpu" in worker]
            return live or [dict(gpu) for gpu in self._record.gpus]

    @property
    def plan(self) -> Plan | None:
        """What the workers have planned, before the first step; None until they have."""
        plan = self._record.plan
        return None if plan is None else Plan.of(plan, self.config)

    def program(self) -> Program:
        """Every op of a step, explained, with shapes, FLOPs, bytes and the time it took.

        Times are of the steps that the workers timed last (after the third, the tenth, the
        thirtieth, … since they began); before that they are predicted.

        Raises
        ------
        NotFoundError
            There is no plan yet, or the model's folder is not on this machine.
        """
        from pantheraml.profiles import event_of
        from pantheraml.steps import Program

        with self._changed:
            plan = self._record.plan
        if plan is None:
            raise NotFoundError(f"run {self.name} is {self.state} and has no plan yet")
        levels = ("none", "norms", "attention", "layer")
        limits = plan["limits"]
        text = _native.program(
            json.dumps(self.config),
            (
                limits["tokens"],
                limits["docs"],
                limits["labels"],
                limits["max_doc"],
                limits["generate_length"],
            ),
            choices=(
                levels.index(plan.get("recompute", "none")),
                plan["recompute_layers"],
                plan["head_chunk"],
                plan.get("pieces", 1),
                int(plan.get("moments_8bit", False)),
                plan.get("unpacked", 0),
                levels.index(plan.get("offload", "none")),
                plan.get("offload_layers", 0),
            ),
        )
        return Program.parse(text, event_of(self._notes()))

    def profile(self) -> Profile:
        """Where the time of a step goes, op by op, beside what the machine can do.

        Raises
        ------
        NotFoundError
            No step was timed yet: the first are told of after the third step.
        """
        from pantheraml.profiles import Profile, event_of

        event = event_of(self._notes())
        if event is None:
            raise NotFoundError(
                f"run {self.name} ({self.state}, step {self.step}) has no times yet: its workers "
                "tell of them after their third step"
            )
        return Profile.of(self.program(), event)

    @property
    def doing(self) -> tuple[str, float] | None:
        """What it is busy with that takes long, and how far it is (0 to 1).

        Before it runs: tokenising, checking a checkpoint, loading; later a save to a slow disk.
        """
        progress = self._record.progress
        return None if progress is None else (progress["what"], progress["fraction"])

    @property
    def workers(self) -> list[dict[str, Any]]:
        """One ``{rank, device, pid, state}`` for each worker."""
        with self._changed:
            return [dict(worker) for worker in self._record.workers]

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Checkpoints that are there, oldest first."""
        with self._changed:
            found = list(self._record.checkpoints)
        return [checkpoint for checkpoint in found if checkpoint.path.is_dir()]

    @property
    def best_checkpoint(self) -> Checkpoint | None:
        """The checkpoint of the best evaluation of those that were saved; None: there is none.

        Evaluations that a person asked for, and the one before the first step, are not among them.
        """
        with self._changed:
            events = list(self._record.evals)
        losses: dict[int, float] = {}
        for event in events:
            loss = float(event["loss"])
            if event["step"] > 0 and "command" not in event and math.isfinite(loss):
                losses[event["step"]] = loss
        saved = [c for c in reversed(self.checkpoints) if c.step in losses and not c.abandoned]
        return min(saved, key=lambda c: (losses[c.step], c.step), default=None)

    @property
    def _ends_with(self) -> Checkpoint | None:
        """The checkpoint whose weights a finished run has, where these are not its last ones."""
        if self.state != "finished" or not self.config.get("load_best_model_at_end"):
            return None
        with self._changed:
            own = [e for e in self._record.evals if e["step"] > 0 and "command" not in e]
        finite = [e for e in own if math.isfinite(float(e["loss"]))]
        best = min(finite, key=lambda e: (float(e["loss"]), e["step"]), default=None)
        found = self.best_checkpoint
        # Where no checkpoint has those any more the run has ended with its last weights.
        return found if best is not None and found and found.step == best["step"] else None

    @property
    def evaluations(self) -> list[Evaluation]:
        """Every evaluation of the current timeline, in the order in which they came.

        One that was asked for once a run had ended with its best weights is of their step.
        """
        with self._changed:
            return [Evaluation.of(event) for event in self._record.evals]

    @property
    def refused(self) -> dict[str, int]:
        """What the coordinator turned away at its doors, counted by kind."""
        answer = self._ask("status")
        return dict(answer["refused"])


def _told(steps: Columns, memory: Any) -> list[Event]:
    """Steps as events; the last of them says what memory is used for."""
    told: list[Event] = [{"type": "step", **row} for row in steps.rows("seq", *NAMES)]
    if told:
        told[-1]["memory"] = memory
    return told
