"""Conversions between checkpoint dtypes and the two that SinterLM packs: bf16 bits and float32.

bf16 is held as uint16, the upper half of a float32. Rounding is to nearest, ties to even; NaN stays
NaN; what is bf16 already passes through untouched.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ReadDType = Literal["bf16", "fp32"]

#: Elements converted at a time, so that temporaries stay small beside the result.
CHUNK = 1 << 21

#: NumPy type that holds one element of each dtype a tensor can be stored in.
STORAGE: dict[str, np.dtype[Any]] = {
    "bf16": np.dtype("<u2"),
    "fp16": np.dtype("<f2"),
    "fp32": np.dtype("<f4"),
}

#: The same for what codes and their indices are stored in, which is never read as floats; fp8
#: numbers are codes too, since they mean nothing without a scale.
INTEGERS: dict[str, np.dtype[Any]] = {
    "e4m3fn": np.dtype("u1"),
    "int8": np.dtype("<i1"),
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
}


def fp32_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """bf16 bits of float32 values of any shape; values beyond the bf16 range become infinity."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits  # wraps only for NaN, replaced below
    rounded >>= 16
    result = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        result[nan] = (bits[nan] >> 16).astype(np.uint16) | np.uint16(0x40)  # quiet, sign kept
    return result


def bf16_to_fp32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """float32 values of bf16 bits, exactly."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def convert(stored: Array, source: str, dtype: ReadDType) -> Array:
    """``stored`` (dtype ``source``, one of STORAGE, any shape) as ``dtype``, C-contiguous.

    Returns the same memory when nothing has to change and it is aligned.
    """
    if source == dtype:
        return np.require(stored, requirements=["C", "A"])
    out = np.empty(stored.shape, np.uint16 if dtype == "bf16" else np.float32)
    flat, result = stored.reshape(-1), out.reshape(-1)
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK]
        result[start : start + CHUNK] = _convert(part, source, dtype)
    return out


def _convert(part: Array, source: str, dtype: ReadDType) -> Array:
    wide = bf16_to_fp32(part) if source == "bf16" else part.astype(np.float32)
    return fp32_to_bf16(wide) if dtype == "bf16" else wide
