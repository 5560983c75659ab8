"""Turns float weights into codes with the least squared error that a short search finds.

Every group is fitted on its own: scales around the one that just holds its largest weight are tried
(more weights clipped, finer steps for the rest); for the codes that each gives, the best scale, and
offset, is a linear regression; the best of all is refined by turns of codes and regression. NumPy
alone, always in the same order: the same weights give the same codes on every machine.

Where a scale covers a group it is a number that fp16 holds, since that is what panels store. A
group that holds NaN or infinity gets NaN for its scale, so that damage stays visible.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sinterlm.ir.quant import CodedMatrix

F32 = NDArray[np.float32]
Bits = Literal[8, 4]

#: Scales that are tried, as shares of the one that just holds the largest weight. With 4 bits,
#: clipping pays in most groups; with 8, in few.
_SHARES: dict[tuple[Bits, bool], tuple[float, ...]] = {
    (4, True): (1.0, 0.86, 0.89, 0.92, 0.96, 1.05, 1.1, 1.17),
    (4, False): (1.0, 0.81, 0.84, 0.87, 0.9, 0.93, 0.965, 1.04),
    (8, True): (1.0, 0.87, 0.91, 0.95, 0.98, 0.99, 1.005, 1.01),
    (8, False): (1.0, 0.87, 0.91, 0.95, 0.98, 0.99, 0.995, 1.005),
}
#: The same with 4 bits where a group is a row: its largest weight lies far out.
_SHARES_OF_ROWS = (1.0, 0.93, 0.86, 0.79, 0.72, 0.65, 0.58, 0.5, 0.42, 0.34)
_ROW = 256  #: weights of a group from which on they hold
_TURNS = 2  #: of codes and regression, after the best share is known
_BLOCK = 1 << 15  #: weights that are fitted together: what a core's caches hold several times
_MIN_GROUPS = 64  #: fitted together at least


def quantise(matrix: NDArray[Any], bits: Bits, group: int, symmetric: bool) -> CodedMatrix:
    """``matrix`` fp32 [N, K] in codes; ``group`` 0 shares a scale over all of K."""
    rows, depth = matrix.shape
    size = group or depth
    groups = -(-depth // size)
    wide = np.ascontiguousarray(matrix, np.float32)
    if depth % size:
        wide = np.pad(wide, ((0, 0), (0, groups * size - depth)), mode="edge")
    cut = wide.reshape(rows * groups, size)
    codes = np.empty(cut.shape, np.uint8)
    scales = np.empty(rows * groups, np.float32)
    offsets, finite = np.zeros_like(scales), np.empty(rows * groups, bool)
    step = max(_MIN_GROUPS, _BLOCK // size)
    with np.errstate(all="ignore"):  # what overflows is found afterwards, and marked
        for first in range(0, rows * groups, step):
            part = slice(first, first + step)
            fit = _Fit(np.ascontiguousarray(cut[part].T), bits, symmetric, bool(group))
            codes[part], scales[part] = fit.codes.T, fit.scale
            offsets[part], finite[part] = fit.offset, fit.is_finite
    bad = ~(np.isfinite(scales) & np.isfinite(offsets) & finite)
    scales[bad], codes[bad] = np.nan, 1 << (bits - 1)
    return CodedMatrix(
        codes=codes.reshape(rows, groups * size)[:, :depth],
        scales=scales.reshape(rows, groups),
        offsets=None if symmetric else offsets.reshape(rows, groups),
        bits=bits,
        group=group,
    )


class _Fit:
    """The best codes of weights x [size, M], each column a group: x ≈ scale * code + offset."""

    def __init__(self, x: F32, bits: Bits, symmetric: bool, in_fp16: bool) -> None:
        self.size, self.symmetric = np.float32(len(x)), symmetric
        self.low = np.float32(-(1 << (bits - 1)) if symmetric else 0)
        self.high = self.low + np.float32((1 << bits) - 1)
        self.sums_are_exact = len(x) * max(-self.low, self.high) ** 2 <= 1 << 24
        self.q, self.product = np.empty_like(x), np.empty_like(x)
        self.gain = np.full(x.shape[1], -1, np.float32)  # of the best: Σx² − error
        self.scale, self.offset = np.zeros_like(self.gain), np.zeros_like(self.gain)
        mean = np.float32(0) if symmetric else _divide(_sum_rows(x.copy()), self.size)
        self.x = x if symmetric else x - mean  # a large offset would drown the differences
        self.sum = np.zeros_like(self.gain) if symmetric else _sum_rows(self.x.copy())
        is_row = bits == 4 and len(x) >= _ROW
        self.search(_SHARES_OF_ROWS if is_row else _SHARES[bits, symmetric])
        if in_fp16:
            self.scale = self.scale.astype(np.float16).astype(np.float32)
        self.round(self.scale, self.offset)
        if not symmetric:
            centred = _divide(self.sum - self.scale * self.sum_whole(self.q), self.size)
            self.offset = mean + centred
        self.codes = (self.q - self.low).astype(np.uint8)

    def search(self, shares: tuple[float, ...]) -> None:
        """Try every share, then take turns."""
        top, bottom = self.x.max(axis=0), self.x.min(axis=0)
        self.is_finite = np.isfinite(top) & np.isfinite(bottom)  # neither loses a NaN
        if self.symmetric:
            # the low end holds one code more than the high end, so the largest weight goes there
            full = np.where(top > -bottom, top, bottom) / self.low
            middle = np.zeros_like(full)
        else:
            full, middle = (top - bottom) / self.high, (top + bottom) / 2
        for share in shares:
            scale = full * np.float32(share)
            self.regress(scale, middle if self.symmetric else middle - scale * self.high / 2)
        for _ in range(_TURNS):
            self.regress(self.scale, self.offset)

    def regress(self, scale: F32, offset: F32) -> None:
        """Codes for a scale and offset, the best scale and offset for these codes; kept if better
        than the best so far."""
        self.round(scale, offset)
        np.multiply(self.x, self.q, out=self.product)
        xq = _sum_rows(self.product)
        np.multiply(self.q, self.q, out=self.product)
        qq = self.sum_whole(self.product)
        if self.symmetric:
            best, shift = _divide(xq, qq), offset
            gain = best * xq
        else:
            q = self.sum_whole(self.q)
            best = _divide(self.size * xq - self.sum * q, self.size * qq - q * q)
            shift = _divide(self.sum - best * q, self.size)
            gain = best * xq + shift * self.sum
        better = gain > self.gain
        for kept, found in ((self.gain, gain), (self.scale, best), (self.offset, shift)):
            np.copyto(kept, found, where=better)

    def round(self, scale: F32, offset: F32) -> None:
        """``q`` = the nearest codes, counted from ``low``."""
        q = self.q
        if self.symmetric:
            np.multiply(self.x, _divide(np.float32(1), scale), out=q)
        else:
            np.subtract(self.x, offset, out=q)
            np.multiply(q, _divide(np.float32(1), scale), out=q)
        np.rint(q, out=q)
        np.clip(q, self.low, self.high, out=q)

    def sum_whole(self, a: F32) -> F32:
        """Sums of the columns of ``a``, whole numbers of at most a code's square each: where fp32
        holds every sum of them, their order does not matter, and NumPy's own is the fastest."""
        if self.sums_are_exact:
            return np.asarray(np.add.reduce(a, axis=0))
        return _sum_rows(a.copy())


def _sum_rows(a: F32) -> F32:
    """Sums of the columns of ``a`` [n, M], by halves and in place: whatever M, the same order."""
    n = len(a)
    while n > 1:
        half = n // 2
        a[:half] += a[n - half : n]
        n -= half
    return np.array(a[0])


def _divide(a: F32 | np.float32, b: F32 | np.float32) -> F32:
    """a / b, and 0 where b is 0."""
    if np.all(b):  # a mask costs ten times the division
        return np.asarray(a / b, np.float32)
    out = np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b)), np.float32)
    return np.divide(a, b, out=out, where=b != 0)
