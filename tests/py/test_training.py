"""Training settings through every process: schedules, optimizers, evaluation, tuning."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pantheraml as pm
import pytest
from conftest import FOREVER, PATIENCE, ROWS, at_step, end, until
from safetensors.numpy import load_file, save_file

Start = Callable[..., pm.Run]


def rates(run: pm.Run) -> list[float]:
    return [row["learning_rate"] for row in run.history]


def reason(run: pm.Run) -> str:
    return " ".join(e.get("reason", "") for e in run.events() if e["type"] == "state")


def weights(folder: Path) -> dict[str, Any]:
    return dict(load_file(folder / "adapter_model.safetensors"))


def test_a_schedule_with_keywords_and_a_warmup_ratio(start: Start) -> None:
    run = start(
        max_steps=20,
        learning_rate=1e-3,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 1e-4},
        warmup_ratio=0.21,
    ).wait(PATIENCE)
    wave = [0.5 * (1 + math.cos(math.pi * (n - 5) / 15)) * 0.9 + 0.1 for n in range(5, 20)]
    assert rates(run) == pytest.approx([1e-3 * f for f in [n / 5 for n in range(5)] + wave])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr_scheduler_kwargs": {"min_lr": 0.1}}, "cosine has no keyword min_lr"),
        ({"lr_scheduler_kwargs": {"cycles": 2}}, 'no field "cycles"'),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr and min_lr_rate"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "follows evaluations"),
        ({"early_stopping_patience": 2}, "follows evaluations"),
        ({"load_best_model_at_end": True, "eval_steps": 2}, "need eval_data or eval_split"),
        ({"group_by_length": True, "packing": True}, "packing=False"),
        ({"optim": "sgd", "optim_args": {"nesterov": True}}, "nesterov needs momentum"),
    ],
)
def test_what_does_not_fit_together_is_said_before_a_run_is_there(
    start: Start, runs: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(pm.InvalidError, match=words):
        start(max_steps=3, **settings)
    assert not list(runs.glob("*"))


@pytest.mark.parametrize("args", [None, "momentum=0.9", {"momentum": 0.9, "nesterov": True}])
def test_sgd(start: Start, args: Any) -> None:
    run = start(max_steps=30, optim="sgd", optim_args=args, learning_rate=0.3).wait(PATIENCE)
    plan = run.plan
    assert plan is not None and run.history[-1]["loss"] < run.history[0]["loss"]
    moments = plan.by_cause["optimizer"] / plan.by_cause["gradients"]
    assert round(moments) == (0 if args is None else 1)


def test_the_rate_falls_when_the_evaluation_does_not(start: Start) -> None:
    run = start(
        eval_data=ROWS[:8],
        max_steps=12,
        learning_rate=1e-9,
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"patience": 1, "factor": 0.5, "eps": 0},
        eval_steps=2,
    ).wait(PATIENCE)
    # The first evaluation is the best; each two without a better one halve the rate.
    assert rates(run) == pytest.approx([1e-9] * 6 + [5e-10] * 4 + [2.5e-10] * 2)


def test_early_stopping_and_the_best_checkpoint(start: Start, tmp_path: Path) -> None:
    run = start(
        eval_data=ROWS[32:40],
        max_steps=FOREVER,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        eval_steps=3,
        early_stopping_patience=4,
        load_best_model_at_end=True,
        save_total_limit=2,
        threads=1,
    )
    run.wait(PATIENCE)
    own = [e for e in run.evaluations if e.step > 0]
    best = min(own, key=lambda e: e.loss)
    assert run.state == "finished" and "early stopping" in reason(run)
    assert run.step == own[-1].step < FOREVER and len(own) >= 5
    assert all(e.loss >= best.loss for e in own[-4:])
    assert run.best_checkpoint is not None and run.best_checkpoint.step == best.step
    # The best and the newest, and the weights that serve and are exported are the best.
    assert {c.step for c in run.checkpoints} == {best.step, run.step}
    measured = run.evaluate()
    assert measured.loss == pytest.approx(best.loss, rel=1e-6) and measured.step == best.step
    exported, wanted = weights(run.export(tmp_path / "out")), weights(run.best_checkpoint.path)
    assert all(np.array_equal(exported[name], wanted[name]) for name in wanted)
    # Asked again long after, it is still them.
    run.stop(wait=True)
    again = pm.attach(run.folder)
    assert again.evaluate().loss == pytest.approx(best.loss, rel=1e-6)


def test_a_width_left_open_is_the_plans_and_stays(start: Start, model: Path) -> None:
    """float32 moments while there is room, 8 bits where only they fit, and so when it goes on."""
    settings = {
        "method": "full", "optim": "adamw_auto", "max_length": 64, "packing": False,
        "per_device_train_batch_size": 2, "threads": 1, "generate_length": 64,
    }  # fmt: skip
    roomy = pm.plan(model, **settings).total + (16 << 20)
    assert not pm.plan(model, memory_limit=roomy, **settings).moments_8bit

    def least(optim: str) -> int:
        low, high = 0, roomy
        while high - low > 4096:
            limit = (low + high) // 2
            try:
                pm.plan(model, memory_limit=limit, **{**settings, "optim": optim})
            except pm.NoMemoryError:
                low = limit
            else:
                high = limit
        return high

    narrow = (least("adamw") + least("adamw_8bit")) // 2
    plan = pm.plan(model, memory_limit=narrow, **settings)
    assert plan.moments_8bit and "8 bits" in str(plan)
    with pytest.raises(pm.NoMemoryError, match='optim="adamw_8bit" fits'):
        pm.plan(model, memory_limit=narrow, **{**settings, "optim": "adamw"})
    rows = [{"input_ids": [70 + i % 9] * 64} for i in range(8)]
    run = start(rows, max_steps=4, memory_limit=narrow, **settings)
    run.wait(PATIENCE)
    assert run.plan.moments_8bit
    assert json.loads((run.folder / "run.json").read_text())["identity"]["moments_8bit"] is True


def test_the_held_out_loss_is_the_mean_over_tokens(start: Start) -> None:
    """However rows are put together; a mean of batches would be another number each time."""
    short, long = {"input_ids": [70, 80]}, {"input_ids": [70 + i * 7 % 40 for i in range(60)]}

    def held_out(rows: list[dict[str, Any]], **settings: Any) -> pm.Evaluation:
        run = start(eval_data=rows, max_steps=1, learning_rate=1e-9, **settings)
        run.wait(PATIENCE)
        return run.evaluate()

    one, other = held_out([short]), held_out([long])
    assert (one.labels, other.labels) == (1, 59)
    mean = (one.loss + 59 * other.loss) / 60
    assert abs(mean - (one.loss + other.loss) / 2) > 1e-3
    for settings in (
        {"per_device_train_batch_size": 2},
        {"per_device_train_batch_size": 2, "packing": True},
        {"per_device_train_batch_size": 1, "devices": ["cpu", "cpu"]},
    ):
        made = held_out([short, long], **settings)
        assert made.labels == 60
        assert made.loss == pytest.approx(mean, rel=1e-6), settings


def test_strategies_by_epoch_and_groups_by_length(start: Start) -> None:
    rows = [{"input_ids": [70 + i % 9] * (2 + (i * 7) % 23)} for i in range(240)]
    run = start(
        rows,
        eval_data=rows[:4],
        max_steps=None,
        num_train_epochs=2,
        per_device_train_batch_size=4,
        packing=False,
        group_by_length=True,
        eval_strategy="epoch",
        save_strategy="epoch",
    ).wait(PATIENCE)
    assert run.step == 120 and [e.step for e in run.evaluations] == [0, 60, 120]
    assert [c.step for c in run.checkpoints] == [60, 120]
    tokens = [row["tokens"] for row in run.history]
    assert sum(tokens[:60]) == sum(tokens[60:]) == sum(len(row["input_ids"]) for row in rows)
    # The longest first; sorted in runs of 15 steps, so that most have less than the one before.
    assert tokens[0] >= 4 * 22 and tokens[60] >= 4 * 22
    assert sum(a >= b for a, b in zip(tokens[:60], tokens[1:60], strict=False)) >= 55


@pytest.mark.parametrize("workers", [1, 2])
def test_everything_that_can_be_tuned(start: Start, workers: int) -> None:
    rows = [{"input_ids": [70, 71, 72, 73, 74 + i % 9]} for i in range(8190)]  # in whole steps
    run = start(
        rows,
        devices=["cpu"] * workers,
        threads=1,
        max_steps=FOREVER,
        lr_scheduler_type="constant",
        learning_rate=1e-3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        packing=False,
        lora=pm.LoRA(r=4, lora_dropout=0.1),
    )
    at_step(run, 3)
    schedule = run.set(
        wait=True,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 5e-4, "num_cycles": 0.0},
        warmup_steps=0,
    )
    more = run.set(wait=True, gradient_accumulation_steps=3, lora_dropout=0.5, eval_steps=0)
    assert schedule.step is not None and more.step is not None
    assert schedule.workers == more.workers == list(range(workers))
    at_step(run, more.step + 3)
    refused = run.set(lr_scheduler_type="linear", lr_scheduler_kwargs={"power": 2.0})
    with pytest.raises(pm.Error, match="linear has no keyword power"):
        refused.wait(PATIENCE)
    run.stop(wait=True)
    # Each step has the tokens of its accumulation, from the very step that was announced.
    for row in run.history:
        if row["step"] < more.step + 3:
            wanted = 5 * workers * (3 if row["step"] >= more.step else 1)
            assert row["tokens"] == wanted, row
    run.resume(wait=True)
    begun = run.step
    at_step(run, begun + 2)
    assert run.history[-1]["tokens"] == 15 * workers and rates(run)[-1] == pytest.approx(1e-3)
    run.set(wait=True, lr_scheduler_type="inverse_sqrt", warmup_steps=1)
    at_step(run, run.step + 2)
    last = run.history[-1]
    assert last["learning_rate"] == pytest.approx(1e-3 / math.sqrt(last["step"] - 1), rel=1e-6)


def test_what_is_set_is_as_if_it_had_been_given(start: Start, gate: Path, tmp_path: Path) -> None:
    """Every setting that can be tuned, set before step 1: to the bit the run that was given it."""
    fixed: dict[str, Any] = {
        "max_steps": 12, "deterministic": True, "eval_data": ROWS[:4], "warmup_steps": 0,
    }  # fmt: skip
    given = {
        "learning_rate": 1e-3, "lr_scheduler_type": "cosine_with_min_lr", "weight_decay": 0.5,
        "lr_scheduler_kwargs": {"min_lr": 2e-4}, "max_grad_norm": 0.05, "eval_steps": 5,
        "save_steps": 4, "gradient_accumulation_steps": 3, "lora": pm.LoRA(r=4, lora_dropout=0.25),
    }  # fmt: skip
    before = {
        "learning_rate": 2e-3, "lr_scheduler_type": "linear", "weight_decay": 0.0,
        "max_grad_norm": 1.0, "gradient_accumulation_steps": 1, "eval_steps": 12, "save_steps": 12,
        "lora": pm.LoRA(r=4, lora_dropout=0.5),
    }  # fmt: skip
    kept = {}
    for name, settings in (("given", given), ("set", before), ("left", before)):
        gate.unlink(missing_ok=True)
        run = start(name=name, **fixed, **settings)
        if name == "set":
            words = {key: value for key, value in given.items() if key != "lora"}
            rate = {"learning_rate": words.pop("learning_rate"), "lora_dropout": 0.25}
            commands = [run.set(**rate), run.set(**words)]
        gate.touch()
        run.wait(PATIENCE)
        if name == "set":
            assert [command.step for command in commands] == [1, 1]
        kept[name] = (
            [(r["step"], r["loss"], r["learning_rate"], r["grad_norm"]) for r in run.history],
            [(e["step"], e["loss"]) for e in run.events() if e["type"] == "eval"],
            [checkpoint.step for checkpoint in run.checkpoints],
            (run.export(tmp_path / name) / "adapter_model.safetensors").read_bytes(),
        )
    assert kept["given"] == kept["set"]
    assert kept["set"][2] == [4, 8, 12] and [step for step, _ in kept["set"][1]] == [0, 5, 10, 12]
    assert kept["left"][0] != kept["set"][0] and kept["left"][3] != kept["set"][3]


def test_dropout_that_was_not_planned_is_refused(start: Start) -> None:
    run = start(max_steps=FOREVER)
    at_step(run, 1)
    with pytest.raises(pm.Error, match="planned without dropout"):
        run.set(wait=True, lora_dropout=0.1)
    at_step(run, run.step + 2)


def test_steps_that_are_not_finite_can_be_left_out(
    start: Start, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "huge"
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][:] = np.nan
    save_file(tensors, folder / "model.safetensors")
    run = start(model=folder, max_steps=6, devices=["cpu"] * 2, threads=1)
    until(lambda: run.state == "paused", "the run to stand still")
    assert run.step == 1 and "resume() leaves this batch out" in run.reason
    assert "loss nan, gradient norm nan" in run.reason
    saved = run.checkpoint(wait=True)
    run.resume(wait=True)
    until(lambda: run.state == "paused" and run.step == 2, "the next to stand still")
    assert saved.path.name in run.reason
    run.resume(nonfinite="skip")
    run.wait(PATIENCE)
    assert run.state == "finished" and len(run.history) == 6
    first, last = weights(saved.path), weights(run.checkpoints[-1].path)
    assert all(np.array_equal(first[name], last[name]) for name in first)


def standing(start: Start, name: str) -> pm.Run:
    """Some steps of sixty are made, at a rate that does not change."""
    run = start(
        name=name, max_steps=60, learning_rate=2e-4, lr_scheduler_type="constant",
        gradient_accumulation_steps=16,
    )  # fmt: skip
    at_step(run, 3)
    run.pause(wait=True)
    return run


def let_go(run: pm.Run, *, stopped: bool) -> pm.Run:
    """To its end; by a resume of what was stopped, which sets again what a checkpoint may lack."""
    if stopped:
        run.stop(wait=True)
        end(run)
        run = pm.resume(run.name)
    else:
        run.resume(wait=True)
    return run.wait(PATIENCE)


def test_a_schedule_and_a_rate_set_together(start: Start) -> None:
    """The rate is the current one, the schedule's own are what they say; twice is as once."""
    cosine = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}}
    rates = {}
    for name in ("resumed", "stopped"):
        run = standing(start, name)
        run.set(learning_rate=1e-3, wait=True, **cosine)
        stands = run.step
        run = let_go(run, stopped=name == "stopped")
        rates[name] = [row["learning_rate"] for row in run.history[stands:]]
        assert rates[name][0] == pytest.approx(1e-3, rel=1e-9)
        wave = 0.5 * (1 + math.cos(math.pi * 59 / 60))
        peak = (1e-3 - 1e-5) / (0.5 * (1 + math.cos(math.pi * stands / 60))) + 1e-5
        assert rates[name][-1] == pytest.approx(1e-5 + (peak - 1e-5) * wave, rel=1e-6)


def test_a_schedule_and_then_a_rate(start: Start) -> None:
    """What is loaded and has both is not given them again, the one on top of the other."""
    rates = []
    for name in ("resumed", "stopped"):
        run = standing(start, name)
        run.set(
            lr_scheduler_type="polynomial", lr_scheduler_kwargs={"lr_end": 1e-4}, wait=True
        )  # fmt: skip
        run.set(learning_rate=1e-5, wait=True)
        stands = run.step
        run = let_go(run, stopped=name == "stopped")
        rates.append(run.history[stands]["learning_rate"])
    assert rates == pytest.approx([1e-5, 1e-5], rel=1e-9)


def test_an_end_below_the_rate_that_is_set_with_it(start: Start) -> None:
    run = start(name="poly", max_steps=FOREVER, learning_rate=2e-4, lr_scheduler_type="constant")
    at_step(run, 1)
    ends = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 5e-4}}
    run.set(learning_rate=1e-3, wait=True, **ends)
    at_step(run, run.step + 2)
    assert 5e-4 < run.history[-1]["learning_rate"] <= 1e-3
    run.stop(wait=True)
