"""Chat templates against what transformers made of them (fixtures/make_chat.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pantheraml.data import chat
from pantheraml.data.rows import Row, Source
from pantheraml.data.shard import IGNORE
from pantheraml.data.tokenise import Tokeniser, load_model_folder
from pantheraml.errors import InvalidError, NotFoundError
from pantheraml.tiny import SPECIAL, TinyLlama, write_tokenizer

FIXTURE = json.loads((Path(__file__).parent / "fixtures/chat.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in FIXTURE["cases"]}
MARKED = {name: case for name, case in CASES.items() if "learned" in case}


def template_of(case: dict[str, Any]) -> chat.ChatTemplate:
    end = SPECIAL[0]
    return chat.ChatTemplate(case["template"], {"bos_token": end, "eos_token": end})


@pytest.mark.parametrize("name", CASES)
def test_renders_as_transformers(name: str) -> None:
    case = CASES[name]
    template = template_of(case)
    assert template.render(case["messages"], tools=case["tools"]) == case["text"]
    prompt = template.render(case["messages"][:1], prompt=True, tools=case["tools"])
    assert prompt == case["prompt"]


def tokenised(folder: Path, case: dict[str, Any]) -> tuple[list[int], list[int]]:
    (folder / "config.json").write_text('{"vocab_size": 272, "eos_token_id": 256}')
    write_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"chat_template": case["template"], "bos_token": SPECIAL[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    row = Row(Source(folder / "rows.jsonl", "jsonl"), 0, dict(case), 1)
    ((_, (ids, labels)),) = Tokeniser(load_model_folder(folder), "messages").batch([row])
    return ids.tolist(), labels.tolist()


@pytest.mark.parametrize("name", MARKED)
def test_learns_what_transformers_masks(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    ids, labels = tokenised(tmp_path, case)
    assert ids == case["input_ids"]
    assert [int(label != IGNORE) for label in labels] == case["learned"]
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels, strict=True))


@pytest.mark.parametrize("name", ["plain-two", "system-two", "plain-system"])
def test_prefixes_find_the_assistants_turns(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    text, spans = template_of(case).with_spans(case["messages"])
    said = [turn["content"] for turn in case["messages"] if turn["role"] == "assistant"]
    assert [text[begin:end] for begin, end in spans] == [f"{s.strip()}<|im_end|>\n" for s in said]
    ids, labels = tokenised(tmp_path, case)
    assert ids == case["input_ids"]
    learned = bytes(i for i in labels if 0 <= i < 256)
    assert labels.count(258) == len(said)  # <|im_end|> of each turn, and of no other
    assert len(learned) == sum(len(s.strip().encode()) + 1 for s in said)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("seen-")])
def test_templates_see_what_transformers_shows_them(name: str, tmp_path: Path) -> None:
    assert tokenised(tmp_path, CASES[name])[0] == CASES[name]["input_ids"]
    assert "None" not in CASES[name]["text"]


def test_tools_take_the_template_for_tools(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "{{ messages[0].content }}"},
        {"name": "tool_use", "template": "{{ tools | tojson }}{{ messages[0].content }}"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]
    tools = [{"name": "f"}]

    def texts(template: chat.ChatTemplate) -> list[str]:
        assert template.with_spans(turns, tools=tools)[0] == template.render(turns, tools=tools)
        return [template.render(turns), template.render(turns, tools=tools)]

    assert texts(chat.load(tmp_path)) == ["a", '[{"name": "f"}]a']
    assert texts(chat.load(tmp_path, "{{ messages[0].content }}!")) == ["a!", "a!"]
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    assert texts(chat.load(tmp_path)) == ["file a", "file a"]  # the files say it all
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools|length }}")
    assert texts(chat.load(tmp_path)) == ["file a", "1"]


@pytest.mark.parametrize(
    "source", ["{{ messages[0].content }}", "{% for m in messages %}{{ m.content }}{% endfor %}-"]
)
def test_who_begins_has_nothing_before(source: str) -> None:
    turns = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(InvalidError, match="begins with the assistant.*put a turn before it"):
        chat.ChatTemplate(source, {}).with_spans(turns)


def test_rewriting_template_is_refused() -> None:
    template = chat.ChatTemplate(
        "{% for m in messages %}{{ m.content if loop.last else '-' }}{% endfor %}",
        {},
    )
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(InvalidError, match="earlier turns differently"):
        template.with_spans(turns)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content + 1 }}",
    ],
)
def test_template_is_a_stranger(source: str) -> None:
    """It can neither reach out of its sandbox nor end us with an error of its own."""
    turns = [{"role": "assistant", "content": "x"}]
    with pytest.raises(InvalidError, match="chat template"):
        chat.ChatTemplate(source, {}).render(turns)
    assert turns == [{"role": "assistant", "content": "x"}]


def test_broken_template_and_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="cannot be read"):
        chat.ChatTemplate("{% for %}", {})
    for empty in (None, "", " \n"):
        if empty is not None:
            (tmp_path / "chat_template.jinja").write_text(empty)
        with pytest.raises(NotFoundError, match="no chat template"):
            chat.load(tmp_path)


def test_jinja_file_goes_first_and_lists_have_a_default(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert chat.load(tmp_path).render([]) == "yes"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert chat.load(tmp_path).render([]) == "file"


def test_marks_survive_what_a_template_does_with_them() -> None:
    template = chat.ChatTemplate(
        "{% for m in messages %}{% set t %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% endset %}{{ t | trim }};{% endfor %}",
        {},
    )
    text, spans = template.with_spans([{"role": "assistant", "content": "a\x02b"}])
    assert (text, spans) == ("a\x02b;", [(0, 3)])


def test_marks_of_the_completion_only() -> None:
    """A turn may have several, or none; the head of one may be the prompt's end."""
    template = chat.ChatTemplate(
        "{% for m in messages %}{% if m.role == 'user' %}<{{ m.content }}>{% else %}"
        "{% generation %}[{% if m.reasoning_content %}{{ m.reasoning_content }}{% endif %}"
        "{% endgeneration %}|{% generation %}{{ m.content }}{% endgeneration %}]{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}[{% endif %}",
        {},
    )
    asks = {"role": "user", "content": "a"}
    says = {"role": "assistant", "content": "b", "reasoning_content": "r"}

    def learned(turns: list[dict[str, str]], first: int) -> list[str]:
        text, spans = template.with_spans(turns, first=first)
        return [text[begin:end] for begin, end in spans]

    assert learned([asks, says], 0) == ["[r", "b"]
    assert learned([asks, says], 1) == ["r", "b"]
    assert learned([asks, says, asks, says], 3) == ["r", "b"]
    assert learned([asks, says, asks], 2) == []


def test_marks_where_the_prompt_asks_for_more_than_there_is() -> None:
    """As DeepSeek's and Nemotron's: they ask for reasoning, and drop it from past turns."""
    template = chat.ChatTemplate(
        "{% for m in messages %}{% if m.role == 'user' %}<{{ m.content }}>{% else %}"
        "{% generation %}[{{ m.content }}]{% endgeneration %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[(think){% endif %}",
        {},
    )
    turns = [
        {"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, "abcd", strict=True)
    ]
    for first, marked in ((1, ["[b]", "[d]"]), (3, ["[d]"])):
        text, spans = template.with_spans(turns, first=first)
        assert [text[begin:end] for begin, end in spans] == marked


def test_conversational_prompt_and_completion(tmp_path: Path) -> None:
    folder = TinyLlama().write(tmp_path / "m")
    fields = {
        "prompt": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "not learned"},
            {"role": "user", "content": "b"},
        ],
        "completion": [{"role": "assistant", "content": "learned"}],
    }
    row = Row(Source(tmp_path / "x", "list"), 0, fields, 1)
    ((_, (_, labels)),) = Tokeniser(load_model_folder(folder), "prompt_completion").batch([row])
    model = load_model_folder(folder).need_tokenizer()
    learned = model.decode([i for i in labels.tolist() if i != IGNORE], skip_special_tokens=False)
    assert learned == "learned<|im_end|>\n"
