"""Every kind of source gives the same rows, names every fault, and takes bounded memory."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import environment
from examples import RUN
from pantheraml.data import readers
from pantheraml.data.handover import look_at
from pantheraml.data.readers import read, source_of, text_pieces
from pantheraml.data.rows import FIELDS, Source
from pantheraml.errors import Error, InvalidError, NotFoundError
from pyarrow import parquet

ROWS: list[dict[str, Any]] = [
    {"text": "é\n日本 👋"},
    {"text": ""},
    {"text": '"}],[{"\\ \x7f' * 50},
    {"text": "x" * 3000},
]
TALKS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f", "x": {"a": 1}}]},
    {
        "messages": [{"role": "assistant", "content": "b", "name": "n"}],
        "tools": [{"name": "g", "x": {"b": 1}}],
    },
]


class Dataset:
    """What is used of a ``datasets.Dataset``, over one Arrow table."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.column_names = table.column_names

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def select_columns(self, names: list[str]) -> Dataset:
        return Dataset(self.table.select(names))

    def with_format(self, name: str) -> Dataset:
        assert name == "arrow"
        return self

    def iter(self, batch_size: int) -> Iterator[pa.Table]:
        for begin in range(0, len(self), batch_size):
            yield self.table.slice(begin, batch_size)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as the ending says."""
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2), "utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def stored(tmp_path: Path, data: Any) -> Source:
    (tmp_path / "data").mkdir(exist_ok=True)
    described = look_at(data).hand_over(tmp_path, "source")
    assert (tmp_path / described["path"]).stat().st_mode & 0o777 == 0o600
    return Source(tmp_path / described["path"], described["format"])


@pytest.mark.parametrize("rows", [ROWS, ROWS * 300, TALKS], ids=["few", "many", "talks"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "list", "generator", "dataset"])
def test_all_give_the_same(kind: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    if kind == "list":
        source = stored(tmp_path, rows)
    elif kind == "generator":
        source = stored(tmp_path, (row for row in rows))
    elif kind == "dataset":
        source = stored(tmp_path, Dataset(pa.Table.from_pylist(rows)))
    else:
        source = source_of(write(tmp_path / f"rows.{kind}", rows))
    found = list(read(source))
    assert [row.fields for row in found] == rows
    done = [row.done for row in found]
    assert done == sorted(done) and 0 < done[0] and done[-1] == pytest.approx(1, abs=0.01)


def test_only_what_is_used_is_read(tmp_path: Path) -> None:
    rows = [{"text": "a", "id": 1, "picture": b"\xff"}, {"text": "b", "id": 2, "picture": b""}]
    for data in (rows, Dataset(pa.Table.from_pylist(rows)), iter(rows)):
        assert [row.fields for row in read(stored(tmp_path, data))] == [
            {"text": "a"},
            {"text": "b"},
        ]
    source = source_of(write(tmp_path / "a.parquet", rows))
    assert [row.fields for row in read(source)] == [{"text": "a"}, {"text": "b"}]
    assert {"text", "messages", "input_ids"} < set(FIELDS)


def test_json_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut at every place: values, escapes, characters of several bytes and numbers."""
    monkeypatch.setattr(readers, "_CHUNK", 1)
    text = ' [ {"text":"é\\u00e9\\ud83d\\ude00","n":-1.5e+10} ,\n\n{"a":[true,null,{}]}\n] \n'
    path = tmp_path / "a.json"
    path.write_text(text, "utf-8")
    found = list(read(source_of(path)))
    assert [row.fields for row in found] == json.loads(text)
    assert [row.index for row in found] == [0, 2]  # lines


def test_json_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\ufeff\n{"text": "a"}\n{"text": "b"}\n', "utf-8")
    assert source_of(path).format == "jsonl"
    with pytest.raises(InvalidError, match="line 4: not a JSON object"):
        path.write_text(path.read_text("utf-8") + "{")
        list(read(source_of(path)))


def test_text_is_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    text = "日本\r\né👋\x00x\n" * 50
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    for size in (1, 2, 3, 7, 10000):
        pieces = list(text_pieces(path, size))
        assert "".join(piece for piece, _ in pieces) == text
        assert pieces[-1][1] == 1
    path.write_bytes(b"a\nb\n" + "é".encode()[:1])
    for size in (1, 3, 100):
        with pytest.raises(InvalidError, match="line 3: not UTF-8"):
            list(text_pieces(path, size))


# ---- faults ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"text": "a"},\n {"text": }]', "line 2: not JSON (Expecting value)"),
        ('[{"text": "a"},\n {"text": "b"', "line 2: not JSON"),
        ('[{"text": "a"}\n', "line 2: not JSON (the file ends within the list)"),
        ('[{"text": "a"}\n {"text": "b"}]', "line 2: not JSON ('{' after a row)"),
        ('[{"text": "a"}]\n\nx', "line 3: something stands after"),
        ("[\n3]", "line 2: a row must be a JSON object, this is a number"),
        ('"x"', "line 1: a .json file must hold a list"),
        ('[{"text": "\\ud800"}]', "line 1: text with half a surrogate pair"),
        ('[{"text": "a\nb"}]', "line 1: not JSON (Invalid control character"),
        ("[" * 100000, "line 1: not JSON (maximum recursion"),
        (b'[{"text": "a"},\n{"text": "\xff"}]', "line 2: not UTF-8"),
    ],
)
@pytest.mark.parametrize("chunk", [1 << 20, 3])
def test_json_faults(
    text: str | bytes, words: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(text, str) and len(text) > 1000 and chunk == 3:
        pytest.skip("the same, slowly")
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    with pytest.raises(InvalidError) as caught:
        list(read(source_of(path)))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"text": "a"}\r\n\r\n{"text": 1\r\n', "line 3: not a JSON object"),
        (b"\x00" * 4096, "line 1: not a JSON object"),
        (b'{"text": "a\x00b"}', "line 1: not a JSON object (Invalid control character"),
        (
            '{"text": "a"}'.encode("utf-16"),
            "line 1: not UTF-8 at byte 0 of the line; it looks like",
        ),
        (b'\n{"text": "\\udc00\\ud800"}', "line 2: text with half a surrogate pair"),
        (b'{"a": ' * 5000, "line 1: not a JSON object (maximum recursion"),
        (b'{"n": ' + b"9" * 5000 + b"}", "line 1: not a JSON object (Exceeds the limit"),
        (b'{"text": "a"}' * 2, "line 1: not a JSON object (Extra data at character 14)"),
        (b'{"text": "a"}\n{"text": "' + b"x" * 999, "line 2: longer than"),
    ],
)
def test_line_faults(
    data: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if b"xxx" in data:
        monkeypatch.setattr(readers, "MAX_ROW", 500)
        words += " 0 MiB"
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    with pytest.raises(InvalidError) as caught:
        list(read(source_of(path)))
    assert words in str(caught.value)


def test_crlf_and_bom(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\\r\\n"}\r\n\r\n{"text": "b"}\r\n')
    assert [row.fields["text"] for row in read(source_of(path))] == ["a\r\n", "b"]


def test_parquet_faults(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["a" * 100] * 999}), path, compression="none")
    whole = path.read_bytes()
    bad_text = pa.Array.from_buffers(
        pa.string(),
        3,
        [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")],
    )
    damaged = bytearray(whole)
    damaged[4:40] = b"\xff" * 36
    for data, words in (
        (b"PAR1 no", "a.parquet: it cannot be read as parquet"),
        (b"", "a.parquet: it cannot be read as parquet"),
        (whole[:-20], "a.parquet: it cannot be read as parquet"),
        (bytes(damaged), "a.parquet: it cannot be read as parquet"),
    ):
        path.write_bytes(data)
        with pytest.raises(InvalidError) as caught:
            list(read(source_of(path)))
        assert words in str(caught.value)
    parquet.write_table(pa.table({"text": bad_text}), path)
    with pytest.raises(InvalidError, match=r"a.parquet, row 2: not UTF-8"):
        list(read(source_of(path)))


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotFoundError, match=r"needs pyarrow: pip install 'pantheraml\[parquet\]'"):
        source_of(path)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="is not a file"):
        source_of(tmp_path)


# ---- hand-over ---------------------------------------------------------------------------------


def test_numbers_of_other_libraries(tmp_path: Path) -> None:
    source = stored(tmp_path, [{"input_ids": np.array([1, 2]), "labels": [np.int64(3), 4]}])
    assert [row.fields for row in read(source)] == [{"input_ids": [1, 2], "labels": [3, 4]}]


class Frame:
    """Looks as pandas' does."""

    columns = ("text",)

    def to_dict(self, _: str) -> None: ...


TABLE = Dataset(pa.table({"text": ["a"]}))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([{"text": "a"}, 3], "data[1] must be a dict, it is int"),
        ([{"text": object()}], "data[0] cannot be stored: object is no text"),
        ([{"messages": [], "tools": [print]}], "data[0] cannot be stored: builtin_function"),
        ([{"text": "a"}, {"text": "\ud800"}], "data[1]: text with half a surrogate pair"),
        (iter([]), "data: there are no rows in it"),
        ([{"txt": 1}], "data[0]: a row must be"),
        (["text"], "data[0] must be a dict, it is str"),
        ({"train": TABLE, "test": TABLE}, "data is a dict of 'train', 'test'; give one of them"),
        ({"text": ["a"]}, "not one dict ('text'); give datasets.Dataset.from_dict(data)"),
        (Frame(), 'data is a DataFrame; give data.to_dict("records")'),
        (pa.table({"text": ["a"]}), "data is Arrow data; give data.to_pylist()"),
        (Dataset(pa.table({"txt": ["a"]})), "data[0]: a row must be"),
        (Dataset(pa.table({"text": pa.array([], pa.string())})), "data: there are no rows in it"),
        (b"x", "data must be a file or a list of dicts, it is bytes"),
    ],
)
def test_what_cannot_be_handed_over(data: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(Error) as caught:
        stored(tmp_path, data)
    assert words in str(caught.value)
    assert not list(tmp_path.glob("data/*"))


def test_a_generator_is_not_kept(tmp_path: Path) -> None:
    """Rows are written as they come: at no time are all of them there."""
    alive = 0

    class Text(str):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    most = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal alive, most
        for _ in range(1000):
            alive += 1
            most = max(most, alive)
            yield {"text": Text("a" * 100)}

    assert len(list(read(stored(tmp_path, rows())))) == 1000
    assert most < 5


# ---- memory ------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from pathlib import Path
from pantheraml.data import prepare
status = prepare.main([sys.argv[1]])
print(status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(folder: Path, model: Path, source: Path) -> int:
    """Peak resident memory, in MiB, of a preparation in a process of its own."""
    (folder / "data").mkdir(parents=True)
    config = RUN | {
        "model": str(model), "train_data": "data/train.safetensors", "max_length": 128,
        "eval_data": "data/eval.safetensors", "packing": True, "seed": 1,
        "data": {
            "train": {"path": str(source), "format": source.suffix[1:]}, "eval_split": 0.1,
        },
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-P", "-c", MEASURE, str(folder)],
        # What allocators keep for threads is not the matter here (Arrow's kept up to 25 MiB).
        env=environment(MALLOC_ARENA_MAX="2", ARROW_DEFAULT_MEMORY_POOL="system"),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    status, kib = done.stdout.splitlines()[-1].split()
    assert status == "0", done.stdout
    return int(kib) >> 10


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_memory_does_not_grow_with_the_file(kind: str, model: Path, tmp_path: Path) -> None:
    choose = random.Random(3)
    words = ["".join(choose.choices("abcdefgh", k=choose.randint(2, 9))) for _ in range(300)]
    rows = [{"text": " ".join(choose.choices(words, k=600))} for _ in range(350)]  # 1.4 MB
    peaks = []
    for times in (1, 5):
        path = tmp_path / f"{times}.{kind}"
        if kind == "parquet":  # one row group, of any size
            parquet.write_table(pa.Table.from_pylist(rows * times), path, row_group_size=10**9)
        else:
            write(path, rows * times)
        peaks.append(peak(tmp_path / f"run-{times}", model, path))
    # 7 MB of text are 7 M tokens here and a shard of 56 MB: nothing of that size may be held.
    assert peaks[1] - peaks[0] < 40, peaks
