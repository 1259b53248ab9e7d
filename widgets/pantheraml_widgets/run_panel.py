"""The run panel: an anywidget over a run, one model per run, at most five updates a second.

Three threads meet here. The run's I/O thread calls :meth:`RunPanel._on_event`, which only queues.
The front end's messages come on the kernel's main thread or a subshell's, and are only queued as
well. Everything that is sent, and the synced trait, belongs to the panel's own sender thread; a
second one carries out commands, because those wait for the coordinator's answer.
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import anywidget
import IPython.display
import traitlets

from pantheraml_widgets.feed import Feed

if TYPE_CHECKING:
    from pantheraml import Run

__all__ = ["RunLike", "RunPanel", "panel_of"]

_STATIC = Path(__file__).parent / "static"
#: Seconds between two updates.
PERIOD = 0.2
#: Seconds after which the synced trait, which is what a saved notebook has, is renewed.
RENEWAL = 60.0
#: States after which nothing more is learnt.
_OVER = {"finished", "stopped", "failed"}


class RunLike(Protocol):
    """What the panel needs of a ``pantheraml.Run``, which describes each of them."""

    name: str

    @property
    def state(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def max_steps(self) -> int | None: ...
    def kept_events(self) -> Iterable[Mapping[str, Any]]: ...
    def kept_past(self) -> tuple[Iterable[Mapping[str, Any]], Iterable[Mapping[str, Any]]]: ...
    def subscribe(self, callback: Callable[[dict[str, Any]], None]) -> Callable[[], None]: ...
    def pause(self) -> object: ...
    def resume(self) -> object: ...
    def checkpoint(self) -> object: ...
    def stop(self) -> object: ...
    def set(self, *, learning_rate: float) -> object: ...


def _bundle(name: str) -> str:
    """A part of the front end, as text.

    Of a path anywidget keeps a watcher in the class, and each panel that was ever made in the
    watcher.
    """
    path = _STATIC / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: `make build` makes it out of widgets/js")
    return path.read_text(encoding="utf-8")


class RunPanel(anywidget.AnyWidget):
    """Live view of one run.

    Parameters
    ----------
    run : RunLike
        The run.
    record : callable, optional
        Makes the static HTML record that stands beside the widget in a saved notebook.
    decode : callable, optional
        Makes text of token ids, for samples.
    plan : callable, optional
        Makes text of a plan event.
    """

    _esm = _bundle("panel.js")
    _css = _bundle("panel.css")
    #: The whole run (``Feed.snapshot``): what a front end starts from, also without a kernel.
    snapshot = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        run: RunLike,
        *,
        record: Callable[[], str] | None = None,
        decode: Callable[[list[int]], str] | None = None,
        plan: Callable[[Mapping[str, Any]], str] | None = None,
    ) -> None:
        self._run = run
        self._record = record
        self._feed = Feed(run.name, lambda: run.max_steps, decode, plan)
        self._wake = threading.Condition()
        self._dirty = False
        self._outbox: list[dict[str, Any]] = []
        self._hello = False
        self._anew = False  # the past is another one
        self._fresh = True
        self._ended = False  # the end of the run was shown
        self._closed = False
        self._reported: set[str] = set()
        self._display_id: str | None = None
        self._commands: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        # Subscribed first and read then: an event in between comes twice and counts once.
        early: list[dict[str, Any]] = []
        gate = threading.Lock()
        opened = False

        def on_event(event: dict[str, Any]) -> None:
            with gate:
                if not opened:
                    early.append(event)
                    return
            self._on_event(event)

        self._unsubscribe = run.subscribe(on_event)
        for event in run.kept_events():
            self._feed.add(event)
        while not opened:
            if self._feed.gone_back:
                self._feed.restore(*run.kept_past())
            with gate:
                for event in early:
                    self._feed.add(event)
                early.clear()
                opened = not self._feed.gone_back
        self._feed.say(run.reason)
        if run.state in _OVER:
            self._feed.settle(run.state, run.reason, time.time())
        self._ended = self._feed.state in _OVER
        super().__init__(snapshot=self._feed.snapshot())
        self._free_replies()
        self.on_msg(self._on_message)
        for target in (self._send_loop, self._command_loop):
            threading.Thread(target=target, name="pml-panel", daemon=True).start()

    def close(self) -> None:
        """Let go of the run and end the threads; the run goes on."""
        with self._wake:
            already, self._closed = self._closed, True
            self._wake.notify()
        if not already:
            self._unsubscribe()
            self._commands.put(None)
            with _panels_lock:  # the panel holds its run, so the entry would hold both for ever
                if _panels.get(id(self._run)) is self:
                    del _panels[id(self._run)]
        super().close()

    def _free_replies(self) -> None:
        """Keep the panel's buttons alive while a cell is busy.

        ipykernel 7.4.0 answers a comm on the shell that last published on it, so a widget made by
        a busy cell is not heard before that cell ends; without its choice the front end's own
        (a subshell) stands. The name is private: other versions do not have it and need nothing.
        """
        comm = self.comm
        if hasattr(comm, "_reply_subshell_for"):
            comm._reply_subshell_for = lambda data, default: default

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        made = super()._repr_mimebundle_(**kwargs)
        if made is None or self._record is None:
            return made
        data, metadata = made
        return {**data, "text/html": self._record()}, metadata

    def _ipython_display_(self) -> None:
        """Display with an id, so that the record in the notebook can be renewed at the end."""
        made = self._repr_mimebundle_()
        if made is None:
            return
        self._display_id = f"pantheraml-{uuid.uuid4().hex}"
        data, metadata = made
        IPython.display.display(  # type: ignore[no-untyped-call]
            data, raw=True, metadata=metadata, display_id=self._display_id
        )

    # From the run's I/O thread.
    def _on_event(self, event: dict[str, Any]) -> None:
        if event.get("type") == "gone":
            news = self._feed.settle(self._run.state, self._run.reason, time.time())
        else:
            # Who attached again took in what the log had meanwhile, and nobody was told.
            missed = event.get("seq", 0) > self._feed.seq + 1
            for each in self._run.kept_events() if missed else ():
                self._feed.add(each)
            news = self._feed.add(event) or missed
        anew = self._feed.gone_back
        if anew:  # to a branch, perhaps, whose rows were dropped when it was gone back from
            self._feed.restore(*self._run.kept_past())
        if self._feed.say(self._run.reason) or news:
            with self._wake:
                self._dirty = True
                self._anew |= anew
                self._wake.notify()

    # From the front end, on whichever thread the kernel reads its comms.
    def _on_message(self, _widget: object, content: object, _buffers: object) -> None:
        if not isinstance(content, dict):
            return
        if content.get("kind") == "hello":
            with self._wake:
                self._hello = True
                self._wake.notify()
        elif content.get("kind") == "command":
            self._commands.put(content)

    def _command_loop(self) -> None:
        while (content := self._commands.get()) is not None:
            error: str | None = None
            try:
                self._carry_out(content)
            # Whatever it is, the person who pressed the button has to see it; the thread goes on.
            except Exception as problem:
                error = str(problem) or type(problem).__name__
            with self._wake:
                self._outbox.append({"kind": "reply", "id": content.get("id"), "error": error})
                self._wake.notify()

    def _carry_out(self, content: dict[str, Any]) -> None:
        verb, args = content.get("verb"), content.get("args")
        if verb == "set":
            rate = args.get("learning_rate") if isinstance(args, dict) else None
            if isinstance(rate, bool) or not isinstance(rate, int | float):
                raise ValueError("set needs a learning_rate that is a number")
            self._run.set(learning_rate=float(rate))
        elif verb == "pause":
            self._run.pause()
        elif verb == "resume":
            self._run.resume()
        elif verb == "checkpoint":
            self._run.checkpoint()
        elif verb == "stop":
            self._run.stop()
        else:
            raise ValueError(f"the panel has no command {verb!r}")

    def _send_loop(self) -> None:
        last, renewed = 0.0, time.monotonic()
        while True:
            with self._wake:
                while not (self._dirty or self._hello or self._outbox or self._closed):
                    self._wake.wait()
                # Answers go at once, numbers at most every PERIOD.
                while not (self._hello or self._outbox or self._closed):
                    left = last + PERIOD - time.monotonic()
                    if left <= 0:
                        break
                    self._wake.wait(left)
                if self._closed:
                    return
                due = time.monotonic() >= last + PERIOD
                hello, self._hello = self._hello, False
                answers, self._outbox = self._outbox, []
                self._dirty = self._dirty and not due
                anew, self._anew = self._anew and due, self._anew and not due
            try:
                for answer in answers:
                    self.send(answer)
                if hello:
                    self._welcome()
                    renewed = time.monotonic()
                elif due:
                    self._send_tick()
                    if anew or time.monotonic() > renewed + RENEWAL:
                        self.snapshot = self._feed.snapshot()
                        renewed = time.monotonic()
            # A comm that closes, a record that cannot be drawn: the next round may well go, and a
            # view that missed a tick sees the gap and asks for the whole. Not that its past is
            # another one: that is sent again.
            except Exception as problem:
                self._report(problem)
                with self._wake:
                    self._anew |= anew
                    self._dirty |= anew
            if due or hello:
                last = time.monotonic()

    def _report(self, problem: Exception) -> None:
        """Say what went wrong on the sender's thread, each thing once."""
        text = f"panel of {self._run.name}: {problem!r}"
        if text not in self._reported and not self._closed:
            self._reported.add(text)
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _welcome(self) -> None:
        fresh, self._fresh = self._fresh, False
        self.snapshot = self._feed.snapshot()
        self.send({"kind": "welcome", "fresh": fresh})

    def _send_tick(self) -> None:
        tick = self._feed.tick()
        if tick is not None:
            self.send({"kind": "tick", **tick})
        over = self._feed.state in _OVER
        if over and not self._ended:
            # The trait is what a notebook saved from here on shows without a kernel.
            self.snapshot = self._feed.snapshot()
            self._renew_record()
        self._ended = over

    def _renew_record(self) -> None:
        made = self._repr_mimebundle_()
        if self._display_id is not None and made is not None:
            data, metadata = made
            IPython.display.update_display(  # type: ignore[no-untyped-call]
                data, raw=True, metadata=metadata, display_id=self._display_id
            )


#: Open panels by their run's id; a panel holds its run, so an id here is nobody else's.
_panels: dict[int, RunPanel] = {}
_panels_lock = threading.RLock()


def panel_of(run: Run) -> RunPanel:
    """The panel of a run, made at the first call; close() lets go of both."""
    with _panels_lock:
        known = _panels.get(id(run))
        if known is None or known._closed:
            known = RunPanel(
                run, record=_recorder(run), decode=run.decode, plan=_planner(run.config)
            )
            _panels[id(run)] = known
        return known


def _planner(config: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], str]:
    def text(event: Mapping[str, Any]) -> str:
        from pantheraml.memory import Plan

        return str(Plan.of(event, config))

    return text


def _recorder(run: Run) -> Callable[[], str]:
    def record() -> str:
        from pantheraml.report import record_html

        return record_html(run)

    return record
