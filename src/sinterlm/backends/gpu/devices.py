"""What SinterLM compiles for beside CPUs: one row per device family.

Limits are those of the makers' ISA documents: AMD CDNA3, CDNA4 and RDNA4, NVIDIA compute
capability 9.0 and 10.0. Nobody has run any of them: a target is used only when it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sinterlm.ir.fp8 import Fp8Name

Vendor = Literal["hip", "cuda"]
#: How fp32 is rounded to fp8: by an instruction, or by whole numbers where Triton uses none.
Rounding = Literal["cvt", "bits"]


@dataclass(frozen=True)
class Device:
    """One value of ``--target``."""

    name: str
    vendor: Vendor
    arch: str  #: as Triton's back end calls it
    warp: int  #: threads
    shared_bytes: int  #: that one program may have
    unit_bytes: int  #: that the programs of a compute unit share (``occupancy``)
    max_registers: int  #: per thread, accumulation registers included
    dies: int  #: with an L2 each; program i runs on die i % dies
    #: Instruction of the products in a tile of fewer than 64 rows, and of others, as a regex.
    matrix: tuple[str, str]
    drain: str  #: waits until a wave's stores are done; "" where the barrier does
    machines: str  #: for people
    fp8: Fp8Name = "e4m3fn"  #: as the matrix instructions take it
    #: Fewest rows of a tile whose products of fp8 have an instruction; others are made in fp16,
    #: which holds every fp8 number.
    fp8_rows: int = 16
    rounding: Rounding = "cvt"  #: to fp8

    @property
    def reserved_bytes(self) -> int:
        """Of a unit's shared memory, that the driver keeps beside each program's."""
        return 1 << 10 if self.vendor == "cuda" else 0

    @property
    def triple(self) -> tuple[str, str, int]:
        """(vendor, arch, warp) as the compiler takes them."""
        return self.vendor, self.arch, self.warp


_MOVE = "\nv_mov_b32 $0, $1"  # Triton's inline assembly must give something back
_GFX9 = "s_waitcnt vmcnt(0)" + _MOVE
_GFX12 = "s_wait_storecnt 0x0" + _MOVE

DEVICES: dict[str, Device] = {
    d.name: d
    for d in (
        Device("gfx942", "hip", "gfx942", 64, 64 << 10, 64 << 10, 512, 8, ("v_mfma", "v_mfma"),
               _GFX9, "AMD Instinct MI300A, MI300X, MI325X", "e4m3fnuz"),
        Device("gfx950", "hip", "gfx950", 64, 160 << 10, 160 << 10, 512, 8, ("v_mfma", "v_mfma"),
               _GFX9, "AMD Instinct MI350X, MI355X"),
        Device("gfx1201", "hip", "gfx1201", 32, 64 << 10, 128 << 10, 256, 1, ("v_wmma", "v_wmma"),
               _GFX12, "AMD Radeon RX 9070, Radeon AI PRO R9700", rounding="bits"),
        Device("sm_90", "cuda", "90", 32, 227 << 10, 228 << 10, 255, 1,
               (r"mma\.sync", r"wgmma\.mma_async"), "", "NVIDIA H100, H200", fp8_rows=64),
        Device("sm_100", "cuda", "100", 32, 227 << 10, 228 << 10, 255, 1,
               (r"mma\.sync", r"tcgen05\.mma|mma\.sync"), "", "NVIDIA B200", fp8_rows=64),
    )
}  # fmt: skip
