"""Turns checkpoint tensors into the bytes of the packed file, a few panels at a time.

Padding is zeros. NaN and infinity pass through. Holds the checkpoint tensors that one packed tensor
is made of and two chunks, never a packed tensor whole. Refuses a tensor of another shape or dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sinterlm.errors import CheckpointError
from sinterlm.ir.plan import PackedTensor, Segment, WeightLayout
from sinterlm.passes.layout import PANEL

PACKER_VERSION = "1"  #: part of the key of packed weights: bump when packed bytes change

Read = Callable[[str, Literal["bf16", "fp32"]], NDArray[Any]]

#: Most columns and bytes packed at a time: what stays in cache between its two copies is fast.
_CHUNK_COLUMNS = 16 * PANEL
_CHUNK_BYTES = 1 << 20


def packed_chunks(layout: WeightLayout, read: Read) -> Iterator[tuple[int, memoryview]]:
    """``(offset, bytes)`` of the whole file, ascending. ``read(name, dtype)`` gives a checkpoint
    tensor [out, in] (or [n]) as uint16 bf16 bits or float32. Raises what ``read`` raises, and
    CheckpointError for a tensor that does not have the rows and columns that the layout counts on.
    """
    for tensor in layout.tensors:
        offset = tensor.offset
        for chunk in tensor_chunks(tensor, read):
            yield offset, chunk.reshape(-1).view(np.uint8).data
            offset += chunk.nbytes


def pack(tensor: PackedTensor, read: Read) -> NDArray[Any]:
    """One packed tensor whole, flat, as uint16 (bf16) or float32."""
    return np.concatenate([chunk.reshape(-1) for chunk in tensor_chunks(tensor, read)])


def unpack(tensor: PackedTensor, packed: NDArray[Any]) -> NDArray[Any]:
    """The inverse of ``pack``: [n, k] columns in packed order (``vector``: [n])."""
    if tensor.kind == "vector":
        return packed.reshape(tensor.n)
    if tensor.kind == "rows":
        return packed.reshape(tensor.n, tensor.k)
    pair = 2 if tensor.dtype == "bf16" else 1
    panels = packed.reshape(tensor.n // PANEL, tensor.k // pair, PANEL, pair)
    return panels.transpose(0, 2, 1, 3).reshape(tensor.n, tensor.k)


def tensor_chunks(tensor: PackedTensor, read: Read) -> Iterator[NDArray[Any]]:
    """One packed tensor in order, as C-contiguous arrays of uint16 or float32."""
    element = np.dtype(np.uint16 if tensor.dtype == "bf16" else np.float32)
    width = max(PANEL, min(_CHUNK_COLUMNS, _CHUNK_BYTES // (tensor.k * element.itemsize)))
    width -= width % PANEL
    sources: dict[str, NDArray[Any]] = {}
    for first in range(0, tensor.n, width):
        last = min(first + width, tensor.n)
        columns = np.zeros((last - first, tensor.k), element)
        for segment in tensor.segments:
            lo, hi = max(segment.at, first), min(_end(segment), last)
            if lo >= hi:
                continue
            if segment.weight not in sources:
                sources[segment.weight] = _matrix(tensor, segment.weight, read)
            rows = sources[segment.weight][segment.start :][lo - segment.at : hi - segment.at]
            columns[lo - first : hi - first, : tensor.k_real] = rows
        yield _panels(columns) if tensor.kind == "panels" else columns


def _end(segment: Segment) -> int:
    """One past the last packed column."""
    return segment.at + segment.stop - segment.start


def _matrix(tensor: PackedTensor, weight: str, read: Read) -> NDArray[Any]:
    """A checkpoint tensor as [rows, k_real]."""
    found = read(weight, tensor.dtype)
    needed = max(s.stop for s in tensor.segments if s.weight == weight)
    expected = (needed,) if tensor.kind == "vector" else (needed, tensor.k_real)
    element = np.uint16 if tensor.dtype == "bf16" else np.float32
    if found.shape != expected or found.dtype != element:
        raise CheckpointError(
            f"tensor {weight!r} was read as {found.dtype}{list(found.shape)}, and {tensor.name!r} "
            f"is packed from {np.dtype(element)}{list(expected)}; compile the checkpoint again"
        )
    return found.reshape(needed, tensor.k_real)


def _panels(columns: NDArray[Any]) -> NDArray[Any]:
    """[n, k] -> [n/64][k/P][64][P]; bf16 pairs move as one 32-bit word."""
    words = columns.view(np.uint32)
    cut = words.reshape(len(words) // PANEL, PANEL, words.shape[1])
    return np.ascontiguousarray(cut.transpose(0, 2, 1)).view(columns.dtype)
