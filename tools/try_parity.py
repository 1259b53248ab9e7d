"""Random cases against transformers and PEFT, through the package, as a stranger would try them.

    .venv/bin/python tools/try_parity.py --peer PYTHON --seeds 1-100 [--folder DIR]

PYTHON has torch, transformers and peft; it makes the cases (tools/fixtures/make_parity.py), those
that are in DIR already are taken as they are. Each is trained by `pm.finetune`; held against what
transformers has: loss and gradient norm of every step, the evaluation before and after, greedy
tokens, and every tensor of the exported adapter or model, whose names must be the same, too. Then
tests/parity/test_parity takes the same cases, for the gradients of the first step.

The measure is the distance from transformers' float32 result. Beyond the limit its float64 result
decides: tests/parity/parity.c has limits and reasons. Exit status 1 when a check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pantheraml as pm
from safetensors.numpy import load_file

ROOT = Path(__file__).parent.parent
MAKE = ROOT / "tools" / "fixtures" / "make_parity.py"
IN_C = ROOT / "build/release/tests/parity/test_parity"
LOSS, CURVE, TRAINED = 1e-5, 1e-4, 5e-3
AS_NEAR, LEAST_LEAD = 3.0, 1e-5
Array = np.ndarray[Any, np.dtype[Any]]


class Judge:
    """What is expected of one case, and what was found."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.expected: dict[str, Array] = load_file(folder / "expected.safetensors")
        self.checks, self.by_double, self.ties, self.failed = 0, 0, 0, 0
        self.horizon = self._horizon()
        self.worst = {"curve": 0.0, "evaluation": 0.0, "trained": 0.0}

    def _horizon(self) -> int:
        """Where training is not determined by float32 any more, see tests/parity/parity.c."""
        apart = np.zeros(len(self.expected["loss"]), dtype=bool)
        for name in ("loss", "grad_norm"):
            want, exact = self.expected[name], self.expected["float64." + name]
            apart |= np.abs(want - exact) > CURVE * np.abs(exact)
        return int(apart.argmax()) if apart.any() else len(apart)

    @property
    def determined(self) -> bool:
        """Whether what was trained can be compared."""
        return self.horizon == len(self.expected["loss"])

    def fail(self, text: str) -> None:
        """Say what is wrong."""
        self.failed += 1
        print(f"FAILED: {self.name}: {text}", flush=True)

    def near(self, what: str, kind: str, got: Array, name: str, limit: float, size: float) -> None:
        """One tensor or number; `size` is what the distance is measured by."""
        self.checks += 1
        want = self.expected[name].astype(np.float64)
        if got.shape != want.shape:
            self.fail(f"{what} has shape {got.shape}, expected {want.shape}")
            return
        if np.array_equal(got, want, equal_nan=True):
            return
        apart = float(np.abs(got - want).max())
        self.worst[kind] = max(self.worst[kind], apart / size)
        if apart <= limit * size:
            return
        exact = self.expected["float64." + name]
        ours, theirs = float(np.abs(got - exact).max()), float(np.abs(want - exact).max())
        self.by_double += 1
        if not ours <= AS_NEAR * max(theirs, limit * size):
            self.fail(
                f"{what} is {apart / size:.1e} from float32; {ours / size:.1e} from float64, "
                f"which transformers' float32 misses by {theirs / size:.1e}"
            )

    def curve(self, what: str, got: list[float]) -> None:
        """One number a step, each by its own size."""
        want = self.expected[what]
        if len(got) != len(want):
            self.fail(f"{what} has {len(got)} steps, expected {len(want)}")
            return
        for step, (a, b) in enumerate(zip(got, want, strict=True)):
            if step >= self.horizon:
                break
            name = f"{what} of step {step + 1}"
            self.expected[name] = np.array(b)
            self.expected["float64." + name] = self.expected["float64." + what][step]
            limit = LOSS if step == 0 and what == "loss" else CURVE
            self.near(name, "curve", np.array(a), name, limit, abs(float(b)))

    def evaluation(self, what: str, got: float) -> None:
        """A mean loss."""
        want = float(self.expected[what][0])
        limit = LOSS if what == "evaluation_loss" else CURVE
        self.near(what, "evaluation", np.array([got]), what, limit, want)

    def greedy(self, when: str, got: list[int]) -> None:
        """Tokens; those that come after a tie may be others."""
        self.checks += 1
        want = self.expected[f"greedy_{when}"].tolist()
        pairs = zip(got, want, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(got), len(want)))
        if got == want:
            return
        exact = self.expected[f"float64.greedy_{when}"].tolist()
        other = same >= len(exact) or (same < len(want) and exact[same] != want[same])
        if same < len(want) and (other or self.expected[f"lead_{when}"][same] < LEAST_LEAD):
            self.ties += 1
            return
        self.fail(f"greedy tokens {when} training: {got}, expected {want}")

    def trained(self, got: dict[str, Array]) -> None:
        """Every tensor that was trained, and no other name."""
        want = {name.removeprefix("final.") for name in self.expected if name.startswith("final.")}
        for name in sorted(set(got) ^ want):
            self.fail(f"{name} is in only one of the two exports")
        for name in sorted(set(got) & want):
            size = float(np.abs(self.expected["final." + name]).max())
            self.near(name, "trained", got[name], "final." + name, TRAINED, size)


def write_rows(folder: Path, path: Path) -> Path:
    """The case's rows as pre-tokenised JSON lines: its model has no tokenizer."""
    shard = load_file(folder / "rows.safetensors")
    bounds = shard["offsets"].tolist()
    with path.open("w") as file:
        for begin, stop in zip(bounds, bounds[1:], strict=False):
            row = {name: shard[name][begin:stop].tolist() for name in ("input_ids", "labels")}
            file.write(json.dumps(row) + "\n")
    return path


def sample(run: pm.Run, judge: Judge, when: str, refused: bool) -> None:
    """Greedy tokens, or the refusal that a window of one token gets."""
    prompt = judge.expected["prompt"].tolist()
    try:
        judge.greedy(when, run.sample(input_ids=prompt, max_new_tokens=20).token_ids)
        if refused:
            judge.fail("sampling with a window of one token was not refused")
    except pm.Error as error:
        if not refused or "sliding_window is 1" not in str(error):
            judge.fail(f"sampling: {error}")


def has_window_of_one(model: Path) -> bool:
    """Whether some layer of the model sees one token only."""
    config = json.loads((model / "config.json").read_text())
    if config.get("sliding_window") != 1 or config["model_type"] == "llama":
        return False
    kinds = config.get("layer_types")
    return config["model_type"] == "mistral" or (kinds and "sliding_attention" in kinds)


def exported(run: pm.Run, folder: Path, lora: bool) -> dict[str, Array]:
    """What the exported files hold, tensor by tensor."""
    if lora:
        return load_file(run.export(folder, format="peft") / "adapter_model.safetensors")
    run.export(folder, format="merged", dtype="float32", max_shard_size="50KB")
    tensors: dict[str, Array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def try_case(folder: Path, scratch: Path) -> Judge:
    """Train one case twice: as it says, and at a rate of zero."""
    judge = Judge(folder)
    case: dict[str, Any] = json.loads((folder / "case.json").read_text())
    data = write_rows(folder, scratch / f"{folder.name}.jsonl")
    lora = {key: case.pop(key) for key in list(case) if key.startswith("lora_")}
    settings: dict[str, Any] = {"packing": False, **case}
    if lora:
        settings["lora"] = pm.LoRA(init=folder / "adapter")
    settings |= {"eval_data": data, "shuffle": False, "dtype": "float32", "devices": "cpu",
                 "deterministic": True}  # fmt: skip
    refused = has_window_of_one(folder / "model")
    with closing(pm.finetune(folder / "model", data=data, **settings)) as run:
        run.wait(300)
        judge.curve("loss", [row["loss"] for row in run.history])
        judge.curve("grad_norm", [row["grad_norm"] for row in run.history])
        after = run.evaluate().loss
        tensors = exported(run, scratch / f"{folder.name}-export", bool(lora))
        if judge.determined:
            judge.evaluation("evaluation_after", after)
            sample(run, judge, "after", refused)
            judge.trained(tensors)
    still = {**settings, "max_steps": 1, "learning_rate": 0.0, "lr_scheduler_type": "constant"}
    still.pop("lr_scheduler_kwargs", None)
    with closing(pm.finetune(folder / "model", data=data, **still)) as run:
        run.wait(300)
        judge.evaluation("evaluation_loss", run.evaluate().loss)
        sample(run, judge, "before", refused)
    worst = ", ".join(f"{name} {value:.1e}" for name, value in judge.worst.items())
    if not judge.determined:
        worst += f"; not determined by float32 from step {judge.horizon + 1} on"
    print(f"{folder.name:14} {judge.checks:4} checks; worst {worst}", flush=True)
    return judge


def main() -> int:
    """Make the cases that are not there, and try all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--peer", required=True, metavar="PYTHON")
    parser.add_argument("--seeds", required=True, metavar="FIRST-LAST")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    first, _, last = args.seeds.partition("-")
    names = [f"random-{seed}" for seed in range(int(first), int(last or first) + 1)]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["PANTHERAML_RUNS"] = str(Path(scratch) / "runs")
        folder = args.folder or Path(scratch) / "cases"
        missing = [n for n in names if not (folder / n / "expected.safetensors").is_file()]
        if missing:
            subprocess.run(
                [args.peer, "-W", "ignore", str(MAKE), str(folder), *missing], check=True
            )
        judges = [try_case(folder / name, Path(scratch)) for name in names]
        in_c = subprocess.run([str(IN_C), str(folder), *names], check=False)
    total = {
        what: sum(getattr(judge, what) for judge in judges)
        for what in ("checks", "by_double", "ties", "failed")
    }
    print(f"{len(judges)} cases through the package: {total}; in C: exit status {in_c.returncode}")
    return 1 if total["failed"] or in_c.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
