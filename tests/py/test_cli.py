"""The shell: the same verbs, one sentence for what is wrong, and exit statuses."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pantheraml as pm
import pytest
from conftest import FOREVER, PATIENCE, ROWS, at_step, end, hear_ctrl_c
from pantheraml import cli, devices, sharing
from pantheraml.config import Settings

BUILD = Path(__file__).parents[2] / "build" / "release"


def shell(*arguments: str, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pantheraml", *arguments],
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    return path


def test_a_run_in_the_shell(runs: Path, model: Path, data: Path, tmp_path: Path) -> None:
    common = ("--data", str(data), "--max-length", "64", "--max-steps", "12", "--no-packing")
    made = shell("train", str(model), *common, "--eval-data", str(data), "--name", "one")
    assert made.returncode == 0, made.stderr
    assert "finished, step 12/12" in made.stdout and "checkpoints/step-000012" in made.stdout
    assert "train: 64 rows, " in made.stdout and "eval: 64 rows, " in made.stdout
    before, _, _ = made.stdout.partition(f"{pm.attach('one', restart=False).plan}\n")
    assert before != made.stdout and ", loss " not in before
    listed = json.loads(shell("runs", "--json").stdout)
    assert [(r["name"], r["state"], r["step"]) for r in listed] == [("one", "finished", 12)]
    assert "one" in shell("runs").stdout
    out = shell("export", "one", str(tmp_path / "out"))
    assert out.returncode == 0 and (tmp_path / "out/adapter_config.json").is_file(), out.stderr
    assert shell("export", str(tmp_path / "out2")).returncode == 0  # the latest run
    page = shell("report", "one").stdout.strip()
    assert Path(page).read_text().startswith("<!doctype html>")
    assert shell("sample", "1 plus 1 is ", "--run", "one", "--max-new-tokens", "3").returncode == 0
    assert "held-out loss" in shell("evaluate", "one").stdout


def test_steering(start: Callable[..., pm.Run]) -> None:
    run = start(name="two", max_steps=10**6, lr_scheduler_type="constant")
    at_step(run, 1)
    assert "pause: applied at step" in shell("pause", "two").stdout
    assert "set: applied" in shell("set", "learning_rate=0.0005", "--run", "two").stdout
    assert "set: applied" in shell("set", "max_grad_norm=none", "--run", "two").stdout
    limits = [e["args"].get("max_grad_norm") for e in run.events() if e.get("verb") == "set"]
    assert limits[-1] == 0  # as in Python: None is no limit
    assert "checkpoints/step-" in shell("checkpoint", "two", "--name", "x").stdout
    assert "resume: applied" in shell("resume").stdout
    wrong = shell("set", "learning_rat=1", "--run", "two")
    assert wrong.returncode == 1 and "did you mean learning_rate" in wrong.stderr
    assert "stopped at step" in shell("stop", "two").stdout
    assert "goes on from its checkpoint" in shell("resume", "two").stdout
    at_step(pm.attach("two"), run.step + 1)


def test_resume_of_what_has_finished(start: Callable[..., pm.Run]) -> None:
    run = start(name="over", max_steps=2).wait(PATIENCE)
    end(run)  # its coordinator would stay for whoever still asks
    assert "no more steps are made" in shell("resume", "over").stdout


def test_every_option_of_train_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for in the shell reaches the run: each option that names a setting."""
    values = {
        "lr_scheduler_type": "linear", "lr_scheduler_kwargs": '{"min_lr": 1}', "optim": "sgd",
        "optim_args": "momentum=0.9", "eval_strategy": "epoch", "save_strategy": "best",
        "memory_limit": "8GiB", "devices": "cpu,cpu", "quant": "nf4", "overlong": "drop",
        "chat_template": "x.jinja", "chat_template_kwargs": '{"a": 1}', "method": "full",
        "restart": "never", "dtype": "float32",
    }  # fmt: skip
    read = {
        "lr_scheduler_kwargs": {"min_lr": 1}, "devices": ["cpu", "cpu"],
        "chat_template_kwargs": {"a": 1},
    }  # fmt: skip
    asked: dict[str, Any] = {}

    def finetune(model: str, data: str, **settings: Any) -> pm.Run:
        asked.update(settings)
        raise pm.InvalidError("asked")

    monkeypatch.setattr(pm, "finetune", finetune)
    options = {
        name.removeprefix("--").replace("-", "_")
        for name in re.findall(r"--[a-z][a-z0-9-]*", shell("train", "--help").stdout)
    }
    known = set(Settings.__dataclass_fields__) - {"lora", "metric_for_best_model", "save_to"}
    assert known <= options
    for name in known:
        value = values.get(name, "3")
        flag = f"--no-{name}".replace("_", "-")
        negated = f"no_{name}" in options
        for option in (f"--{name}", f"--{name}".replace("_", "-")):
            asked.clear()
            given = [flag] if negated else [option, value]
            assert cli.main(["train", "m", "--data", "d", *given]) == 1
            if negated:
                assert asked[name] is False
            else:
                wanted = read[name] if name in read else type(asked[name])(value)
                assert asked[name] == wanted, name


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--lr", "it is learning-rate"), ("--max-step", "did you mean max-steps"),
        ("--epochs=3", "it is num-train-epochs"), ("stray", "unrecognized arguments: stray"),
        ("--data-set=x", "did you mean data?"), ("--run", "'run' is not a parameter"),
        ("--eval-split=²", "must be a share such as 0.1"), ("--lr-scheduler-kwargs=x", "not JSON"),
        (f"--lr-scheduler-kwargs={'[' * 10**5}", "not JSON"),
        (f"--chat-template-kwargs={'[' * 10**5}", "not JSON"),
    ],
)  # fmt: skip
def test_options_that_are_none(option: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "m", "--data", "d", option])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["pause", "resume", "set"])
@pytest.mark.parametrize("seconds", ["nan", "-1", "1e300", "x"])
def test_a_command_whose_timeout_is_none_is_not_sent(
    verb: str, seconds: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pm, "attach", lambda _: pytest.fail("it went to the run"))
    with pytest.raises(SystemExit):
        cli.main([verb, "weight_decay=0", f"--timeout={seconds}"])
    assert "must be a number of seconds" in capsys.readouterr().err


def test_a_report_follows_no_link(start: Callable[..., pm.Run], tmp_path: Path) -> None:
    """A run folder may be somebody else's; a shared run's is a path that somebody else chose."""
    run = start(name="four", max_steps=10**6)
    at_step(run, 1)
    page, elsewhere = run.folder / "report.html", tmp_path / "precious"
    elsewhere.write_text("mine")
    page.symlink_to(elsewhere)
    assert cli.main(["report", "four"]) == 0
    assert elsewhere.read_text() == "mine" and not page.is_symlink()
    assert page.read_text().startswith("<!doctype html>") and page.stat().st_mode & 0o777 == 0o600
    page.write_text("mine")
    key = run.share("tcp://127.0.0.1:*").save(tmp_path / "key.json")
    assert cli.main(["report", str(key)]) == 1
    assert page.read_text() == "mine"
    assert cli.main(["report", str(key), "--file", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_a_key_that_finds_no_place_opens_no_door(
    start: Callable[..., pm.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(name="five", max_steps=10**6)
    at_step(run, 1)
    there = tmp_path / "there.json"
    there.write_text("")
    share = ("share", "five", "--bind", "tcp://127.0.0.1:*", "--out")
    for place in (there, tmp_path / "none" / "key.json"):
        assert cli.main([*share, str(place)]) == 1
        assert run.sharing is None
    # The disk is full when the key is written: no half of it stays, and no door.
    full, key = OSError(errno.ENOSPC, "No space left on device"), tmp_path / "key.json"
    with monkeypatch.context() as patch:
        patch.setattr(sharing.Share, "_json", lambda _: (_ for _ in ()).throw(full))
        assert cli.main([*share, str(key)]) == 1
        assert run.sharing is None and not key.exists()
    assert cli.main([*share, str(key)]) == 0
    found = run.sharing
    assert found is not None and found["keys"] == 1
    with monkeypatch.context() as patch:  # others look on: they stay
        patch.setattr(sharing.Share, "_json", lambda _: (_ for _ in ()).throw(full))
        assert cli.main([*share, str(tmp_path / "second.json")]) == 1
    assert run.sharing == found
    pm.attach(key).close()


def test_what_stands_behind_two_dashes_is_no_option(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(cli, "_sample", lambda args: asked.append((args.text, args.top_k)))
    assert cli.main(["sample", "--top_k", "3", "--", "--an_option"]) == 0
    assert asked == [("--an_option", 3)]


def test_ctrl_c_detaches(start: Callable[..., pm.Run]) -> None:
    run = start(name="three", max_steps=10**6)
    at_step(run, 1)
    child = subprocess.Popen(
        [sys.executable, "-m", "pantheraml", "attach", "three"],
        stdout=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c,
    )  # fmt: skip
    assert child.stdout is not None
    assert "three: running, step" in child.stdout.readline()
    child.send_signal(signal.SIGINT)
    said, _ = child.communicate(timeout=PATIENCE)
    assert "detached; the run goes on. Come back by: pantheraml attach three" in said
    assert child.returncode == 0
    at_step(run, run.step + 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("attach", "none"), "there is no run 'none'"),
        (("train", "--data", "x.jsonl", "./nowhere"), "there is no file"),
        (("plan", "./nowhere"), "there is no folder nowhere"),
        (("plan",), "name one MODEL"),
        (("set", "x"), "is not NAME=VALUE; --run"),
        (("set", "learning_rate=x"), "learning_rate must be a number"),
        (("set", "lr_scheduler_kwargs=" + "[" * 10**5), "lr_scheduler_kwargs: not JSON"),
        (("export", "x", "y\udcff"), "there is no run 'x'"),
        (("attach", "x\udcff"), "a name that is no UTF-8"),
        (("plan", "x\udcff"), "a name that is no UTF-8"),
        (("monitor",), "not in this version"),
        (("profile", "./nowhere"), "there is no run './nowhere' here, and model: "),
    ],
)
def test_what_is_wrong_is_one_sentence(arguments: tuple[str, ...], words: str, runs: Path) -> None:
    made = shell(*arguments)
    assert made.returncode == 1 and words in made.stderr
    assert "Traceback" not in made.stderr and len(made.stderr.strip().splitlines()) == 1


def test_failed_run_has_a_status(runs: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{\n")
    made = shell("train", str(model), "--data", str(tmp_path / "bad.jsonl"))
    assert made.returncode == 1 and "bad.jsonl, line 1" in made.stderr
    assert "Traceback" not in made.stderr


def test_plan_and_program(model: Path) -> None:
    made = shell("plan", str(model), "--max-length", "128")
    assert made.returncode == 0 and "weights" in made.stdout and "total" in made.stdout
    plan = json.loads(shell("plan", str(model), "--max-length", "128", "--json").stdout)
    assert plan["total"] == sum(plan["by_cause"].values())
    program = shell("plan", str(model), "--max-length", "128", "--program").stdout
    for op in ("embed", "rmsnorm", "linear", "attention", "swiglu", "adamw"):
        assert op in program
    nodes = json.loads(
        shell("plan", str(model), "--max-length", "128", "--program", "--json").stdout
    )
    assert [s["name"] for s in nodes["segments"]][:2] == ["micro", "norm"]
    assert made.stdout.startswith(f"plan of {model} on cpu\n")
    for optim, words in (("adamw", "moments in 32 bits"), ("adamw_8bit", "moments in 8 bits"),
                         ("sgd", "SGD")):  # fmt: skip
        planned = pm.plan(model, max_length=128, optim=optim, devices=["cpu"] * 2)
        assert f"trained; {'' if optim == 'sgd' else 'AdamW' + chr(39) + 's '}{words}; " in str(
            planned
        )
        assert str(planned).startswith(f"plan of {model} on each of cpu, cpu\n")
    full = pm.plan(model, method="full", max_length=128)
    assert full.by_cause["optimizer"] > pm.plan(model, max_length=128).by_cause["optimizer"]
    assert "parameters" in str(full) and full._repr_html_().startswith("<pre>")


def test_plan_on_a_gpu_that_others_use(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 40 GiB runs have reserved 30, of which 6 are still free to the driver."""
    native, gib = devices._native, 1 << 30
    reserved = {
        "uuid": "a", "bus": "0", "memory_total": 40 * gib, "reserved": 30 * gib,
        "pending": 6 * gib, "holders": [{"run": "/runs/a", "pid": 1, "bytes": 30 * gib}],
    }  # fmt: skip
    made = {
        "by_cause": {"weights": 1}, "total": 1, "recompute_layers": 0, "head_chunk": 1,
        "parameters": 1, "trainable": 1,
    }  # fmt: skip
    used: dict[str, float | str] = {"memory_used": 24.5 * gib}
    monkeypatch.setattr(native, "gpu_reserved", lambda index: reserved)
    monkeypatch.setattr(native, "gauges", lambda bus, uuid: used)
    monkeypatch.setattr(native, "plan", lambda *given: made)  # there is no such GPU to ask
    given = ["plan", str(model), "--devices=cuda", "--max-length=64", "--memory-limit=9GiB"]
    assert cli.main(given) == 0
    assert "the GPU has 9.5 GiB left; reserved by runs: a 30.0 GiB\n" in capsys.readouterr().out
    assert cli.main([*given, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["left"], told["reserved"], told["unknown"]) == (9.5 * gib, "a 30.0 GiB", "")
    used["memory_used"] = "the card is divided"
    assert cli.main(given) == 0
    out = capsys.readouterr().out
    assert "at most 10.0 GiB left" in out and "is not known: the card is divided" in out


def test_profile_on_a_device_that_others_use(
    start: Callable[..., pm.Run], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run is refused what a run that goes on has reserved, and leaves nothing reserved."""
    (tmp_path / "devices").mkdir(mode=0o700)
    monkeypatch.setenv("PML_WORKER", str(BUILD / "tests" / "fault" / "fake_worker"))
    monkeypatch.setenv("FAKE_DEVICES", str(tmp_path / "devices"))  # one, of 4,000 MiB
    monkeypatch.setenv("FAKE_RESERVE_MIB", "3000")
    run = start(max_steps=FOREVER, gradient_accumulation_steps=1, name="other")
    at_step(run, 5)
    for wanted in ("2000", "3900"):
        monkeypatch.setenv("FAKE_RESERVE_MIB", wanted)
        made = shell("profile", str(model), "--max-length", "64")
        assert made.returncode == 1 and "Traceback" not in made.stderr
        (line,) = made.stderr.strip().splitlines()
        (worker,) = run.workers
        assert "fake has 1.0 GiB left for this run" in line
        assert f"(the run other (process {worker['pid']}) has reserved 2.9 GiB; " in line
        assert "wait until that ends, or take another device (devices=)" in line
    monkeypatch.setenv("FAKE_RESERVE_MIB", "1000")
    beside = start(max_steps=FOREVER, gradient_accumulation_steps=1, name="beside")
    at_step(beside, 5)


def test_doctor(runs: Path) -> None:
    made = shell("doctor", timeout=PATIENCE)
    assert made.returncode == 0, made.stdout + made.stderr
    assert "a real run" in made.stdout and "tokens/s" in made.stdout and "ready" in made.stdout
    assert not runs.exists()


def test_doctor_says_what_is_missing(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PML_BIN", "/nowhere")
    made = shell("doctor", "--no-run")
    assert made.returncode == 1 and "reinstall pantheraml" in made.stdout


def test_model_may_be_an_option() -> None:
    for line in (("train", "m", "--data", "d"), ("train", "--model", "m", "--data", "d")):
        assert cli._model(cli._parser().parse_args(line)) == "m"
    with pytest.raises(pm.InvalidError):
        cli._model(cli._parser().parse_args(["train", "m", "--model", "m", "--data", "d"]))
    assert os.environ
