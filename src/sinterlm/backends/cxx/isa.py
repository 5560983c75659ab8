"""ISA levels as a C++ compiler sees them: machine flags and the macro that the headers test.

What a level needs of a machine is in ``artifact.isa``, which the run side shares. A level's flags
name every extension; ``-march=native`` would tie a library to one machine and to one compiler.
"""

from __future__ import annotations

from sinterlm.artifact.isa import available_isas, best_isa, check_isa, cpu_flags, parse_isa
from sinterlm.options import IsaName

__all__ = [
    "MACHINE_FLAGS",
    "available_isas",
    "best_isa",
    "check_isa",
    "cpu_flags",
    "isa_macro",
    "parse_isa",
]

_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_AVX512BF16 = (*_AVX512, "-mavx512vnni", "-mavx512bf16")

#: Flags of each level, as both g++ and clang++ spell them.
MACHINE_FLAGS: dict[IsaName, tuple[str, ...]] = {
    "amx": (*_AVX512BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    "avx512bf16": _AVX512BF16,
    "avx512": _AVX512,
    "avx2": _AVX2,
    "generic": (),
}


def isa_macro(isa: IsaName) -> str:
    """The macro that selects a level in ``simd.h``, e.g. ``SL_ISA_AVX2``."""
    return f"SL_ISA_{isa.upper()}"
