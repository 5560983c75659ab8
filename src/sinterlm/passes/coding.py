"""Float weights in the codes of a format: whole numbers by ``quantise``, fp8 numbers by rounding.

An fp8 scale is the row's largest magnitude over e4m3fn's largest number, whatever the device
writes, so that weights are the same on all of them. A row that holds NaN or infinity gets NaN for
its scale, so that damage stays visible.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinterlm.ir.fp8 import FP8_MAX, to_fp8
from sinterlm.ir.quant import CodedMatrix, GemmFormat
from sinterlm.passes.quantise import quantise

#: Weights that are rounded at a time, so that temporaries stay in cache.
_CHUNK = 1 << 18


def in_format(matrix: NDArray[Any], form: GemmFormat) -> CodedMatrix:
    """``matrix`` fp32 [N, K] in the codes of ``form``; fp8 with a scale per row alone."""
    if not form.is_fp8:
        return quantise(matrix, form.bits, form.group, form.symmetric)
    assert form.group == 0 and form.rows == 1, f"floats are not put into {form.name}"
    return rows_in_fp8(np.ascontiguousarray(matrix, np.float32)).written_as(form.code)


def rows_in_fp8(matrix: NDArray[np.float32]) -> CodedMatrix:
    """``matrix`` [N, K] in e4m3fn with a scale per row; a row of zeros has a scale of zero."""
    rows, depth = matrix.shape
    codes = np.empty(matrix.shape, np.uint8)
    scales = np.empty((rows, 1), np.float32)
    step = max(1, _CHUNK // depth)
    with np.errstate(invalid="ignore", over="ignore"):
        for first in range(0, rows, step):
            part = matrix[first : first + step]
            scale = np.abs(part).max(axis=1, keepdims=True) / np.float32(FP8_MAX["e4m3fn"])
            scale[~np.isfinite(scale)] = np.nan
            safe = np.where(scale > 0, scale, np.float32(1))
            codes[first : first + step] = to_fp8(np.where(scale > 0, part, 0) / safe, "e4m3fn")
            scales[first : first + step] = scale
    return CodedMatrix(codes, scales, None, 8, 0, "e4m3fn")
