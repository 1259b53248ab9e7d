"""Staged uploads against a driver that does nothing before it is waited for (staging.c)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_uploads_through_pinned_pieces(tmp_path: Path, sanitizer: str) -> None:
    program = tmp_path / "staging"
    sources = ["tests/cuda/staging.c", "kernels/cuda/staging.c", "engine/src/base/error.c",
               "engine/src/base/file_at.c"]  # fmt: skip
    subprocess.run(
        ["cc", "-std=gnu11", "-O1", "-g", "-D_GNU_SOURCE", f"-fsanitize={sanitizer}", "-pthread",
         "-Ikernels/cuda", "-Iengine/include", "-Ikernels/include", "-Ibuild/cuda/toolkit/include",
         *sources, "-o", program],
        cwd=ROOT, check=True,
    )  # fmt: skip
    done = subprocess.run([program], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok  ") == 30
