"""Weight matrices as quantised checkpoints hold them: codes, a scale per group, a zero per group.

``w[n, k] = scale[n, g] * (code[n, k] - zero[n, g])``, where g is k // group, or what the
checkpoint's own index says; for fp8 numbers, which have no zeros, ``scale * value``. How they are
packed is known in ``code_packings``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sinterlm.ir.fp8 import from_fp8
from sinterlm.ir.quant import CodedMatrix, CodeName

Bytes = NDArray[np.uint8]
F32 = NDArray[np.float32]

#: Rows that become floats at a time.
_ROWS = 512


@dataclass(frozen=True, eq=False)
class GroupedCodes:
    """One matrix [N, K] with G groups along k."""

    codes: Bytes  #: [N, K]
    scales: F32  #: [N, G]
    zeros: NDArray[np.int16] | None  #: [N, G]; None = 2 ** (bits - 1) everywhere
    bits: Literal[8, 4]
    group: int  #: weights along k that share a scale; 0 = all of k
    index: NDArray[np.int32] | None = None  #: [K], the group of each k; None = k // group
    code: CodeName = "int"

    def floats(self) -> F32:
        """The weights [N, K] in fp32: one rounding where scales have more than 16 bits."""
        depth = self.codes.shape[1]
        index = np.arange(depth) // (self.group or depth) if self.index is None else self.index
        out = np.empty(self.codes.shape, np.float32)
        centre = np.float32(1 << (self.bits - 1))
        for first in range(0, len(out), _ROWS):
            rows = slice(first, first + _ROWS)
            if self.code != "int":
                values = from_fp8(self.codes[rows], self.code)
                np.multiply(values, self.scales[rows][:, index], out=out[rows])
                continue
            zeros = centre if self.zeros is None else self.zeros[rows].astype(np.float32)[:, index]
            np.subtract(self.codes[rows], zeros, out=out[rows])
            out[rows] *= self.scales[rows][:, index]
        return out

    def coded(self, group: int) -> CodedMatrix:
        """The same weights in codes with groups of ``group``, which divides this one's; exact.

        The index, if any, must be k // group.
        """
        times = self.group // group if group else 1
        offsets = None if self.zeros is None else self.scales * -self.zeros.astype(np.float32)
        return CodedMatrix(
            codes=self.codes,
            scales=np.repeat(self.scales, times, axis=1),
            offsets=None if offsets is None else np.repeat(offsets, times, axis=1),
            bits=self.bits,
            group=group,
            code=self.code,
        )


def fields_of(words: NDArray[Any], bits: Literal[8, 4]) -> Bytes:
    """The unsigned fields of little-endian int32 words [..., n], lowest first:
    [..., n * 32/bits]."""
    raw = np.ascontiguousarray(words, np.dtype("<i4")).view(np.uint8)
    if bits == 8:
        return raw
    out = np.empty((*raw.shape[:-1], raw.shape[-1] * 2), np.uint8)
    np.bitwise_and(raw, 15, out=out[..., 0::2])
    np.right_shift(raw, 4, out=out[..., 1::2])
    return out


def fields_along_rows(words: NDArray[Any], bits: Literal[8, 4]) -> Bytes:
    """Fields of words [r, n] that are packed along the first axis, transposed: [n, r * 32/bits]."""
    return fields_of(np.ascontiguousarray(words.T), bits)
