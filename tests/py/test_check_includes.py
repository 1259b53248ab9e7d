"""tools/check-includes must see each kind of wrong include, and only wrong ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "check-includes"


def run(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), str(root)], capture_output=True, text=True, check=False
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree of the real shape with no offence in it."""
    for name, text in {
        "engine/include/pml/base/error.h": "#include <stddef.h>\n",
        "engine/include/pml/json/message.h": '#include "pml/base/error.h"\n',
        "engine/include/pml/net/socket.h": '#include "pml/json/message.h"\n',
        "engine/include/pml/plan/plan.h": '#include "pml_op/ops.h"\n',
        "engine/include/pml/train/stepper.h": '#include "pml/plan/plan.h"\n',
        "engine/include/pml/dist/comm.h": '#include "pml/base/error.h"\n',
        "engine/src/base/hash.c": "#include <sodium.h>\n",
        "engine/src/json/message.c": '#include <jansson.h>\n#include "private.h"\n',
        "engine/src/json/private.h": "",
        "engine/src/net/socket.c": "#include <zmq.h>\n#include <sodium.h>\n",
        "engine/cmd/worker/main.c": '#include "pml/net/socket.h"\n#include "pml/dist/comm.h"\n',
        "kernels/include/pml_op/ops.h": '#include "pml/base/error.h"\n',
        "kernels/cpu/gemm.c": "#include <cblas.h>\n",
        "kernels/cpu/cpu.h": "",
        "kernels/cpu/ref/norm.c": '#include "cpu.h"\n',
        "kernels/cuda/backend.c": "#include <cuda.h>\n",
        "ext/src/module.c": '#include <Python.h>\n#include "pml/net/socket.h"\n',
        "ext/pantheraml/api.py": "def show():\n    import pantheraml_widgets\n",
    }.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


def test_repository_is_clean() -> None:
    done = run(ROOT)
    assert (done.returncode, done.stdout) == (0, "")


def test_tree_without_offence(tree: Path) -> None:
    done = run(tree)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("path", "include", "says"),
    [
        # upwards, sideways
        ("engine/src/base/arena.c", '"pml/json/message.h"', "base includes pml/json/message.h"),
        ("engine/src/base/arena.c", '"pml_op/ops.h"', "base includes pml_op/ops.h of kernels"),
        ("engine/include/pml/plan/program.h", '"pml/train/stepper.h"', "of train"),
        ("engine/src/plan/program.c", '"pml/dist/comm.h"', "of dist"),
        ("engine/src/train/step.c", '"pml/net/socket.h"', "of net"),
        ("kernels/cpu/ref/rope.c", '"pml/plan/plan.h"', "of plan"),
        ("kernels/cpu/ref/rope.c", "<pml/plan/plan.h>", "of plan"),
        ("ext/src/run.c", '"pml/dist/comm.h"', "of dist"),
        # guarded headers
        ("engine/src/model/spec.c", "<jansson.h>", "engine/src/json/"),
        ("engine/include/pml/json/table.h", "<jansson.h>", "engine/src/json/"),
        ("engine/cmd/worker/loop.c", "<zmq.h>", "engine/src/net/"),
        ("engine/src/base/philox.c", "<sodium.h>", "hash"),
        ("engine/src/base/philox.c", "<sodium/crypto_generichash.h>", "hash"),
        ("engine/src/train/sync.c", "<nccl.h>", "engine/src/dist/"),
        ("engine/src/train/tpu.c", '"pjrt_c_api.h"', "engine/src/pjrt/"),
        ("engine/src/data/rows.c", "<Python.h>", "ext/src/"),
        ("engine/src/train/adamw.c", "<cblas.h>", "kernels/cpu/"),
        ("kernels/cuda/gemm.c", "<openblas/cblas.h>", "kernels/cpu/"),
        ("kernels/cpu/gemm2.c", "<cuda.h>", "kernels/cuda/"),
        ("engine/src/dist/ring.c", "<cuda_bf16.h>", "kernels/cuda/"),
        # things that are not what they seem
        ("engine/src/train/step.c", '"pml/train/gone.h"', "there is no"),
        ("engine/src/train/step.c", '"../net/private.h"', "neither in this folder"),
        ("engine/src/train/step.c", "HEADER", "through a macro"),
        ("engine/src/newroom/x.c", "<stdio.h>", "no layer owns this folder"),
    ],
)
def test_offence_is_seen(tree: Path, path: str, include: str, says: str) -> None:
    file = tree / path
    file.parent.mkdir(parents=True, exist_ok=True)
    before = "" if "newroom" in path else "/* one\n   two */\n"
    file.write_text(f"{before}#  include {include}\n")
    done = run(tree)
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{path}:{1 + before.count(chr(10))}: ")
    assert says in line


def test_include_split_over_lines_is_seen(tree: Path) -> None:
    (tree / "engine/src/json/split.c").write_text("#include \\\n  <zmq.h>\n")
    assert run(tree).stdout.startswith("engine/src/json/split.c:1: zmq.h")


@pytest.mark.parametrize(
    "text",
    [
        "/* #include <zmq.h> */\n",
        "/*\n#include <zmq.h>\n*/\n",
        "// #include <zmq.h>\n",
        'const char *s = "/*";\n#include <stdio.h>\nconst char *t = "*/";\n',
    ],
)
def test_comments_and_strings_are_not_includes(tree: Path, text: str) -> None:
    (tree / "engine/src/json/comment.c").write_text(text)
    assert run(tree).returncode == 0


def test_comment_opener_inside_a_string_hides_nothing(tree: Path) -> None:
    (tree / "engine/src/json/trick.c").write_text('const char *s = "/*";\n#include <zmq.h>\n//*/\n')
    assert run(tree).returncode == 1


def test_widgets_are_not_imported_while_the_package_loads(tree: Path) -> None:
    (tree / "ext/pantheraml/api.py").write_text("import pantheraml_widgets\n")
    assert "ext/pantheraml/api.py:1: " in run(tree).stdout
