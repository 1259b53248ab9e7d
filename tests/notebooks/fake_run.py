"""A run that only pretends: the interface of ``pantheraml.Run`` that the panel uses, no workers.

It keeps an event log as docs/protocol.md has it and takes its steps in a thread, so that the panel
can be tested without the engine: commands take effect at the next step, as in a real run.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable
from typing import Any

__all__ = ["FakeError", "FakeRun"]

Event = dict[str, Any]

PLAN = {
    "weights": 33_600_000,
    "adapters": 2_900_000,
    "gradients": 2_900_000,
    "optimizer": 5_800_000,
    "activations": 96_000_000,
    "workspace": 18_000_000,
    "communication": 0,
    "runtime": 42_000_000,
}


class FakeError(Exception):
    """Stands for ``pantheraml.Error``."""


class FakeRun:
    """A run whose loss falls by a formula.

    Parameters
    ----------
    name : str
        Its name.
    max_steps : int
        Steps until it is finished.
    seconds : float
        What one step takes.
    workers : int
        How many workers it claims to have.
    done : int
        Steps that are in the log at the start already.
    """

    def __init__(
        self,
        name: str = "fake",
        *,
        max_steps: int = 400,
        seconds: float = 0.05,
        workers: int = 1,
        done: int = 0,
    ) -> None:
        self.name = name
        self.max_steps = max_steps
        self.config = {"model_id": "fake/model", "devices": ["cpu"] * workers}
        self.state = "starting"
        self.reason = ""
        self.step = 0
        self._seconds = seconds
        self._workers = workers
        self._rate_factor = 1.0
        self._random = random.Random(1)
        self._lock = threading.RLock()
        self._log: list[Event] = []
        self._listeners: list[Callable[[Event], None]] = []
        self._pending: list[Event] = []
        self._commands = 0
        self._changed = threading.Condition(self._lock)
        self._emit("state", state="starting", step=0, reason="new run")
        self._emit(
            "plan",
            by_cause=PLAN,
            total=sum(PLAN.values()),
            available=1_073_741_824,
            max_steps=max_steps,
            recompute_layers=0,
            head_chunk=64,
            parameters=8_391_936,
            trainable=724_992,
        )
        devices = [
            {"rank": rank, "device": "cpu", "pid": 100 + rank, "state": "running"}
            for rank in range(workers)
        ]
        self._emit("workers", workers=devices)
        self._set_state("running")
        for _ in range(done):
            self._take_step()
        threading.Thread(target=self._train, daemon=True).start()

    def kept_events(self) -> list[Event]:
        """The log so far."""
        with self._lock:
            return list(self._log)

    def kept_past(self) -> tuple[list[Event], list[Event]]:
        """Its steps and evaluations: it never goes back."""
        log = self.kept_events()
        return [e for e in log if e["type"] == "step"], [e for e in log if e["type"] == "eval"]

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Calls back, from the training thread, with every event to come."""
        with self._lock:
            self._listeners.append(callback)
        return lambda: self._listeners.remove(callback)

    def pause(self) -> None:
        self._command("pause")

    def resume(self) -> None:
        self._command("resume")

    def checkpoint(self, name: str | None = None) -> None:
        self._command("checkpoint", **({"name": name} if name else {}))

    def stop(self) -> None:
        self._command("stop")

    def set(self, *, learning_rate: float) -> None:
        if learning_rate > 0.5:
            raise FakeError("learning_rate must be at most 0.5")
        self._command("set", learning_rate=learning_rate)

    def sample(self, text: str) -> None:
        """Writes a sample event; the token ids are the text's code points."""
        with self._lock:
            self._commands += 1
            number = self._commands
            ids = [ord(character) for character in text]
            half = len(ids) // 2
            self._emit("sample", command=number, step=self.step, token_ids=ids[:half], done=False)
            self._emit("sample", command=number, step=self.step, token_ids=ids[half:], done=True)

    @staticmethod
    def decode(ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def _emit(self, kind: str, **fields: Any) -> None:
        with self._lock:
            event = {"seq": len(self._log) + 1, "time": time.time(), "timeline": 0, "type": kind}
            event |= fields
            self._log.append(event)
            for listener in list(self._listeners):
                listener(event)

    def _set_state(self, state: str, reason: str = "") -> None:
        self.state, self.reason = state, reason
        self._emit("state", state=state, step=self.step, reason=reason)

    def _command(self, verb: str, **args: Any) -> None:
        with self._lock:
            if self.state in ("finished", "stopped", "failed"):
                raise FakeError(f"the run is {self.state}")
            self._commands += 1
            command = {"command": self._commands, "verb": verb, "args": args}
            self._emit("command", id=f"fake-{self._commands}", **command)
            self._pending.append(command)
            self._changed.notify_all()

    def _apply(self) -> None:
        for command in self._pending:
            verb = command["verb"]
            if verb == "set":
                now = self._rate(self.step + 1) or 1e-12
                self._rate_factor *= command["args"]["learning_rate"] / now
            self._emit("applied", step=self.step + 1, workers=list(range(self._workers)), **command)
            if verb in ("pause", "resume"):
                self._set_state("paused" if verb == "pause" else "running")
            elif verb == "stop":
                self._set_state("stopped", "asked to stop")
            elif verb == "checkpoint":
                path = f"checkpoints/step-{self.step:06d}"
                self._emit("checkpoint", step=self.step, path=path, bytes=8_900_000, seconds=0.1)
        self._pending.clear()

    def _rate(self, step: int) -> float:
        warm = min(1.0, step / 20)
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.max_steps))
        return self._rate_factor * 2e-4 * warm * cosine

    def _take_step(self) -> None:
        self.step += 1
        loss = 2.1 + 6.2 * math.exp(-self.step / 60) + self._random.gauss(0, 0.16)
        memory = [{**PLAN, "rss": 190_000_000 + rank} for rank in range(self._workers)]
        self._emit(
            "step",
            step=self.step,
            loss=loss,
            learning_rate=self._rate(self.step),
            grad_norm=0.9 + self._random.random() * 0.3,
            tokens=2048,
            seconds=self._seconds,
            tokens_per_second=4950 + self._random.gauss(0, 40),
            **({"memory": memory} if self.step % 50 == 1 else {}),
        )
        if self.step % 50 == 0:
            self._emit("eval", step=self.step, loss=loss + 0.12, labels=4096, seconds=0.2)

    def _train(self) -> None:
        while True:
            with self._lock:
                self._apply()
                if self.state == "paused":
                    self._changed.wait()
                    continue
                if self.state == "stopped":
                    return
                self._take_step()
                if self.step == self.max_steps:
                    self._set_state("finished")
                    return
            time.sleep(self._seconds)
