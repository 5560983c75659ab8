"""Which matrices lose too much in narrow codes, by measurement, and what they are stored in then.

The error of a matrix is that of its codes against its floats, Σ(w' − w)² / Σw², which is the share
of noise in its outputs where inputs are alike in size; taken over evenly spaced rows. Normal
weights have 0.7 % in groups of 32 at 4 bits, 0.002 % to 0.008 % at 8 bits, and 0.07 % in fp8. A
matrix beyond the limit has weights far outside of their group's, and takes the next wider form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinterlm.ir.bf16 import from_bf16
from sinterlm.ir.quant import GemmFormat
from sinterlm.options import DEFAULT_QUANT_GROUP
from sinterlm.passes.coding import in_format

#: Most error that codes of so many bits may have: twice, and some fifteen times, that of normal.
#: docs/numerics.md has the errors of real ones.
LIMITS: dict[int, float] = {4: 0.015, 8: 1e-3}
_ROWS = 64  #: that are measured

#: The error of a matrix in a format.
ErrorOf = Callable[[str, GemmFormat], float]


def measured(read_exact: Callable[[str], NDArray[Any]]) -> ErrorOf:
    """Errors of a checkpoint's matrices; ``read_exact(name)`` is bf16 bits or float32 [N, K]."""
    rows: dict[str, NDArray[np.float32]] = {}

    def error_of(name: str, form: GemmFormat) -> float:
        if name not in rows:
            rows.clear()  # one matrix is measured after the other
            whole = read_exact(name)
            some = whole[np.linspace(0, len(whole) - 1, min(_ROWS, len(whole))).astype(np.int64)]
            rows[name] = from_bf16(some) if some.dtype == np.uint16 else some
        floats = rows[name]
        back = in_format(floats, form).dequantise()
        energy = float(np.square(floats, dtype=np.float64).sum())
        return float(np.square(back - floats, dtype=np.float64).sum()) / energy if energy else 0.0

    return error_of


def wide_enough(
    names: tuple[str, ...], form: GemmFormat | None, error_of: ErrorOf
) -> GemmFormat | None:
    """``form``, or the first wider one in which none of the matrices exceeds its limit: 8 bits,
    then None, which is no codes at all."""
    while form is not None and any(error_of(name, form) > LIMITS[form.bits] for name in names):
        form = replace(form, bits=8, group=DEFAULT_QUANT_GROUP[8]) if form.bits == 4 else None
    return form
