"""Export: what was trained, as other tools read it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pantheraml.errors import NotFoundError

#: What only a resumed run reads.
_OURS = {"optimizer.safetensors", "state.json", "MANIFEST"}


def copy_checkpoint(checkpoint: Path, folder: Path) -> Path:
    """Copy a checkpoint's files for users; each is whole under its name or not there."""
    names = sorted(path.name for path in checkpoint.iterdir() if path.name not in _OURS)
    if not any(name.endswith(".safetensors") for name in names):
        raise NotFoundError(f"{checkpoint} holds no weights")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        temporary = folder / f"{name}.tmp-{os.getpid()}"
        try:
            shutil.copyfile(checkpoint / name, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(folder / name)
        finally:
            temporary.unlink(missing_ok=True)
    return folder
