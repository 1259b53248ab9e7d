"""Which devices a run is for: names, how many, and what they compute in."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pantheraml import _native
from pantheraml.checks import whole
from pantheraml.errors import Error, InvalidError, NotFoundError, NotInThisVersion


def device_list(devices: str | int | Sequence[str]) -> list[str]:
    """Turn `devices` into one entry a worker, all of one kind.

    Raises
    ------
    InvalidError
        There are none, they are of two kinds, or more than the machine has.
    """
    if isinstance(devices, bool):
        raise InvalidError(f"devices must be names or a number, it is {devices!r}")
    if isinstance(devices, int):
        count = whole("devices", devices, 1, 512)
        gpus = _gpus()
        if gpus == 0:
            return ["cpu"] * count
        if count > gpus:
            raise InvalidError(f"devices={count}: this machine has {gpus} GPUs for runs")
        return [f"cuda:{index}" for index in range(count)]
    if isinstance(devices, str):
        if devices == "auto":
            devices = "cuda" if _gpus() > 0 else "cpu"
        devices = [devices]
    if not isinstance(devices, Sequence):
        raise InvalidError(f'devices must be "auto", names or a number, it is {devices!r}')
    names = [_device(name) for name in devices]
    if not names:
        raise InvalidError("devices is empty; one worker is the least")
    if len({name.partition(":")[0] for name in names}) > 1:
        raise InvalidError(f"devices must be of one kind, they are {', '.join(names)}")
    whole("number of devices", len(names), 1, 512)
    return names


def _device(name: object) -> str:
    if name == "cpu":
        return "cpu"
    if isinstance(name, str) and name.partition(":")[0] == "tpu":
        raise NotInThisVersion(f"not in this version: devices={name!r}")
    match = re.fullmatch(r"cuda(?::([0-9]{1,3}))?", name) if isinstance(name, str) else None
    if match is None:
        raise InvalidError(f'devices: {name!r} is no device; there are "cpu" and "cuda:0"')
    return f"cuda:{int(match[1] or 0)}"


#: In Windows' Linux NVIDIA's driver lies here, and no device shows.
_WINDOWS_DRIVER = "/usr/lib/wsl/lib/libcuda.so.1"


def nvidia_there(system: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether this machine has an NVIDIA GPU, with a driver or without."""
    if any(os.path.exists(path) for path in ("/dev/nvidiactl", _WINDOWS_DRIVER)):
        return True
    for device in system.glob("*"):
        with suppress(OSError):
            vendor, kind = (device / "vendor").read_text(), (device / "class").read_text()
            if vendor.strip() == "0x10de" and kind.startswith("0x03"):  # a display controller
                return True
    return False


def usable_gpus() -> tuple[int, str, bool]:
    """Count the GPUs that runs can use; where that is none, also why, and whether there is one."""
    count = 0
    try:
        count = _native.gpus()
        _native.gpu_dtypes(0)  # one that is too old has none
    except Error as why:
        return 0, str(why), count > 0 or nvidia_there()
    return count, "", True


def _gpus() -> int:
    """Count the GPUs that runs can use; where one is there and cannot be used, say why."""
    count, why, there = usable_gpus()
    if count == 0 and there:
        warnings.warn(f"this run uses the CPU: {why}", stacklevel=2)
    return count


def gpu_dtypes(device: str) -> list[str]:
    """Say what a GPU computes in; one that is not here, only planned for, in all there is."""
    try:
        return _native.gpu_dtypes(int(device.partition(":")[2]))
    except NotFoundError:
        return ["float32", "bfloat16", "float16", "float8"]
