"""The GPUs that a driver sees, for whoever is asked why a model does not run on one.

    python -m sinterlm.runtime.gpu_devices FILE        {"devices": […]} or {"error"} on stdout

In a process of its own (``devices_of``), as a driver that is broken may hang, or end it. HIP's and
CUDA's functions differ in their names alone.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

_LIMIT_S = 30.0
#: cuDeviceGetAttribute's numbers of the compute capability.
_MAJOR, _MINOR = 75, 76
#: ``--target`` by what a driver says of a device: compute capability; of AMD's the version of the
#: instruction set (gfx942 is 9.4), so that others share it.
_TARGETS = {("CUDA", 9, 0): "sm_90", ("CUDA", 10, 0): "sm_100", ("HIP", 9, 4): "gfx942",
            ("HIP", 9, 5): "gfx950", ("HIP", 12, 0): "gfx1201"}  # fmt: skip


class DriverError(Exception):
    """A driver that does not answer."""


@dataclass(frozen=True)
class GpuDevice:
    """One that a driver sees."""

    name: str  #: as its driver calls it
    nbytes: int  #: of its memory
    capability: str  #: "9.0"
    target: str  #: the ``--target`` for it; "" = there is none

    def __str__(self) -> str:
        of = f"--target {self.target}" if self.target else f"no --target is for {self.capability}"
        return f"{self.name}, {self.nbytes / 1e9:.0f} GB, {of}"


def devices_of(file: str) -> list[GpuDevice]:
    """Those that the driver library ``file`` sees. Raises DriverError saying what went wrong."""
    command = [sys.executable, "-m", __name__, file]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise DriverError(f"it does not answer within {_LIMIT_S:.0f} s") from None
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise DriverError(f"asking it ended with {done.returncode}: {said}") from None
    if "error" in answer:
        raise DriverError(answer["error"])
    return [GpuDevice(**one) for one in answer["devices"]]


def ask(file: str) -> dict[str, Any]:
    """What the process answers."""
    try:
        driver = ctypes.CDLL(file)
    except OSError as exc:
        return {"error": str(exc)}
    vendor = "HIP" if hasattr(driver, "hipInit") else "CUDA"
    prefix = "hip" if vendor == "HIP" else "cu"

    def call(name: str, *args: Any) -> None:
        if code := getattr(driver, prefix + name)(*args):
            raise DriverError(f"{prefix}{name}: {vendor} error {code}")

    try:
        count = ctypes.c_int()
        call("Init", 0)
        call("GetDeviceCount" if vendor == "HIP" else "DeviceGetCount", ctypes.byref(count))
        devices = [_describe(call, vendor, number) for number in range(count.value)]
    except (DriverError, AttributeError) as exc:
        return {"error": str(exc)}
    return {"devices": [vars(device) for device in devices]}


def _describe(call: Any, vendor: str, number: int) -> GpuDevice:
    name, nbytes = ctypes.create_string_buffer(256), ctypes.c_size_t()
    call("DeviceGetName", name, len(name), number)
    call("DeviceTotalMem" if vendor == "HIP" else "DeviceTotalMem_v2", ctypes.byref(nbytes), number)
    major, minor = ctypes.c_int(), ctypes.c_int()
    if vendor == "HIP":
        call("DeviceComputeCapability", ctypes.byref(major), ctypes.byref(minor), number)
    else:
        call("DeviceGetAttribute", ctypes.byref(major), _MAJOR, number)
        call("DeviceGetAttribute", ctypes.byref(minor), _MINOR, number)
    target = _TARGETS.get((vendor, major.value, minor.value), "")
    return GpuDevice(name.value.decode(errors="replace"), nbytes.value,
                     f"{major.value}.{minor.value}", target)  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(ask(sys.argv[1])))
