"""Export: what was trained, as other tools read it.

Everything is written into a folder beside the one that was asked for, which takes its name when it
is whole. An earlier export that nobody has touched gives way to it; anything else that is there is
never written over. What fails leaves what was there.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PosixPath
from typing import Any

from pantheraml import _native, config, folders, gguf
from pantheraml.data import chat
from pantheraml.errors import (
    BusyError,
    DeniedError,
    Error,
    InvalidError,
    IOFailed,
    NoMemoryError,
    NotFoundError,
)

#: Lies in each folder and says what is in it, so that the next export knows it for one of ours.
NOTE = "pantheraml.json"
#: Stands near the beginning of each GGUF file.
GGUF_MARK = b"pantheraml.run"

FORMATS = ("peft", "merged", "gguf")
DTYPES = ("auto", "float32", "bfloat16", "float16")
TYPES = ("f32", "f16", "bf16", "q8_0")

#: The largest difference of logits that arithmetic and rounding explain; beyond it something is
#: wrong with the export, and it is thrown away.
_EXACT, _ROUNDED = 1e-4, 0.5
#: What only a resumed run reads.
_OURS = {"optimizer.safetensors", "state.json", "MANIFEST"}
#: Copied beside merged weights when the model folder has them.
_COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


class Export(PosixPath):
    """The path of what was written, a folder or a GGUF file, and what is known of it.

    Attributes
    ----------
    format
        ``peft``, ``merged`` or ``gguf``.
    dtype
        Of the matrices in it.
    step
        Optimizer steps in the weights.
    bytes
        Of its files.
    seconds
        It took, reading back included.
    difference
        It was read back and asked for logits: the largest difference from those of the trained
        weights, by the largest logit. None where that was not done; `notes` says why.
    same_top
        After how many of `tokens` both thought the same token likeliest.
    rounding
        Merged weights of another type than float32: how far rounding moved one at most.
    notes
        What is worth knowing.
    """

    format = ""
    dtype = ""
    step = 0
    bytes = 0
    seconds = 0.0
    difference: float | None = None
    same_top: int | None = None
    tokens: int | None = None
    rounding: float | None = None
    notes: tuple[str, ...] = ()

    def with_segments(self, *segments: str | os.PathLike[str]) -> Path:  # type: ignore[override,unused-ignore]
        """Paths made of this one are ordinary ones."""
        return Path(*segments)

    def describe(self) -> str:
        """Say it in words."""
        text = f"{self}: {self.format}, {self.dtype}, {self.bytes / 1e6:,.1f} MB"
        if self.difference is not None:
            text += (
                f"; read back, its logits are {self.difference:.1e} from the trained ones, "
                f"the likeliest token the same {self.same_top} times of {self.tokens}"
            )
        return "\n".join([text, *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class Request:
    """What is asked for: run.json, a checkpoint of the run, and how it is to be written."""

    run: dict[str, Any]
    checkpoint: Path
    step: int
    format: str
    dtype: str
    shard_bytes: int
    verify: bool

    @property
    def text(self) -> str:
        """run.json, for the engine."""
        return json.dumps(self.run)


def check(full: bool, format: str | None, dtype: str | None) -> tuple[str, str]:
    """Settle format and dtype, or say what is wrong with them.

    Raises
    ------
    InvalidError
        The format is unknown or not for this run, or does not come in that dtype.
    """
    wanted = format or ("merged" if full else "peft")
    config.choice("format", wanted, FORMATS)
    if wanted == "peft" and full:
        raise InvalidError('format="peft" needs an adapter, but every weight was trained')
    if wanted == "peft":
        if dtype not in (None, "auto", "float32"):
            raise InvalidError("an adapter is float32; dtype is for merged and gguf")
        return wanted, "float32"
    if wanted == "gguf":
        return wanted, config.choice("dtype", dtype or "f16", TYPES)
    return wanted, config.choice("dtype", dtype or "auto", DTYPES)


def write(request: Request, target: Path) -> Export:
    """Write an export to `target`: a new name, an empty folder, or an earlier export.

    Raises
    ------
    BusyError
        There is something else under that name.
    IOFailed
        It cannot be written there.
    """
    begun = time.monotonic()
    one_file = request.format == "gguf" and target.suffix == ".gguf"
    try:
        _refuse_what_is_there(target, one_file)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = _beside(target)
    except OSError as error:
        if isinstance(error, Error):
            raise
        raise IOFailed(f"{target.parent} cannot be written to: {error.strerror}") from None
    with _gone_afterwards(beside) as folder:
        mask = _umask(folder)
        if request.format == "peft":
            made = _copy_adapter(request, folder)
        elif request.format == "merged":
            made = _merge(request, folder)
        else:
            made = _gguf(request, folder / (target.name if one_file else "model.gguf"))
        made["notes"][:0] = _note_of_model(request)
        read = folder / made["file"] if request.format == "gguf" else folder
        made |= _read_back(request, read, made["notes"])
        size = sum(file.stat().st_size for file in folder.iterdir())
        if not one_file:
            _leave_note(request, folder, made["dtype"])
        _publish(folder / made["file"] if one_file else folder, target, one_file, mask)
    made |= {"format": request.format, "step": request.step, "bytes": size}
    made |= {"notes": tuple(made["notes"]), "seconds": time.monotonic() - begun}
    inside = request.format == "gguf" and not one_file
    export = Export(target / made.pop("file") if inside else target)
    made.pop("file", None)
    for name, value in made.items():
        setattr(export, name, value)
    return export


# ---- the folder ------------------------------------------------------------------------------


def _refuse_what_is_there(target: Path, one_file: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if one_file and _is_our_file(target):
        return
    if not one_file and target.is_dir() and (not any(target.iterdir()) or _is_our_folder(target)):
        return
    raise BusyError(
        f"{target} is there already, and is not (or not only) an earlier export: give a new name "
        "or an empty folder"
    )


def _is_our_file(target: Path) -> bool:
    if target.is_symlink() or not target.is_file():
        return False
    with target.open("rb") as file:
        head = file.read(1 << 16)
    return head.startswith(b"GGUF") and GGUF_MARK in head


def _is_our_folder(target: Path) -> bool:
    """Whether an export made it, and every file in it is as that left it."""
    if target.is_symlink():
        return False
    try:
        files = json.loads((target / NOTE).read_text(encoding="utf-8"))["files"]
        there = {path.name: path.lstat().st_size for path in target.iterdir() if path.name != NOTE}
        return bool(files == there)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _leave_note(request: Request, folder: Path, dtype: str) -> None:
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    said = {"run": request.run["name"], "step": request.step, "format": request.format}
    said |= {"dtype": dtype, "files": files}
    (folder / NOTE).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    _sync(folder / NOTE)


def _beside(target: Path) -> Path:
    """Make a folder beside the target."""
    folder = target.parent / f".{target.name}.tmp-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir(mode=0o700)
    return folder


@contextmanager
def _gone_afterwards(folder: Path) -> Iterator[Path]:
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(made: Path, target: Path, one_file: bool, mask: int) -> None:
    """Give it its name; an earlier export gives way, in one piece."""
    for file in made.iterdir() if made.is_dir() else [made]:
        file.chmod(0o644 & ~mask)
    _sync(made)
    _refuse_what_is_there(target, one_file)  # it was asked before all that was written, too
    if one_file and target.exists():
        made.replace(target)
    elif one_file:
        try:
            os.link(made, target)
        except FileExistsError:
            raise BusyError(f"{target} is there now; give another name") from None
    else:
        made.chmod(0o755 & ~mask)
        _take_the_place(made, target)
    _sync(target.parent)


def _take_the_place(made: Path, target: Path) -> None:
    old = target.parent / f"{made.name}.old"
    earlier = target.is_dir() and any(target.iterdir())
    if earlier:
        target.rename(old)
    try:
        made.rename(target)
    except OSError as error:
        if earlier:
            old.rename(target)
        elif target.exists():
            raise BusyError(f"{target} is there now; give another name") from error
        raise
    if earlier:
        shutil.rmtree(old)


def _umask(folder: Path) -> int:
    """See what a new file lacks: to set it and put it back, other threads would write with it."""
    probe = folder / "umask"
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o777)
        try:
            return 0o777 & ~os.fstat(descriptor).st_mode
        finally:
            os.close(descriptor)
            probe.unlink()
    except OSError as error:
        raise IOFailed(f"{folder.parent} cannot be written to: {error.strerror}") from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy(source: Path, folder: Path) -> None:
    copy = folder / source.name
    shutil.copyfile(source, copy)
    _sync(copy)


# ---- formats ---------------------------------------------------------------------------------


def _copy_adapter(request: Request, folder: Path) -> dict[str, Any]:
    try:
        return _copy_files(request.checkpoint, folder)
    except folders.NotOurs as error:
        raise DeniedError(f"{error.filename}: {error.strerror}") from None


def _copy_files(checkpoint: Path, folder: Path) -> dict[str, Any]:
    # RUN/checkpoints/step-000412: a link in it could bring any file of ours to whoever gets this.
    root, path = checkpoint.parent.parent, "/".join(checkpoint.parts[-2:])
    inside = folders.opened(root, path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        names = [name for name in os.listdir(inside) if name not in _OURS]
    finally:
        os.close(inside)
    if not any(name.endswith(".safetensors") for name in names):
        raise NotFoundError(f"{checkpoint} holds no weights")
    for name in sorted(names):
        with folders.reading(root, f"{path}/{name}") as source, (folder / name).open("xb") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            os.fsync(copy.fileno())
    return {"dtype": "float32", "notes": []}


def _merge(request: Request, folder: Path) -> dict[str, Any]:
    model = Path(request.run["model"])
    made = _native.merge(
        request.text, str(request.checkpoint), str(folder), request.dtype, request.shard_bytes
    )
    description = json.loads((model / "config.json").read_text(encoding="utf-8"))
    stored = description.get("dtype") or description.get("torch_dtype") or "float32"
    dtype = stored if request.dtype == "auto" else request.dtype
    # Both spellings: transformers reads torch_dtype before version 5 and dtype since.
    description |= {"dtype": dtype, "torch_dtype": dtype}
    description |= {"tie_word_embeddings": made["tied_head"]}
    description.pop("quantization_config", None)
    text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    _sync(folder / "config.json")
    for name in _COMPANIONS:
        if (model / name).is_file():
            _copy(model / name, folder)
    notes = []
    if chat.additional(model):
        notes.append("the model's additional_chat_templates are not in it: copy them beside it")
    if made["rounding"] > 0:
        notes.append(f"rounded to {dtype}: a weight moved by at most {made['rounding']:.1e}")
    notes += _note_of_quant(request)
    return {"dtype": dtype, "rounding": made["rounding"], "notes": notes}


def _gguf(request: Request, path: Path) -> dict[str, Any]:
    model = Path(request.run["model"])
    vocab = int(_native.check_model(model)["vocab"])
    pairs = gguf.pairs(model, str(request.run["name"]), vocab)
    made = _native.gguf(
        request.text, str(request.checkpoint), str(path), request.dtype, json.dumps(pairs)
    )
    notes = [made["notes"]] if made["notes"] else []
    if made["not_quantised"]:
        notes.append(
            f"{made['not_quantised']} matrices have rows that are no multiple of 32 and are f16"
        )
    return {"dtype": request.dtype, "file": path.name, "notes": notes + _note_of_quant(request)}


def _note_of_model(request: Request) -> list[str]:
    """Say where the model folder is not what the checkpoint was trained over."""
    if request.format == "peft" and not request.verify:
        return []  # nothing is read of it
    root, path = request.checkpoint.parent.parent, "/".join(request.checkpoint.parts[-2:])
    with folders.reading(root, f"{path}/state.json") as file:
        identity = json.loads(json.load(file)["identity"] or "{}")
    model = request.run["model"]
    if identity.get("model", "") in ("", _native.model_mark(model)):
        return []
    use = "compared over" if request.format == "peft" else "merged into, and compared with,"
    note = (
        f"the model folder {model} has changed since this was trained: what was trained is {use} "
        "what is there now; put back what was there and export again"
    )
    warnings.warn(note, stacklevel=4)
    return [note]


def _note_of_quant(request: Request) -> list[str]:
    quant = request.run.get("quant", "none")
    if quant == "none":
        return []
    if _is_stored_nf4(request):
        return ["the folder's NF4 weights were dequantised, as training saw them, and merged into"]
    return [
        f"the adapter was trained over {quant.upper()} weights and is merged into the original "
        "ones: the difference is that of the quantisation"
    ]


def _is_stored_nf4(request: Request) -> bool:
    """Whether the model's folder itself is quantised: what was trained over is all there is."""
    text = (Path(request.run["model"]) / "config.json").read_text(encoding="utf-8")
    return bool(json.loads(text).get("quantization_config"))


def _read_back(request: Request, path: Path, notes: list[str]) -> dict[str, Any]:
    if not request.verify:
        notes.append("not read back (verify=False)")
        return {}
    checkpoint = str(request.checkpoint)
    try:
        found = _native.compare_export(request.text, checkpoint, request.format, str(path))
    except NoMemoryError as error:
        notes.append(f"not read back, for lack of memory: {error}")
        return {}
    except Error as error:
        raise type(error)(f"what was exported cannot be read back: {error}") from error
    same = request.run.get("quant", "none") == "none" or _is_stored_nf4(request)
    exact = request.dtype in ("float32", "f32") and same
    if not found["difference"] <= (_EXACT if exact else _ROUNDED):
        raise Error(
            f"what was exported is not what was trained: its logits are {found['difference']:.1e} "
            "from the trained ones; nothing was written"
        )
    return found
