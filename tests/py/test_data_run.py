"""Data in every way it can be given, through whole runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pantheraml as pm
import pyarrow as pa
import pytest
from conftest import PATIENCE
from pyarrow import parquet
from safetensors import safe_open
from test_readers import Dataset

TEXTS = [{"text": f"{i} and {i + 1}"} for i in range(40)]


@pytest.mark.parametrize("kind", ["parquet", "dataset", "rows"])
def test_held_out_of_what_is_given(kind: str, start: Callable[..., pm.Run], tmp_path: Path) -> None:
    data: Any = iter(TEXTS)
    if kind == "parquet":
        data = tmp_path / "rows.parquet"
        parquet.write_table(pa.Table.from_pylist(TEXTS), data)
    elif kind == "dataset":
        data = Dataset(pa.Table.from_pylist(TEXTS))
    run = start(data, eval_split=0.2, num_train_epochs=1, max_steps=None)
    run.wait(PATIENCE)
    assert run.step == 16  # 32 rows of 40, two at a time
    labels = run.evaluate().labels
    said = [event["message"] for event in run.events() if event["type"] == "log"]
    assert any(line.startswith("train: 32 rows, ") for line in said)
    assert any(
        line.startswith("train: held out for eval: 8 rows, ")
        and f" {labels} of them learned" in line
        for line in said
    )


def test_what_is_wrong_is_said_before_a_run_is_there(
    start: Callable[..., pm.Run], runs: Path
) -> None:
    for settings, words in (
        ({"eval_split": 0.1, "eval_data": TEXTS}, "both given"),
        ({"eval_split": 1.0}, "eval_split"),
        ({"eval_split": 0}, "eval_split"),
        ({"overlong": "trim"}, "overlong"),
        ({"chat_template": "no-such-file.jinja"}, "no file"),
        ({"chat_template_kwargs": {"f": print}}, "cannot be stored"),
    ):
        with pytest.raises(pm.Error, match=words):
            start(TEXTS, **settings)
    with pytest.raises(pm.InvalidError, match=r"eval_data\[1\] must be a dict"):
        start(TEXTS, eval_data=[{"text": "a"}, 3])
    assert not list(runs.iterdir())


def test_a_template_of_ones_own_is_the_runs(start: Callable[..., pm.Run]) -> None:
    """It makes the rows, and the prompts of samples, and its date is the one that was given."""
    template = (
        "{{ strftime_now('%Y') }}{{ word }}{% for m in messages %}{{ m.role[0] }}{{ m.content }}"
        "{% if m.role == 'assistant' %}{% generation %}!{% endgeneration %}{% endif %}{% endfor %}"
    )
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    given = {"strftime_now": "2001-02-03", "word": "w"}
    run = start(
        [{"messages": talk}], max_steps=1, chat_template=template, chat_template_kwargs=given
    )
    run.wait(PATIENCE)
    with safe_open(run.folder / "data/train.safetensors", "np") as file:
        assert run.decode(file.get_tensor("input_ids").tolist()) == "2001wuaab!"
        assert [int(i) for i in file.get_tensor("labels") if i >= 0] == run._text.encode("!")
    assert run._text.decode(run._text.encode_messages(talk[:1])) == "2001wua"
