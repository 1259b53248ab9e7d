"""Model folders that cannot be used: said before a run begins, and nothing is left behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pantheraml as pm
import pytest
from conftest import PATIENCE
from pantheraml.tiny import TinyLlama
from safetensors.numpy import load_file, save_file

Change = Callable[[Path], None]


def config_with(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))

    return change


def weights_with(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors") | changes
        save_file({k: v for k, v in tensors.items() if v is not ...}, folder / "model.safetensors")

    return change


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def sharded_without_a_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


Q = "model.layers.1.self_attn.q_proj.weight"
BAD: dict[str, tuple[Change, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),  # type: ignore[dict-item]
    "field missing": (config_with(hidden_size=...), "hidden_size"),
    "another architecture": (config_with(model_type="gpt2"), "gpt2"),
    "mathematics not supported": (config_with(hidden_act="gelu"), "hidden_act"),
    "rope not supported": (
        config_with(rope_scaling={"rope_type": "longrope", "factor": 4.0}), "longrope",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "safetensors"),
    "damaged": (garbage, "model.safetensors"),
    "cut short": (cut, "model.safetensors"),
    "tensor missing": (weights_with(**{Q: ...}), Q),
    "wrong shape": (weights_with(**{Q: np.zeros((64, 63), np.float32)}), Q),
    "wrong dtype": (weights_with(**{Q: np.zeros((64, 64), np.int64)}), Q),
    "shard missing": (sharded_without_a_shard, "model-00002-of-00002.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_folder_is_named(name: str, model: Path, runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(model, folder)
    change, words = BAD[name]
    change(folder)
    with pytest.raises(pm.Error) as caught:
        pm.finetune(folder, [{"text": "a"}])
    assert words in str(caught.value)
    assert not runs.exists() or not list(runs.iterdir())
    with pytest.raises(pm.Error):
        pm.plan(folder)


def test_nf4_folder_with_a_whole_weight_is_named(tmp_path: Path, runs: Path) -> None:
    """What llm_int8_skip_modules leaves: transformers would not quantise it, we would have to."""
    stored = Path(__file__).parent.parent / "parity/fixtures/qwen2-nf4-lora/model"
    shutil.copytree(stored, tmp_path / "bad")
    index = json.loads((stored / "model.safetensors.index.json").read_text())["weight_map"]
    file = tmp_path / "bad" / index[Q]
    tensors = load_file(file)
    rest = {name: t for name, t in tensors.items() if not name.startswith(Q)}
    save_file(rest | {Q: np.zeros((40, 40), np.float32)}, file)
    for name in list(index):
        if name.startswith(Q + "."):
            del index[name]
    (tmp_path / "bad" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index})
    )
    with pytest.raises(pm.Error, match=f"'{Q}' was left whole.*llm_int8_skip_modules"):
        pm.finetune(tmp_path / "bad", [{"input_ids": [1, 2]}], quant="nf4")
    assert not runs.exists() or not list(runs.iterdir())


def test_a_tied_head_in_the_file_is_the_table(
    model: Path, tmp_path: Path, start: Callable[..., pm.Run]
) -> None:
    """As some exporters write it; with another one it is not said which of the two is meant."""
    folder = tmp_path / "tied"
    shutil.copytree(model, folder)
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    config_with(tie_word_embeddings=True)(folder)
    weights_with(**{"lm_head.weight": table})(folder)
    beside = start(model=folder, max_steps=2, seed=1).wait(PATIENCE)
    weights_with(**{"lm_head.weight": ...})(folder)
    alone = start(model=folder, max_steps=2, seed=1).wait(PATIENCE)
    weights_with(**{"lm_head.weight": table.astype(np.float64)})(folder)  # alike in numbers
    wide = start(model=folder, max_steps=2, seed=1).wait(PATIENCE)
    for run in (beside, wide):
        assert [r["loss"] for r in run.history] == [r["loss"] for r in alone.history]
    other = table.copy()
    other[-1, -1] += 1
    for head in (other, other.astype(np.float64), table[:-1]):
        weights_with(**{"lm_head.weight": head})(folder)
        with pytest.raises(pm.RunFailed, match="lm_head.weight is not model.embed_tokens.weight"):
            start(model=folder, max_steps=2).wait(PATIENCE)


def test_shards_are_read(model: Path, tmp_path: Path, start: Callable[..., pm.Run]) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    one, two = start(max_steps=2, seed=1), start(model=folder, max_steps=2, seed=1)
    assert [r["loss"] for r in one.wait(PATIENCE).history] == [
        r["loss"] for r in two.wait(PATIENCE).history
    ]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ('{"text": "a"}\n{broken\n', "rows.jsonl, line 2"),
        ('{"input_ids": [1, 300]}\n', "rows.jsonl, line 1: input_ids[1] is 300"),
        ('{"input_ids": [1, 2], "labels": [-100, -100]}\n', "no token of any row is learned"),
        ("", "there are no rows"),
    ],
)
def test_bad_data_ends_the_run_with_its_line(
    rows: str, words: str, start: Callable[..., pm.Run], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(rows)
    run = start(path)
    with pytest.raises(pm.RunFailed) as caught:
        run.wait(PATIENCE)
    assert words in str(caught.value) and words in run.reason
    assert run.state == "failed" and run.history == []
    assert pm.runs()[0].state == "failed"


def test_rows_whose_labels_are_beyond_the_cut(start: Callable[..., pm.Run]) -> None:
    run = start([{"prompt": "x" * 100, "completion": "y"}], max_length=16)
    with pytest.raises(pm.RunFailed, match="label"):
        run.wait(PATIENCE)


def test_what_is_said_to_fit_fits(tmp_path: Path) -> None:
    """Every setting that a refusal names, with all that follows from it, such as room to sample."""
    model = TinyLlama(hidden=256, layers=4, intermediate=700, vocab=4000, positions=2048)
    folder = model.write(tmp_path / "m", tokenizer=False)
    given: dict[str, Any] = {"devices": "cpu", "threads": 1, "max_length": 2048}
    said = 0
    for limit in range(24 << 20, 96 << 20, 3 << 20):
        try:
            pm.plan(folder, memory_limit=limit, **given)
        except pm.NoMemoryError as error:
            for advice in re.findall(r"([^,:]*) fits", str(error)):
                pairs = re.findall(r'(\w+)=(?:"(\w+)"|(\d+))', advice)
                changed = {name: word or int(number) for name, word, number in pairs}
                pm.plan(folder, memory_limit=limit, **given | changed)
                said += 1
    assert said > 8


def test_no_memory_names_what_would_fit(model: Path, start: Callable[..., pm.Run]) -> None:
    with pytest.raises(MemoryError) as planned:
        pm.plan(model, memory_limit="2MiB")
    assert "the smallest plan needs" in str(planned.value)
    run = start(memory_limit="2MiB")
    with pytest.raises(pm.RunFailed, match="the smallest plan needs .* or take a smaller model"):
        run.wait(PATIENCE)
