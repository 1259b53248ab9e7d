"""Real text: sources of the standard library in every way, counted beside the tokenizer itself.

`tools/realtext/run.py` does the same with whole corpora, and transformers beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from examples import RUN
from pantheraml.data import prepare
from pantheraml.data.handover import look_at
from pyarrow import parquet
from real_text import KINDS, model_folder, sources
from safetensors import safe_open
from test_readers import Dataset
from tokenizers import Tokenizer


def shard(folder: Path, model: Path, data: Any, capsys: pytest.CaptureFixture[str]) -> Any:
    """Ids and labels that a run would get, and what it would say."""
    (folder / "data").mkdir(parents=True)
    run = RUN | {
        "model": str(model), "train_data": "data/train.safetensors", "eval_data": "",
        "max_length": 512, "packing": True, "data": {"train": look_at(data).hand_over(folder, "s")},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run))
    assert prepare.main([str(folder)]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    with safe_open(folder / "data/train.safetensors", "np") as file:
        found = file.get_tensor("input_ids"), file.get_tensor("labels")
    return *found, " ".join(line.get("message", "") for line in said)


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_has_the_tokenizers_tokens(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_folder(tmp_path / "m", kind)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    rows = [{"text": path.read_text("utf-8")} for path in sources(300_000)]
    table = pa.Table.from_pylist(rows)
    encoded = tokenizer.encode_batch([row["text"] for row in rows])
    expected = np.concatenate([[*encoding.ids, 0] for encoding in encoded])
    ways: dict[str, Any] = {"list": rows, "dataset": Dataset(table)}
    for name in ("rows.jsonl", "rows.json", "rows.parquet"):
        ways[name] = tmp_path / name
    ways["rows.jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    ways["rows.json"].write_text(json.dumps(rows, ensure_ascii=False, indent=1), "utf-8")
    parquet.write_table(table, ways["rows.parquet"])
    for name, data in ways.items():
        ids, labels, said = shard(tmp_path / f"run-{name}", model, data, capsys)
        assert np.array_equal(ids, expected) and np.array_equal(labels, expected), name
        full = float(said.partition(" full")[0].rpartition(", ")[2].rstrip("%"))
        assert full >= 98, said
    text = "\n".join(row["text"] for row in rows)
    (tmp_path / "all.txt").write_text(text, "utf-8", newline="")
    ids, _, _ = shard(tmp_path / "run-txt", model, tmp_path / "all.txt", capsys)
    assert np.array_equal(ids, [*tokenizer.encode(text).ids, 0])
