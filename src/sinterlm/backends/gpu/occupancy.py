"""How many programs of a kernel a compute unit holds at once, and how many it is meant to hold.

A unit is NVIDIA's SM, CDNA's CU or RDNA's WGP. Each has four SIMDs (schedulers), which share its
memory. Limits are those of the CUDA programming guide for compute capability 9.0 and 10.0, and of
AMD's ISA documents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinterlm.backends.gpu.devices import Device
from sinterlm.backends.gpu.tuning import MEASURED

if TYPE_CHECKING:
    from sinterlm.backends.gpu.objects import Object

_SIMDS = 4
#: NVIDIA: registers of a scheduler, given to a warp in pieces of 8 per thread, and its most warps.
_REGISTERS, _PIECE, _MOST_WARPS = 1 << 14, 8, 16
#: Waves per SIMD that an object is meant to reach where its entry does not ask for a number.
LEAST_WAVES = 2
#: Programs of at most so many warps are meant to be two on an SM: while one waits for its first
#: tile or at a barrier, the other multiplies.
FEW_WARPS = 4


def waves_of(made: Object, device: Device) -> int:
    """Waves (warps) of a SIMD by registers alone: AMD's as the compiler reckons them, and what an
    entry's ``waves_per_eu`` caps."""
    if device.vendor == "hip":
        return int(made.facts["occupancy"] or 0)
    pieces: int = max(1, -(-made.facts["registers"] // _PIECE))
    return min(_MOST_WARPS, _REGISTERS // (pieces * _PIECE * device.warp))


def programs_of(made: Object, device: Device) -> int:
    """Programs that a unit holds at once, by registers and shared memory."""
    by_registers = _SIMDS * waves_of(made, device) // int(made.kernel.options["num_warps"])
    shared: int = made.facts["shared_bytes"] + device.reserved_bytes
    return min(by_registers, device.unit_bytes // shared) if shared else by_registers


def below_step(made: Object, device: Device) -> list[str]:
    """What keeps an object from the occupancy that is intended for it; empty when nothing does, and
    where a device has measured the entry, which intends no more than to be fast.

    On AMD LEAST_WAVES per SIMD (``objects.faults`` holds those that an entry asks for). On NVIDIA
    one program per SM, two where they have FEW_WARPS.
    """
    options, facts = made.kernel.options, made.facts
    if made.kernel.source.startswith(MEASURED):
        return []
    if device.vendor == "hip":
        waves, asked = waves_of(made, device), options.get("waves_per_eu")
        if asked or waves >= LEAST_WAVES:
            return []
        return [f"{waves} waves per SIMD, of {LEAST_WAVES} that are intended"]
    least, found = 1 + (options["num_warps"] <= FEW_WARPS), programs_of(made, device)
    if found >= least:
        return []
    return [f"{found} programs of {options['num_warps']} warps per SM, of {least} that are "
            f"intended: {facts['registers']} registers, {facts['shared_bytes']} bytes of shared "
            "memory"]  # fmt: skip
