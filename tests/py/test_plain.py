"""What others wrote is shown on a terminal, and nothing in it is obeyed."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import examples
import pantheraml as pm
import pytest
from conftest import PATIENCE, environment
from pantheraml import cli
from pantheraml.errors import from_code
from pantheraml.live import watch
from pantheraml.plain import plain
from pantheraml.terminal import Terminal

#: Sets a window's title, clears the screen, turns the writing round, goes back to the line's begin.
TRICK = "\x1b]0;owned\x07\x1b[2J\u202ekcirt\x9b31m\r"
SHOWN = r"\x1b]0;owned\x07\x1b[2J\u202ekcirt\x9b31m\x0d"


def obeyed(text: str) -> bool:
    """Whether any of it would reach the terminal as it is."""
    return any(part in text for part in ("\x1b]", "\x1b[2J", "\x07", "\u202e", "\x9b", "\r"))


@pytest.fixture
def forged(start: Callable[..., pm.Run], runs: Path) -> Path:
    """A run folder from somebody else, with a trick wherever words stand."""
    run = start(name="mine", max_steps=3).wait()
    run.close()
    folder = runs / f"n{TRICK}"  # a run in a copied folder is called as that is
    shutil.copytree(runs / "mine", folder)
    config = json.loads((folder / "run.json").read_text())
    del config["sum"]
    config |= {"name": f"n{TRICK}", "model_id": f"m{TRICK}"}
    (folder / "run.json").write_text(json.dumps(config))
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    for event in events:
        del event["sum"]
        if event["type"] == "log":
            event["message"] = f"l{TRICK}"
        if event["type"] == "state" and event["state"] == "finished":
            event |= {"state": "failed", "reason": f"r{TRICK}"}
    (folder / "events.jsonl").write_bytes(b"".join(map(examples.line, events)))
    return folder


def test_a_folder_of_somebody_else(forged: Path) -> None:
    for verb, part in (("runs", "m"), ("attach", "r"), ("doctor", "r"), ("stop", "n")):
        arguments = [verb] if verb == "runs" else [verb, str(forged)]
        made = subprocess.run(
            [sys.executable, "-m", "pantheraml", *arguments], timeout=PATIENCE,
            capture_output=True, check=False, env=environment(COLUMNS="300"),
        )  # fmt: skip
        text = (made.stdout + made.stderr).decode()
        assert not obeyed(text), (verb, text)
        assert rf"{part}\x1b]0;owned" in text, (verb, text)  # rich leaves the bell out
    run = pm.attach(forged, restart=False)
    assert SHOWN in repr(run) and not obeyed(repr(run))
    with pytest.raises(pm.RunFailed) as failed:
        run.wait()
    assert SHOWN in str(failed.value) and not obeyed(str(failed.value))
    for terminal in (True, False):
        console = Terminal(file=io.StringIO(), force_terminal=terminal, width=300)
        watch(run, console=console, whole=True)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        shown = text.replace("\r", "")  # rich goes back to a line's begin itself
        assert r"n\x1b]0;owned" in shown and not obeyed(shown)
        assert not terminal or "\x1b[" in text  # rich's own colours stay


def test_what_a_model_wrote(
    start: Callable[..., pm.Run],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = start(name="writer", max_steps=2).wait()
    pieces = iter([f"one{TRICK}", "two\n\tthree\n"])
    monkeypatch.setattr(pm.Run, "sample", lambda *_, **__: pieces)
    assert cli.main(["sample", "hello", "--run", run.name]) == 0
    assert capsys.readouterr().out == f"one{SHOWN}two\n\tthree\n\n"


def test_errors_have_plain_words() -> None:
    for code in ("io", "not found", "denied", "busy", "corrupt", "memory of another version"):
        error = from_code(code, f"why{TRICK}")
        assert str(error) == f"why{SHOWN}" and error.args == (f"why{TRICK}",)


def test_text_of_people_stays_as_it_is() -> None:
    said = "naïve\tδοκιμή\n日本語 👩\u200d👩\u200d👧 عربي\u200f! \u200eעברית\u200f. \u200b é"
    assert plain(said) == said
    assert plain("half \udcff of it") == r"half \udcff of it"


def test_json_is_still_json() -> None:
    said = {"a": "".join(map(chr, range(0x100))) + "\u202e\u2028\ud800"}
    assert json.loads(plain(json.dumps(said))) == said


def test_a_terminal_without_the_letters(start: Callable[..., pm.Run]) -> None:
    """What its encoding has not is written as escaped; marks of ours, and words of a model's."""
    run = start(name="marks", max_steps=1).wait()
    code = (
        "import sys, pantheraml as pm; from pantheraml import cli\n"
        "pm.Run.sample = lambda *_, **__: iter(['日本 é'])\n"
        "sys.exit(cli.main(['doctor', 'marks']) or cli.main(['sample', 'a', '--run', 'marks']))"
    )
    made = subprocess.run(
        [sys.executable, "-P", "-c", code], timeout=PATIENCE, capture_output=True, check=False,
        env=environment(PYTHONIOENCODING="latin-1"),
    )  # fmt: skip
    assert made.returncode == 0 and run.state == "finished", made.stderr.decode()
    text = made.stdout.decode("latin-1")
    assert r"\u2713" in text and r"\u65e5\u672c é" in text
