"""The whole path against transformers and PEFT (tests/parity/fixtures): as a user would call it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pantheraml as pm
import pytest
from conftest import PATIENCE
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from try_parity import write_rows

FIXTURES = Path(__file__).parent.parent / "parity" / "fixtures"
CASES = sorted(path.name for path in FIXTURES.iterdir() if (path / "case.json").is_file())


@pytest.mark.parametrize("name", CASES)
def test_curve_and_greedy_tokens(name: str, runs: Path, tmp_path: Path) -> None:
    folder = FIXTURES / name
    case: dict[str, Any] = json.loads((folder / "case.json").read_text())
    expected = load_file(folder / "expected.safetensors")
    data = write_rows(folder, tmp_path / "rows.jsonl")
    lora = {k: case.pop(k) for k in list(case) if k.startswith("lora_")}
    if lora:
        case["lora"] = pm.LoRA(init=folder / "adapter")
    run = pm.finetune(
        folder / "model", data=data, eval_data=data, shuffle=False, packing=False,
        dtype="float32", devices="cpu", deterministic=True, **case,
    )  # fmt: skip
    if lora:
        assert sorted(run.config["lora_targets"]) == sorted(lora["lora_targets"])
        assert bool(run.config["lora_groups"]) == bool(lora.get("lora_mixed", False))
    prompt = expected["prompt"].tolist()
    run.wait(PATIENCE)
    loss = np.array([row["loss"] for row in run.history])
    norm = np.array([row["grad_norm"] for row in run.history])
    assert loss[0] == pytest.approx(expected["loss"][0], rel=1e-5)
    assert np.allclose(loss, expected["loss"], rtol=1e-4, atol=0, equal_nan=True)
    assert np.allclose(norm, expected["grad_norm"], rtol=1e-4, atol=0)
    windows = json.loads((folder / "model" / "config.json").read_text()).get("sliding_window")
    if windows == 1:  # of which transformers' cache makes no window
        with pytest.raises(pm.Error, match="sliding_window is 1"):
            run.sample(input_ids=prompt)
        return
    after = run.sample(input_ids=prompt, max_new_tokens=20).token_ids
    assert after == expected["greedy_after"].tolist()
    keep = os.environ.get("PML_KEEP_EXPORTS")  # for tools/fixtures/check_peft.py
    if keep and lora and "quant" not in case:
        exported = Path(keep) / name
        shutil.copytree(folder / "model", exported / "model", dirs_exist_ok=True)
        run.export(exported / "export")
        cut = case["max_length"]
        rows = [json.loads(line) for line in data.read_text().splitlines()]
        rows = [{k: v[:cut] for k, v in row.items()} for row in rows]
        result = {"rows": rows, "prompt": prompt, "greedy": after, "loss": run.evaluate().loss}
        (exported / "result.json").write_text(json.dumps(result))
    # At a rate of zero the weights stay what they were.
    still = pm.finetune(
        folder / "model", data=data, eval_data=data, packing=False, lora=case.get("lora"),
        method=case["method"], quant=case.get("quant"), max_steps=1, learning_rate=0.0,
        max_length=case["max_length"],
        per_device_train_batch_size=case["per_device_train_batch_size"],
    ).wait(PATIENCE)  # fmt: skip
    before = still.sample(input_ids=prompt, max_new_tokens=20).token_ids
    assert before == expected["greedy_before"].tolist()
    assert still.evaluate().loss == pytest.approx(expected["evaluation_loss"][0], rel=1e-5)


def test_there_are_cases() -> None:
    assert len(CASES) >= 4
