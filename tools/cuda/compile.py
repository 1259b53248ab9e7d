#!/usr/bin/env python3
"""Compile one file of device code with NVRTC, NVIDIA's compiler as a library.

Usage: compile.py --nvrtc LIBRARY [--include FOLDER]... TARGET SOURCE OUTPUT

TARGET is ``sm_90a`` (machine code of that generation) or ``compute_75`` (PTX, which a driver
compiles). Needs no GPU and no driver. A warning is an error: the compiler's log must be empty.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from pathlib import Path


class Nvrtc:
    """The few calls of NVRTC's C interface that a compilation takes."""

    def __init__(self, library: Path) -> None:
        # Named by its path, so that it finds its built-in part beside itself.
        self._library = ctypes.CDLL(str(library))

    def _call(self, name: str, *arguments: object) -> None:
        result = getattr(self._library, name)(*arguments)
        if result != 0:
            describe = self._library.nvrtcGetErrorString
            describe.restype = ctypes.c_char_p
            raise RuntimeError(f"{name}: {describe(result).decode()}")

    def _bytes(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def compile(self, target: str, source: Path, includes: list[Path]) -> bytes:
        """Machine code or PTX of a source; raises RuntimeError with what the compiler said."""
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram", ctypes.byref(program), source.read_bytes(),
            str(source).encode(), 0, None, None,
        )  # fmt: skip
        options = [f"--gpu-architecture={target}", "--std=c++17"]
        options += [f"--include-path={folder}" for folder in (source.parent, *includes)]
        words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        result = self._library.nvrtcCompileProgram(program, len(options), words)
        log = self._bytes("ProgramLog", program).rstrip(b"\0").decode().strip()
        if result != 0 or log:
            raise RuntimeError(f"{source} for {target}:\n{log or f'NVRTC failed ({result})'}")
        made = self._bytes("CUBIN" if target.startswith("sm_") else "PTX", program)
        self._call("nvrtcDestroyProgram", ctypes.byref(program))
        # PTX comes with the zero that ends it as a string; embed.py writes its own.
        return made if target.startswith("sm_") else made.rstrip(b"\0")


def main() -> int:
    """Compile what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nvrtc", type=Path, required=True)
    parser.add_argument("--include", type=Path, action="append", default=[])
    parser.add_argument("target")
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    try:
        made = Nvrtc(arguments.nvrtc.resolve()).compile(
            arguments.target, arguments.source, arguments.include
        )
    except RuntimeError as why:
        print(f"compile.py: {why}", file=sys.stderr)
        return 1
    arguments.output.write_bytes(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
