"""Models by name: a folder as it is, a hub name through ``huggingface_hub``."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pantheraml.checks import path_of
from pantheraml.errors import InvalidError, NotFoundError, PeerError

#: What fine-tuning reads of a repository.
_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
#: Of folders inside it, only templates: additional_chat_templates/tool_use.jinja.
_UNWANTED = ["*/*.json", "*/*.safetensors", "consolidated*.safetensors"]
#: A model's page on the hub.
_PAGE = r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)(?:/.*)?"


def resolve(model: str | os.PathLike[str]) -> Path:
    """Give the folder of a model, fetching it first if it is named as on the hub.

    Raises
    ------
    InvalidError
        It is neither a path nor a name, or a file.
    NotFoundError
        Neither a folder nor a repository of that name exists.
    PeerError
        The hub cannot be reached, and no earlier copy is there.
    """
    if not isinstance(model, str | os.PathLike) or not os.fspath(model):
        raise InvalidError(f"model must be a folder or a name on the hub, it is {model!r}")
    path = path_of(model)
    if path.is_dir():
        _refuse_adapter(path)
        _refuse_pointers(path)
        return path.absolute()
    name = os.fspath(model)
    if path.is_file():
        if path.suffix == ".gguf":
            raise InvalidError(
                f"model: {path} is a GGUF file, which is only written; give the folder or the hub "
                "name of the model with safetensors that it was made from"
            )
        raise InvalidError(f"model: {path} is a file; give the folder that config.json is in")
    if isinstance(name, str) and (match := re.fullmatch(_PAGE, name)):
        raise InvalidError(f"model: {name} is an address; give its hub name, {match[1]!r}")
    if isinstance(name, str) and name != name.strip() and path_of(name.strip()).is_dir():
        raise NotFoundError(f"model: there is no folder {name!r}; it has a space too many")
    if not isinstance(name, str) or path.is_absolute() or name.startswith((".", "~")):
        raise NotFoundError(f"model: there is no folder {path}")
    if name.count("/") > 1 or not name.strip("/"):
        raise NotFoundError(f"model: there is no folder {name}, and it is no hub name (owner/name)")
    return _fetch(name)


def _refuse_adapter(folder: Path) -> None:
    if (folder / "config.json").exists() or not (folder / "adapter_config.json").exists():
        return
    raise InvalidError(
        f"model: {folder} is an adapter; give the model that it sits on, and "
        "lora=pm.LoRA(init=…) with this folder to train it further"
    )


def _refuse_pointers(folder: Path) -> None:
    """A clone made without Git LFS has a few words where the weights should be."""
    for path in folder.glob("*.safetensors"):
        if path.is_file() and path.stat().st_size < 1024:
            with path.open("rb") as file:
                if file.read(24) == b"version https://git-lfs.":
                    raise InvalidError(
                        f"model: {path} is only Git LFS's pointer to the weights; git lfs pull "
                        "fetches them"
                    )


def _fetch(name: str) -> Path:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub
    from huggingface_hub import errors

    def copy(*, local: bool) -> Path:
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, local_files_only=local
        )
        return Path(folder).absolute()

    try:
        return copy(local=False)
    except errors.GatedRepoError:
        raise NotFoundError(
            f"model: {name} is gated; accept its terms on the hub and log in (hf auth login)"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise NotFoundError(f"model: there is no folder and no hub model {name!r}") from None
    except Exception as error:  # each version of the library has its own network errors
        try:
            return copy(local=True)
        except Exception:
            reason = (
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            )
            raise PeerError(
                f"model: {name} is not on this machine and the hub cannot be reached; give a "
                f"folder, or try again with a network ({reason[:200]})"
            ) from None
