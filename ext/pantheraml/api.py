"""The calls that begin things: finetune, plan, attach, resume, runs."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from errno import EDQUOT, ENOSPC, EROFS
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from pantheraml import __version__, _native, folders, hub, sharing, sums, whole
from pantheraml.aside import is_own
from pantheraml.checks import names_checked, path_of
from pantheraml.config import USUAL_LENGTH, Settings
from pantheraml.data.handover import Data, Given, look_at
from pantheraml.devices import room
from pantheraml.errors import (
    Error,
    InvalidError,
    IOFailed,
    NoMemoryError,
    NotFoundError,
    NotInThisVersion,
)
from pantheraml.lora import Model
from pantheraml.memory import Plan
from pantheraml.notebook import kernel
from pantheraml.plain import complain
from pantheraml.record import ENDED
from pantheraml.run import Run, open_run, start_run
from pantheraml.steps import Program

if TYPE_CHECKING:
    from pantheraml.previews import Preview
    from pantheraml.profiles import Profile

_P = ParamSpec("_P")
_R = TypeVar("_R")

_ALSO = ("model", "data", "eval_data", "name")


def _with_settings(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let help() and completion show every setting where the code has ``**settings``."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    shown = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default)
        for field in fields(Settings)
    ]
    function.__signature__ = signature.replace(parameters=[*own, *shown])  # type: ignore[attr-defined]
    return function


@_with_settings
def finetune(
    model: str | os.PathLike[str],
    data: Data,
    *,
    eval_data: Data | None = None,
    name: str | None = None,
    **settings: Any,
) -> Run:
    """Fine-tune a model in the background, and return at once.

    Everything that can be checked without reading the whole data is checked before this returns.
    It prints nothing, nor does any call that is not asked to show something: ``run.watch()`` does.
    In a notebook that runs without a person (Kaggle's batch commit, papermill, nbconvert) it waits
    for the run's end, because the kernel's end would be the machine's.

    Parameters
    ----------
    model
        Folder with config.json and safetensors, or a name on the hub.
    data
        A .jsonl, .json, .parquet or .txt file, a ``datasets.Dataset``, or dicts. Rows are
        ``{"text"}``, ``{"prompt", "completion"}``,
        ``{"messages": [{"role", "content"}]}`` (only assistant turns learn) or pre-tokenised
        ``{"input_ids", "labels"}``, where -100 means no loss.
    eval_data
        Held-out data, likewise.
    name
        Of the run; made up where it is not given.
    **settings
        See :class:`pantheraml.config.Settings`.

    Returns
    -------
    Run
        In the state ``starting``.

    Raises
    ------
    TypeError
        A name is not a parameter; the nearest is suggested.
    InvalidError, NotFoundError, NotInThisVersion
        What is wrong, by name.
    BusyError
        There is a run of that name.
    IOFailed
        The run cannot be written there.
    """
    chosen = Settings.of(settings, _ALSO)
    if name is not None:
        folders.check_name(name)
    given = {"train": look_at(data)}
    if eval_data is not None:
        given["eval"] = look_at(eval_data, "eval_data")
    options = chosen.data_options(held_out=eval_data is not None)
    resolved, about = _resolve(model, chosen)
    if resolved["eval_strategy"] != "no" and "eval" not in given and "eval_split" not in options:
        raise InvalidError("eval_steps and eval_strategy need eval_data or eval_split")
    if resolved["devices"][0] != "cpu":
        _native.gpus()  # raises what is missing
    folder = folders.create(name, os.fspath(model))
    try:
        _write_run(folder, model, resolved | about, options, given)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)  # nothing but what we have just made is in it
        if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT, EROFS):
            raise IOFailed(
                f"the run could not be written to {folder} ({error.strerror or error}): make room, "
                "or set PANTHERAML_RUNS to another folder"
            ) from error
        raise
    run = start_run(folder)
    if _nobody_is_there() and not is_own(run):
        run.wait()
    return run


@names_checked
def preview(
    data: Data,
    model: str | os.PathLike[str],
    *,
    rows: int = 3,
    max_length: int | None = None,
    packing: bool = True,
    overlong: str | None = None,
    chat_template: str | os.PathLike[str] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Preview:
    """Show the first rows of data as a run would learn from them, without starting one.

    Learned tokens are marked: by colour in a notebook and in a terminal, by ⟦brackets⟧ as text.

    Parameters
    ----------
    data, model
        As in :func:`finetune`. Of a generator, the rows that are shown are gone.
    rows
        How many.
    max_length, packing, overlong, chat_template, chat_template_kwargs
        As in :func:`finetune`.

    Raises
    ------
    InvalidError, NotFoundError, NotInThisVersion
        What would end a run's preparation, for these rows.
    """
    whole.load("numpy", "tokenizers")
    from pantheraml import previews

    settings = Settings(
        max_length=max_length,
        packing=packing,
        overlong=overlong,
        chat_template=chat_template,
        chat_template_kwargs=chat_template_kwargs,
    )
    return previews.preview(data, model, rows, settings)


@_with_settings
def plan(model: str | os.PathLike[str], **settings: Any) -> Plan:
    """Plan the memory of a run by cause, without starting it.

    Parameters
    ----------
    model
        As in :func:`finetune`.
    **settings
        As in :func:`finetune`.

    Raises
    ------
    NoMemoryError
        No plan fits in ``memory_limit``; the nearest setting that would is named.
    """
    config, limits, available = _planned(model, settings)
    made = {**_native.plan(config, limits, available), "available": available}
    run = json.loads(config)
    device = run["devices"][0]
    if device != "cpu":
        try:
            there = room(int(device.partition(":")[2]))
            made |= vars(there)
        except NotFoundError:
            pass  # a plan needs no GPU
        except Error as why:
            warnings.warn(
                f"what runs have reserved of {device} cannot be read: {why}", stacklevel=3
            )
    return Plan.of(made, run)


@_with_settings
def program(model: str | os.PathLike[str], **settings: Any) -> Program:
    """Make the step program of :func:`plan`: every op of a step, with shapes and costs.

    Its times are predicted by the planner's table of rates; those of :meth:`Run.program` are
    measured.
    """
    return Program.parse(_native.program(*_planned(model, settings)))


@_with_settings
def profile(model: str | os.PathLike[str], **settings: Any) -> Profile:
    """Make some ten steps on random tokens, in a run that leaves nothing behind, and profile them.

    Parameters
    ----------
    model
        As in :func:`finetune`.
    **settings
        As in :func:`finetune`; without them micro-batches have 4 rows of 256 tokens. Rows are
        full, so packing has no effect; nor has what says how long a run goes on, how fast it
        learns, and when it evaluates and saves.
    """
    from pantheraml import profiles

    # What is wrong is said before anything else, also of what has no effect.
    Settings.of(settings, ("model",)).resolve(1 << 20)
    return profiles.of_model(model, settings)


def attach(name: str | os.PathLike[str] | None = None, *, restart: bool = True) -> Run:
    """Come back to a run, by its name, its folder, or (None) to the latest.

    Parameters
    ----------
    name
        Its name or its folder; None for the latest. Of a run that somebody shares: the file or
        the text of its :class:`pantheraml.Share`.
    restart
        Let it go on where all its processes died (the machine went down), unless the run itself
        has ``restart="never"``; False only looks.

    Notes
    -----
    A run that has ended is read from its log.
    """
    connection = None if name is None else sharing.parse(name)
    if connection is None:
        return open_run(folders.find(name), restart)
    run = sharing.SharedRun(connection)
    run._follow()
    return run


def resume(
    name: str | os.PathLike[str] | None = None,
    *,
    checkpoint: str | None = None,
    accept_changes: bool = False,
) -> Run:
    """Attach to a run and let it go on: see :meth:`Run.resume`."""
    run = attach(name, restart=False)
    if checkpoint is not None or run.state not in ("running", "starting"):
        run.resume(checkpoint=checkpoint, accept_changes=accept_changes)
    return run


@dataclass(frozen=True)
class RunInfo:
    """A line of :func:`runs`; ``max_steps`` is 0 where epochs decide (`Run.max_steps` knows)."""

    name: str
    state: str
    step: int
    max_steps: int
    model: str
    method: str
    created: float
    folder: Path


def runs() -> list[RunInfo]:
    """List the runs of ``$PANTHERAML_RUNS`` or ``./runs``, the latest first."""
    found = []
    for folder in folders.every():
        try:
            config = folders.read_config(folder)
            state, step = _last_state(folder)
            found.append(
                RunInfo(
                    folder.name,  # by which it is attached to; run.json's may be another's
                    state,
                    step,
                    int(config["max_steps"]),
                    config["model_id"],
                    config["method"],
                    float(config["created"]),
                    folder,
                )
            )
        except (Error, KeyError, TypeError, ValueError, OSError) as error:
            complain(f"pantheraml: {folder} cannot be read: {error}")
    return found


# ---- helpers ---------------------------------------------------------------------------------


def _check_units(known: Mapping[str, Any]) -> None:
    """Refuse a model whose layers are not whole units of what 8-bit products come in."""
    heads, head_dim = int(known["heads"]), int(known["head_dim"])
    widths = {"hidden_size": int(known["hidden"]), "intermediate_size": int(known["intermediate"]),
              "width of queries": heads * head_dim,
              "width of keys": int(known["kv_heads"]) * head_dim}  # fmt: skip
    for name, width in widths.items():
        if width % _native.FP8_UNIT:
            raise InvalidError(
                f'quant="fp8" needs widths in units of {_native.FP8_UNIT}, this model\'s {name} '
                f'is {width}; use quant="nf4"'
            )


def _resolve(
    model: str | os.PathLike[str], settings: Settings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check settings and model; returns run.json's settings, and what it says of the model."""
    settings.resolve(1 << 20)  # what is wrong with them comes before a download
    folder = hub.resolve(model)
    known = _native.check_model(folder)
    seen = Model(folder, int(known["layers"]), bool(known["qk_norm"]))
    if settings.max_length is None and int(known["max_positions"]) < USUAL_LENGTH:
        warnings.warn(
            f"max_length is {known['max_positions']} here, the model's max_position_embeddings, "
            f"and not the usual {USUAL_LENGTH}; give max_length to have another",
            stacklevel=4,
        )
    resolved = settings.resolve(int(known["max_positions"]), seen)
    if known["nf4"] and resolved["quant"] != "nf4":
        raise InvalidError(f'model: {folder} holds NF4 weights; give quant="nf4"')
    if resolved["quant"] == "fp8":
        _check_units(known)
    # A relative path would say nothing to whoever reads it elsewhere.
    here = path_of(model).is_dir()
    return resolved, {"model": str(folder), "model_id": str(folder) if here else os.fspath(model)}


def _write_run(
    folder: Path,
    model: str | os.PathLike[str],
    resolved: dict[str, Any],
    options: dict[str, Any],
    given: dict[str, Given],
) -> None:
    stems = {"train": "source", "eval": "eval-source"}
    template = options.pop("chat_template", None)
    if template is not None:  # in a file of its own: run.json is a message, and those are short
        options["chat_template"] = "data/chat_template.jinja"
        folders.write_private(folder / options["chat_template"], template.encode("utf-8"))
    described = {what: data.hand_over(folder, stems[what]) for what, data in given.items()}
    held_out = "eval" in given or "eval_split" in options
    run = {
        "format": 1,
        "name": folder.name,
        **resolved,
        "train_data": "data/train.safetensors",
        "eval_data": "data/eval.safetensors" if held_out else "",
        "data": described | options,
        "created": time.time(),
        "version": __version__,
    }
    _native.check_run(json.dumps(run))
    text = sums.add(json.dumps(run, indent=1, ensure_ascii=False).encode("utf-8")) + b"\n"
    folders.write_private(folder / "run.json", text)


def _planned(
    model: str | os.PathLike[str], given: dict[str, Any]
) -> tuple[str, tuple[int, int, int, int, int], int]:
    """Make the arguments of the engine's plan: run.json's text, limits, available bytes."""
    resolved, about = _resolve(model, Settings.of(given, ("model",)))
    run = {
        "format": 1,
        "name": "plan",
        **resolved,
        **about,
        "train_data": "none",
        "eval_data": "",
        "data": {},
        "created": time.time(),
        "version": __version__,
    }
    rows, length = resolved["per_device_train_batch_size"], resolved["max_length"]
    tokens = rows * length
    # Without data: full rows; with packing, documents of 64 tokens or more.
    docs = max(rows, tokens // 64) if resolved["packing"] else rows
    limits = (tokens, docs, tokens, length, resolved["generate_length"])
    text = json.dumps(run)
    _native.check_run(text)  # what a run would be refused for, a plan is, too
    return text, limits, int(resolved["memory_limit"])


def _last_state(folder: Path) -> tuple[str, int]:
    """State and step by the end of the log; a run without a coordinator does not run."""
    state, step = "starting", 0
    lines: list[bytes] = []
    try:
        with folders.reading(folder, "events.jsonl") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - (1 << 17)))
            lines = file.read().split(b"\n")[:-1]
            if size > 1 << 17:
                lines = lines[1:]  # begins somewhere in a line
                state = "running"
    except OSError as error:
        if not folders.is_absent(error):  # there is none, or none that a run has made
            raise
    damaged = _native.first_damaged(b"".join(line + b"\n" for line in lines), 0)
    for line in lines[: None if damaged is None else damaged[0]]:
        event = json.loads(line)
        if event["type"] == "state":
            state, step = event["state"], event["step"]
        elif event["type"] == "step":
            step = event["step"]
    if state not in ENDED:
        try:
            _native.coordinator_pid(_native.connection_file(folder))
        except (IOFailed, NoMemoryError):
            raise
        except Error:
            state = "stopped"
    return state, step


def _nobody_is_there() -> bool:
    """Whether this is a notebook that runs without a person."""
    override = os.environ.get("PANTHERAML_WAIT")
    if override:
        return override != "0"
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch" or os.environ.get(
        "PAPERMILL_INPUT_PATH"
    ):
        return True
    here = kernel()
    # nbclient (so nbconvert and papermill too) asks for no input; a front end with a person does.
    return here is not None and getattr(here, "_allow_stdin", True) is False


def monitor() -> None:
    """Not in this version.

    Raises
    ------
    NotInThisVersion
        Always.
    """
    raise NotInThisVersion("not in this version: monitor; run.memory() has a run's own")
