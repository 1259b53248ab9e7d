"""Calls as people make them who know other tools, or mistype: what is wrong, where, what to do.

Each is answered at once, before there is a run.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pantheraml as pm
import pytest
from conftest import ROWS
from pantheraml.data import chat

IDS = [[1, 2, 3], [4, 5, 6]]
COMPLETED = 'may be the "prompt", \'{}\' the "completion"'


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("https://huggingface.co/Qwen/Qwen2.5-0.5B", "hub name, 'Qwen/Qwen2.5-0.5B'"),
        ("https://www.huggingface.co/a/b-c.d/tree/main", "hub name, 'a/b-c.d'"),
        ("{tiny} ", "a space too many"),
        ("{tiny}/../m.gguf", "GGUF file, which is only written"),
        ("{tiny}/../pointer", "git lfs pull fetches them"),
        ("{tiny}/model.safetensors", "give the folder that config.json is in"),
    ],
)
def test_models(model: str, words: str, tmp_path: Path, runs: Path) -> None:
    tiny = pm.tiny.TinyLlama().write(tmp_path / "tiny")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "pointer").mkdir()
    (tmp_path / "pointer" / "config.json").write_text("{}")
    (tmp_path / "pointer" / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
    )
    with pytest.raises(pm.Error, match=words):
        pm.finetune(model.format(tiny=tiny), ROWS)
    assert not runs.exists()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("Hello, this is my training text", r"if it is the text itself, give \[\{\"text\": …\}\]"),
        ("*.jsonl", "patterns are not searched for"),
        ("tatsu-lab/alpaca", r'load_dataset\("tatsu-lab/alpaca", split="train"\)'),
        ("https://example.org/train.jsonl", "download it"),
        ({"text": ["a", "b"]}, r"Dataset\.from_dict\(data\)"),
        ({"text": "a"}, r"give \[data\] if it is one row"),
        (["one text", "two"], r'for texts, give \[\{"text": text\} for text in data\]'),
        (["a.jsonl", "b.jsonl"], "one file is read"),
        ([Path("a.jsonl")], "one file is read"),
        (IDS, r'for token ids, give \[\{"input_ids": ids\} for ids in data\]'),
        (np.array(IDS), "for token ids, give"),
        ([[{"role": "user", "content": "hi"}]], "must be a dict, it is list$"),
        ([None], r"data\[0\] must be a dict, it is NoneType$"),
        ([{"conversations": [{"from": "human", "value": "hi"}]}], '"assistant" the role'),
        ([{"instruction": "a", "input": "", "output": "b"}], COMPLETED.format("output")),
        ([{"question": "a", "answer": "b"}], COMPLETED.format("answer")),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "preferences are not trained on"),
        ([{"content": "a"}], '"content" may be the "text"'),
        ([{"role": "user", "content": "a"}], "this one has 'role', 'content'$"),
        ([{"text": None}], r"'text' \(null\)"),
    ],
)
def test_data(data: Any, words: str, model: Path, runs: Path) -> None:
    with pytest.raises(pm.Error, match=words):
        pm.finetune(model, data)
    with pytest.raises(pm.Error, match=words):
        pm.preview(data, model)
    assert not runs.exists() or not any(runs.iterdir())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rows.csv", r'load_dataset\("csv", data_files=…, split="train"\)'),
        ("rows.tsv", r'sep="\\t"'),
        ("rows.jsonl.gz", "unpack it first"),
        ("saved", r"datasets\.load_from_disk"),
        ("tiny", r"a model's folder: finetune\(model, data\), preview\(data, model\)"),
        (".", "is not a file"),
    ],
)
def test_files(name: str, words: str, model: Path, tmp_path: Path) -> None:
    for made in ("rows.csv", "rows.tsv", "saved/dataset_info.json", "tiny/config.json"):
        (tmp_path / made).parent.mkdir(exist_ok=True)
        (tmp_path / made).write_text("{}")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    with pytest.raises(pm.Error, match=words):
        pm.preview(tmp_path / name, model)


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        (json.dumps([{"role": "user", "content": "a"}]), r"it is a text: json\.loads\(…\)"),
        ("hi", "must be a list with at least one turn$"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}],
         'turn 2: "content" is null'),
    ],
)  # fmt: skip
def test_conversations(turns: Any, words: str, model: Path) -> None:
    with pytest.raises(pm.InvalidError, match=rf"data\[0\]: .*{words}"):
        pm.preview([{"messages": turns}], model)


def test_turns_that_say_something_else() -> None:
    """A call of a tool, or reasoning, stands where the content is null."""
    for what in ({"tool_calls": [{}]}, {"reasoning_content": "hm"}):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, **what}]
        assert chat.check(turns) == turns


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_steps": -1}, "None leaves it to num_train_epochs"),
        ({"method": "qlora"}, 'method="lora" and quant="nf4"'),
        ({"method": "LoRA"}, "did you mean 'lora'"),
        ({"quant": "4bit"}, '"nf4" has 4 bits'),
        ({"quant": "NF4"}, "did you mean 'nf4'"),
        ({"lora": {"r": 8}}, r"LoRA\(\*\*…\)"),
        ({"lora": 8}, r"give lora=pantheraml\.LoRA\(r=…\)"),
        ({"memory_limit": 8}, '8 bytes, .* "8GiB"'),
        ({"memory_limit": "8"}, '8 bytes, .* "8GiB"'),
        ({"memory_limit": "9MiB"}, "give it that much, or take a smaller model"),
        ({"max_length": 1 << 19, "per_device_train_batch_size": 4096}, "tokens of one micro-batch"),
        ({"lr_scheduler_type": "Cosine"}, "did you mean 'cosine'"),
    ],
)
def test_settings(settings: dict[str, Any], words: str, model: Path) -> None:
    with pytest.raises(pm.Error, match=words):
        pm.plan(model, **settings)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("r", r"LoRA\(r=…\)"), ("lora_alpha", "LoRA"), ("target_modules", "LoRA"),
        ("vram", "memory_limit"), ("max_memory", "memory_limit"), ("tokenizer", "model's folder"),
    ],
)  # fmt: skip
def test_names(name: str, words: str, model: Path) -> None:
    for call in (pm.plan, pm.finetune):
        with pytest.raises(TypeError, match=f"'{name}' is not a parameter: .*{words}"):
            call(model, ROWS, **{name: 1}) if call is pm.finetune else call(model, **{name: 1})


def test_numbers_of_numpy(model: Path) -> None:
    """NumPy's whole numbers and truth values are such, and its others are not."""
    same = {"max_steps": 2, "per_device_train_batch_size": 3, "packing": False}
    drawn = {
        "max_steps": np.int64(2), "per_device_train_batch_size": np.uint8(3),
        "packing": np.bool_(False),
    }  # fmt: skip
    assert pm.plan(model, max_length=64, **drawn) == pm.plan(model, max_length=64, **same)
    for wrong in (np.float32(2.5), np.bool_(True), np.array([2])):
        with pytest.raises(pm.InvalidError, match="max_steps must be a whole number"):
            pm.plan(model, max_steps=wrong)
    with pytest.raises(pm.InvalidError, match="packing must be True or False"):
        pm.plan(model, packing=np.int64(1))


def test_a_keyword_that_is_none_is_not_given(model: Path) -> None:
    kwargs = {"min_lr": None, "min_lr_rate": 0.1}
    pm.plan(
        model, max_length=64, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs=kwargs
    )


def test_of_a_run(start: Callable[..., pm.Run], tmp_path: Path) -> None:
    run = start([{"messages": [{"role": "human", "content": "a"}]}] * 4, max_steps=1)
    with pytest.raises(pm.Error, match="\"assistant\" are learned.*roles are 'human'"):
        run.wait()
    run = start(max_steps=1).wait()
    ids = run.sample(input_ids=[97, 98], max_new_tokens=3, temperature=0.0).token_ids
    prompt = np.frombuffer(b"ab", np.uint8)
    for given in (prompt, np.stack([prompt] * 2)):
        found = run.sample(input_ids=given, max_new_tokens=3, temperature=0.0)
        assert [s.token_ids for s in (found if given.ndim == 2 else [found])] == [ids] * given.ndim
    for wrong, words in ((5, "input_ids must be a list"), ("12", "must be a whole number")):
        with pytest.raises(pm.InvalidError, match=words):
            run.sample(input_ids=wrong)  # type: ignore[arg-type]
    with pytest.raises(pm.InvalidError, match="given as messages="):
        run.sample([{"role": "user", "content": "hi"}])  # type: ignore[list-item]
    for folder in ("", None):
        with pytest.raises(pm.InvalidError, match="folder must be where the export goes"):
            run.export(folder)  # type: ignore[arg-type]
    with pytest.raises(pm.InvalidError, match="did you mean 'gguf'"):
        run.export(tmp_path / "x", "GGUF")
