"""Which ISA levels this machine can run, from what the kernel reports, not from what CPUID could.

A level counts only if every instruction set that its compiler flags allow is there, so that a
library can never meet an illegal instruction. ``generic`` runs everywhere.
"""

from __future__ import annotations

import os
from pathlib import Path

from sinterlm.errors import BundleError, UsageError
from sinterlm.options import ISA_LEVELS, IsaName

_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi2"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
_AVX512BF16 = _AVX512 | {"avx512_bf16", "avx512_vnni"}

#: Names in /proc/cpuinfo that each level needs; all of them must be there.
REQUIRED_CPU_FLAGS: dict[IsaName, frozenset[str]] = {
    "amx": _AVX512BF16 | {"amx_tile", "amx_bf16", "amx_int8"},
    "avx512bf16": _AVX512BF16,
    "avx512": _AVX512,
    "avx2": _AVX2,
    "generic": frozenset(),
}


def cpu_flags(root: Path = Path("/")) -> frozenset[str]:
    """Feature names of the first CPU in ``root/proc/cpuinfo``; empty off x86-64."""
    if os.uname().machine not in ("x86_64", "AMD64"):
        return frozenset()
    try:
        with open(root / "proc/cpuinfo", encoding="ascii", errors="replace") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() == "flags":
                    return frozenset(value.split())
    except OSError:
        pass
    return frozenset()


def available_isas(root: Path = Path("/")) -> tuple[IsaName, ...]:
    """Levels this machine can run, widest first; always ends with ``generic``."""
    flags = cpu_flags(root)
    return tuple(level for level in ISA_LEVELS if flags >= REQUIRED_CPU_FLAGS[level])


def best_isa(root: Path = Path("/")) -> IsaName:
    """The widest level this machine can run."""
    return available_isas(root)[0]


def parse_isa(name: str) -> IsaName:
    """``name`` as an ISA level. Raises UsageError listing the levels when it is none."""
    for level in ISA_LEVELS:
        if level == name:
            return level
    raise UsageError(f"unknown ISA level {name!r}; choose one of {', '.join(ISA_LEVELS)}")


def check_isa(level: str, root: Path = Path("/")) -> None:
    """Raises BundleError naming both sides when this machine cannot run ``level``."""
    have = available_isas(root)
    if level not in have:
        raise BundleError(
            f"the bundle is built for ISA level {level}, and this machine has only "
            f"{', '.join(have)}; rebuild it here with `sinterlm compile MODEL --isa {have[0]}`"
        )
