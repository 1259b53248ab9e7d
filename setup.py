"""Package the Python side and let CMake build the native one.

One wheel serves every Python from 3.11 on (``cp311-abi3``): the extension keeps to the limited API,
and ``pml-coordinator`` and ``pml-worker`` are ordinary programs without any Python. They are
installed inside the package (``pantheraml/bin``), not as scripts, so that whoever starts them knows
where they are and auditwheel can point them at the libraries inside the wheel.

Where ``PML_CUDA_OBJECT`` names a file (as ``tools/wheel`` does), a wheel gets it as its CUDA
backend: ``pml_cuda.so``, which links none of CUDA and is opened where a driver is.

CMake's own folder is ``build/release`` in a checkout (an editable installation) and ``build/wheel``
for a wheel; both keep their objects, so a second build only builds what changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NATIVE = ["_native.abi3.so", "bin/pml-coordinator", "bin/pml-worker"]
CUDA = os.environ.get("PML_CUDA_OBJECT")


class CMakeBuild(build_ext):
    """Build ``pantheraml._native`` and the two programs, and lay them into the package."""

    def run(self) -> None:
        build = ROOT / "build" / ("release" if self.inplace else "wheel")
        prefix = ROOT / "ext" if self.inplace else Path(self.build_lib).resolve()
        # The component's paths begin with pantheraml/, which is a folder of both prefixes.
        configure = [
            "cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "--no-warn-unused-cli",
            f"-DPython_EXECUTABLE={sys.executable}", f"-DPython3_EXECUTABLE={sys.executable}",
        ]  # fmt: skip
        if not self.inplace:
            configure += ["-DPML_TESTS=OFF", "-DPML_CUDA=OFF"]
        install = ["cmake", "--install", build, "--component", "package", "--prefix", prefix]
        for command in (
            configure,
            ["cmake", "--build", build],
            install if self.inplace else [*install, "--strip"],
        ):
            subprocess.run(command, check=True)
        if CUDA and not self.inplace:
            shutil.copy2(CUDA, prefix / "pantheraml/bin/pml_cuda.so")
            # cudnn-frontend is headers only, so it is in that object.
            shutil.copytree(
                ROOT / "build/cuda/toolkit/licenses",
                prefix / "pantheraml/licenses/cudnn-frontend",
                dirs_exist_ok=True,
            )
        for name in NATIVE:
            if not (prefix / "pantheraml" / name).is_file():
                raise FileNotFoundError(f"the native build made no pantheraml/{name}")

    def get_outputs(self) -> list[str]:
        names = [*NATIVE, "bin/pml_cuda.so"] if CUDA else NATIVE
        return [str(Path(self.build_lib) / "pantheraml" / name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        # Nothing is copied from somewhere else at installation: CMake installs in place.
        return {}


setup(
    packages=find_packages("ext") + find_packages("widgets"),
    package_dir={
        "pantheraml": "ext/pantheraml",
        "pantheraml_widgets": "widgets/pantheraml_widgets",
    },
    package_data={
        "pantheraml": ["py.typed"],
        "pantheraml_widgets": ["py.typed", "static/*"],
    },
    include_package_data=False,
    ext_modules=[Extension("pantheraml._native", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild},
    options={
        "bdist_wheel": {"py_limited_api": "cp311"},
        "build": {"build_base": "build/setuptools"},
    },
)
