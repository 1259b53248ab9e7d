"""Run: one training run as a notebook sees it.

The run itself lives in the coordinator's and the workers' processes. This object follows it by its
events, on a thread of its own, and sends it commands; losing the object, the kernel or the page
changes nothing about the run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from pantheraml import config, folders
from pantheraml.asking import Asking
from pantheraml.checks import names_checked, path_of
from pantheraml.commands import Command, Evaluation, Sample
from pantheraml.errors import BusyError, InvalidError, NotFoundError, NotInThisVersion, PeerError
from pantheraml.following import followed, remember
from pantheraml.notebook import kernel
from pantheraml.plain import plain
from pantheraml.record import ENDED, Checkpoint, Event

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pantheraml.export import Export
    from pantheraml.sampling import SampleStream, SampleStreams
    from pantheraml.sharing import Share

#: What `Run.set` can change, with its range.
TUNABLE: dict[str, tuple[float, float]] = {
    "lora_dropout": (0, 1),
    "gradient_accumulation_steps": (1, 65536),
    "warmup_steps": (0, 1e12),
    "learning_rate": (0, 1e3),
    "weight_decay": (0, 1e3),
    "max_grad_norm": (0, 1e9),
    "eval_steps": (0, 1e12),
    "save_steps": (0, 1e12),
}


class Run(Asking):
    """A run: running, paused, or long over.

    Made by :func:`pantheraml.finetune`, :func:`pantheraml.attach` and :func:`pantheraml.resume`.
    All methods may be called from any thread. Those that wait stay interruptible, and Ctrl-C in
    them leaves the run alone.
    """

    # ---- commands --------------------------------------------------------------------------

    def pause(self, wait: bool = False) -> Command:
        """Stand still before the next update. The weights stay where they are."""
        return self._stand(self._command("pause", wait=wait), "paused", wait)

    def resume(
        self,
        wait: bool = False,
        *,
        checkpoint: str | None = None,
        accept_changes: bool = False,
        nonfinite: str | None = None,
    ) -> Command | None:
        """Go on: after a pause, or where a run that ended early has its newest checkpoint.

        Parameters
        ----------
        wait
            Wait until it runs.
        checkpoint
            Of a run that ended: go back to this one (``step-000412``, or a name that was given to
            it) instead, and leave out what was tuned after it.
        accept_changes
            Of a deterministic run that ended: go on although something that decides bits has
            changed.
        nonfinite
            Of a run that stands because a step's loss or gradient norm was not finite, and so was
            left out: what later ones do, ``"pause"`` (the default) or ``"skip"``, which leaves
            them out and goes on.

        Returns
        -------
        Command or None
            None for a run that was started again.

        Raises
        ------
        BusyError
            A checkpoint was named, but the run has not ended.
        """
        self._follow()  # somebody else may have started it again: then it must not be ended
        if self._link is not None and self.state not in ENDED:
            if checkpoint is not None:
                raise BusyError(
                    f"the run is {self.state}; stop() it first to go back to a checkpoint"
                )
            fields = {}
            if nonfinite is not None:
                fields["nonfinite"] = config.choice("nonfinite", nonfinite, ("pause", "skip"))
            self._resumed_at = self._record.seq
            return self._stand(self._command("resume", wait=wait, **fields), "running", wait)
        if not self._start_again(self._checkpoint_named(checkpoint), accept_changes):
            return self.resume(  # somebody else had it go on just now
                wait, checkpoint=checkpoint, accept_changes=accept_changes, nonfinite=nonfinite
            )
        if wait:
            with self._leave_alone():
                self._wait_for(lambda: self.state != "starting", None, "resume")
            self._raise_failure()
        return None

    def set(self, wait: bool = False, **settings: Any) -> Command:
        """Change settings before the next update.

        Parameters
        ----------
        wait
            Wait until it is in force.
        **settings
            ``learning_rate`` (becomes the current rate; the rest of the schedule is scaled
            alike); ``lr_scheduler_type``, ``lr_scheduler_kwargs``, ``warmup_steps`` (the schedule
            from here on, as if it had been from the first step); ``weight_decay``,
            ``max_grad_norm``, ``lora_dropout`` (where the run began with some),
            ``gradient_accumulation_steps`` (``max_steps`` stays), ``eval_steps``, ``save_steps``.

        Raises
        ------
        TypeError
            There is no such setting, or none was given.
        """
        known = [*TUNABLE, "lr_scheduler_type", "lr_scheduler_kwargs"]
        if not settings:
            raise TypeError(f"set() needs one of {', '.join(known)}")
        fields: dict[str, Any] = {}
        for name, value in settings.items():
            if name not in known and name in config.Settings.__dataclass_fields__:
                raise TypeError(
                    f"{name} is settled when a run begins; set() takes {', '.join(known)}"
                )
            if name not in known:
                raise config.unknown_parameter(name, known)
            if name == "lr_scheduler_type":
                fields[name] = config.choice(name, value, config.SCHEDULES)
                continue
            if name == "lr_scheduler_kwargs":
                fields[name] = config.scheduler_kwargs(value)
                continue
            low, high = TUNABLE[name]
            if name.endswith("_steps"):  # evaluation, saving, warmup, accumulation
                fields[name] = config.whole(name, value, int(low), int(high))
            elif name == "max_grad_norm" and value is None:  # as Trainer: no limit
                fields[name] = 0.0
            else:
                fields[name] = config.number(name, value, low, high, below=name == "lora_dropout")
        return self._command("set", wait=wait, **fields)

    @overload
    def checkpoint(self, name: str | None = None, wait: Literal[False] = False) -> Command: ...
    @overload
    def checkpoint(self, name: str | None = None, *, wait: Literal[True]) -> Checkpoint: ...

    def checkpoint(self, name: str | None = None, wait: bool = False) -> Command | Checkpoint:
        """Write a checkpoint while training goes on; with `wait`, return it when it is on disk."""
        fields = {} if name is None else {"name": folders.check_name(name)}
        command = self._command("checkpoint", wait=wait, **fields)
        if not wait:
            return command
        event = self._event_of(command, "checkpoint")
        found = next(c for c in self._record.checkpoints if c.path == self.folder / event["path"])
        return found

    def stop(self, wait: bool = False) -> Command | None:
        """End the run with a checkpoint. A run that has ended stays as it is."""
        self._connected()
        if not self._is_over():
            with self._leave_alone(), suppress(PeerError):
                self._there()  # where there is none any more, it may have ended
            self._connected()
        if self._is_over():
            return None
        command = self._command("stop", wait=False)
        if wait:
            with self._leave_alone():
                self._wait_for(self._nothing_comes, None, "stop")
            self._connected()
        return command

    def evaluate(self) -> Evaluation:
        """Measure the loss on the held-out data now, and wait for it.

        Raises
        ------
        InvalidError
            The run has no held-out data.
        """
        if not self.config["eval_data"]:
            raise InvalidError("the run has no eval_data to evaluate on")
        with self._leave_alone():
            command = self._serve("evaluate")
            return Evaluation.of(self._event_of(command, "eval"))

    @overload
    def sample(
        self, text: str | None = None, *, stream: Literal[False] = False, **settings: Any
    ) -> Sample: ...
    @overload
    def sample(
        self, text: Sequence[str], *, stream: Literal[False] = False, **settings: Any
    ) -> list[Sample]: ...
    @overload
    def sample(
        self, text: str | None = None, *, stream: Literal[True], **settings: Any
    ) -> SampleStream: ...
    @overload
    def sample(
        self, text: Sequence[str], *, stream: Literal[True], **settings: Any
    ) -> SampleStreams: ...

    @names_checked  # type: ignore[misc]
    def sample(
        self,
        text: str | Sequence[str] | None = None,
        *,
        messages: Sequence[Any] | None = None,
        input_ids: Sequence[Any] | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int = 0,
        stream: bool = False,
    ) -> Sample | list[Sample] | SampleStream | SampleStreams:
        """Let the model continue a prompt with its weights as they are, and wait for it.

        A run that trains does it between two steps; one that is paused, at once. With the same
        settings the next token is chosen as transformers' ``generate`` chooses it.

        Parameters
        ----------
        text
            The prompt, taken as it is. A list of prompts is answered by a list of samples; they
            go through the model side by side, as many as the space for `generate_length` holds.
        messages
            A conversation instead; the model's chat template makes the prompt. Or several.
        input_ids
            Token ids instead. Or several lists of them.
        max_new_tokens
            It ends earlier at an end-of-text token.
        temperature
            0 takes the likeliest token each time.
        top_k
            Draw only among so many of the likeliest.
        top_p
            Draw only among the likeliest that have this probability together.
        repetition_penalty
            Above 1, tokens that are there already become less likely.
        stop
            A text, or several: it ends where the first of them begins. ``token_ids`` go up to the
            token that completes it, ``text`` ends before it.
        seed
            Of the noise, where there is a temperature.
        stream
            Return at once, with an iterator over pieces of text as they are written; for several
            prompts over pairs of the prompt's place in the list and a piece of its text.
        """
        from pantheraml import sampling

        found, several = sampling.prompts(self, text, messages, input_ids)
        fields = sampling.choices(
            max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed
        )
        until = sampling.stops(stop)
        with self._leave_alone():
            made = [
                one
                for group in sampling.together(found)
                for one in sampling.ask(self, group, fields, until)
            ]
            if stream:
                return sampling.SampleStreams(self, made) if several else made[0]
            samples = [one.result() if until else one.tokens() for one in made]
        return samples if several else samples[0]

    def decode(self, token_ids: list[int]) -> str:
        """Make text of token ids, without special tokens."""
        return self._text.decode(token_ids)

    @names_checked
    def export(
        self,
        folder: str | os.PathLike[str],
        format: str | None = None,
        step: int | None = None,
        *,
        dtype: str | None = None,
        max_shard_size: int | str = "5GB",
        verify: bool = True,
    ) -> Export:
        """Write what was trained as other tools read it.

        Parameters
        ----------
        folder
            Where to: a new name, an empty folder, or where an earlier export is that nobody has
            changed, which this one replaces. With ``format="gguf"`` a name that ends in
            ``.gguf`` is the file itself; else the folder gets a ``model.gguf``.
        format
            ``"peft"``, an adapter folder that PEFT loads, is the default for LoRA; ``"merged"``, a
            model folder that transformers loads, for a full run; ``"gguf"`` is for llama.cpp.
        step
            Take the checkpoint of this step. Default: the weights as they are now, which are the
            best ones in a run that ended with ``load_best_model_at_end``.
        dtype
            Of merged weights: ``"auto"`` (as the original's), ``"float32"``, ``"bfloat16"``,
            ``"float16"``. Of a GGUF: ``"f16"`` (the default), ``"f32"``, ``"bf16"``, ``"q8_0"``.
        max_shard_size
            Of the files of merged weights.
        verify
            Load what was written and compare its logits with the trained weights'. Takes the
            memory of the model as float32, in this process.

        Returns
        -------
        Export
            Where it is, and how far its logits are from the trained ones.

        Raises
        ------
        InvalidError
            `folder`, `format` or `dtype` is nothing that can be exported to.
        BusyError
            There is something else under that name; only an earlier export is written over.
        IOFailed
            It cannot be written there.
        """
        from pantheraml import export

        if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
            raise InvalidError(f"folder must be where the export goes, it is {folder!r}")
        wanted, kind = export.check(self.config["method"] == "full", format, dtype)
        checkpoint = self._newest(step)
        request = export.Request(
            run=self.config,
            checkpoint=checkpoint.path,
            step=checkpoint.step,
            format=wanted,
            dtype=kind,
            shard_bytes=config.memory(max_shard_size, "max_shard_size"),
            verify=verify,
        )
        made = export.write(request, path_of(folder).absolute())
        self._note_export(made)
        return made

    def _note_export(self, made: Export) -> None:
        """Let the run's log tell of it, where there is still somebody who writes it."""
        fields: dict[str, Any] = {"format": made.format, "path": str(made), "step": made.step}
        fields |= {"bytes": made.bytes, "seconds": made.seconds}
        if made.difference is not None:
            fields["difference"] = made.difference
        if self._link is not None:
            with suppress(PeerError):  # it has gone meanwhile; the export stands
                self._ask("exported", **fields)

    def _newest(self, step: int | None) -> Checkpoint:
        if step is None and self._lost:  # the weights as they are now are to be had then
            with self._leave_alone():
                self._wait_for(lambda: self.state != "starting", None, "export")
        if step is None and self._link is not None and self.state in ("running", "paused"):
            return self.checkpoint(wait=True)
        if step is None and (best := self._ends_with) is not None:
            return best
        step = self.step if step is None else step
        there = [c for c in reversed(self.checkpoints) if c.step == step]
        for checkpoint in sorted(there, key=lambda c: c.abandoned):
            return checkpoint
        known = ", ".join(str(c.step) for c in self.checkpoints) or "none"
        raise NotFoundError(
            f"run {self.name} ({self.state}) has no checkpoint of step {step}; it has {known}"
        )

    def rewind(self, step: int) -> None:
        """Not in this version.

        Raises
        ------
        NotInThisVersion
            Always.
        """
        raise NotInThisVersion("not in this version: rewind; stop(), then resume(checkpoint=…)")

    def branch(self, step: int, **settings: Any) -> Run:
        """Not in this version.

        Raises
        ------
        NotInThisVersion
            Always.
        """
        raise NotInThisVersion("not in this version: branch")

    def to_script(self) -> str:
        """Not in this version.

        Raises
        ------
        NotInThisVersion
            Always.
        """
        raise NotInThisVersion("not in this version: to_script")

    # ---- sharing ---------------------------------------------------------------------------

    def share(
        self, bind: str, *, role: str = "view", name: str | None = None, address: str | None = None
    ) -> Share:
        """Let others see the run over a network, each with a key; says who can connect.

        Nothing listens on a network before this, and :meth:`unshare` ends it. A new coordinator
        (after a resume) listens nowhere until it is asked to.

        Parameters
        ----------
        bind
            ``tcp://ADDRESS:PORT``: an address of this machine in numbers (``0.0.0.0`` is all of
            them), and a port; events go to the next port. ``*`` takes any ports. A second call
            with the same `bind` gives another key.
        role
            ``"view"`` sees everything and changes nothing; ``"control"`` steers too.
        name
            Whom the key is for.
        address
            What viewers connect to where that is not what `bind` says (a name, a forwarded port's
            host).

        Returns
        -------
        Share
            Has ``save(path)`` and ``text()`` for ``pm.attach``, ``reach``, ``revoke()``.

        Raises
        ------
        InvalidError, IOFailed
            What cannot be listened on, and what to take instead.
        """
        from pantheraml.sharing import share

        return share(self, bind, role, name, address)

    def unshare(self, share: Share | None = None) -> int:
        """Revoke a key that :meth:`share` made, or all, and then listen on no network any more.

        Who is connected with such a key is shut out at once.

        Returns
        -------
        int
            Keys revoked.

        Raises
        ------
        NotFoundError
            The key was not given out, or is revoked already.
        InvalidError
            It is nothing that :meth:`share` gave.
        """
        from pantheraml.sharing import Share

        if share is not None and not isinstance(share, Share):
            raise InvalidError(f"unshare() takes what share() gave, not {share!r}")
        fields = {} if share is None else {"public_key": share.public_key}
        return int(self._ask("unshare", **fields)["keys"])

    @property
    def sharing(self) -> dict[str, Any] | None:
        """Where the run listens on a network: control, telemetry, reach, keys. None: nowhere."""
        return self._ask("status").get("sharing")

    # ---- waiting ---------------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> Self:
        """Wait until the run has ended.

        Raises
        ------
        RunFailed
            It failed, or stands since a step that was not finite and will not go on by itself; the
            message says why. A run that somebody has paused is waited for.
        TimedOut
            The timeout (seconds) passed; the run goes on.
        """
        with self._leave_alone():
            self._wait_for(self._will_not_end, timeout, "the run's end")
        self._raise_failure()
        return self

    async def wait_async(self) -> Self:
        """Wait for the run's end without blocking the event loop."""
        import asyncio  # a notebook has it; a script that does not wait so need not

        loop = asyncio.get_running_loop()
        changed = asyncio.Event()

        def wake(_: Event | None = None) -> None:
            with suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(changed.set)

        unsubscribe = self.subscribe(wake)
        self._at_close.append(wake)
        try:
            while not self._will_not_end():
                self._not_forked()
                self._not_closed()
                await changed.wait()
                changed.clear()
        finally:
            self._at_close.remove(wake)
            unsubscribe()
        self._raise_failure()
        return self

    # ---- showing ---------------------------------------------------------------------------

    def watch(self) -> Self:
        """Show the run until it has ended, as ``pantheraml train`` and ``attach`` do.

        First its plan, then its steps: in a terminal a picture that is renewed in its place,
        elsewhere a line every few seconds. In a notebook it is the live panel, which goes on by
        itself: the call returns at once, as cells do. Ctrl-C leaves the run alone.

        Raises
        ------
        RunFailed
            As of :meth:`wait`.
        """
        shown = self._panel() if kernel() is not None else None
        if shown is not None:
            from IPython.display import display

            display(shown)  # type: ignore[no-untyped-call,unused-ignore]
            return self
        from pantheraml.live import watch

        def over() -> bool:
            if self._will_not_end():
                return True
            self._not_forked()
            self._not_closed()
            return False

        with self._leave_alone():
            watch(self, over, whole=self._begun)
        self._raise_failure()
        return self

    def to_html(self) -> str:
        """Give a page that needs nothing else: curves, settings, events."""
        from pantheraml.report import page_html

        return page_html(self)

    def plot(self) -> Figure:
        """Draw loss, learning rate and gradient norm with matplotlib."""
        from pantheraml.report import figure

        return figure(self)

    def __repr__(self) -> str:
        of = f"/{self.max_steps}" if self.max_steps else ""
        return plain(f"<Run {self.name}: {self.state}, step {self.step}{of}>")

    def _panel(self) -> Any | None:
        """Make the live panel; None where the package of panels or its anywidget is missing."""
        try:
            from pantheraml_widgets import panel
        except ModuleNotFoundError as error:
            if error.name != "pantheraml_widgets":
                raise
            return None
        return panel(self)

    def _ipython_display_(self) -> None:
        """Show the live panel; where there is none, the static record."""
        from IPython.display import display

        shown = self._panel()
        if shown is not None:
            display(shown)  # type: ignore[no-untyped-call,unused-ignore]
            return
        from pantheraml.report import record_html

        bundle = {"text/plain": repr(self), "text/html": record_html(self)}
        display(bundle, raw=True)  # type: ignore[no-untyped-call,unused-ignore]


def open_run(folder: Path, go_on: bool = False) -> Run:
    """Follow a run; the same object again where this process follows it already.

    `go_on`: let it go on where its coordinator died and it does that by itself.
    """
    known = followed(folder)
    run = known if isinstance(known, Run) else Run(folder)
    run._follow(go_on)
    remember(run)
    return run


def start_run(folder: Path) -> Run:
    """Start the coordinator of a new run folder and follow it."""
    run = Run(folder)
    run._launch()
    run._begun = True
    remember(run)
    return run
