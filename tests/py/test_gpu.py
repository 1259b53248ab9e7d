"""What a person sees of a GPU: readings of a driver that answers as this test says (tests/shim).

The worker is the real one over a job without a model (tests/fault/fake_worker.c), so no GPU is
needed: coordinator, log, heartbeats and this side are those of every run.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pantheraml as pm
import pytest
from conftest import FOREVER, at_step, until
from pantheraml import devices, doctor, programs
from pantheraml.live import gpu_lines

BUILD = Path(__file__).parents[2] / "build" / "release"
DRIVER = (
    "utilisation 97\ntotal 150e9\nreserved 1e9\nused 60e9\nprocesses 1\nprocess 0 50e9\n"
    "process 1 7e9\ntemperature 64\nmilliwatts 690500\nlimit 700000\nclock 1755\n"
    "clock_most 1980\nmemory_clock 3201\nthrottle 4\n"
)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of what a driver answers, for runs with a worker on such a GPU."""
    folder = tmp_path / "bin"
    folder.mkdir()
    shutil.copy(programs.coordinator(), folder)  # it looks for the worker beside itself
    (folder / "pml-worker").symlink_to(BUILD / "tests" / "fault" / "fake_worker")
    answers = tmp_path / "driver"
    answers.write_text(DRIVER)
    monkeypatch.setenv("PML_BIN", str(folder))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(BUILD / "nvml"))
    for name, value in {
        "FAKE_NVML": str(answers), "FAKE_GPU": "NVIDIA H200", "FAKE_FLOPS": "1e12",
        "FAKE_STEP_MS": "20",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return answers


def test_readings_reach_a_client_live_and_by_the_log(
    start: Callable[..., pm.Run], driver: Path
) -> None:
    run = start(max_steps=FOREVER, gradient_accumulation_steps=1)
    until(lambda: run.gpus and {"age", "mfu"} <= set(run.gpus[0]), "a reading")
    gpu = run.gpus[0]
    assert gpu["name"] == "NVIDIA H200" and gpu["rank"] == 0
    assert (gpu["utilisation"], gpu["temperature"], gpu["power"]) == (0.97, 64, 690.5)
    assert (gpu["throttle"], gpu["peak_flops"]) == ("power cap", 989.5e12)
    assert run.memory()[0] | {
        "memory_total": 150_000_000_000, "memory_used": 60_000_000_000,
        "memory_ours": 50_000_000_000, "memory_others": 7_000_000_000,
    } == run.memory()[0]  # fmt: skip
    assert "memory_clock" not in run.memory()[0]
    until(lambda: any("gpus" in row for row in run.history), "a reading in the log")
    logged = next(row for row in run.history if "gpus" in row)
    assert logged["gpus"][0]["power"] == 690.5
    assert 0 < logged["mfu"] <= 1e12 / 0.02 / 989.5e12
    (line,) = gpu_lines([gpu])
    assert line.startswith("GPU 0: 97% busy, MFU ")
    assert "64 °C, 690 of 700 W, 1,755 MHz, slowed down by power cap" in line
    assert "other processes have 6.5 GiB" in line and "not said" not in line

    driver.write_text("temperature 90\n")  # and what it no longer says is not there any more
    until(lambda: run.gpus[0].get("temperature") == 90, "another reading")
    assert "power" not in run.gpus[0] and "memory_ours" not in run.memory()[0]
    assert "power: this GPU does not support it" in run.gpus[0]["missing"]
    (line,) = gpu_lines(run.gpus)
    assert "90 °C" in line and "not said: utilisation, memory total" in line

    again = pm.attach(run.name)
    until(lambda: again.gpus, "a reading for who comes later")
    assert [row for row in again.history if "gpus" in row]


def test_without_nvml_the_run_says_so_and_trains(
    start: Callable[..., pm.Run], driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/nowhere")
    run = start(max_steps=FOREVER, gradient_accumulation_steps=1)
    until(lambda: run.gpus, "a reading")
    assert "libnvidia-ml.so.1" in run.gpus[0]["trouble"]
    assert {"utilisation", "temperature", "age"}.isdisjoint(run.gpus[0])
    until(lambda: run.step > 20, "steps")
    warned = [e["message"] for e in run.events() if e["type"] == "log" and e["level"] == "warning"]
    assert any("libnvidia-ml.so.1" in message for message in warned)
    assert "libnvidia-ml.so.1" in gpu_lines(run.gpus)[0]


@pytest.mark.parametrize("found_out_in", [0, 5])
def test_what_a_gpu_lacks_is_told_with_what_to_install(
    start: Callable[..., pm.Run],
    driver: Path,
    monkeypatch: pytest.MonkeyPatch,
    found_out_in: int,
) -> None:
    monkeypatch.setenv("FAKE_LACKS", "our own kernels do attention: pip install it")
    monkeypatch.setenv("FAKE_LACKS_STEP", str(found_out_in))
    run = start(max_steps=FOREVER, gradient_accumulation_steps=1)

    def told() -> list[int]:
        events = run.events()
        return [i for i, e in enumerate(events) if e.get("message", "").endswith("install it")]

    until(told, "it")
    before = [e["step"] for e in run.events()[: told()[0]] if e["type"] == "step"]
    assert max(before, default=0) >= found_out_in
    at_step(run, run.step + 20)
    assert len(told()) == 1  # once


GIB = 1 << 30


def reservations(
    gpus: list[list[tuple[str, int]]], pending: int = 0
) -> Callable[[int], dict[str, Any]]:
    """What `_native.gpu_reserved` says of GPUs of 141 GiB with these runs."""

    def said(index: int) -> dict[str, Any]:
        if index >= len(gpus):
            raise pm.NotFoundError(f"no GPU cuda:{index}")
        holders = [{"run": run, "pid": 1, "bytes": bytes_} for run, bytes_ in gpus[index]]
        return {
            "uuid": str(index), "bus": str(index), "memory_total": 141 * GIB, "pending": pending,
            "reserved": sum(one["bytes"] for one in holders), "holders": holders,
        }  # fmt: skip

    return said


def test_a_run_gets_the_gpu_with_most_left(monkeypatch: pytest.MonkeyPatch) -> None:
    used = {"0": 20.0 * GIB, "1": 10.0 * GIB, "2": 0.0}

    def gauges(bus: str, uuid: str) -> dict[str, float | str]:
        if bus == "2":
            raise pm.NotFoundError("no NVML: it is not there")
        return {"memory_used": used[bus]}

    native = devices._native
    monkeypatch.setattr(native, "gpus", lambda: 3)
    monkeypatch.setattr(native, "gpu_dtypes", lambda index: ["bfloat16"])
    monkeypatch.setattr(native, "gauges", gauges)
    taken = [[("/runs/a", 5 * GIB)], [("/runs/b", 5 * GIB)], [("/runs/c", 60 * GIB)]]
    monkeypatch.setattr(native, "gpu_reserved", reservations(taken))
    assert [devices.room(index).left // GIB for index in range(3)] == [121, 131, 81]
    assert devices.room(2).reserved == "c 60.0 GiB"
    assert devices.room(2).unknown == "no NVML: it is not there" and devices.room(1).unknown == ""
    assert devices.device_list("auto") == ["cuda:1"]
    monkeypatch.setattr(native, "gpu_reserved", reservations(taken, pending=5 * GIB))
    assert devices.room(1).left == 126 * GIB
    taken[1] += [("/runs/d", 130 * GIB)]  # what it says is free is promised
    assert devices.device_list("auto") == ["cuda:0"]
    assert devices.device_list("cuda") == ["cuda:0"] and devices.device_list(2)[1] == "cuda:1"

    def old(index: int) -> list[str]:
        if index == 0:
            raise pm.InvalidError("compute capability 5.0: runs need 7.0")
        return ["bfloat16"]

    monkeypatch.setattr(native, "gpu_dtypes", old)
    assert devices._roomiest(3) == 2


def test_a_plan_tells_what_is_left(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices._native, "gauges", lambda bus, uuid: {"memory_used": 1.0 * GIB})
    monkeypatch.setattr(devices._native, "gpu_reserved", reservations([[("/runs/a", 100 * GIB)]]))
    monkeypatch.setattr(devices._native, "plan", lambda *given: api_plan())
    plan = pm.plan(model, devices="cuda", max_length=64)
    assert (plan.left, plan.reserved) == (41 * GIB, "a 100.0 GiB")
    assert "the GPU has 41.0 GiB left; reserved by runs: a 100.0 GiB" in str(plan)
    elsewhere = pm.plan(model, devices="cuda:1", max_length=64)
    assert elsewhere.left == 0 and "left" not in str(elsewhere)
    assert pm.plan(model, devices="cpu", max_length=64).left == 0
    monkeypatch.setattr(devices._native, "gauges", lambda bus, uuid: {"memory_used": "divided"})
    plan = pm.plan(model, devices="cuda", max_length=64)
    assert str(plan).endswith(
        "the GPU has at most 41.0 GiB left; reserved by runs: a 100.0 GiB; "
        "what others have is not known: divided"
    )
    monkeypatch.setattr(devices._native, "gpu_reserved", reservations([[("/runs/a", 141 * GIB)]]))
    full = pm.plan(model, devices="cuda", max_length=64)
    assert full.left == 0 and "reserved by runs: a 141.0 GiB" in str(full)

    def strangers(index: int) -> dict[str, Any]:
        raise pm.DeniedError("it is a link; remove it")

    monkeypatch.setattr(devices._native, "gpu_reserved", strangers)
    with pytest.warns(UserWarning, match=r"reserved of cuda:0 cannot be read: it is a link"):
        assert pm.plan(model, devices="cuda", max_length=64).total == 1


def api_plan() -> dict[str, Any]:
    """Answer as the engine does; a plan for a GPU needs the CUDA backend's object."""
    return {
        "by_cause": {"weights": 1}, "total": 1, "recompute_layers": 0, "head_chunk": 1,
        "parameters": 1, "trainable": 1,
    }  # fmt: skip


def test_the_doctor_looks_at_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def info(device: str) -> dict[str, Any]:
        return {
            "name": "NVIDIA H200", "memory_free": 140 * 2**30, "memory_total": 141 * 2**30,
            "libraries": "cuBLASLt 13.1.0", "instructions": "sm_90a", "bus": device, "uuid": device,
            "lacks": "pip install nvidia-cudnn-cu13" if device == "cuda:1" else "",
            "capability": 90,
        }  # fmt: skip

    def gauges(bus: str, uuid: str) -> dict[str, float | str]:
        if bus == "cuda:1":
            raise pm.NotFoundError("no NVML: it is not there")
        return {
            "temperature": 40.0, "power": "this GPU does not support it", "clock": 345.0,
            "memory_used": 1.0 * GIB,
        }  # fmt: skip

    monkeypatch.setattr(doctor._native, "gpus", lambda: 1)
    monkeypatch.setattr(doctor._native, "device_info", info)
    monkeypatch.setattr(doctor._native, "gauges", gauges)
    monkeypatch.setattr(
        doctor._native, "gpu_dtypes", lambda index: ["float16"] if index else ["bfloat16", "float8"]
    )
    monkeypatch.setattr(
        devices._native, "gpu_reserved", reservations([[("/runs/a", 100 * GIB)]] * 2)
    )
    monkeypatch.setattr(doctor, "_attention_lacks", lambda index: "")
    one = doctor._gpu()
    assert one.verdict == "ok" and one.do == ""
    assert ", cuDNN compiles its attention, dtype" in one.found
    assert (
        "cuda:0 NVIDIA H200, 140.0 GiB of 141.0 GiB free (41.0 GiB for a run; reserved: a "
        "100.0 GiB), cuBLASLt 13.1.0"
    ) in one.found
    monkeypatch.setattr(devices._native, "gpu_reserved", reservations([[], []]))
    assert "140.0 GiB of 141.0 GiB free, cuBLASLt 13.1.0" in doctor._gpu().found
    one = doctor._gpu()
    assert one.found.endswith("40 °C, 345 MHz; NVML does not say: power")
    assert 'dtype="auto" is bfloat16;' in one.found
    monkeypatch.setattr(doctor._native, "gpus", lambda: 2)
    two = doctor._gpu()
    assert (two.verdict, two.do) == ("note", "pip install nvidia-cudnn-cu13")
    assert "no NVML" in two.found
    assert 'dtype="auto" is float16 (it has no bfloat16' in two.found
    assert two.found.count('no quant="fp8"') == 1 and "fp8" not in one.found

    def old_beside_new(index: int) -> list[str]:
        if index == 1:
            raise pm.InvalidError("compute capability 5.0: runs need 7.0")
        return ["bfloat16", "float8"]

    monkeypatch.setattr(doctor._native, "gpu_dtypes", old_beside_new)
    both = doctor._gpu()
    assert (both.verdict, both.do) == ("note", "compute capability 5.0: runs need 7.0")
    assert "cuda:0 NVIDIA H200" in both.found and both.found.endswith("cuda:1 cannot be used")


@pytest.mark.parametrize(
    ("does", "words"),
    [
        ("kill -SEGV $$", r"^compiling cuDNN's attention for cuda:3 ended with signal 11; "),
        ("echo no >&2; exit 1", r"ended with status 1 \(no\); install .*'pantheraml\[cuda13\]'"),
        ("echo it lacks this", r"^it lacks this$"),
        ("echo", r"^$"),
        ("exec sleep 1000", r"^compiling cuDNN's attention for cuda:3 did not end within "),
    ],
)
def test_libraries_that_do_not_work_do_not_end_the_doctor(
    does: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{does}\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    if does.startswith("exec sleep"):
        monkeypatch.setattr(doctor, "_COMPILING", 0.1)
    assert re.search(words, doctor._attention_lacks(3))


def test_a_run_on_the_cpu_has_no_gpus(start: Callable[..., pm.Run]) -> None:
    run = start()
    run.wait(240)
    assert run.gpus == [] and gpu_lines(run.gpus) == []
    assert {"mfu", "gpus"}.isdisjoint(run.history[-1])


def test_words_for_what_is_stale() -> None:
    some: list[dict[str, Any]] = [
        {"rank": 1, "age": 60.0, "temperature": 40.0, "throttle": ""},
        {"rank": 2, "mfu": 0.4},
    ]
    assert gpu_lines(some) == [
        "GPU 1: 40 °C, as of 60 s ago",
        "GPU 2: MFU 40%, its driver has not answered yet",
    ]
