"""Exactness: interrupted, steered and resumed runs end with the bits of an undisturbed one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pantheraml as pm
import pytest
from conftest import FOREVER, PATIENCE, ROWS, SLOW_WORKER, alive, at_step, until
from safetensors.numpy import load_file, save_file

Start = Callable[..., pm.Run]
STEPS = 240
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS, "deterministic": True, "seed": 11, "shuffle": True, "eval_data": ROWS[:4],
    "lr_scheduler_type": "cosine", "warmup_steps": 5, "per_device_train_batch_size": 4,
    "lora": pm.LoRA(r=4, lora_dropout=0.1),
}  # fmt: skip
TUNED = {"learning_rate": 4e-4, "weight_decay": 0.02}


def adapter(run: pm.Run, folder: Path) -> bytes:
    return (run.export(folder) / "adapter_model.safetensors").read_bytes()


def numbers(run: pm.Run) -> list[tuple[float, ...]]:
    return [(r["step"], r["loss"], r["learning_rate"], r["grad_norm"]) for r in run.history]


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """A file: while it is there, runs that began to stand make twenty steps a second at most.

    So they are not over before what is to happen to them, however seldom this process gets a turn.
    """
    path = tmp_path / "slow"
    path.touch()
    return path


@pytest.fixture
def tuned(start: Start, gate: Path, slow: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start a run that is tuned before its first step; with `stands`, it is paused there."""
    monkeypatch.setenv("PML_BEHIND_GATE", str(SLOW_WORKER))

    def begin(stands: bool = False, **settings: Any) -> pm.Run:
        gate.unlink(missing_ok=True)
        monkeypatch.setenv("PML_SLOW", str(slow) if stands else "")
        run = start(**SETTINGS | settings)
        command = run.set(**TUNED)
        pause = run.pause() if stands else None
        gate.touch()
        assert command.wait(PATIENCE).step == 1
        if pause is not None:
            assert pause.wait(PATIENCE).step == 1
        return run

    return begin


def creep(run: pm.Run, step: int) -> None:
    """Let a run that stands make a few steps at a time until it has made so many; it stands again.

    Its next pause is on its way before it goes on, and it is slow.
    """
    while run.step < step:
        run.resume()
        run.pause(wait=True)
    assert run.step < STEPS


@pytest.fixture
def undisturbed(tuned: Start, tmp_path: Path) -> tuple[bytes, list[tuple[float, ...]]]:
    """The adapter and the numbers of a run that was tuned before its first step, and left alone."""
    run = tuned(name="undisturbed")
    run.wait(PATIENCE)
    return adapter(run, tmp_path / "undisturbed"), numbers(run)


@pytest.mark.parametrize("devices", [1, 2])
def test_paused_checkpointed_stopped_and_resumed(
    devices: int, tuned: Start, slow: Path, tmp_path: Path
) -> None:
    plain = tuned(name="plain", devices=devices)
    run = tuned(name="steered", devices=devices, stands=True)
    creep(run, 10)
    run.evaluate()
    run.sample(input_ids=[5, 6], max_new_tokens=5, temperature=1.0)
    run.resume()
    mark = run.checkpoint("on-the-way")  # while it trains
    run.pause(wait=True)
    mark.wait(PATIENCE)
    creep(run, 25)
    run.stop(wait=True)
    assert run.state == "stopped" and run.step < STEPS
    slow.unlink()
    run.resume()
    run.wait(PATIENCE)
    plain.wait(PATIENCE)
    assert run.state == "finished" and numbers(run) == numbers(plain)
    assert adapter(run, tmp_path / "a") == adapter(plain, tmp_path / "b")
    identity = json.loads((run.folder / "run.json").read_text())["identity"]
    assert identity == json.loads((plain.folder / "run.json").read_text())["identity"]
    assert identity


@pytest.mark.parametrize("what", ["data", "data/train.safetensors"])
def test_shards_that_are_links_are_not_trained_on(start: Start, tmp_path: Path, what: str) -> None:
    run = start(max_steps=FOREVER, restart="never")
    at_step(run, 2)
    run.stop(wait=True)
    (run.folder / what).rename(tmp_path / "elsewhere")
    (run.folder / what).symlink_to(tmp_path / "elsewhere")
    run.resume()
    with pytest.raises(pm.RunFailed, match=f"{what} is a link, which is not followed here"):
        run.wait(PATIENCE)


def test_killed_anywhere_and_resumed(
    undisturbed: tuple[bytes, list[tuple[float, ...]]], tuned: Start, slow: Path, tmp_path: Path
) -> None:
    """kill -9 of the coordinator, then of a worker; each time somebody resumes it."""
    run = tuned(name="killed", save_steps=7, restart="never", stands=True)
    creep(run, 12)
    pid = run.coordinator_pid
    assert pid is not None
    run.resume(wait=True)
    os.kill(pid, signal.SIGKILL)
    until(lambda: run.state == "stopped", "the coordinator's death")
    run.resume()
    run.pause(wait=True)  # or it might be finished before it is killed
    os.kill(run.workers[0]["pid"], signal.SIGKILL)
    until(lambda: run.state == "failed", "the worker's death")
    assert "worker" in run.reason
    with pytest.raises(pm.RunFailed, match="worker"):
        run.wait()
    slow.unlink()
    run.resume()
    run.wait(PATIENCE)
    assert run.state == "finished"
    assert numbers(run) == undisturbed[1]  # also the steps that the coordinator did not live to log
    assert adapter(run, tmp_path / "killed") == undisturbed[0]


def test_killed_anywhere_it_goes_on(
    undisturbed: tuple[bytes, list[tuple[float, ...]]], tuned: Start, slow: Path, tmp_path: Path
) -> None:
    """The same without anybody: workers and coordinators are replaced, and not a bit is lost."""
    run = tuned(name="undying", max_restarts=20, stands=True)
    for victim in ("coordinator", "worker", "coordinator", "worker"):
        creep(run, run.step + 5)
        timeline = run.events()[-1]["timeline"]
        pid = run.coordinator_pid if victim == "coordinator" else run.workers[0]["pid"]
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        until(lambda: run.events()[-1]["timeline"] > timeline, f"the next {victim}")  # noqa: B023
        until(lambda: run.state == "paused", "it to stand where it stood")
    slow.unlink()
    run.resume()
    run.wait(PATIENCE)
    restarts = [e for e in run.events() if e["type"] == "restart"]
    assert [e["cause"] for e in restarts] == ["coordinator", "died", "coordinator", "died"]
    assert run.state == "finished" and numbers(run) == undisturbed[1]
    assert adapter(run, tmp_path / "undying") == undisturbed[0]


def test_a_run_that_goes_on_keeps_its_plan(tuned: Start) -> None:
    """Also one that would not be made today, as on a machine with fewer cores or more memory."""
    run = tuned(name="kept", stands=True)
    creep(run, 3)
    run.stop(wait=True)
    path = run.folder / "run.json"
    config = json.loads(path.read_text())
    del config["sum"]
    assert (config["identity"]["pieces"], config["identity"]["recompute"]) == (1, 0)
    config["identity"]["pieces"] = 2
    path.write_text(json.dumps(config))
    run.resume(wait=True)
    until(lambda: [e for e in run.events() if e["type"] == "plan"][1:], "another plan")
    plans = [e for e in run.events() if e["type"] == "plan"]
    assert [e["pieces"] for e in plans] == [1, 2]
    assert run.state in ("running", "finished")


def test_what_decides_bits_is_asked_about(tuned: Start) -> None:
    run = tuned(name="pinned", stands=True)
    creep(run, 3)
    run.stop(wait=True)
    path = run.folder / "run.json"
    config = json.loads(path.read_text())
    del config["sum"]  # a file without one is somebody's edit
    assert config["identity"]
    name = "threads" if "threads" in config["identity"] else next(iter(config["identity"]))
    config["identity"][name] = "other" if isinstance(config["identity"][name], str) else 77
    path.write_text(json.dumps(config))
    with pytest.raises(pm.Error, match=name):
        run.resume(wait=True)
    until(lambda: run.state in ("failed", "stopped"), "it to end")
    run.resume(wait=True, accept_changes=True)
    assert run.state in ("running", "finished")


def test_other_weights_are_asked_about(
    tuned: Start, slow: Path, model: Path, tmp_path: Path
) -> None:
    mine = shutil.copytree(model, tmp_path / "mine")
    run = tuned(name="moved", stands=True, model=mine)
    creep(run, 3)
    run.stop(wait=True)
    shutil.rmtree(mine)
    shutil.copytree(model, mine, copy_function=shutil.copyfile)  # fetched again: the same weights
    run.resume(wait=True)
    run.pause(wait=True)
    run.stop(wait=True)
    weights = load_file(mine / "model.safetensors")
    weights["model.layers.0.self_attn.o_proj.weight"] *= 2
    save_file(weights, mine / "model.safetensors", {"format": "pt"})
    with pytest.raises(pm.Error, match=r"what decides bits has changed \(model: "):
        run.resume(wait=True)
    until(lambda: run.state in ("failed", "stopped"), "it to end")
    run.resume(wait=True, accept_changes=True)
    slow.unlink()
    run.wait(PATIENCE)


def test_stopped_in_the_midst_of_evaluations(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What follows them (the rate, the best so far) is as if they had never been broken off."""
    settings: dict[str, Any] = SETTINGS | {
        "max_steps": 20, "eval_data": ROWS, "eval_steps": 5, "max_length": 64,
        "lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 0,
        "lr_scheduler_kwargs": {"patience": 0, "threshold": 0.5}, "learning_rate": 1e-3,
    }  # fmt: skip
    plain = start(name="plain", **settings)
    # Evaluations after these steps stand until the stop that is sent there is heard in them.
    stops = [5, 10, 20]
    monkeypatch.setenv("PML_WORKER", str(SLOW_WORKER))
    monkeypatch.setenv("PML_STAND", " ".join(map(str, stops)))
    run = start(name="stopped", **settings)
    for step in stops:
        at_step(run, step)
        run.stop(wait=True)
        assert run.state == "stopped" and run.step == step
        newest = run.checkpoints[-1].path
        assert json.loads((newest / "state.json").read_text())["owes_evaluation"]
        run.resume()
    run.wait(PATIENCE)
    plain.wait(PATIENCE)
    assert run.state == "finished" and numbers(run) == numbers(plain)
    assert len({row["learning_rate"] for row in run.history}) > 1  # the evaluations counted
    measured = [[(e.step, e.loss) for e in each.evaluations] for each in (run, plain)]
    assert measured[0] == measured[1] and [step for step, _ in measured[0]] == [0, 5, 10, 15, 20]
    assert adapter(run, tmp_path / "a") == adapter(plain, tmp_path / "b")


def flip_a_moment(checkpoint: Path) -> None:
    path = checkpoint / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def flip_the_timeline(checkpoint: Path) -> None:
    """By its number it is older than the one before it, then."""
    path = checkpoint / "state.json"
    text = path.read_text()
    assert text.count('"timeline": 1,') == 1
    path.write_text(text.replace('"timeline": 1,', '"timeline": 0,'))


@pytest.mark.parametrize("damage", [flip_a_moment, flip_the_timeline])
def test_a_damaged_checkpoint_is_passed_over(tuned: Start, damage: Callable[[Path], None]) -> None:
    run = tuned(name="damaged", save_steps=5, stands=True)
    creep(run, 7)
    run.stop(wait=True)
    run.resume(wait=True)
    run.pause(wait=True)
    creep(run, 12)
    run.stop(wait=True)
    newest, before = run.checkpoints[-1], run.checkpoints[-2]
    damage(newest.path)
    run.resume(wait=True)
    starting = [e for e in run.events() if e["type"] == "state" and e["state"] == "starting"][-1]
    assert starting["checkpoint"] == f"checkpoints/{before.path.name}"
    logged = [e["message"] for e in run.events() if e["type"] == "log"]
    assert any(f"{newest.path.name} is not used" in message for message in logged), logged


ATTACH = """
import sys
import pantheraml as pm
run = pm.attach(sys.argv[1])
print(run.coordinator_pid, flush=True)
sys.stdin.read()
"""


def test_two_attach_at_once_and_start_one(start: Start) -> None:
    """Every process of a run is killed: whoever comes back first has it go on, and only once."""
    run = start(name="fallen", **SETTINGS | {"max_steps": 10**6})
    at_step(run, 5)
    coordinator, workers = run.coordinator_pid, [w["pid"] for w in run.workers]
    assert coordinator is not None
    run.close()
    for pid in (coordinator, *workers):
        os.kill(pid, signal.SIGSTOP)  # so that none of them helps
    for pid in (coordinator, *workers):
        os.kill(pid, signal.SIGKILL)
    until(lambda: not any(map(alive, (coordinator, *workers))), "their end")
    comers = [
        subprocess.Popen(
            [sys.executable, "-c", ATTACH, run.folder],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    told = [comer.stdout.readline().strip() for comer in comers if comer.stdout is not None]
    assert told[0] == told[1] != "None", told
    for comer in comers:
        comer.communicate()
    run = pm.attach("fallen")
    assert str(run.coordinator_pid) == told[0]
    at_step(run, run.step + 5)
    assert [e["cause"] for e in run.events() if e["type"] == "restart"] == ["coordinator"]
    history = run.history  # once: the run goes on
    assert [row["step"] for row in history] == list(range(1, len(history) + 1))


def test_a_stopped_last_worker_keeps_nobody_waiting(start: Start) -> None:
    """The coordinator is dead and the only worker left is stopped: it saves nothing."""
    run = start(name="frozen", hang_timeout=3, **SETTINGS | {"max_steps": 10**6})
    at_step(run, 5)
    coordinator, worker = run.coordinator_pid, run.workers[0]["pid"]
    assert coordinator is not None
    os.kill(worker, signal.SIGSTOP)
    try:
        os.kill(coordinator, signal.SIGKILL)
        until(lambda: run.coordinator_pid not in (None, coordinator), "another coordinator")
        at_step(run, run.step + 5)
    finally:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


def test_a_copy_has_its_own_name(start: Callable[..., pm.Run], runs: Path) -> None:
    """What is listed is what can be attached to, also where run.json has the original's name."""
    start(name="original", max_steps=2).wait(PATIENCE)
    shutil.copytree(runs / "original", runs / "copy")
    assert {info.name for info in pm.runs()} == {"original", "copy"}
    run = pm.attach("copy", restart=False)
    assert run.name == "copy" and run.folder == runs / "copy"
