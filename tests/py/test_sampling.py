"""Sampling as a user calls it: batches, streams, stop strings, choices, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pantheraml as pm
import pytest
from conftest import FOREVER, PATIENCE
from pantheraml.sampling import MOST_TOKENS, _settled, together

Start = Callable[..., pm.Run]
PROMPT = "3 plus 4 is "


@pytest.fixture
def run(start: Start) -> pm.Run:
    return start(max_steps=3, generate_length=200).wait(PATIENCE)


def test_a_list_is_answered_by_a_list(run: pm.Run) -> None:
    texts = ["1 plus 1 is ", PROMPT, "hello"]
    many = run.sample(texts, max_new_tokens=9)
    assert isinstance(many, list)
    assert [s.token_ids for s in many] == [
        run.sample(text, max_new_tokens=9).token_ids for text in texts
    ]
    ids = [[5, 6], [7]]
    assert len(run.sample(input_ids=ids, max_new_tokens=2)) == 2
    assert len(run.sample(messages=[[{"role": "user", "content": "a"}]], max_new_tokens=2)) == 1


def test_a_stream_is_the_sample(run: pm.Run) -> None:
    whole = run.sample(PROMPT, max_new_tokens=100, temperature=1.0, seed=5)
    stream = run.sample(PROMPT, max_new_tokens=100, temperature=1.0, seed=5, stream=True)
    pieces = list(stream)
    assert "".join(pieces) == whole.text and stream.result().token_ids == whole.token_ids
    assert all(pieces)


def test_it_ends_where_a_stop_string_begins(run: pm.Run) -> None:
    whole = run.sample(PROMPT, max_new_tokens=120, temperature=1.2, seed=3)
    stop = whole.text[20:23]
    at = whole.text.index(stop)
    for stream in (False, True):
        made = run.sample(
            PROMPT, max_new_tokens=120, temperature=1.2, seed=3, stop=["\x00", stop], stream=stream
        )
        sample = made.result() if stream else made
        assert sample.text == whole.text[:at]
        assert sample.token_ids == whole.token_ids[: len(sample.token_ids)]
        assert stop in run.decode(sample.token_ids)
        assert stop not in run.decode(sample.token_ids[:-1])
    # The worker itself was told: it wrote no more than it had to.
    long = run.sample(PROMPT, max_new_tokens=180, temperature=1.2, seed=3, stop=stop)
    written = run._record.samples[max(run._record.samples)]
    assert len(long.token_ids) <= len(written) <= 180


def test_enough(run: pm.Run) -> None:
    stream = run.sample(PROMPT, max_new_tokens=180, temperature=1.0, seed=1, stream=True)
    stream.close()
    other = run.sample(PROMPT, max_new_tokens=3)  # the next one is not harmed
    assert len(stream.tokens().token_ids) <= 180 and len(other.token_ids) == 3


def test_choices_narrow_the_draw(run: pm.Run) -> None:
    greedy = run.sample(PROMPT, max_new_tokens=12).token_ids
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        drawn = run.sample(PROMPT, max_new_tokens=12, temperature=5.0, seed=2, **narrow)
        assert drawn.token_ids == greedy
    free = run.sample(PROMPT, max_new_tokens=40, temperature=5.0, seed=2).token_ids
    assert free[:12] != greedy
    penalised = run.sample(PROMPT, max_new_tokens=40, repetition_penalty=100.0).token_ids
    assert len(set(penalised)) == len(penalised) > 12  # nothing twice


def test_while_it_trains_and_while_it_stands(start: Start) -> None:
    run = start(max_steps=FOREVER)
    running = run.sample(PROMPT, max_new_tokens=5)
    run.pause(wait=True)
    paused = run.sample([PROMPT, PROMPT], max_new_tokens=5, stop="\x00")
    assert running.step <= paused[0].step == run.step
    assert paused[0].token_ids == paused[1].token_ids


def test_many_prompts_side_by_side(run: pm.Run) -> None:
    """As alone, each: of other lengths, more than go at once, ended by stop strings, streamed."""
    texts = [PROMPT[: 1 + i % len(PROMPT)] for i in range(12)]
    alone = [run.sample(text, max_new_tokens=6) for text in texts]
    beside = run.sample(texts, max_new_tokens=6)
    assert [one.token_ids for one in beside] == [one.token_ids for one in alone]
    commands = [e for e in run.events() if e["type"] == "command" and e["verb"] == "sample"]
    assert sum(e["args"].get("lengths") == [len(t) for t in texts] for e in commands) == 1
    drawn = run.sample(texts, max_new_tokens=6, temperature=1.0, seed=3, top_k=20)
    assert drawn[7].token_ids == run.sample(
        texts[7], max_new_tokens=6, temperature=1.0, seed=3, top_k=20
    ).token_ids  # fmt: skip
    letter = next((t for one in alone for t in one.text if t.isprintable()), None)
    if letter is not None:
        stopped = run.sample(texts, max_new_tokens=6, stop=letter)
        assert all(letter not in one.text for one in stopped)
        assert [one.text for one in stopped] == [one.text.split(letter)[0] for one in alone]
    with pytest.raises(pm.Error, match="outside the vocabulary"):
        run.sample(input_ids=[[1], [5000]], max_new_tokens=2)


def test_several_streams_beside_each_other(run: pm.Run) -> None:
    """The pieces of each prompt make up its sample, and carry its place in the list."""
    texts = [PROMPT[: 2 + i] for i in range(3)]
    settings = {"max_new_tokens": 150, "temperature": 1.0, "seed": 5, "stop": "\x00"}
    whole = run.sample(texts, **settings)
    streams = run.sample(texts, stream=True, **settings)
    assert len(streams) == 3 and streams[2] is not streams[0]
    pieces = list(streams)
    for i, sample in enumerate(whole):
        assert "".join(piece for place, piece in pieces if place == i) == sample.text
    assert [one.token_ids for one in streams.result()] == [one.token_ids for one in whole]
    events = [e for e in run.events() if e["type"] == "sample"]
    rows = [e.get("row", 0) for e in events if e["command"] == events[-1]["command"]]
    assert set(rows) == {0, 1, 2}
    # One that is read by itself, and one list of one prompt.
    streams = run.sample(texts[:2], stream=True, **settings)
    assert "".join(streams[1]) == whole[1].text and {place for place, _ in streams} <= {0}
    (only,) = run.sample(texts[:1], stream=True, **settings).result()
    assert only.token_ids == whole[0].token_ids


def test_closing_streams_ends_them(run: pm.Run) -> None:
    streams = run.sample([PROMPT, PROMPT], max_new_tokens=180, temperature=1.0, stream=True)
    streams.close()
    other = run.sample(PROMPT, max_new_tokens=3)  # the worker is free again
    assert len(other.token_ids) == 3
    assert all(len(one.token_ids) <= 180 for one in streams.result())


def test_more_prompts_than_one_request_holds() -> None:
    groups = list(together([[1] * 3000] * 5 + [[2]] * 300))
    assert [len(group) for group in groups] == [2, 2, 257 - 1, 45]
    assert all(sum(map(len, group)) <= MOST_TOKENS for group in groups)


def test_refused_by_name(run: pm.Run) -> None:
    with pytest.raises(TypeError, match="one of text"):
        run.sample()
    for settings, words in (
        ({"top_k": 0}, "top_k"), ({"top_p": 0.0}, "top_p"), ({"top_p": 1.5}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"), ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": 5}, "stop must be texts that are not empty, it is 5"),
    ):  # fmt: skip
        with pytest.raises(pm.InvalidError, match=words):
            run.sample(PROMPT, **settings)
    with pytest.raises(pm.InvalidError, match="no prompts"):
        run.sample([])
    for prompt, words in ((5, "a prompt must be text"), ([5], "must be text"), ("\ud800", "half")):
        with pytest.raises(pm.InvalidError, match=words):
            run.sample(prompt)  # type: ignore[call-overload]
    for turns in ("hi", 5, [5], ["hi"], [{"role": "user"}]):
        with pytest.raises(pm.InvalidError, match="messages must be|turn 1|must be text"):
            run.sample(messages=turns)  # type: ignore[call-overload]


def test_what_may_become_a_stop_string_is_held_back() -> None:
    assert _settled("abc<|", ("<|end",)) == "abc"
    assert _settled("abc<|x", ("<|end",)) == "abc<|x"
    assert _settled("ab\ufffd", ()) == "ab"
    assert _settled("aaa", ("aab",)) == "a"
