"""Runs from beginning to end, through every process."""

from __future__ import annotations

import asyncio
import json
import math
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pantheraml as pm
import pytest
from conftest import (
    FOREVER,
    PATIENCE,
    ROWS,
    alive,
    at_step,
    end,
    environment,
    hear_ctrl_c,
    remove,
    until,
)
from pantheraml import _native, connecting, folders
from pantheraml.tiny import TinyLlama
from safetensors.numpy import load_file, save_file

Start = Callable[..., pm.Run]


def test_a_run_from_beginning_to_end(start: Start, gate: Path) -> None:
    run = start(name="first", eval_data=ROWS[:8], max_steps=30, learning_rate=3e-3)
    assert run.state == "starting" and run.name == "first"
    gate.touch()
    run.wait(PATIENCE)
    assert run.state == "finished" and run.step == run.max_steps == 30
    history = run.history
    assert [row["step"] for row in history] == list(range(1, 31))
    assert set(history[0]) == {
        "step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds",
    }  # fmt: skip
    assert history[-1]["loss"] < history[0]["loss"]
    assert run.plan is not None and run.plan.trainable < run.plan.parameters
    assert run.plan.total == sum(run.plan.by_cause.values())
    assert run.memory()[0]["weights"] > 0 and run.memory()[0]["rss"] > 0
    assert [w["rank"] for w in run.workers] == [0] and run.evaluations[-1].step == 30
    # Nothing of it can be read by others.
    for path in [run.folder, *run.folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    # The run has ended, and still answers.
    sample = run.sample("1 plus 2 is ", max_new_tokens=4)
    assert sample.step == 30 and 1 <= len(sample.token_ids) <= 4 and isinstance(sample.text, str)
    assert run.evaluate().loss == pytest.approx(run.evaluations[-1].loss)
    assert [c.step for c in run.checkpoints] == [30]
    assert (run.folder / "run.json").read_text().count('"identity"') == 1


def test_history_numbers_are_those_of_the_schedule(start: Start) -> None:
    run = start(max_steps=20, warmup_steps=5, lr_scheduler_type="linear", learning_rate=1e-3)
    run.wait(PATIENCE)
    expected = [min(n / 5, (20 - n) / 15) * 1e-3 for n in range(20)]
    assert [row["learning_rate"] for row in run.history] == pytest.approx(expected, rel=1e-12)


def test_commands(start: Start) -> None:
    run = start(max_steps=FOREVER, lr_scheduler_type="constant")
    at_step(run, 5)
    pause = run.pause(wait=True)
    assert pause.state == "applied" and run.state == "paused" and pause.step == run.step + 1
    stood = run.step
    command = run.set(learning_rate=5e-4, weight_decay=0.1, wait=True)
    assert command.step == stood + 1 and command.workers == [0]
    assert repr(command) == f"set: applied at step {stood + 1} on 1/1 workers"
    first = run.checkpoint("here", wait=True)
    assert isinstance(first, pm.Checkpoint) and first.step == stood and first.name == "here"
    greedy = run.sample(input_ids=[1, 2, 3], max_new_tokens=8)
    assert greedy.token_ids == run.sample(input_ids=[1, 2, 3], max_new_tokens=8).token_ids
    warm = [run.sample(input_ids=[1], max_new_tokens=9, temperature=2.0, seed=s) for s in (1, 1, 2)]
    assert warm[0].token_ids == warm[1].token_ids != warm[2].token_ids
    assert run.step == stood
    resumed = run.resume(wait=True)
    assert isinstance(resumed, pm.Command) and resumed.state == "applied"
    at_step(run, stood + 3)
    assert run.history[stood]["learning_rate"] == 5e-4
    assert run.history[stood - 1]["learning_rate"] == 1e-3
    run.stop(wait=True)
    assert run.state == "stopped" and run.checkpoints[-1].step == run.step
    assert run.stop() is None
    with pytest.raises(pm.Error):
        run.pause()


def test_gone_on_with_while_the_coordinator_goes(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(max_steps=FOREVER)
    at_step(run, 2)
    run.stop(wait=True)
    launch, asked = _native.launch, 0

    def gone_meanwhile(*args: Any, **kwargs: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 1:  # it holds the lock, and is found nowhere
            raise pm.BusyError("this run has a coordinator already: attach to it")
        return launch(*args, **kwargs)

    monkeypatch.setattr(_native, "launch", gone_meanwhile)
    run.resume(wait=True)
    assert asked > 1
    at_step(run, run.step + 2)
    run.stop(wait=True)


def test_wrong_commands(start: Start) -> None:
    run = start(max_steps=FOREVER)
    with pytest.raises(TypeError, match="did you mean learning_rate"):
        run.set(learning_rat=1)
    with pytest.raises(TypeError, match="needs one of"):
        run.set()
    with pytest.raises(TypeError, match="max_steps is settled when a run begins; set.. takes"):
        run.set(max_steps=5)
    with pytest.raises(ValueError, match="learning_rate must be at least 0"):
        run.set(learning_rate=-1)
    with pytest.raises(ValueError, match="lora_dropout must be at least 0 and below 1"):
        run.set(lora_dropout=1)
    for seconds in ("soon", -1, float("nan"), 1e300):
        with pytest.raises(ValueError, match="timeout must be"):
            run.wait(seconds)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no eval_data"):
        run.evaluate()
    with pytest.raises(TypeError, match="one of text"):
        run.sample()
    with pytest.raises(ValueError, match="1 to 8192"):
        run.sample(input_ids=[])
    at_step(run, 1)
    with pytest.raises(pm.Error, match="sample was refused"):
        run.sample(input_ids=[1] * 60, max_new_tokens=60)  # more than generate_length
    with pytest.raises(pm.Error):
        run.sample(input_ids=[999_999])
    for call in (run.to_script, lambda: run.rewind(1), lambda: run.branch(1), pm.monitor):
        with pytest.raises(NotImplementedError, match="not in this version"):
            call()
    with pytest.raises(pm.BusyError, match="there is a run"):
        start(name=run.name)
    for kwargs in (3, {"min_lr": math.nan}, {"min_lr": []}):
        with pytest.raises(pm.InvalidError, match="lr_scheduler_kwargs"):
            run.set(lr_scheduler_kwargs=kwargs)
    assert run.state == "running"


def test_a_folder_that_is_removed_under_a_run(start: Start) -> None:
    run = start(max_steps=FOREVER)
    at_step(run, 1)
    remove(run.folder)
    until(lambda: any("has been removed" in str(e.get("message")) for e in run.events()), "word")
    step = run.step
    at_step(run, step + 1)
    assert (run.checkpoint(wait=True).path / "adapter_model.safetensors").is_file()
    with pytest.raises(pm.NotFoundError):
        pm.attach(run.name)
    run.stop(wait=True)
    assert run.state == "stopped"
    end(run)


def test_two_workers_are_one(start: Start, gate: Path) -> None:
    """The same global batches, so the same curve, and each command at one step on both."""
    common: dict[str, Any] = {"shuffle": False, "max_steps": 12, "dtype": "float32"}
    one = start(per_device_train_batch_size=4, **common)
    two = start(per_device_train_batch_size=2, devices=["cpu"] * 2, **common)
    command = two.set(max_grad_norm=1.0)
    gate.touch()
    one.wait(PATIENCE)
    two.wait(PATIENCE)
    assert command.workers == [0, 1]
    assert [w["rank"] for w in two.workers] == [0, 1]
    assert len({w["pid"] for w in two.workers}) == 2
    for a, b in zip(one.history, two.history, strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=5e-6)


def test_adapter_folder_is_peft_s(start: Start, tmp_path: Path, model: Path) -> None:
    run = start(max_steps=3, lora=pm.LoRA(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    run.wait(PATIENCE)
    out = run.export(tmp_path / "out", format="peft")
    assert out.difference == 0
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "pantheraml.json",
    }  # fmt: skip
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 4 and config["lora_alpha"] == 8
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    tensors = load_file(out / "adapter_model.safetensors")
    names = {
        f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{side}.weight"
        for layer in range(2) for module in ("q_proj", "v_proj") for side in "AB"
    }  # fmt: skip
    assert set(tensors) == names
    at = "base_model.model.model.layers.1.self_attn.v_proj.lora_"
    assert tensors[at + "A.weight"].shape == (4, 64) and tensors[at + "B.weight"].shape == (32, 4)
    assert np.abs(tensors[at + "B.weight"]).max() > 0
    # It starts where the other ended.
    again = start(max_steps=1, lora=pm.LoRA(init=out), learning_rate=0.0)
    again.wait(PATIENCE)
    copied = load_file(again.export(tmp_path / "again") / "adapter_model.safetensors")
    assert all(np.array_equal(copied[name], tensors[name]) for name in tensors)


def test_full_run_gives_a_model_folder(start: Start, tmp_path: Path, model: Path) -> None:
    run = start(method="full", max_steps=3)
    run.wait(PATIENCE)
    with pytest.raises(ValueError, match="every weight was trained"):
        run.export(tmp_path / "no", format="peft")
    out = run.export(tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (model, out))
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert any(not np.array_equal(before[name], after[name]) for name in before)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 272
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    next_run = start(model=out, max_steps=1)
    next_run.wait(PATIENCE)
    assert next_run.history[0]["loss"] < run.history[0]["loss"]


def test_packing_and_accumulation_change_nothing(start: Start) -> None:
    common: dict[str, Any] = {"shuffle": False, "max_steps": 6}
    eight = start(per_device_train_batch_size=8, **common)
    four = start(per_device_train_batch_size=2, gradient_accumulation_steps=4, **common)
    eight.wait(PATIENCE)
    four.wait(PATIENCE)
    for a, b in zip(eight.history, four.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


def test_the_coordinator_outlives_us_and_the_log_outlives_it(start: Start, runs: Path) -> None:
    run = start(name="long", max_steps=FOREVER, restart="never")
    at_step(run, 3)
    pid = run.coordinator_pid
    assert pid is not None
    run.close()
    with pytest.raises(pm.PeerError, match="was closed"):
        run.pause()
    assert alive(pid)
    again = pm.attach()
    assert again is not run and again.coordinator_pid == pid
    assert pm.attach("long") is again
    assert [row["step"] for row in again.history][:3] == [1, 2, 3]
    at_step(again, again.step + 2)
    workers = [w["pid"] for w in again.workers]
    os.kill(pid, signal.SIGKILL)
    until(lambda: again.state == "stopped", "the death to be noticed")
    assert "resume()" in again.reason and again.coordinator_pid is None
    until(lambda: not any(map(alive, workers)), "the workers to end with their coordinator")
    (info,) = pm.runs()
    assert info.state == "stopped"
    seen = again.step
    # The connection file is stale; the log is there, and the run can go on.
    run = pm.attach("long")
    assert run.state == "stopped" and run.step >= seen and len(run.history) == run.step
    run = pm.resume("long")
    at_step(run, seen + 2)
    steps = [row["step"] for row in run.history]
    # Nor is a step lost that was under way when the coordinator was killed.
    assert steps == list(range(1, len(steps) + 1)) and steps[-1] >= seen + 2
    assert run.events()[-1]["timeline"] == 1


def test_checkpoint_to_go_back_to(start: Start) -> None:
    run = start(max_steps=FOREVER, lr_scheduler_type="constant")
    at_step(run, 2)
    mark = run.checkpoint("mark", wait=True)
    run.set(learning_rate=0.5, wait=True)
    at_step(run, mark.step + 3)
    run.stop(wait=True)
    ended = run.step
    with pytest.raises(pm.NotFoundError, match="no checkpoint 'nope'"):
        run.resume(checkpoint="nope")
    run.resume(checkpoint="mark", wait=True)
    at_step(run, mark.step + 1)
    assert run.history[mark.step]["learning_rate"] == 1e-3
    assert ended > mark.step


WAITING = """
import sys, threading, time
import pantheraml as pm
def watch(main):
    frame = None
    while frame is None or frame.f_code.co_name != "_wait_for":
        time.sleep(0.01)
        frame = sys._current_frames()[main]
        while frame.f_back is not None and frame.f_code.co_name != "_wait_for":
            frame = frame.f_back
    print("it waits", flush=True)
run = pm.attach("alone")
threading.Thread(target=watch, args=[threading.get_ident()], daemon=True).start()
run.wait()
"""


def test_ctrl_c_leaves_the_run_alone(start: Start, runs: Path) -> None:
    run = start(name="alone", max_steps=FOREVER)
    at_step(run, 1)
    child = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "it waits\n"
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=PATIENCE)
    assert "The run goes on without you. Come back by pm.attach('alone')" in said
    assert "KeyboardInterrupt" in said and child.returncode != 0
    at_step(run, run.step + 2)
    assert run.state == "running"


async def test_asyncio(start: Start, gate: Path) -> None:
    """While one waits the loop is free: the run begins only when somebody else has had a turn."""
    run = start(max_steps=20)
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while turns < 3:
            turns += 1
            await asyncio.sleep(0.01)
        gate.touch()

    others = asyncio.create_task(take_turns())
    in_the_end = threading.Timer(PATIENCE, gate.touch)  # where the loop never comes to it
    in_the_end.daemon = True
    in_the_end.start()
    assert (await run.wait_async()).state == "finished"
    in_the_end.cancel()
    assert turns == 3
    await others


def test_subscribers(start: Start, gate: Path) -> None:
    run = start(max_steps=15)
    seen: list[dict[str, Any]] = []
    steps: list[int] = []

    def note(event: dict[str, Any]) -> None:
        seen.append(event)
        steps.append(run.step)
        if event["type"] == "step":
            assert run.step >= event["step"]  # the properties have changed already

    def fail(_: dict[str, Any]) -> None:
        raise RuntimeError("mine")

    refusal: list[Exception] = []

    def ask(event: dict[str, Any]) -> None:
        if event["type"] == "step" and not refusal:
            try:
                run.pause()
            except pm.Error as error:
                refusal.append(error)

    unsubscribe = run.subscribe(note)
    run.subscribe(ask)
    with pytest.warns(RuntimeWarning, match="a subscriber failed and was dropped"):
        run.subscribe(fail)
        gate.touch()
        run.wait(PATIENCE)  # which may see the end before subscribers do
        until(lambda: any(e.get("state") == "finished" for e in seen), "the end to be told")
    unsubscribe()
    numbers = [event["seq"] for event in seen if "seq" in event]
    assert numbers == sorted(set(numbers))
    assert [e["step"] for e in seen if e["type"] == "step"] == list(range(1, 16))
    assert refusal and "another thread" in str(refusal[0])
    readable, _, _ = select.select([run.fileno()], [], [], 0)
    assert readable in ([], [run.fileno()])


def test_nobody_waits_for_a_notebook_without_people(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert start(max_steps=3).state == "finished"


def test_a_script_shows_what_it_asks_to_be_shown(runs: Path, model: Path) -> None:
    """Calls are silent but for watch(), which has the workers' own plan before their steps."""
    code = (
        "import sys, pantheraml as pm\n"
        "rows = [{'text': 'one two three'}] * 8\n"
        "given = {'max_length': 64, 'max_steps': 3}\n"
        "pm.finetune(sys.argv[1], rows, name='silent', **given).wait()\n"
        "print('watched')\n"
        "assert pm.finetune(sys.argv[1], rows, name='shown', **given).watch().step == 3\n"
    )
    made = subprocess.run(
        [sys.executable, "-P", "-c", code, str(model)],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    said, _, shown = made.stdout.partition("watched\n")
    assert (said, made.stderr) == ("", "")
    before, _, after = shown.partition(f"{pm.attach('shown', restart=False).plan}\n")
    assert before != shown and ", loss " not in before
    assert after.endswith("\n") and "shown: finished, step 3/3, loss " in after


def test_watching_ends_as_waiting_does(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(max_steps=10**6)
    at_step(run, 1)
    run.pause(wait=True)
    monkeypatch.setattr(run, "wait_for_change", lambda _: run.close())
    with pytest.raises(pm.PeerError, match="this Run was closed"):
        run.watch()
    run = pm.attach(run.name)
    run.stop(wait=True)
    assert run.watch() is run  # it has ended: what it came to is shown
    assert "stopped, step" in capsys.readouterr().out.splitlines()[-1]


def test_watching_in_a_notebook_holds_no_cell(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The panel goes on by itself; where there is none, lines until the run's end."""
    run = start(max_steps=10**6)
    monkeypatch.setattr("pantheraml.run.kernel", object)
    monkeypatch.setattr(run, "_panel", lambda: "the panel")
    assert run.watch() is run and run.state in ("starting", "running")
    assert "the panel" in capsys.readouterr().out
    run.stop(wait=True)
    monkeypatch.setattr(run, "_panel", lambda: None)
    assert run.watch() is run
    assert "stopped, step" in capsys.readouterr().out.splitlines()[-1]


def test_same_bits_twice(start: Start, tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        run = start(max_steps=8, deterministic=True, seed=7)
        run.wait(PATIENCE)
        made.append((run.export(tmp_path / name) / "adapter_model.safetensors").read_bytes())
    assert made[0] == made[1]


def stands(run: pm.Run) -> int:
    """How often it came to stand still."""
    return sum(e["type"] == "state" and e["state"] == "paused" for e in run.events())


def test_not_finite_numbers_arrive_as_numbers(start: Start, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "huge"
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][:] = np.nan
    save_file(tensors, folder / "model.safetensors")
    run = start(model=folder, max_steps=3)
    until(lambda: run.state == "paused", "the run to stand still")
    assert "not finite" in run.reason
    with pytest.raises(pm.RunFailed, match="stands: step 1 is not finite"):
        run.wait(PATIENCE)  # nothing would ever end this
    with pytest.raises(pm.RunFailed, match="stands"):
        asyncio.run(run.wait_async())
    assert all(isinstance(row["loss"], float) for row in run.history)
    assert not math.isfinite(run.history[0]["loss"])
    assert "nan" in run.to_html() or "inf" in run.to_html()
    for kill in (run.workers[0]["pid"], run.coordinator_pid):  # the next of each says why, too
        assert kill is not None
        stood = stands(run)
        os.kill(kill, signal.SIGKILL)
        until(lambda stood=stood: stands(run) > stood, "the run to stand again")
        with pytest.raises(pm.RunFailed, match="stands: step 1 is not finite"):
            run.wait(PATIENCE)


def test_a_step_without_labels_learns_nothing_and_goes_on(start: Start) -> None:
    ids = [70, 71, 72, 73]
    rows = [{"input_ids": ids, "labels": [-100] * 4}, {"input_ids": ids, "labels": ids}]
    run = start(rows, max_steps=4, per_device_train_batch_size=1, shuffle=False).wait(PATIENCE)
    assert run.state == "finished"
    assert [math.isnan(row["loss"]) for row in run.history] == [True, False, True, False]
    assert [row["grad_norm"] > 0 for row in run.history] == [False, True, False, True]


def test_rows_and_samples_beyond_the_models_positions(start: Start, tmp_path: Path) -> None:
    small = TinyLlama(positions=16).write(tmp_path / "small")
    rows = [{"input_ids": list(range(70, 70 + n))} for n in (8, 24, 40)]
    run = start(rows, model=small, max_length=32, max_steps=3).wait(PATIENCE)
    assert run.state == "finished", run.reason
    assert len(run.sample(input_ids=[70] * 20, max_new_tokens=8).token_ids) > 0
    lines = map(json.loads, (run.folder / "events.jsonl").read_text().splitlines())
    said = [e["message"] for e in lines if e["type"] == "log" and e["level"] == "warning"]
    told = [text for text in said if "max_position_embeddings=16" in text]
    assert len(told) == 2
    assert "32 tokens" in told[0] and "max_length=32" in told[0]
    assert "20 prompt tokens" in told[1]


def test_who_waits_while_the_disk_is_full_is_told(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is waited for is announced after it is on disk: the wait has a reason that is said."""
    run = start(max_steps=FOREVER)
    at_step(run, 1)
    with run._changed:  # no heartbeat comes in between
        run._trouble = "the disk is full: make room"
        with pytest.raises(pm.TimedOut):
            run._wait_for(lambda: False, 0.01, "checkpoint")
    assert "checkpoint waits: the disk is full" in capsys.readouterr().err
    until(lambda: run._trouble == "", "a heartbeat without trouble")
    with pytest.raises(pm.TimedOut):
        run._wait_for(lambda: False, 0.01, "checkpoint")
    assert capsys.readouterr().err == ""


def test_fixture_ends_what_it_began(start: Start) -> None:
    run = start(max_steps=FOREVER)
    pid = run.coordinator_pid
    end(run)
    assert pid is not None and not alive(pid)
    assert environment()["PANTHERAML_RUNS"]


@contextmanager
def held_elsewhere(lock: threading.Condition) -> Iterator[None]:
    """Have another thread hold a lock."""
    held, enough = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            enough.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(PATIENCE)
    try:
        yield
    finally:
        enough.set()
        thread.join(PATIENCE)


def test_a_forked_child_keeps_out(start: Start) -> None:
    """It is told what to do: nobody listens there, and who waited would wait for ever."""
    run = start(max_steps=FOREVER)
    at_step(run, 1)
    command = run.set(weight_decay=0.5, wait=True)
    command.number = 10**6  # as if it was on its way still
    calls = (lambda: run.sharing, run.pause, run.fileno, run.wait, command.wait)
    for call in calls:
        reader, writer = os.pipe()
        with held_elsewhere(run._changed):  # nobody lets go of it in the child
            child = os.fork()
        if child == 0:  # nothing of the tests' may run in it
            signal.alarm(int(PATIENCE))
            words = "nothing"
            with suppress(BaseException):
                try:
                    call()
                except pm.Error as error:
                    words = f"{type(error).__name__} {error}"
                os.write(writer, words.encode())
            os._exit(0)
        os.close(writer)
        with open(reader) as file:
            said = file.read()
        os.waitpid(child, 0)
        assert said.startswith("BusyError") and "pm.attach" in said, said
    at_step(run, run.step + 2)


def test_what_a_full_disk_keeps_from_the_log_is_told(start: Callable[..., pm.Run]) -> None:
    """A run that stands by itself, since too much waits, says so; it is no end, nor news of one."""
    run = start(max_steps=FOREVER)
    at_step(run, 1)
    run.pause(wait=True)
    step = run.step
    beat = {"type": "heartbeat", "time": 0.0, "last": run.last_seq(), "workers": []}
    full = beat | {"state": "running", "step": step + 7, "trouble": "No space left on device"}
    seen: list[tuple[str, int, str]] = []

    def hear(event: dict[str, Any]) -> None:
        if event["type"] == "heartbeat":
            seen.append((run.state, run.step, run.reason))

    unsubscribe = run.subscribe(hear)
    with run._changed:  # none of the coordinator's own comes in between
        for event in (full, full | {"state": "finished"}, beat | {"state": "paused", "step": step}):
            run.on_events([event])
    assert ("running", step + 7, "No space left on device") in seen
    assert ("paused", step + 7, "No space left on device") in seen  # no end before its events
    assert seen[-1][:2] == ("paused", step) and [row["step"] for row in run.history][-1] == step
    unsubscribe()


def test_interrupted_while_it_begins(
    start: Start, runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before there is a run, nothing keeps its name; from then on it goes on, and that is said."""

    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folders, "sync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            start(name="mine")
    assert not (runs / "mine").exists()
    with monkeypatch.context() as patch:
        patch.setattr(connecting.Connecting, "_catch_up", interrupted)
        with pytest.raises(KeyboardInterrupt):
            start(name="mine", max_steps=5)
    assert "Come back by pm.attach('mine')" in capfd.readouterr().err
    assert pm.attach("mine").wait(PATIENCE).step == 5
