"""Turns float weights into codes, each row on its own, by rounding to nearest.

Where a scale covers a group it is a number that fp16 holds, since that is what panels store. A
group that holds NaN or infinity gets NaN for its scale, so that damage stays visible.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sinterlm.ir.quant import CodedMatrix

F32 = NDArray[np.float32]


def quantise(matrix: NDArray[Any], bits: Literal[8, 4], group: int, symmetric: bool) -> CodedMatrix:
    """``matrix`` fp32 [N, K] in codes; ``group`` 0 shares a scale over all of K."""
    rows, depth = matrix.shape
    size = group or depth
    groups = -(-depth // size)
    wide = np.ascontiguousarray(matrix, np.float32)
    if depth % size:
        wide = np.pad(wide, ((0, 0), (0, groups * size - depth)), mode="edge")
    cut = wide.reshape(rows, groups, size)
    levels, centre = np.float32((1 << bits) - 1), np.float32(1 << (bits - 1))
    with np.errstate(invalid="ignore", over="ignore"):
        if symmetric:
            largest = np.abs(cut).max(axis=2)
            scales, low = _storable(largest / (centre - 1), group), -centre
        else:
            bottom = cut.min(axis=2)
            scales, low = _storable((cut.max(axis=2) - bottom) / levels, group), np.float32(0)
        shift = 0 if symmetric else bottom[:, :, None]
        steps = (cut - shift) * _inverse(scales)[:, :, None] - low
        codes = np.clip(np.rint(steps), 0, levels)
    codes = np.where(np.isnan(codes), centre, codes).astype(np.uint8)
    return CodedMatrix(
        codes=codes.reshape(rows, groups * size)[:, :depth],
        scales=scales,
        offsets=None if symmetric else bottom,
        bits=bits,
        group=group,
    )


def _storable(scales: F32, group: int) -> F32:
    """The scales as panels hold them; NaN where one is not finite."""
    kept = scales.astype(np.float16).astype(np.float32) if group else scales
    return np.where(np.isfinite(kept), kept, np.float32(np.nan)).astype(np.float32)


def _inverse(scales: F32) -> F32:
    """1 / scale, and 0 where the scale is 0."""
    return np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
