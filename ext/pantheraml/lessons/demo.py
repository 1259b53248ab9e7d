"""The main job from beginning to end: ``python -m pantheraml.lessons.demo``.

Two stages on the source of Python's standard library. Stage 1 trains a small Llama from random
weights; its client is killed half way, on purpose, and a second one picks the run up. Stage 2
teaches that model, with LoRA, to say what a function does. It ends with what both learned.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.markup import escape
from rich.table import Table

import pantheraml as pm
from pantheraml.lessons import stdlib
from pantheraml.live import watch
from pantheraml.terminal import Terminal

console = Terminal()

#: Steps of each stage; the pause, the new rate, the checkpoint and the kill happen on the way.
STAGE1_STEPS, STAGE2_STEPS = 240, 110
PAUSE_AT, CHECKPOINT_AT, KILL_AT = 40, 80, 100
ASKED = ("def sort(self, reverse=False)", "def close(self)", "def is_file(path)")


def _say(text: str) -> None:
    console.print(f"[bold cyan]▸[/] {text}")


def _until(run: pm.Run, step: int) -> Callable[[], bool]:
    return lambda: run.step >= step


def _free_name(base: str) -> str:
    taken = {info.name for info in pm.runs()}
    numbers = (f"{base}-{n}" for n in range(1, len(taken) + 2))
    return next(name for name in numbers if name not in taken)


def first_client(lesson: stdlib.Lesson, name: str, steps: int) -> None:
    """Start stage 1, steer it, then die as a crashed notebook kernel would: without a word."""
    run = pm.finetune(
        lesson.model, name=name, method="full",
        data=lesson.train_text, eval_data=lesson.eval_text,
        max_steps=steps, learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=10,
        per_device_train_batch_size=4, max_length=256, packing=True,
    )  # fmt: skip
    at_pause = _until(run, steps * PAUSE_AT // STAGE1_STEPS)
    watch(run, until=at_pause, console=console, whole=True)
    run.pause(wait=True)
    _say(f"paused at step {run.step}; the weights stay where they are")
    run.set(learning_rate=1.5e-3)
    run.resume(wait=True)
    _say("learning rate 1e-3 → 1.5e-3, and on")
    watch(run, until=_until(run, steps * CHECKPOINT_AT // STAGE1_STEPS), console=console)
    _say(f"checkpoint in {run.checkpoint('tried-1.5e-3', wait=True)}")
    watch(run, until=_until(run, steps * KILL_AT // STAGE1_STEPS), console=console)
    _say(f"kill -9 {os.getpid()}: this client dies at step {run.step}")
    os.kill(os.getpid(), signal.SIGKILL)


def _eval_losses(run: pm.Run) -> tuple[float, float]:
    """Held-out loss before the first step and after the last."""
    losses = [float(event["loss"]) for event in run.events() if event["type"] == "eval"]
    if len(losses) < 2:
        raise RuntimeError(f"run {run.name} has {len(losses)} evaluations, expected two or more")
    return losses[0], losses[-1]


def stage1(lesson: stdlib.Lesson, folder: Path, steps: int) -> pm.Run:
    """Train from scratch; the first client is a process of its own, and is killed."""
    console.rule("[bold]1 · from random weights to Python")
    _say(f"a Llama with {lesson.parameters / 1e6:.1f} M random weights reads the standard library")
    name = _free_name("stdlib-1-from-scratch")
    command = [sys.executable, "-m", "pantheraml.lessons.demo", "--first-client", name]
    done = subprocess.run([*command, "--folder", str(folder), "--steps", str(steps)], check=False)
    if done.returncode != -signal.SIGKILL:
        raise SystemExit(
            f"the first client should have been killed, it ended with {done.returncode}"
        )
    start = time.monotonic()
    run = pm.attach(name)
    seconds = time.monotonic() - start
    _say(f"client gone, run alive: attached in {seconds:.2f} s with all {len(run.history)} steps")
    watch(run, console=console)
    run.wait()
    return run


def _answers(run: pm.Run) -> list[str]:
    prompts = (stdlib.ask(signature) for signature in ASKED)
    samples = (run.sample(p, max_new_tokens=24, temperature=0.7, seed=7) for p in prompts)
    return [sample.text for sample in samples]


def stage2(lesson: stdlib.Lesson, model: Path, steps: int) -> tuple[pm.Run, list[str], list[str]]:
    """Teach the trained model to answer, with LoRA; returns the answers before and after."""
    console.rule("[bold]2 · from Python to answers, with LoRA")
    run = pm.finetune(
        model, name=_free_name("stdlib-2-answers"),
        method="lora", lora=pm.LoRA(r=16, lora_alpha=32),
        data=lesson.train_pairs, eval_data=lesson.eval_pairs,
        max_steps=steps, learning_rate=2e-3, lr_scheduler_type="linear", warmup_steps=5,
        per_device_train_batch_size=4, max_length=256, packing=True,
    )  # fmt: skip
    before = _answers(run)
    watch(run, console=console, whole=True)
    run.wait()
    after = _answers(run)
    return run, before, after


def _conclude(runs: list[pm.Run], before: list[str], after: list[str]) -> None:
    console.rule("[bold]what was learned")
    samples = Table("asked", "before", "after", show_lines=True)
    for question, old, new in zip(ASKED, before, after, strict=True):
        samples.add_row(escape(question), escape(old.strip()), escape(new.strip()))
    console.print(samples)
    losses = Table("stage", "held-out loss before", "after", "steps", "tokens/s", "run folder")
    for number, run in enumerate(runs, 1):
        first, last = _eval_losses(run)
        rates = sorted(float(record["tokens_per_second"]) for record in run.history)
        losses.add_row(
            str(number), f"{first:.3f}", f"{last:.3f}", str(run.step),
            f"{rates[len(rates) // 2]:,.0f}", escape(str(run.folder)),
        )  # fmt: skip
        if not last < first:
            raise SystemExit(
                f"stage {number}: held-out loss did not fall ({first:.4f} → {last:.4f})"
            )
    console.print(losses)
    for run in runs:
        report = run.folder / "report.html"
        report.write_text(run.to_html(), encoding="utf-8")
        _say(f"curves of {run.name}: {report}")


def main(arguments: list[str] | None = None) -> None:
    """Run both stages, or (for the demo itself) only the client that gets killed."""
    parser = argparse.ArgumentParser(prog="python -m pantheraml.lessons.demo", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("stdlib-lesson"))
    parser.add_argument("--steps", type=int, default=STAGE1_STEPS, help="steps of stage 1")
    parser.add_argument("--first-client", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    start = time.monotonic()
    lesson = stdlib.prepare(args.folder)
    if args.first_client:
        first_client(lesson, args.first_client, args.steps)
        return
    _say(f"sources, pairs, tokenizer and model in {lesson.model.parent}")
    first = stage1(lesson, args.folder, args.steps)
    model = first.checkpoints[-1].path
    second, before, after = stage2(lesson, model, args.steps * STAGE2_STEPS // STAGE1_STEPS)
    _conclude([first, second], before, after)
    first.close()
    second.close()
    console.print(f"[dim]{time.monotonic() - start:.0f} s in all[/]")


if __name__ == "__main__":
    main()
