"""The CUDA backend's object on a machine without a driver: it opens, plans, says what is missing.

``tools/cuda/build`` makes it; ``make test`` has a step of its own for both. What a GPU does with it
is ``make gpu-test``'s.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pantheraml as pm
import pytest
from pantheraml import _native, doctor
from pantheraml.devices import device_list, nvidia_there
from pantheraml.tiny import TinyLlama

OBJECT = Path(__file__).parents[2] / "build/cuda/object/pml_cuda.so"
#: One sentence of reason, one of what to do.
NO_DRIVER = re.compile(
    r"^no NVIDIA driver: .+\. On a machine with an NVIDIA GPU install its driver"
)


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs find this object; a machine with a driver has another test."""
    if not OBJECT.is_file():
        pytest.fail(f"{OBJECT} is not there: tools/cuda/build makes it")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("there is an NVIDIA driver: make gpu-test looks at it")
    monkeypatch.setenv("PML_CUDA_BACKEND", str(OBJECT))


def test_it_needs_nothing_of_cuda() -> None:
    """The object depends on the C library alone, and exports one function."""
    told = subprocess.run(["ldd", OBJECT], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"cu(da|blas|dnn)|nvrtc|nvidia", told), told
    names = subprocess.run(
        ["nm", "-D", "--defined-only", OBJECT], capture_output=True, text=True, check=True
    ).stdout
    assert re.findall(r" T (\w+)", names) == ["pml_cuda_backend"]


def test_no_driver_is_said_in_a_sentence() -> None:
    with pytest.raises(pm.NotFoundError, match=NO_DRIVER):
        _native.gpus()


def test_asked_for_it_is_refused_before_a_run_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PANTHERAML_RUNS", str(tmp_path / "runs"))
    model = TinyLlama().write(tmp_path / "model")
    with pytest.raises(pm.NotFoundError, match=NO_DRIVER):
        pm.finetune(model, [{"text": "a panther"}], max_steps=1, devices="cuda", name="none")
    assert not (tmp_path / "runs" / "none").exists()


@pytest.mark.parametrize("gpu", [False, True])
def test_auto_takes_the_cpu(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a word about it where there is a GPU, without one where there is none."""
    monkeypatch.setattr("pantheraml.devices.nvidia_there", lambda: gpu)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert device_list("auto") == ["cpu"]
    words = [str(warning.message) for warning in said]
    assert len(words) == gpu
    assert all(word.startswith("this run uses the CPU: no NVIDIA driver") for word in words)


@pytest.mark.parametrize(
    ("vendor", "kind", "there"),
    [("0x10de", "0x030200", True), ("0x10de", "0x040300", False), ("0x1002", "0x030000", False)],
)
def test_a_gpu_is_seen_without_its_driver(
    vendor: str, kind: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the PCI bus says: NVIDIA's sound devices and others' GPUs are none."""
    monkeypatch.setattr(os.path, "exists", lambda _: False)  # no /dev/nvidiactl
    device = tmp_path / "0000:01:00.0"
    device.mkdir()
    (device / "vendor").write_text(vendor + "\n")
    (device / "class").write_text(kind + "\n")
    assert nvidia_there(tmp_path) is there


def test_doctor_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "pantheraml", "doctor", "--no-run"],
        capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "400"},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    line = next(line for line in made.stdout.splitlines() if " GPU " in line)
    assert "runs use the CPU" in line and "no NVIDIA driver: libcuda.so.1" in made.stdout
    assert "install its driver" in made.stdout


def test_libraries_are_found_without_a_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the four by its path, or by what to install."""
    monkeypatch.setenv("PML_CUDA_LIBS", str(tmp_path))
    said = _native.gpu_libraries()
    assert [there for there, _ in said] == [False] * 4
    names = ("libcublasLt.so", "libcudnn.so", "libnvrtc.so", "libcudart.so")
    for (_, text), name in zip(said, names, strict=True):
        assert text.startswith(name) and str(tmp_path) in text
    assert "libraries for one" not in doctor._libraries()
    (tmp_path / "libnvrtc.so.12").symlink_to(
        next(OBJECT.parents[1].glob("toolkit/lib/libnvrtc.so*"))
    )
    assert [there for there, _ in _native.gpu_libraries()] == [False, False, True, False]
    words = doctor._libraries()
    assert words.startswith("; libraries for one: ") and "libcudnn.so" in words


def test_a_plan_for_a_gpu_needs_none(tmp_path: Path) -> None:
    """Memory is known before there is a GPU to take it from."""
    model = TinyLlama().write(tmp_path / "model")
    plan = pm.plan(model, devices="cuda", max_length=64, memory_limit="4GiB")
    assert plan.total > 0 and plan.by_cause["runtime"] > 0
