"""pm.preview: what is marked is what a run learns from."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pantheraml as pm
import pytest
from conftest import PATIENCE
from pantheraml import previews
from rich.console import Console
from test_readers import Dataset

TALK = {
    "messages": [
        {"role": "user", "content": "<b>é</b>?"},
        {"role": "assistant", "content": "日本 & <script>"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "done"},
    ]
}


def texts(row: Any, kind: str) -> list[str]:
    return [part.text for part in row.parts if part.kind == kind]


def test_marks_are_the_labels(model: Path) -> None:
    seen = pm.preview([TALK, TALK], model)
    assert len(seen.rows) == 2 and seen.kind == "messages"
    row = seen.rows[0]
    assert texts(row, "learned") == ["日本 & <script><|im_end|>\n", "done<|im_end|>\n"]
    assert "".join(part.text for part in row.parts).startswith("<|im_start|>user\n<b>é</b>?")
    assert row.learned == sum(label != -100 for label in row.labels)
    assert sum(part.tokens for part in row.parts) == len(row.input_ids)
    assert row.heading == f"data[0]: {len(row.labels)} tokens, {row.learned} learned"


def test_plain(model: Path) -> None:
    shown = repr(pm.preview([TALK], model))
    assert "assistant\n⟦日本 & <script><|im_end|>\n⟧<|im_start|>user" in shown
    assert shown.startswith("data[0]: ") and shown.endswith("lose their end")


def test_html_is_escaped(model: Path) -> None:
    shown = pm.preview([TALK, {"messages": TALK["messages"][:2]}], model)._repr_html_()
    assert "&lt;b&gt;é&lt;/b&gt;?" in shown and "日本 &amp; &lt;script&gt;" in shown
    assert "<script" not in shown and "<b>é" not in shown
    assert shown.count('<span class="pml-learned"') == 3


def test_a_terminal_is_not_steered(model: Path) -> None:
    seen = pm.preview([{"text": "a\x1b[2Jb\r[red]c"}], model)
    for colours in (None, "truecolor"):
        out = io.StringIO()
        console = Console(
            file=out, force_terminal=colours is not None, color_system=colours, width=200
        )  # type: ignore[arg-type]
        console.print(seen)
        assert "\\x1b[2Jb\\x0d[red]c" in out.getvalue()
        assert "\x1b[2J" not in out.getvalue()
        assert ("⟦" in out.getvalue()) == (colours is None)
    assert "\x1b" not in repr(seen) and "\x1b" not in seen._repr_html_()


def test_what_is_cut(model: Path) -> None:
    rows = [{"prompt": "question ", "completion": "x" * 50}, {"prompt": "a", "completion": "b"}]
    seen = pm.preview(rows, model, max_length=20)
    first = seen.rows[0]
    assert texts(first, "cut") == ["x" * 39 + "<|endoftext|>"]
    assert (first.cut, first.learned) == (40, 11)
    assert "40 of them beyond max_length" in repr(seen) and "lose their end" in seen.note
    assert seen.rows[1].cut == 0
    text = pm.preview([{"text": "x" * 50}], model, max_length=20)
    assert text.rows[0].cut == 0 and "several rows" in text.note


@pytest.mark.parametrize("kind", ["jsonl", "txt", "dataset", "tokens"])
def test_every_source(kind: str, model: Path, tmp_path: Path) -> None:
    import pyarrow as pa

    data: Any = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        data.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(9)))
    elif kind == "txt":
        data.write_text("row 0\n" * 2000)
    elif kind == "dataset":
        data = Dataset(pa.table({"text": ["row 0", "row 1"]}))
    else:
        data = [{"input_ids": [82, 79], "labels": [-100, 79]}]
    seen = pm.preview(data, model, rows=2, max_length=64)
    assert len(seen.rows) == (1 if kind == "tokens" else 2)
    assert all(row.learned > 0 for row in seen.rows)
    if kind != "tokens":
        assert "".join(part.text for part in seen.rows[0].parts).startswith("row 0")


def test_many_parts_and_long_rows_are_short(model: Path) -> None:
    labels = [-100 if i % 2 else i % 256 for i in range(5000)]
    seen = pm.preview(
        [{"input_ids": [i % 256 for i in range(5000)], "labels": labels}], model, max_length=8192
    )
    assert len(seen.rows[0].parts) > 2000
    long = pm.preview([{"text": "y" * 50000}], model, packing=False)
    assert "max_length=256 " in long.note  # the model's positions, as a run has it
    assert len(repr(long)) < 2 * previews.SHOWN and "characters …" in repr(long)


def test_faults(model: Path) -> None:
    for data, settings, error, words in (
        ([{"txt": 1}], {}, pm.InvalidError, r"data\[0\]: a row must be"),
        ([{"text": "a"}, {"txt": 1}], {}, pm.InvalidError, r"data\[1\]: no 'text'"),
        ([], {}, pm.InvalidError, "no rows"),
        (iter([]), {}, pm.InvalidError, "no rows"),
        ([{"text": "a"}], {"rows": 0}, pm.InvalidError, "rows must be"),
        ([{"text": "a"}], {"learning_rate": 1}, TypeError, "learning_rate"),
    ):
        with pytest.raises(error, match=words):
            pm.preview(data, model, **settings)


def test_in_the_shell(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(TALK) + "\n")
    command = [sys.executable, "-m", "pantheraml", "preview", str(model), "--data", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "⟦done<|im_end|>" in done.stdout and "line 1: " in done.stdout
    bad = subprocess.run(
        [*command, "--chat-template-kwargs", "{"], capture_output=True, text=True, timeout=PATIENCE
    )
    assert bad.returncode == 2 and "not JSON" in bad.stderr


@pytest.mark.parametrize(
    ("used", "absent"),
    [
        ("pantheraml as pm; pm.finetune", ("tokenizers", "jinja2", "numpy", "asyncio", "email")),
        ("pantheraml.data.prepare", ("tokenizers", "jinja2", "asyncio")),
    ],
)
def test_import_stays_light(used: str, absent: tuple[str, ...]) -> None:
    """What a run does not need is not loaded: its first step waits for both of these."""
    code = f"import sys\nimport {used}\nprint(*(m for m in {absent} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
