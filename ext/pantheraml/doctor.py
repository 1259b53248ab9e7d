"""``pantheraml doctor``: a ten-second real run, what is there, and what to do about what is not."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

import pantheraml as pm
from pantheraml import _native, folders, programs
from pantheraml.aside import end, runs_in
from pantheraml.devices import room, usable_gpus
from pantheraml.errors import Error
from pantheraml.memory import size
from pantheraml.terminal import Terminal
from pantheraml.tiny import TinyLlama

_SECONDS, _STEPS = 10.0, 30  # of the run, and more where it is slower: fewer steps teach nothing
_PACKAGES = (
    "numpy", "tokenizers", "safetensors", "jinja2", "huggingface_hub", "anywidget", "ipywidgets",
    "matplotlib", "rich",
)  # fmt: skip
_ATTENTION = ("", "cuDNN compiles its attention, ")  # which it has from sm_80 on
_COMPILING = 120.0  # seconds
_TEXT = "A panther is a big cat. It climbs well, swims well and hunts at night. "


@dataclass(frozen=True)
class Finding:
    """One line of the report: ``ok``, ``note`` (works without) or ``bad``."""

    verdict: str
    what: str
    found: str
    do: str = ""


def examine(*, run: bool = True, console: Console | None = None) -> int:
    """Print what is there; returns 0 when a run is possible, else 1.

    Parameters
    ----------
    run
        Also train a tiny model for a few seconds, through every process of a real run.
    """
    console = console or Terminal()
    checks: list[Callable[[], Finding]] = [
        _versions, _packages, _programs, _device, _runs_folder, _runtime_folder, _gpu, _notebook,
    ]  # fmt: skip
    if run:
        checks.append(_real_run)
    bad = False
    marks = {"ok": "[green]✓[/]", "note": "[yellow]•[/]", "bad": "[red]✗[/]"}
    for check in checks:
        try:
            finding = check()
        except (pm.Error, OSError) as error:
            finding = Finding("bad", check.__name__.strip("_").replace("_", " "), str(error))
        console.print(f"{marks[finding.verdict]} [bold]{finding.what}[/]  {escape(finding.found)}")
        if finding.do:
            console.print(f"    → {escape(finding.do)}")
        bad |= finding.verdict == "bad"
    console.print("[red]a run is not possible yet[/]" if bad else "[green]ready[/]")
    return 1 if bad else 0


def _versions() -> Finding:
    libc = " ".join(platform.libc_ver())
    found = f"pantheraml {pm.__version__}, Python {platform.python_version()}, {libc}"
    return Finding("ok", "versions", f"{found}, Linux {platform.release()}")


def _packages() -> Finding:
    missing, found = [], []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        do = f"{sys.executable} -m pip install {' '.join(missing)}"
        return Finding("bad", "packages", f"missing: {', '.join(missing)}", do)
    return Finding("ok", "packages", ", ".join(found))


def _programs() -> Finding:
    return Finding("ok", "programs", str(programs.coordinator().parent))


def _device() -> Finding:
    info = _native.device_info()
    found = (
        f"{info['name']}, {info['threads']} threads, {info['libraries']}, {info['instructions']}, "
        f"{size(info['memory_free'])} of {size(info['memory_total'])} free"
    )
    if info["memory_free"] < 1 << 30:
        return Finding("note", "processor", found, "close something: under 1 GiB is free")
    return Finding("ok", "processor", found)


def _runs_folder() -> Finding:
    folder = folders.runs_folder()
    near = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(near).free
    found = f"{folder}, {size(free)} free"
    if not os.access(near, os.W_OK):
        return Finding("bad", "runs folder", found, "set PANTHERAML_RUNS to a folder you may write")
    if free < 1 << 30:
        return Finding("note", "runs folder", found, "make room: checkpoints need space")
    return Finding("ok", "runs folder", found)


def _runtime_folder() -> Finding:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(_native.runtime_folder(folder)).parent
    return Finding("ok", "runtime folder", f"{path} (sockets and keys)")


def _gpu() -> Finding:
    """Whether runs can use a GPU; else the reason and what to do about it."""
    count, why, there = usable_gpus()
    if count == 0 and there:
        return Finding("note", "GPU", "there is an NVIDIA GPU, and runs use the CPU", why)
    if count == 0:
        return Finding("note", "GPU", f"no NVIDIA GPU, runs use the CPU ({why}){_libraries()}")
    found, do = [], []
    for index in range(count):
        try:
            text, lacks = _one_gpu(index)
        except Error as why:  # an old one beside a new one
            text, lacks = f"cuda:{index} cannot be used", str(why)
        found.append(text)
        do += [lacks] if lacks else []
    return Finding("note" if do else "ok", "GPU", "; ".join(found), "; ".join(do))


def _one_gpu(index: int) -> tuple[str, str]:
    """What a GPU is, and what it lacks."""
    info = _native.device_info(f"cuda:{index}")
    lacks = info["lacks"] or _attention_lacks(index)
    text = (
        f"cuda:{index} {info['name']}, {size(info['memory_free'])} of "
        f"{size(info['memory_total'])} free{_reserved(index)}, {info['libraries']}, "
        f"{info['instructions']}, {'' if lacks else _ATTENTION[info['capability'] >= 80]}"
        f'dtype="auto" is {_auto(index)}{_narrow(index)}; {_gauges(info)}'
    )
    return text, lacks


def _attention_lacks(index: int) -> str:
    """What is wrong with cuDNN or its compiler, both of which are there.

    In a process of its own: libraries that do not fit each other may end it. It neither takes nor
    leaves compiled kernels, so what compiles them is asked every time.
    """
    code = f"from pantheraml import _native; print(_native.compile_attention({index}))"
    try:
        made = subprocess.run(
            [sys.executable, "-P", "-c", code], env=os.environ | {"CUDA_CACHE_DISABLE": "1"},
            capture_output=True, text=True, timeout=_COMPILING, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"compiling cuDNN's attention for cuda:{index} did not end within {_COMPILING:.0f} s"
    if made.returncode == 0:
        return made.stdout.strip()
    said = made.stderr.strip().splitlines()
    how = f"signal {-made.returncode}" if made.returncode < 0 else f"status {made.returncode}"
    return (
        f"compiling cuDNN's attention for cuda:{index} ended with {how}"
        + (f" ({said[-1]})" if said else "")
        + "; install anew with pip install --upgrade 'pantheraml[cuda13]' (cuda12 for drivers of "
        "CUDA 12)"
    )


def _reserved(index: int) -> str:
    """Which runs have reserved its memory."""
    try:
        there = room(index)
    except Error as why:
        return f" (what runs have reserved cannot be read: {why})"
    most = "at most " if there.unknown else ""
    if not there.reserved:
        return ""
    return f" ({most}{size(there.left)} for a run; reserved: {there.reserved})"


def _libraries() -> str:
    """What is there for a GPU without there being one: for who prepares an image elsewhere."""
    try:
        said = _native.gpu_libraries()
    except Error:
        return ""  # nor is our own part, which the reason has said
    found = [text for there, text in said if there]
    if not found:
        return ""
    return "; libraries for one: " + ", ".join(found + [text for there, text in said if not there])


def _narrow(index: int) -> str:
    """Whether ``quant="fp8"`` is refused there."""
    if "float8" in _native.gpu_dtypes(index):
        return ""
    return '; no quant="fp8", which needs compute capability 8.9'


def _auto(index: int) -> str:
    """What 16 bits a GPU computes in, and why not in the usual ones."""
    if "bfloat16" in _native.gpu_dtypes(index):
        return "bfloat16"
    return "float16 (it has no bfloat16, which begins with compute capability 8.0)"


def _gauges(info: dict[str, Any]) -> str:
    """What the driver says of a GPU now, and what it does not."""
    try:
        said = _native.gauges(info["bus"], info["uuid"])
    except Error as why:
        return str(why)
    numbers = {name: value for name, value in said.items() if isinstance(value, float)}
    words = [
        f"{numbers[name]:.0f} {unit}"
        for name, unit in (("temperature", "°C"), ("power", "W"), ("clock", "MHz"))
        if name in numbers
    ]
    unsaid = [name.replace("_", " ") for name, why in said.items() if isinstance(why, str)]
    # Of a process without memory on it there is nothing to say.
    unsaid = [name for name in unsaid if name not in ("memory ours", "memory others")]
    return ", ".join(words) + (f"; NVML does not say: {', '.join(unsaid)}" if unsaid else "")


def _notebook() -> Finding:
    """Whether the live panel can be shown, looked at in a process of its own."""
    code = "import anywidget, ipywidgets, pantheraml_widgets"
    made = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    if made.returncode == 0:
        return Finding("ok", "notebook panel", "anywidget and pantheraml_widgets are there")
    why = made.stderr.strip().splitlines()[-1] if made.stderr.strip() else "it cannot be imported"
    return Finding("note", "notebook panel", f"{why}; notebooks show the static record")


def _real_run() -> Finding:
    with tempfile.TemporaryDirectory(prefix="pml-doctor-") as name, runs_in(Path(name) / "runs"):
        # On a GPU heads of 64, so that attention is cuDNN's there as it is of real models.
        wide = TinyLlama(hidden=256, intermediate=512) if usable_gpus()[0] else TinyLlama()
        model = wide.write(Path(name) / "model")
        rows = [
            {"prompt": "What is a panther? ", "completion": _TEXT * (1 + i % 4)} for i in range(64)
        ]
        start = time.monotonic()
        run = pm.finetune(
            model, rows, name="doctor", max_steps=10**6, learning_rate=3e-3, max_length=256,
            lr_scheduler_type="constant",
        )  # fmt: skip
        try:
            while run.step < 2 and run.state in ("starting", "running"):
                run.wait_for_change(1.0)
            first = time.monotonic() - start
            while run.state == "running" and (
                run.step < _STEPS or time.monotonic() - start < _SECONDS
            ):
                run.wait_for_change(0.5)
            text = run.sample("What is a panther? ", max_new_tokens=8).token_ids
            run.stop(wait=True)
        finally:
            end(run)
        history = run.history
        if run.state != "stopped" or len(history) < 2 or not text:
            log = "".join(
                f"\n{path}:\n{path.read_text()}" for path in (run.folder / "log").glob("*")
            )
            return Finding("bad", "a real run", f"{run.state}: {run.reason}{log[-2000:]}")
        rates = sorted(row["tokens_per_second"] for row in history)
        found = (
            f"first steps after {first:.1f} s, {len(history)} steps, "
            f"{rates[len(rates) // 2]:,.0f} tokens/s, loss {history[0]['loss']:.2f} → "
            f"{history[-1]['loss']:.2f}; stopped with a checkpoint; its worker used "
            f"{folders.read_config(run.folder)['identity']['libraries']}"
        )
        return Finding(
            "ok" if history[-1]["loss"] < history[0]["loss"] else "bad", "a real run", found
        )
