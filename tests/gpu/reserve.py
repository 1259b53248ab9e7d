"""Device memory that a run has reserved, with a real driver and processes that die.

    python3 tests/gpu/reserve.py [--device cuda] [--kills 5]

* A worker is killed (SIGKILL) again and again. From its death on its memory must be pending, which
  is what others must not plan with, before the driver calls it free. Both are asked as fast as this
  process can, the driver first; printed is by how much the one came before the other.
* While a killed worker is replaced, a process that reserves nothing takes the memory that it had.
  The run must wait for it, say so, count no restart for that, and go on once it is free.

It takes a minute and a half, and nearly all of the device's memory: nothing else may use it
meanwhile. Exits with 1 when something is not so, 77 without a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pantheraml as pm
from pantheraml import _native
from pantheraml.aside import end
from pantheraml.tiny import TinyLlama

PATIENCE = 120.0
SKIPPED = 77
LENGTH, ROWS = 2048, 128  # of a micro-batch: the arena is some GiB
MIB = 1 << 20


def until(over: Callable[[], object], what: str) -> None:
    """Wait for something; whoever waits so long waits for nothing."""
    deadline = time.monotonic() + PATIENCE
    while not over():
        if time.monotonic() > deadline:
            raise SystemExit(f"FAIL waited {PATIENCE:g} s for {what}")
        time.sleep(0.01)


class Card:
    """What NVML says of memory in use, in a few microseconds."""

    class _Memory(ctypes.Structure):
        _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]

    def __init__(self, bus: str) -> None:
        """Find the card at this PCI address."""
        self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        self._handle = ctypes.c_void_p()
        if self._nvml.nvmlInit_v2() != 0 or self._nvml.nvmlDeviceGetHandleByPciBusId_v2(
            bus.encode(), ctypes.byref(self._handle)
        ):
            raise SystemExit(f"FAIL NVML does not find the GPU at {bus}")

    def used(self) -> int:
        """Bytes."""
        memory = self._Memory()
        if self._nvml.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(memory)) != 0:
            raise SystemExit("FAIL NVML does not say how much memory is in use")
        return int(memory.used)


def take_what_comes_free(index: int, expected: int) -> None:
    """Be the process that reserves nothing: all but half of what is expected, once that is free."""
    cuda = ctypes.CDLL("libcuda.so.1")
    context, pointer, device = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    asked = [
        cuda.cuInit(0), cuda.cuDeviceGet(ctypes.byref(device), index),
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
        cuda.cuCtxSetCurrent(context),
        cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)),
    ]  # fmt: skip
    if any(asked):
        raise SystemExit(f"FAIL the driver's words: {asked}")
    print("there", flush=True)
    enough = free.value + expected * 9 // 10
    while free.value < enough:
        cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    wanted = free.value - expected // 2
    refused = cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(wanted))
    print(f"refused {wanted >> 20} MiB" if refused else f"{wanted >> 20} MiB", flush=True)
    sys.stdin.read()


def kill(run: pm.Run) -> int:
    """End the worker; its process id."""
    pid = int(run.workers[0]["pid"])
    os.kill(pid, signal.SIGKILL)
    return pid


def goes_on(run: pm.Run, restarts: int) -> None:
    """Wait for a step after so many restarts."""
    until(lambda: count(run) == restarts and run.state == "running", "another worker")
    step = run.step
    until(lambda: run.step > step, "a step")


def count(run: pm.Run) -> int:
    """How often it has gone on by itself."""
    return sum(event["type"] == "restart" for event in run.events())


def lead_of_pending(run: pm.Run, card: Card, index: int) -> float:
    """Kill the worker; by how many seconds all was pending before the driver had half of it."""
    reserved, used = _native.gpu_reserved(index)["reserved"], card.used()
    os.kill(int(run.workers[0]["pid"]), signal.SIGKILL)
    deadline, pending_at = time.monotonic() + PATIENCE, 0.0
    while True:
        free = card.used() < used - reserved // 2
        now = time.monotonic()
        told = _native.gpu_reserved(index)
        if told["reserved"] != reserved:
            raise SystemExit(f"FAIL {told['reserved']} bytes are reserved, not {reserved}")
        if told["pending"] == reserved and pending_at == 0:
            pending_at = now
        if free:
            return now - pending_at if pending_at > 0 else -1.0
        if now > deadline:
            raise SystemExit("FAIL the driver does not give the memory up")


def check_order(run: pm.Run, card: Card, index: int, kills: int) -> bool:
    """Memory is never free and nobody's at once."""
    leads = []
    for number in range(1, kills + 1):
        leads.append(lead_of_pending(run, card, index))
        goes_on(run, number)
    good = min(leads) > 0
    print(
        f"{'ok  ' if good else 'FAIL'} of {kills} workers the memory of "
        f"{sum(lead > 0 for lead in leads)} was pending before it was free: by "
        f"{1e3 * min(leads):.1f} to {1e3 * max(leads):.1f} ms, "
        f"median {1e3 * statistics.median(leads):.1f}",
        flush=True,
    )
    return good


def check_waiting(run: pm.Run, index: int) -> bool:
    """A run that goes on waits for memory that went to another process."""
    restarts, reserved = count(run), int(_native.gpu_reserved(index)["reserved"])
    command = [sys.executable, os.path.abspath(__file__), "--take", str(reserved)]
    other = subprocess.Popen(
        [*command, "--device", f"cuda:{index}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert other.stdin is not None and other.stdout is not None
    try:
        if other.stdout.readline() != "there\n":
            raise SystemExit("FAIL the other process does not come to the device")
        killed = kill(run)
        taken = other.stdout.readline().strip()
        pids: set[int] = set()
        waiting = f"waiting for memory of cuda:{index}: "
        until(lambda: run.reason.startswith(waiting), "the run to wait")
        until(
            lambda: pids.update(w["pid"] for w in run.workers if w["pid"]) or len(pids) > 2,
            "three tries",
        )
        good = run.state == "starting" and count(run) == restarts + 1 and killed not in pids
        verdict = "ok  " if good else "FAIL"
        print(f"{verdict} another process took {taken}; {run.reason}", flush=True)
        other.stdin.close()
        begun = time.monotonic()
        goes_on(run, restarts + 1)
        print(f"ok   it went on {time.monotonic() - begun:.1f} s after that had ended", flush=True)
        return good
    finally:
        other.kill()
        other.wait()


def main() -> int:
    """Check both, or be the other process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--take", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    index = int(args.device.partition(":")[2] or 0)
    if args.take is not None:
        take_what_comes_free(index, args.take)
        return 0
    gpus = 0
    with suppress(pm.Error):
        gpus = _native.gpus()
    if gpus > index:
        return check(index, args.kills)
    print("gpu.reserve skipped: no GPU here")
    return SKIPPED


def check(index: int, kills: int) -> int:
    """Train a model whose activations take some GiB."""
    with tempfile.TemporaryDirectory(prefix="pml-reserve-") as name:
        folder = Path(name)
        os.environ["PANTHERAML_RUNS"] = str(folder / "runs")
        os.environ["PANTHERAML_CACHE"] = str(folder / "cache")
        shape = TinyLlama(
            vocab=1024, hidden=1024, layers=4, heads=16, kv_heads=4, intermediate=2048,
            positions=LENGTH,
        )  # fmt: skip
        lists = [[(7 * i + 3 * j) % 1000 for j in range(LENGTH)] for i in range(ROWS)]
        run = pm.finetune(
            shape.write(folder / "model"), [{"input_ids": ids, "labels": ids} for ids in lists],
            devices=f"cuda:{index}", max_steps=10**6, max_length=LENGTH, packing=False,
            per_device_train_batch_size=ROWS, gradient_accumulation_steps=1, method="full",
            learning_rate=1e-5, save_strategy="no", max_restarts=kills + 1, name="reserved",
        )  # fmt: skip
        try:
            goes_on(run, 0)
            gpu = _native.gpu_reserved(index)
            print(f"     reserved: {gpu['reserved'] // MIB} MiB, pending {gpu['pending'] // MIB}")
            good = check_order(run, Card(gpu["bus"]), index, kills)
            return 0 if check_waiting(run, index) and good else 1
        finally:
            end(run)


if __name__ == "__main__":
    sys.exit(main())
