"""What comes back from a run's verbs: commands on their way, evaluations, samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pantheraml.errors import BusyError, NotFoundError
from pantheraml.record import CommandRecord

if TYPE_CHECKING:
    from pantheraml.link import Link
    from pantheraml.standing import Standing


class Command:
    """A command that the coordinator has accepted.

    Attributes
    ----------
    number
        Its place in the run's one order.
    verb
        ``pause``, ``set``, …
    trouble
        Why it is not in the run's log yet ("": it is): it is carried out, but would be lost with
        a coordinator that dies before the disk takes it. The next coordinator gives its number to
        another command; this one is ``refused`` then.
    """

    def __init__(self, run: Standing, link: Link, verb: str, answer: Mapping[str, Any]) -> None:
        self._run = run
        self._link = link
        self._id = str(answer["id"])
        self.number = int(answer["command"])
        self.verb = verb
        self.trouble = str(answer.get("trouble", ""))

    @property
    def _record(self) -> CommandRecord | None:
        """What the log says of it."""
        if self.is_lost:
            why = "its coordinator died before it was in the log; send it again"
            return CommandRecord(self.number, self.verb, {}, self._id, "refused", reason=why)
        return self._run._record.commands.get(self.number)

    @property
    def is_lost(self) -> bool:
        """Whether it went with its coordinator: what the log has under its number is another's."""
        record = self._run._record.commands.get(self.number)
        if record is not None:
            return record.id not in ("", self._id)
        link = self._run._link
        return link is not None and link is not self._link and link.caught_up.is_set()

    @property
    def state(self) -> str:
        """``accepted``, ``applied`` or ``refused``."""
        record = self._record
        return "accepted" if record is None else record.state

    @property
    def step(self) -> int | None:
        """The update from which it is in force; None until it is applied."""
        record = self._record
        return None if record is None else record.step

    @property
    def workers(self) -> list[int]:
        """Ranks that applied it."""
        record = self._record
        return [] if record is None else list(record.workers)

    def wait(self, timeout: float | None = None) -> Command:
        """Wait until it is applied.

        Raises
        ------
        BusyError
            It was refused, or the run ended before it could be applied.
        PeerError, DeniedError
            Of a run that is elsewhere: the connection was lost, or the key revoked, meanwhile.
        TimedOut
            The timeout (seconds) passed.
        """
        self._run._wait_for(
            lambda: self.state != "accepted" or self._run._nothing_comes(), timeout, f"{self.verb}"
        )
        if self.state == "refused":
            record = self._record
            raise BusyError(f"{self.verb} was refused: {record.reason if record else ''}")
        if self.state != "applied":
            self._run._connected()
            raise BusyError(f"the run is {self._run.state}; {self.verb} was not applied")
        return self

    def __repr__(self) -> str:
        if self.state == "applied":
            workers = f"{len(self.workers)}/{len(self._run.workers)} workers"
            return f"{self.verb}: applied at step {self.step} on {workers}"
        return f"{self.verb}: {self.state}"


@dataclass(frozen=True)
class Sample:
    """What the model wrote.

    Attributes
    ----------
    token_ids
        New tokens, an end-of-text token included.
    step
        Optimizer steps that the weights had made.
    """

    token_ids: list[int]
    step: int
    _decode: Callable[[list[int]], str]
    _stop: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The new tokens as text, without special tokens, up to where a stop string begins.

        Raises
        ------
        NotFoundError
            The model folder has no tokenizer.
        """
        text = self._decode(self.token_ids)
        found = [at for at in (text.find(one) for one in self._stop) if at >= 0]
        return text[: min(found, default=len(text))]

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        try:
            return f"Sample({self.text!r}, step={self.step})"
        except NotFoundError:
            return f"Sample(token_ids={self.token_ids!r}, step={self.step})"


@dataclass(frozen=True)
class Evaluation:
    """Loss on the held-out data.

    Attributes
    ----------
    step
        Optimizer steps that the weights had made.
    loss
        Mean over labelled tokens, whatever batches they were in. transformers' Trainer takes a mean
        over batches, which depends on their size; with one batch of all rows it is this.
    labels
        Labelled tokens.
    seconds
        It took.
    """

    step: int
    loss: float
    labels: int
    seconds: float

    @classmethod
    def of(cls, event: dict[str, Any]) -> Evaluation:
        """Take it out of an event."""
        return cls(event["step"], event["loss"], event["labels"], event["seconds"])

    def __float__(self) -> float:
        return self.loss
