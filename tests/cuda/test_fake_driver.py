"""What a user reads where a driver or a library is there and is not enough.

``fake_driver.c`` plays the driver, a library of stubs cuBLASLt; runs by ``devices="auto"``, the
doctor and a run that asks for the GPU each say what is missing and what to do.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OBJECT = ROOT / "build/cuda/object/pml_cuda.so"
INCLUDES = ["-Ikernels/cuda", "-Iengine/include", "-Ibuild/cuda/toolkit/include"]

#: What a child says: of "auto" (devices, warnings), of the doctor's line, of the GPU itself.
CHILD = """
import json, warnings
from pantheraml import Error, _native, devices as names, doctor
names.nvidia_there = lambda: True
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    devices = names.device_list("auto")
finding = doctor._gpu()
try:
    _native.device_info("cuda")
    why = ""
except Error as error:
    why = f"{type(error).__name__} {error}"
print(json.dumps([devices, [str(w.message) for w in said], finding.verdict, finding.found,
                  finding.do, why]))
"""


def names(header: str, table: str) -> list[str]:
    """Functions of a table of the backend's, as the libraries name them."""
    macros = "#define TEXT(f) #f\n#define NAME(f) NAMES TEXT(f)"
    text = f'#include "{header}"\n{macros}\n{table}(NAME)\n'
    made = subprocess.run(
        ["cc", "-E", *INCLUDES, "-xc", "-"], input=text, cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return re.findall(r'NAMES "(\w+)"', made.stdout)


def library(path: Path, stubs: list[str], *more: Path) -> None:
    """A shared object of its file's name: functions that answer 0, and the objects beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"int {name}(void);\nint {name}(void) {{ return 0; }}\n" for name in stubs)
    subprocess.run(
        ["cc", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", *more, "-xc", "-", "-o", path],
        input=text, text=True, check=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """driver/libcuda.so.1, old/libcuda.so.1 without a function, and a folder for each library."""
    if not OBJECT.is_file():
        pytest.fail(f"{OBJECT} is not there: tools/cuda/build makes it")
    folder = tmp_path_factory.mktemp("fakes")
    played = folder / "fake_driver.o"
    subprocess.run(
        ["cc", "-c", "-fPIC", *INCLUDES, "tests/cuda/fake_driver.c", "-o", played], cwd=ROOT,
        check=True,
    )  # fmt: skip
    told = subprocess.run(["nm", "--defined-only", played], capture_output=True, text=True)
    rest = [name for name in names("driver.h", "PMLI_DRIVER") if name not in told.stdout.split()]
    library(folder / "driver/libcuda.so.1", rest, played)
    library(folder / "old/libcuda.so.1", [n for n in rest if n != "cuLibraryLoadData"], played)
    library(folder / "blas/libcublasLt.so.13", names("cublas.h", "PMLI_CUBLAS"))
    library(folder / "dnn/libcudnn.so.9", ["cudnnCreate", "cudnnDestroy", "cudnnGetVersion"])
    library(folder / "nvrtc/libnvrtc.so.13", [])
    library(folder / "runtime/libcudart.so.13", [])
    return folder


@pytest.mark.parametrize(
    ("driver", "blas", "settings", "words"),
    [
        ("driver", True, {"VERSION": "11080"}, r"too old: it serves CUDA 11\.8, and 12\.0 "),
        ("old", True, {"VERSION": "11040"}, r"too old: it serves CUDA 11\.4"),
        ("old", True, {}, r"driver for CUDA 13\.0 has no cuLibraryLoadData"),
        ("driver", True, {"INIT": "803"}, r"does not start: .*restart the machine"),
        ("driver", True, {"INIT": "804"}, r"does not start: .*cuda-compat.*LD_LIBRARY_PATH"),
        ("driver", True, {"INIT": "802"}, r"does not start: .*nvidia-fabricmanager"),
        ("driver", True, {"INIT": "999"}, r"does not start: .*does nvidia-smi run here\?"),
        ("driver", True, {"INIT": "100"}, r"sees no GPU .*CUDA_VISIBLE_DEVICES.*container"),
        ("driver", False, {}, r"libcublasLt\.so\.13 .*pip install 'nvidia-cublas==13\.\*'"),
        ("driver", False, {"VERSION": "12040"}, r"libcublasLt\.so\.12 .*'nvidia-cublas-cu12'"),
        ("driver", False, {"VERSION": "14000"}, r"libcublasLt\.so\.13 .*pip install"),
        ("driver", True, {"CAPABILITY": "61"}, r"compute capability 6\.1, for which this build "),
        ("driver", True, {"PML_CUDA_CAPABILITY": "61"}, r"compute capability 6\.1, for which "),
    ],
)  # fmt: skip
def test_what_is_missing_is_said(
    fakes: Path, driver: str, blas: bool, settings: dict[str, str], words: str
) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    env |= {name if "_" in name else f"FAKE_CUDA_{name}": v for name, v in settings.items()}
    env |= {"LD_LIBRARY_PATH": str(fakes / driver), "PML_CUDA_BACKEND": str(OBJECT)}
    if blas:
        env["PML_CUDA_LIBS"] = str(fakes / "blas")
    made = subprocess.run(
        [sys.executable, "-P", "-c", CHILD], env=env, capture_output=True, text=True, check=True
    )
    devices, warned, verdict, found, do, why = json.loads(made.stdout)
    assert devices == ["cpu"], "auto takes what works"
    assert len(warned) == 1 and warned[0].startswith("this run uses the CPU: ")
    assert re.search(words, warned[0]), warned
    assert verdict == "note" and "runs use the CPU" in found
    assert re.search(words, do), do
    assert re.search(words, why) and not why.startswith("InternalError"), why


@pytest.mark.parametrize(
    ("libraries", "lacks"),
    [
        (["blas"], r"^our own kernels do attention: libcudnn\.so\.9 is not in "),
        (
            ["blas", "dnn"],
            r"^cuDNN has no compiler for its attention, .*libnvrtc\.so\.13 is not in ",
        ),
        (
            ["blas", "dnn", "nvrtc"],
            r"^cuDNN has no CUDA runtime for its attention, .*libcudart\.so\.13 is not in ",
        ),
        (  # all of it there and found by name, too, and none of it works: these are stubs
            ["blas", "dnn", "nvrtc", "runtime"],
            r"^cuDNN does not compile its attention, .*: (?!Unable to load)\S.*; install "
            r"it and its compiler anew with pip install --upgrade nvidia-cudnn-cu13 "
            r"nvidia-cuda-nvrtc$",
        ),
    ],
)
def test_one_that_is_enough(fakes: Path, libraries: list[str], lacks: str) -> None:
    """The fake is a GPU like any other, as long as nobody computes on it; what it lacks is told.

    That cuDNN is there says nothing: the doctor has it compile.
    """
    env = os.environ | {
        "LD_LIBRARY_PATH": str(fakes / "driver"), "PML_CUDA_BACKEND": str(OBJECT),
        "PML_CUDA_LIBS": ":".join(str(fakes / name) for name in libraries),
    }  # fmt: skip
    made = subprocess.run(
        [sys.executable, "-P", "-c", CHILD], env=env, capture_output=True, text=True, check=True
    )
    devices, warned, verdict, found, do, why = json.loads(made.stdout)
    assert (devices, warned, why) == (["cuda:0"], [], "")
    assert "Fake GPU" in found and 'dtype="auto" is bfloat16' in found
    assert "cuDNN compiles" not in found
    assert verdict == "note"
    assert re.search(lacks, do), do


@pytest.mark.parametrize(("version", "major"), [("12040", 12), ("13000", 12), ("13000", 13)])
def test_the_package_is_of_the_cuda_that_is_there(
    fakes: Path, tmp_path: Path, version: str, major: int
) -> None:
    """cuDNN's file is named alike for each CUDA; its packages are not, and would overwrite it."""
    site = tmp_path / "lib/python3.0/site-packages/nvidia"
    lib = site / ("cu13/lib" if major == 13 else "cublas/lib")
    library(lib / f"libcublasLt.so.{major}", names("cublas.h", "PMLI_CUBLAS"))
    env = {k: v for k, v in os.environ.items() if k not in ("PML_CUDA_LIBS", "CONDA_PREFIX")}
    env |= {
        "VIRTUAL_ENV": str(tmp_path), "LD_LIBRARY_PATH": str(fakes / "driver"),
        "PML_CUDA_BACKEND": str(OBJECT), "FAKE_CUDA_VERSION": version, "PATH": "/nowhere",
    }  # fmt: skip
    made = subprocess.run(
        [sys.executable, "-P", "-c", CHILD], env=env, capture_output=True, text=True, check=True
    )
    _, warned, verdict, _, do, why = json.loads(made.stdout)
    assert (warned, why, verdict) == ([], "", "note")
    assert re.search(rf"libcudnn\.so\.9 not found .*pip install 'nvidia-cudnn-cu{major}'", do), do


#: A run on the fake: its worker starts the driver, and fails where the driver gives it no memory.
RUN = """
import sys
from pathlib import Path
import pantheraml as pm
from pantheraml.tiny import TinyLlama
run = pm.finetune(TinyLlama().write(Path(sys.argv[1]) / "model"), [{"text": "a panther"}] * 8,
                  devices="cuda", max_steps=3, max_length=32, restart="never", name="fake")
while run.state in ("starting", "running"):
    run.wait_for_change(1.0)
print(run.state)
"""


@pytest.mark.parametrize("own", [False, True])
def test_what_the_driver_compiles_is_kept_in_our_folder(
    fakes: Path, tmp_path: Path, own: bool
) -> None:
    """And where the user says, when the user says where."""
    env = {k: v for k, v in os.environ.items() if k != "CUDA_CACHE_PATH"}
    env |= {
        "LD_LIBRARY_PATH": str(fakes / "driver"), "PML_CUDA_LIBS": str(fakes / "blas"),
        "PML_CUDA_BACKEND": str(OBJECT), "FAKE_CUDA_TOLD": str(tmp_path / "told"),
        "PANTHERAML_RUNS": str(tmp_path / "runs"), "PANTHERAML_CACHE": str(tmp_path / "cache"),
    } | ({"CUDA_CACHE_PATH": str(tmp_path / "own")} if own else {})  # fmt: skip
    made = subprocess.run(
        [sys.executable, "-P", "-c", RUN, tmp_path], env=env, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert made.stdout.strip() == "failed", made.stdout + made.stderr
    ours = tmp_path / "cache/cuda/compiled"
    assert (tmp_path / "told").read_text() == str(tmp_path / "own" if own else ours)
    assert ours.is_dir() != own
