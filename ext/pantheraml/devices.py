"""Which devices a run is for: names, how many, and what they compute in."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pantheraml import _native
from pantheraml.checks import whole
from pantheraml.errors import Error, InvalidError, NotFoundError, NotInThisVersion
from pantheraml.memory import size


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
            gpus = _gpus()
            devices = f"cuda:{_roomiest(gpus)}" if gpus > 0 else "cpu"
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


@dataclass(frozen=True)
class Room:
    """What runs may still plan with of a GPU, in bytes, and which of them have the rest.

    ``unknown`` says why nobody can tell what other processes have: `left` is what they leave at
    most. It is empty where that is known.
    """

    left: int
    reserved: str
    unknown: str = ""


def room(index: int) -> Room:
    """Ask a GPU's driver and the reservations of this user's runs.

    Raises
    ------
    Error
        There is no such GPU, or what is reserved of it cannot be read.
    """
    gpu = _native.gpu_reserved(index)
    left, unknown = gpu["memory_total"] - gpu["reserved"], ""
    try:
        used = _native.gauges(gpu["bus"], gpu["uuid"])["memory_used"]
    except Error as why:
        used = str(why)
    if isinstance(used, float):
        left = min(left, gpu["memory_total"] - int(used) - gpu["pending"])
    else:
        unknown = used
    words = [f"{Path(one['run']).name} {size(one['bytes'])}" for one in gpu["holders"]]
    return Room(max(left, 0), ", ".join(words), unknown)


def _roomiest(gpus: int) -> int:
    """Choose the GPU with most left for a run; the first where they are equal."""
    if gpus == 1:
        return 0
    left = []
    for index in range(gpus):
        try:
            _native.gpu_dtypes(index)  # an old one beside a new one has none
            left.append(room(index).left)
        except Error:
            left.append(-1)
    return left.index(max(left))


def gpu_dtypes(device: str) -> list[str]:
    """Say what a GPU computes in; one that is not here, only planned for, in all there is."""
    try:
        return _native.gpu_dtypes(int(device.partition(":")[2]))
    except NotFoundError:
        return ["float32", "bfloat16", "float16", "float8"]
