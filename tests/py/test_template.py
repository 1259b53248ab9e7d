"""What a stranger's template may not do, and what stock ones do that rows cannot be learned of."""

from __future__ import annotations

import time
from typing import Any

import pytest
from pantheraml.data import chat, template
from pantheraml.errors import Error, InvalidError

TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second"},
]

# Templates of the shapes that families have, each in its own words.
HEADERS = (  # Llama 3
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)
DATED = (  # Llama 3.1 and 3.2
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ bos_token }}Today: {{ date_string }}\n" + HEADERS
)
THINKING = (  # Qwen 3: only the last answer has a thinking block
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think></think>{% endif %}"
    "{{ m.content }}[end]{% endfor %}{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    "{% endif %}"
)
INSTRUCT = (  # Mistral: the system's words go into the last question
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "[INST] {{ system ~ ' ' if loop.last and system }}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (  # Gemma
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<start>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>model\n{% endif %}"
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def learned(source: str, messages: list[dict[str, Any]] = TALK, **variables: Any) -> list[str]:
    text, spans = chat.ChatTemplate(source, SPECIAL, variables).with_spans(messages)
    return [text[begin:end] for begin, end in spans]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (HEADERS, ["first<|eot|>", "second<|eot|>"]),
        (INSTRUCT, [" first</s>", " second</s>"]),
        (NO_SYSTEM, ["first<end>\n", "second<end>\n"]),
    ],
)
def test_families_whose_prefixes_hold(source: str, expected: list[str]) -> None:
    assert learned(source) == expected


def test_a_thinking_block_is_learned_where_the_model_makes_it() -> None:
    assert learned(THINKING, TALK[:2]) == ["<think></think>first[end]"]
    assert learned(THINKING, TALK[:2], enable_thinking=False) == ["first[end]"]


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (THINKING, TALK),
        (INSTRUCT, [{"role": "system", "content": "s"}, *TALK]),
    ],
)
def test_families_that_rewrite_are_refused(source: str, messages: list[dict[str, Any]]) -> None:
    with pytest.raises(InvalidError, match="differently once later ones follow") as caught:
        learned(source, messages)
    assert "before turn" in str(caught.value) or "with turn" in str(caught.value)


def test_what_differs_is_shown() -> None:
    with pytest.raises(InvalidError) as caught:
        learned(THINKING)
    assert "gives '<think></think>first[end]' where the whole conversation has 'first[end]" in str(
        caught.value
    )


def test_a_date_has_to_be_said() -> None:
    with pytest.raises(InvalidError, match="prints today's date") as caught:
        learned(DATED)
    assert 'chat_template_kwargs={"strftime_now": "2024-07-26"}' in str(caught.value)
    for variables in ({"strftime_now": "2024-07-26"}, {"date_string": "26 Jul 2024"}):
        made = chat.ChatTemplate(DATED, SPECIAL, variables)
        text, spans = made.with_spans(TALK)
        assert text.startswith("<s>Today: 26 Jul 2024\n")
        assert [text[a:b] for a, b in spans] == ["first<|eot|>", "second<|eot|>"]
    assert "Today: " in chat.ChatTemplate(DATED, SPECIAL).render(TALK, prompt=True)
    with pytest.raises(InvalidError, match="must be a date"):
        chat.ChatTemplate(DATED, SPECIAL, {"strftime_now": "tomorrow"})


def test_a_date_that_is_only_mentioned_is_none() -> None:
    assert learned("{% if false %}{{ strftime_now('%Y') }}{% endif %}" + HEADERS)


def again(start: str, step: str) -> str:
    """A template that does something with ns.x ninety-nine times."""
    loop = "{% for i in range(99) %}{% set ns.x = " + step + " %}{% endfor %}"
    return "{% set ns = namespace(x=" + start + ") %}" + loop


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(40) }}",
        "{% for a in [[[[1] * 999] * 999] * 999] recursive %}{{ loop(a) }}{% endfor %}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ 'a' * 33554431 * 2 }}",
        "{{ 10 ** (10 ** 10) }}",
        again("3", "ns.x * ns.x"),
        again("'a'", "ns.x ~ ns.x"),
        again("'a'", "ns.x + ns.x"),
        again("'aa'", "ns.x | replace('a', ns.x)"),
        again("'aa'", "ns.x.replace('a', ns.x)"),
        again("'aa'", "[ns.x] * 999 | join(ns.x)"),
        "{{ range(90000) | map('string') | map('center', 900000) | join }}",
        "{{ ','.join(range(90000) | map('string') | map('center', 900000)) }}",
        "{{ 'a' | center(10 ** 10) }}",
        "{{ 'a'.ljust(10 ** 10) }}",
        "{{ '%09999999999d' % 1 }}",
        "{{ '%*d' % (10 ** 10, 1) }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 10 ** 10) }}",
        "{{ '%9999999999s' | format('a') }}",
        "{{ [1, 2] | tojson(indent=10 ** 10) }}",
        "{{ 'a\nb' | indent(10 ** 10) }}",
        "{{ messages | batch(10 ** 10, 'x') | list }}",
        "{{ lipsum(10 ** 9) }}",
        "{% for i in range(999999) %}{{ 'a' * 1000 }}{% endfor %}",
        "{{ range(10 ** 10) | list }}",
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
        "{% if x %}" * 5000,
        "a" * (1 << 21),
    ],
)  # fmt: skip
def test_a_template_comes_to_an_end(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "SECONDS", 1.0)
    begin = time.process_time()
    with pytest.raises(InvalidError, match="chat template"):
        chat.ChatTemplate(source, SPECIAL).render(TALK)
    assert time.process_time() - begin < 20  # of work, and not of waiting


def test_a_template_may_still_do_much() -> None:
    source = (
        "{% for m in messages %}{{ loop.index ~ '/' ~ loop.length ~ (',' if not loop.last) }}"
        "{% endfor %};{{ 'ab' * 3 }};{{ 2 ** 10 }};{{ '%05.1f' % 3 }};{{ ['a', 'b'] | join('-') }};"
        "{{ messages | map(attribute='role') | unique | join(' ') }};{{ '-'.join(['x', 'y']) }};"
        "{{ 'a-b'.replace('-', '+') }};{{ '{}:{}'.format(1, 'z') }};{{ 'q' | center(3) }};"
        "{% for x in nothing %}{% else %}none{% endfor %};{{ nothing ~ 1 }}"
    )
    assert chat.ChatTemplate(source, SPECIAL).render(TALK) == (
        "1/4,2/4,3/4,4/4;ababab;1024;003.0;a-b;user assistant;x-y;a+b;1:z; q ;none;1"
    )


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{", "'tools' is a text that is not JSON"),
        ("[1]", "must be a list of objects"),
        ([print], "must be a list of objects"),
        ({"name": "f"}, "must be a list of objects"),
    ],
)
def test_bad_tools(value: object, words: str) -> None:
    with pytest.raises(InvalidError, match=words):
        chat.tools_of(value)
    assert chat.tools_of('[{"name": "f"}]') == chat.tools_of([{"name": "f"}])


def test_pictures_are_refused_by_name() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image"}]
    with pytest.raises(Error, match="turn 1: not in this version: content of 'image'"):
        chat.check([{"role": "user", "content": parts}])
    chat.check([{"role": "user", "content": parts[:1]}])
