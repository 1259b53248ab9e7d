"""`tests/gpu` where there is no GPU: skipped by name, with the reason, by a status of its own."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SKIPPED = 77


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """As much of a bundle as is looked at before anything runs."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        (tmp_path / "test_gpu_ops").symlink_to(ROOT / "build/release/test_gpu_ops")
        return tmp_path
    pytest.skip("there is an NVIDIA driver: make gpu-test")


def told(folder: Path, *command: str) -> tuple[int, list[str]]:
    """Status and lines of a program of tests/gpu."""
    env = os.environ | {"OUT": str(folder), "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        [ROOT / "tests/gpu" / command[0], folder, *command[1:]],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, (done.stdout + done.stderr).splitlines()


def test_all_of_it(bundle: Path) -> None:
    status, lines = told(bundle, "run")
    assert status == SKIPPED
    assert len(lines) == 1 and lines[0].startswith("gpu.ops skipped: "), lines


def test_a_part(bundle: Path) -> None:
    status, lines = told(bundle, "run", "ops")
    assert status == 0
    assert len(lines) == 1 and lines[0].startswith("ops: gpu.ops skipped: "), lines


@pytest.mark.parametrize("part", ["curve", "profile", "doctor", "resume"])
def test_a_part_of_the_package(bundle: Path, part: str) -> None:
    status, lines = told(bundle, "run", part)
    assert status == 0
    assert len(lines) == 1 and lines[0].startswith(f"{part}: gpu.{part} skipped: "), lines


def test_compute_sanitizer(bundle: Path) -> None:
    """Without the tool, and with it; each check by its name."""
    status, lines = told(bundle, "sanitize")
    assert status == SKIPPED and len(lines) == 12
    assert all(": skipped: " in line for line in lines), lines
    (bundle / "compute-sanitizer").write_text("#!/bin/sh\nexit 1\n")
    (bundle / "compute-sanitizer").chmod(0o755)
    status, lines = told(bundle, "sanitize", "--rest", "racecheck-plain", "initcheck-control")
    assert status == SKIPPED
    assert [line.split(":")[0] for line in lines] == ["racecheck-plain", "initcheck-control"]
    assert all(": skipped: " in line and "PATH" not in line for line in lines), lines
