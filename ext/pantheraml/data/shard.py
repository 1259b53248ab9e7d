"""Token shards: the file between preparation and the engine.

The layout is the one of ``pml/data/shard.h``: ``input_ids`` and ``labels`` I32 [tokens] with all
rows end to end, ``offsets`` I64 [rows + 1], in one safetensors file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

Ids = npt.NDArray[np.int32]

#: A label that means "no loss here", as in PyTorch's cross entropy.
IGNORE = -100


class ShardWriter:
    """Collects rows and writes them as one file, whole or not at all."""

    def __init__(self) -> None:
        self._ids: list[Ids] = []
        self._labels: list[Ids] = []
        self._max_id = -1
        self.tokens = 0
        self.learned = 0

    @property
    def rows(self) -> int:
        """Rows added so far."""
        return len(self._ids)

    def add(self, ids: Ids, labels: Ids) -> None:
        """Add a row. `labels` stand at the position of the id they belong to, not shifted."""
        self._ids.append(ids)
        self._labels.append(labels)
        self._max_id = max(self._max_id, int(ids.max(initial=-1)))
        self.tokens += len(ids)
        # The first token of a row has nothing before it to be predicted from.
        self.learned += int(np.count_nonzero(labels[1:] != IGNORE))

    def write(self, path: Path, source: str) -> None:
        """Write the file beside its name, fsync, rename, fsync the folder."""
        offsets = np.zeros(self.rows + 1, np.int64)
        np.cumsum([len(row) for row in self._ids], out=offsets[1:])
        tensors: dict[str, npt.NDArray[Any]] = {
            "input_ids": np.concatenate(self._ids).astype(np.int32, copy=False),
            "labels": np.concatenate(self._labels).astype(np.int32, copy=False),
            "offsets": offsets,
        }
        metadata = {"format": "pml-shard-1", "max_id": str(self._max_id), "source": source}
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        try:
            save_file(tensors, temporary, metadata)
            with temporary.open("rb+") as file:
                os.fchmod(file.fileno(), 0o600)
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
