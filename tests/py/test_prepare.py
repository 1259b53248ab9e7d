"""From rows to shards, and what is said about rows that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from examples import RUN
from pantheraml.data import prepare, shard
from pantheraml.data.shard import IGNORE
from pantheraml.tiny import TinyLlama
from pyarrow import parquet
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

EOS = 256
CHOSEN = [5, 9, 11, 12]  # of 20, by seed 42
Pairs = list[tuple[list[int], list[int]]]


class Job:
    """A run folder with a source, and what prepare makes of it."""

    def __init__(self, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.model, self.capsys = folder, model, capsys
        self.settings: dict[str, Any] = {"max_length": 32, "packing": False}
        (folder / "data").mkdir()

    def run(self, source: str | bytes, suffix: str = ".jsonl") -> tuple[int, list[dict[str, Any]]]:
        path = self.folder / f"rows{suffix}"
        path.write_bytes(source.encode() if isinstance(source, str) else source)
        described = {"path": str(path), "format": suffix[1:]}
        config: dict[str, Any] = RUN | {
            "seed": 42,
            "model": str(self.model),
            "train_data": "data/train.safetensors",
            "eval_data": "",
            "data": {"train": described},
            **self.settings,
        }
        for option in ("eval_split", "overlong"):
            if option in config:
                config["data"][option] = config.pop(option)
        if "eval_split" in config["data"]:
            config["eval_data"] = "data/eval.safetensors"
        (self.folder / "run.json").write_text(json.dumps(config))
        status = prepare.main([str(self.folder)])
        lines = [json.loads(line) for line in self.capsys.readouterr().out.splitlines()]
        return status, lines

    def rows(self, *rows: dict[str, Any]) -> Pairs:
        status, lines = self.run("\n".join(json.dumps(row) for row in rows))
        assert status == 0, lines
        return self.shard()

    def shard(self, name: str = "train") -> Pairs:
        with safe_open(self.folder / f"data/{name}.safetensors", "np") as file:
            ids, labels, offsets = (file.get_tensor(n) for n in ("input_ids", "labels", "offsets"))
            assert file.metadata()["format"] == "pml-shard-1"
            assert int(file.metadata()["max_id"]) == ids.max()
        assert (ids.dtype, labels.dtype, offsets.dtype) == (np.int32, np.int32, np.int64)
        assert offsets[0] == 0 and offsets[-1] == len(ids) == len(labels)
        places = zip(offsets[:-1], offsets[1:], strict=True)
        return [(ids[a:b].tolist(), labels[a:b].tolist()) for a, b in places]

    def error(self, source: str | bytes, suffix: str = ".jsonl") -> str:
        status, lines = self.run(source, suffix)
        assert status == 1
        assert lines[-1]["type"] == "error"
        assert not (self.folder / "data/train.safetensors").exists()
        assert not list(self.folder.glob("data/*.tmp-*"))
        return str(lines[-1]["message"])


@pytest.fixture
def job(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> Job:
    folder = tmp_path / "run"
    folder.mkdir()
    return Job(folder, model, capsys)


def ids_of(model: Path, text: str) -> list[int]:
    return list(Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids)


def test_text_learns_all_and_ends_once(job: Job, model: Path) -> None:
    a, b = job.rows({"text": "é!"}, {"text": "x<|endoftext|>"})
    assert a == ([*ids_of(model, "é!"), EOS],) * 2
    assert b == ([*ids_of(model, "x"), EOS],) * 2


def test_completion_learns_from_its_first_character(job: Job, model: Path) -> None:
    ((ids, labels),) = job.rows({"prompt": "Q: é ", "completion": " ü"})
    prompt, whole = ids_of(model, "Q: é "), ids_of(model, "Q: é  ü")
    assert ids == [*whole, EOS]
    assert labels == [IGNORE] * len(prompt) + ids[len(prompt) :]


def test_token_over_the_border_is_learned_and_bos_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """'ab' is one token; the tokenizer adds <s> in front and </s> behind by itself."""
    model = tmp_path / "m"
    model.mkdir()
    vocab = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "ab": 5}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    made.save(str(model / "tokenizer.json"))
    (model / "config.json").write_text('{"vocab_size": 6}')
    (model / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    (tmp_path / "run").mkdir()
    job = Job(tmp_path / "run", model, capsys)
    ((ids, labels),) = job.rows({"prompt": "ca", "completion": "bc"})
    assert ids == [0, 4, 5, 4, 1]
    assert labels == [IGNORE, IGNORE, 5, 4, 1]


def test_tokens_need_no_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = TinyLlama().write(tmp_path / "m", tokenizer=False)
    (tmp_path / "run").mkdir()
    job = Job(tmp_path / "run", model, capsys)
    rows = job.rows({"input_ids": [1, 2, 3], "labels": [-100, 2, -100]}, {"input_ids": [4, 5]})
    assert rows == [([1, 2, 3], [-100, 2, -100]), ([4, 5], [4, 5])]
    (job.folder / "data/train.safetensors").unlink()
    error = job.error('{"text": "a"}')
    assert "no tokenizer.json" in error and "save_pretrained" in error


def again(job: Job, **settings: Any) -> None:
    """Forget the shards; change settings of the run, or (in `data`) of its data."""
    for path in job.folder.glob("data/*.safetensors"):
        path.unlink()
    job.settings = {"max_length": 32, "packing": False, **settings}


def test_long_rows_are_cut_and_counted(job: Job) -> None:
    talk = {"prompt": "z" * 40, "completion": "y"}
    rows = [{"prompt": "z" * 20, "completion": "y" * 50}, talk, {"prompt": "a", "completion": "b"}]
    status, lines = job.run("\n".join(map(json.dumps, rows)))
    assert status == 0
    assert [len(ids) for ids, _ in job.shard()] == [32, 32, 3]
    assert messages(lines) == [
        "train: 3 rows, 67 tokens, 14 of them learned",
        "train: 2 rows are longer than max_length=32 and lose their end, 49 tokens in all; 1 of "
        "them have nothing left to learn",
    ]


def messages(lines: list[dict[str, Any]]) -> list[str]:
    said = [line["message"] for line in lines if "message" in line]
    return [line for line in said if "tokenised in" not in line]


def test_overlong(job: Job) -> None:
    rows = '{"text": "%s"}\n{"text": "a"}\n' % ("y" * 70)
    expected = {"split": [32, 32, 7, 2], "cut": [32, 2], "drop": [2]}
    for policy, lengths in expected.items():
        again(job, overlong=policy)
        status, lines = job.run(rows)
        assert status == 0
        assert [len(ids) for ids, _ in job.shard()] == lengths
        assert len(messages(lines)) == 2  # the summary, and what was done with the long row
    again(job, overlong="refuse")
    assert "rows.jsonl, line 1: 71 tokens, but max_length=32" in job.error(rows)
    again(job, packing=True)  # unsaid: texts that are packed lose nothing
    assert [len(ids) for ids, _ in job.rows({"text": "y" * 70})] == [32, 32, 7]
    again(job, packing=True)
    ((ids, _),) = job.rows({"prompt": "z" * 20, "completion": "y" * 50})
    assert len(ids) == 32


def test_txt_is_one_text(job: Job, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "PIECE", 3000)  # so that it is tokenised in pieces
    text = "\n".join(f"line {i} é" for i in range(1000)) + "\n"
    status, _ = job.run(text, ".txt")
    assert status == 0
    rows = job.shard()
    assert all(len(ids) == 32 for ids, _ in rows[:-1])
    assert sum((ids for ids, _ in rows), []) == [*ids_of(model, text), EOS]
    assert all(ids == labels for ids, labels in rows)


# ---- held out ----------------------------------------------------------------------------------


def held_out(job: Job, source: str, suffix: str = ".jsonl") -> tuple[Pairs, Pairs]:
    status, lines = job.run(source, suffix)
    assert status == 0, lines
    return job.shard(), job.shard("eval")


def test_split_is_whole_exact_and_by_seed(job: Job) -> None:
    """Every document is on one side, with all its rows; the seed alone says on which."""
    rows = "".join('{"text": "%s"}\n' % (chr(65 + i) * (5 + 7 * i)) for i in range(20))
    seen = []
    for seed in (1, 1, 2):
        again(job, seed=seed, eval_split=0.12, packing=True)
        train, out = held_out(job, rows)
        letters = [{ids[0] for ids, _ in side} - {EOS} for side in (train, out)]
        assert len(letters[1]) == 3  # as datasets' train_test_split: 2.4 are 3
        assert letters[0] | letters[1] == set(ids_of(job.model, "".join(map(chr, range(65, 85)))))
        assert not letters[0] & letters[1]
        assert sum(len(ids) for ids, _ in train + out) == sum(6 + 7 * i for i in range(20))
        seen.append(out)
    assert seen[0] == seen[1] != seen[2]
    again(job, seed=1, eval_split=4, packing=True)
    assert len({ids[0] for ids, _ in held_out(job, rows)[1]} - {EOS}) == 4
    assert not list(job.folder.glob("data/*tmp*")) and not list(job.folder.glob("data/*.all*"))


def test_split_keeps_every_row_of_many(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "_RUN", 100)  # several copies a run of rows
    again(job, eval_split=0.5)
    rows = [{"input_ids": [i % 256] * (1 + i % 7)} for i in range(500)]
    train, out = held_out(job, "\n".join(map(json.dumps, rows)))
    assert len(train) == len(out) == 250
    key = sorted((ids, labels) for ids, labels in train + out)
    assert key == sorted((row["input_ids"], row["input_ids"]) for row in rows)


def test_split_of_a_text_is_its_end(job: Job, model: Path) -> None:
    again(job, eval_split=0.25)
    text = "".join(f"line {i}\n" for i in range(100))
    train, out = held_out(job, text, ".txt")
    whole = [*ids_of(model, text), EOS]
    assert sum((ids for ids, _ in train + out), []) == whole
    assert len(out) == -(-(len(train) + len(out)) // 4)


def test_split_of_too_little(job: Job) -> None:
    again(job, eval_split=0.5)
    assert "holds out all of the data, 1 documents" in job.error(GOOD)
    assert not (job.folder / "data/eval.safetensors").exists()


def test_choice_is_fixed() -> None:
    """Runs of an older version are resumed with what they held out."""
    assert np.flatnonzero(prepare.choose(20, 4, 42)).tolist() == CHOSEN
    counts = sum(prepare.choose(50, 10, seed).astype(int) for seed in range(400))
    assert counts.sum() == 4000 and 40 < counts.min() and counts.max() < 125  # 80 each, ± 5 sigma


def test_shards_are_kept(job: Job) -> None:
    job.rows({"text": "first"})
    before = (job.folder / "data/train.safetensors").read_bytes()
    assert job.run('{"text": "second"}') == (0, [])
    assert (job.folder / "data/train.safetensors").read_bytes() == before
    assert (job.folder / "data/train.safetensors").stat().st_mode & 0o777 == 0o600


GOOD = '{"text": "a"}\n'


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (GOOD + "\n" + "{broken\n", "rows.jsonl, line 3: not a JSON object"),
        (GOOD + "[1]\n", "rows.jsonl, line 2: a row must be a JSON object, this is a list"),
        (GOOD.encode() + b'{"text": "\xff"}\n', "rows.jsonl, line 2: not UTF-8"),
        (GOOD + '{"texts": "a"}\n', "rows.jsonl, line 2: no 'text'"),
        (GOOD + '{"text": 7}\n', "rows.jsonl, line 2: 'text' must be a string, it is a number"),
        ('{"txt": "a"}\n', "rows.jsonl, line 1: a row must be"),
        ("", "no rows"),
        ("\n \n", "no rows"),
        ('{"input_ids": [1, 272]}\n', "line 1: input_ids[1] is 272, but the model's vocabulary"),
        ('{"input_ids": [1, -1]}\n', "line 1: input_ids[1] is -1"),
        ('{"input_ids": [1, 99999999999]}\n', "line 1: input_ids[1] is 99999999999"),
        ('{"input_ids": [1, 1e3]}\n', "line 1: 'input_ids' must hold whole numbers"),
        ('{"input_ids": [1, true]}\n', "line 1: 'input_ids' must hold whole numbers"),
        ('{"input_ids": []}\n', "line 1: 'input_ids' is empty"),
        ('{"input_ids": [1, 2], "labels": [1]}\n', "line 1: 2 input_ids but 1 labels"),
        ('{"input_ids": [1, 2], "labels": [1, 272]}\n', "line 1: labels has 272"),
        ('{"input_ids": [1, 2], "labels": [1, -1]}\n', "line 1: labels has -1"),
        ('{"input_ids": [1, 2], "attention_mask": [0, 1]}\n', "line 1: attention_mask"),
        ('{"input_ids": [1, 2], "labels": [1, -100]}\n', "no token of any row is learned"),
        ('{"messages": []}\n', "line 1: messages must be a list with at least one turn"),
        ('{"messages": [{"role": "user"}]}\n', 'line 1: turn 1 has no "content"'),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "the roles are 'user'"),
        ('{"prompt": "a", "completion": 3}\n', "line 1: 'completion' must be a string"),
        ('{"text": ["a"]}\n', "line 1: 'text' must be a string, it is a list"),
        ('{"text": {"a": 1}}\n', "line 1: 'text' must be a string, it is an object"),
        ('{"text": null}\n', "line 1: a row must be"),
        ('{"text": NaN}\n', "line 1: 'text' must be a string, it is a number"),
        ('{"input_ids": [[1, 2]]}\n', "line 1: 'input_ids' must hold whole numbers"),
        ('{"input_ids": "abc"}\n', "line 1: 'input_ids' must be a list of token ids"),
        ('{"input_ids": [1, %s]}\n' % (10**40), "line 1: 'input_ids' holds a number that no"),
        ('{"input_ids": [1, 2], "labels": [1, 2, 3]}\n', "line 1: 2 input_ids but 3 labels"),
        ('{"input_ids": [1, 2], "labels": [1, NaN]}\n', "line 1: 'labels' must hold whole"),
        ('{"input_ids": [1, 2], "attention_mask": [1]}\n', "as long as input_ids"),
        (GOOD + '{"messages": [{"role": "user", "content": "a"}]}\n', "line 2: no 'text'"),
        ('{"messages": [["user", "a"]]}\n', "line 1: turn 1 must be"),
        ('{"messages": {"role": "user"}}\n', "line 1: messages must be a list"),
        ('{"messages": [{"role": 1, "content": "a"}]}\n', 'line 1: turn 1 has no "role"'),
        ('{"messages": [{"from": "human", "value": "a"}]}\n', 'line 1: turn 1 has no "role"'),
        (
            '{"messages": [{"role": "assistant", "content": "a"}], "tools": [1]}\n',
            "line 1: 'tools' must be a list of objects",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a"}], "chat_template_kwargs": 1}\n',
            "line 1: 'chat_template_kwargs' must be an object",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}\n',
            "line 1: turn 1: not in this version: content of 'image'",
        ),
    ],
)
def test_bad_rows_are_named(job: Job, source: str | bytes, words: str) -> None:
    assert words in job.error(source)


def test_bad_txt(job: Job) -> None:
    assert "no rows" in job.error(" \n", ".txt")
    assert "rows.txt, line 2: not UTF-8" in job.error(b"a\n\xff", ".txt")


def test_nothing_is_written_where_a_link_leads(job: Job, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (job.folder / "data").rmdir()
    (job.folder / "data").symlink_to(tmp_path / "elsewhere")
    status, lines = job.run(GOOD)
    assert status == 1
    assert "run/data: it is a link, which is not followed here: remove it" in lines[-1]["message"]
    assert not list((tmp_path / "elsewhere").iterdir())


def test_progress_ends_at_one(job: Job) -> None:
    _, lines = job.run(GOOD * 3000)
    fractions = [line["fraction"] for line in lines if line.get("what") == "tokenising train"]
    assert fractions[0] == 0.0 and fractions[-1] == 1.0 and fractions == sorted(fractions)


# ---- shards that are kept ----------------------------------------------------------------------


def made(job: Job, rows: str = GOOD, **settings: Any) -> bool:
    """Run again; whether rows were tokenised."""
    again(job, **settings)
    status, lines = job.run(rows)
    assert status == 0, lines
    said = messages(lines)
    assert any("rows, " in line and "of them learned" in line for line in said)
    return not any("nothing was tokenised" in line for line in said)


def test_shards_are_used_again(job: Job, cache: Path) -> None:
    assert made(job)
    shard_file = job.folder / "data/train.safetensors"
    first = shard_file.read_bytes()
    assert not made(job)
    assert shard_file.read_bytes() == first
    assert shard_file.stat().st_nlink == 2  # no second copy on disk
    for path in cache.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0
    two = GOOD * 2
    assert made(job, two, eval_split=1)
    pair = job.shard(), job.shard("eval")
    assert not made(job, two, eval_split=1)
    assert (job.shard(), job.shard("eval")) == pair


def test_everything_that_decides_tokens_is_in_the_key(job: Job) -> None:
    rows = GOOD * 4
    assert made(job, rows)
    assert made(job, rows + GOOD)
    assert made(job, rows, max_length=31)
    assert made(job, rows, packing=True)
    assert made(job, rows, overlong="drop")
    assert made(job, rows, eval_split=0.5)
    assert made(job, rows, eval_split=0.5, seed=1)
    for name, change in (
        ("tokenizer.json", lambda text: text.replace("[END]", "[STOP]") + "\n"),
        ("tokenizer_config.json", lambda text: text.replace("im_start", "im_begin")),
        ("config.json", lambda text: text.replace("272", "273")),
    ):
        path = job.model / name
        text = path.read_text()
        try:
            path.write_text(change(text))
            assert made(job, rows) == (name != "tokenizer.json")  # only its meaning counts
        finally:
            path.write_text(text)
    assert not made(job, rows, seed=5)  # what is not used does not count
    assert not made(job, rows)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "entry", "no entry"])
def test_damaged_entries_are_made_anew(job: Job, cache: Path, damage: str) -> None:
    assert made(job)
    good = job.shard()
    (kept,) = cache.rglob("shard.safetensors")
    entry = kept.with_name("entry.json")
    data = bytearray(kept.read_bytes())
    data[-20] ^= 1
    (job.folder / "data/train.safetensors").unlink()
    if damage == "flip":
        kept.write_bytes(data)
    elif damage == "cut":
        kept.write_bytes(data[:-1])
    elif damage == "gone":
        kept.unlink()
    elif damage == "entry":
        entry.write_text("{}")
    else:
        entry.write_text("{")
    again(job)
    status, lines = job.run(GOOD)
    assert status == 0
    assert any("kept shards were damaged" in line for line in messages(lines))
    assert job.shard() == good
    assert not made(job)


def test_the_longest_unused_go(job: Job, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f'{{"text": "{letter * 20}"}}' for letter in "abc"]
    assert made(job, texts[0])
    size = sum(path.stat().st_size for path in cache.rglob("*.*"))
    monkeypatch.setenv("PANTHERAML_CACHE_SIZE", str(size * 5 // 2))
    assert made(job, texts[1])
    assert not made(job, texts[0])
    assert made(job, texts[2])  # takes the place of the second
    assert not made(job, texts[0])
    assert made(job, texts[1])
    monkeypatch.setenv("PANTHERAML_CACHE_SIZE", "0")
    assert made(job, texts[2] + "\n" + GOOD) and made(job, texts[2] + "\n" + GOOD)
    assert len(list((cache / "shards").iterdir())) == 2


def test_a_cache_that_cannot_be_is_said(job: Job, cache: Path) -> None:
    cache.rmdir()
    cache.write_text("a file")
    again(job)
    status, lines = job.run(GOOD)
    assert status == 0
    assert any("not kept for other runs" in line for line in messages(lines))


def test_a_column_of_another_type(job: Job, tmp_path: Path) -> None:
    """What only a .parquet can have: floats for ids, NaN for text, bytes, nulls."""
    for column, words in (
        (pa.array([[1, 2], [1.0, float("nan")]]), "row 1: 'input_ids' must hold whole numbers"),
        (pa.array([[1, 2], [1, None]]), "row 2: 'input_ids' must hold whole numbers"),
        (pa.array([[1, 2], None]), "row 2: no 'input_ids'"),
    ):
        parquet.write_table(pa.table({"input_ids": column}), tmp_path / "c.parquet")
        assert words in job.error((tmp_path / "c.parquet").read_bytes(), ".parquet")
    for texts, words in (
        (pa.array([float("nan"), 1.0]), "row 1: 'text' must be a string, it is a number"),
        (pa.array([b"a", b"\xff"]), "row 1: 'text' must be a string, it is bytes"),
        (pa.array(["a", None]), "row 2: no 'text'"),
    ):
        parquet.write_table(pa.table({"text": texts}), tmp_path / "c.parquet")
        assert words in job.error((tmp_path / "c.parquet").read_bytes(), ".parquet")
