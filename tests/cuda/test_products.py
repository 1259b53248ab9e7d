"""How products choose their algorithm, on a driver and a cuBLASLt that are played (products.c)."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASE = ("error", "file", "folder", "hold", "log", "path", "clock", "view")


def test_products_of_fewer_rows_are_not_timed(tmp_path: Path) -> None:
    program = tmp_path / "products"
    sources = ["tests/cuda/products.c", "kernels/cuda/choices.c",
               *(f"engine/src/base/{name}.c" for name in BASE)]  # fmt: skip
    subprocess.run(
        ["cc", "-std=gnu11", "-O1", "-g", "-D_GNU_SOURCE", "-fsanitize=address,undefined",
         "-DPML_CUDA_ROW_SCALES=1", "-pthread", "-Ikernels/cuda", "-Iengine/include",
         "-Ikernels/include", "-Ibuild/cuda/toolkit/include", *sources, "-o", program],
        cwd=ROOT, check=True,
    )  # fmt: skip
    done = subprocess.run(
        [program, tmp_path / "cuda"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "all as they should be\n"
