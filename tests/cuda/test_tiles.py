"""Who makes which tile of a product by our own kernel (tiles.cc), on a device that is played."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASE = ("error", "log", "path", "clock", "view")
INCLUDE = ["-Ikernels/cuda", "-Ikernels/cuda/device", "-Ikernels", "-Iengine/include",
           "-Ikernels/include", "-Ibuild/cuda/toolkit/include", "-Itests/cuda"]  # fmt: skip
CHECKED = ["-O1", "-g", "-D_GNU_SOURCE", "-fsanitize=address,undefined"]


def test_every_tile_is_made_once(tmp_path: Path) -> None:
    sources = ["tests/cuda/shares.c", *(f"engine/src/base/{name}.c" for name in BASE)]
    objects = []
    for source in sources:
        objects.append(tmp_path / f"{Path(source).stem}.o")
        subprocess.run(
            ["cc", "-std=gnu11", *CHECKED, *INCLUDE, "-c", source, "-o", objects[-1]],
            cwd=ROOT, check=True,
        )  # fmt: skip
    program = tmp_path / "tiles"
    subprocess.run(
        ["c++", "-std=c++17", *CHECKED, *INCLUDE, "tests/cuda/tiles.cc", *objects, "-pthread",
         "-o", program],
        cwd=ROOT, check=True,
    )  # fmt: skip
    done = subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "each tile once\n"
