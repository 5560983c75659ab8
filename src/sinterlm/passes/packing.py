"""Turns checkpoint tensors into the bytes of the packed file, a few panels at a time.

Padding is zeros. NaN and infinity pass through. Never holds more than one checkpoint tensor (of a
matrix made of several: one of its parts) and one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sinterlm.ir.plan import PackedTensor, Segment, WeightLayout
from sinterlm.passes.layout import PANEL

PACKER_VERSION = "1"  #: part of the key of packed weights: bump when packed bytes change

Read = Callable[[str, Literal["bf16", "fp32"]], NDArray[Any]]

#: Columns packed at a time: enough to be fast, small beside any weight that matters.
_CHUNK_COLUMNS = 16 * PANEL


def packed_chunks(layout: WeightLayout, read: Read) -> Iterator[tuple[int, memoryview]]:
    """``(offset, bytes)`` of the whole file, ascending. ``read(name, dtype)`` gives a checkpoint
    tensor [out, in] (or [n]) as uint16 bf16 bits or float32."""
    source = _Source(read)
    for tensor in layout.tensors:
        offset = tensor.offset
        for chunk in tensor_chunks(tensor, source):
            yield offset, memoryview(chunk).cast("B")
            offset += chunk.nbytes


def pack(tensor: PackedTensor, read: Read) -> NDArray[Any]:
    """One packed tensor whole, flat, as uint16 (bf16) or float32."""
    return np.concatenate([c.reshape(-1) for c in tensor_chunks(tensor, _Source(read))])


def unpack(tensor: PackedTensor, packed: NDArray[Any]) -> NDArray[Any]:
    """The inverse of ``pack``: [n, k] columns in packed order (``vector``: [n])."""
    if tensor.kind == "vector":
        return packed.reshape(tensor.n)
    if tensor.kind == "rows":
        return packed.reshape(tensor.n, tensor.k)
    pair = 2 if tensor.dtype == "bf16" else 1
    panels = packed.reshape(tensor.n // PANEL, tensor.k // pair, PANEL, pair)
    return panels.transpose(0, 2, 1, 3).reshape(tensor.n, tensor.k)


class _Source:
    """Reads checkpoint tensors, keeping the last few: the segments of a matrix interleave them."""

    def __init__(self, read: Read, keep: int = 3) -> None:
        self._read = read
        self._keep = keep
        self._held: dict[tuple[str, str], NDArray[Any]] = {}

    def rows(self, segment: Segment, dtype: Literal["bf16", "fp32"]) -> NDArray[Any]:
        """Rows [start, stop) of the segment's tensor."""
        key = (segment.weight, dtype)
        if key not in self._held:
            while len(self._held) >= self._keep:
                del self._held[next(iter(self._held))]
            self._held[key] = self._read(segment.weight, dtype)
        return self._held[key][segment.start : segment.stop]


def tensor_chunks(tensor: PackedTensor, source: _Source) -> Iterator[NDArray[Any]]:
    """The packed bytes of one tensor, in order, as contiguous arrays."""
    element = np.uint16 if tensor.dtype == "bf16" else np.float32
    for first in range(0, tensor.n, _CHUNK_COLUMNS):
        columns = np.zeros((min(_CHUNK_COLUMNS, tensor.n - first), tensor.k), element)
        last = first + len(columns)
        for segment in tensor.segments:
            start, stop = segment.at, segment.at + segment.stop - segment.start
            lo, hi = max(start, first), min(stop, last)
            if lo >= hi:
                continue
            rows = source.rows(segment, tensor.dtype)[lo - start : hi - start]
            columns[lo - first : hi - first, : tensor.k_real] = rows.reshape(hi - lo, -1)
        yield _panels(columns) if tensor.kind == "panels" else columns


def _panels(columns: NDArray[Any]) -> NDArray[Any]:
    """[n, k] -> [n/64][k/P][64][P]; bf16 pairs move as one 32-bit word."""
    words = columns.view(np.uint32)
    cut = words.reshape(len(words) // PANEL, PANEL, words.shape[1])
    return np.ascontiguousarray(cut.transpose(0, 2, 1)).view(columns.dtype)
