"""fp8 numbers of four exponent and three mantissa bits, in the two ways that devices write them.

``e4m3fn`` (Micikevicius et al. 2022, arXiv:2209.05433; checkpoints, NVIDIA, AMD from CDNA 4): bias
7, largest 448, NaN is 0x7F and 0xFF. ``e4m3fnuz`` (Noune et al. 2022, arXiv:2206.02915; CDNA 3):
bias 8, largest 240, NaN is 0x80, and there is no negative zero. Neither has infinities.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Fp8Name = Literal["e4m3fn", "e4m3fnuz"]
Bytes = NDArray[np.uint8]
F32 = NDArray[np.float32]

#: Largest finite value.
FP8_MAX: dict[Fp8Name, float] = {"e4m3fn": 448.0, "e4m3fnuz": 240.0}
#: A code of NaN.
FP8_NAN: dict[Fp8Name, int] = {"e4m3fn": 0x7F, "e4m3fnuz": 0x80}
_BIAS: dict[Fp8Name, int] = {"e4m3fn": 7, "e4m3fnuz": 8}
_LARGEST: dict[Fp8Name, int] = {"e4m3fn": 0x7E, "e4m3fnuz": 0x7F}


def _values(name: Fp8Name) -> F32:
    """The value of each of the 256 codes."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    significand = np.where(exponent > 0, 8 + mantissa, mantissa)
    scale = np.maximum(exponent, 1) - _BIAS[name] - 3
    positive = np.ldexp(significand.astype(np.float32), scale).astype(np.float32)
    values = np.concatenate([positive, -positive])
    values[[0x7F, 0xFF] if name == "e4m3fn" else [0x80]] = np.nan
    return values


#: The value of each code, fp32 [256].
FP8_VALUES: dict[Fp8Name, F32] = {name: _values(name) for name in FP8_MAX}


def from_fp8(codes: Bytes, name: Fp8Name) -> F32:
    """float32 values of codes of any shape, exactly."""
    return np.take(FP8_VALUES[name], codes)


def to_fp8(values: NDArray[Any], name: Fp8Name) -> Bytes:
    """Codes of float32 values of any shape: to nearest, ties to even; what is beyond the largest,
    infinity too, becomes the largest, and NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    size = bits & np.uint32(0x7FFFFFFF)
    # Down to the smallest normal number, three bits of the mantissa are kept and the exponent is
    # counted from another zero. Below, adding a power of two leaves whole steps in the last bits.
    even = size + np.uint32(0x7FFFF) + ((size >> np.uint32(20)) & np.uint32(1))
    normal = (even >> np.uint32(20)).astype(np.int32) - ((127 - _BIAS[name]) << 3)
    magic = np.float32(2.0 ** (24 - 3 - _BIAS[name]))
    steps = ((size.view(np.float32) + magic).view(np.uint32) - magic.view(np.uint32)).view(np.int32)
    is_small = size < np.uint32((128 - _BIAS[name]) << 23)
    code = np.minimum(np.where(is_small, steps, normal), _LARGEST[name]).astype(np.uint8)
    sign = (bits >> np.uint32(24)).astype(np.uint8) & np.uint8(0x80)
    if name == "e4m3fnuz":
        sign[code == 0] = 0
    code |= sign
    code[size > np.uint32(0x7F800000)] = FP8_NAN[name]
    return code


def fn_to_fnuz(codes: Bytes) -> Bytes:
    """Codes of e4m3fn as e4m3fnuz codes of half their value: the same bits, but for the negative
    zero, which becomes zero, and NaN."""
    out = codes.copy()
    out[codes == 0x80] = 0
    out[(codes & 0x7F) == 0x7F] = FP8_NAN["e4m3fnuz"]
    return out
