"""Turns checkpoint tensors into the bytes of the packed file, a few panels at a time.

Padding is zeros. NaN and infinity pass through. Matrices that are stored in codes are quantised
here, unless the checkpoint has their codes. Holds the checkpoint tensors that one packed tensor
is made of and two chunks, never a packed tensor whole. Refuses a tensor of another shape or dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sinterlm.errors import CheckpointError
from sinterlm.ir.bf16 import from_bf16
from sinterlm.ir.plan import PackedTensor, Segment, WeightLayout, pitch_of
from sinterlm.ir.quant import CodedMatrix, GemmFormat
from sinterlm.passes.coding import in_format
from sinterlm.passes.layout import PANEL
from sinterlm.passes.packing_codes import PanelWriter, rows_of, unpack_codes

PACKER_VERSION = "3"  #: part of the key of packed weights: bump when packed bytes change

Read = Callable[[str, Literal["bf16", "fp32"]], NDArray[Any]]

#: A matrix as floats without loss: bf16 bits where bf16 holds every value, else float32.
ReadExact = Callable[[str], NDArray[Any]]
#: The codes a checkpoint has for a matrix, in the format of the layout; None = it has floats.
ReadCoded = Callable[[str, GemmFormat], CodedMatrix | None]

#: Most columns and bytes packed at a time: what stays in cache between its two copies is fast.
_CHUNK_COLUMNS = 16 * PANEL
_CHUNK_BYTES = 1 << 20


def packed_chunks(
    layout: WeightLayout,
    read: Read,
    read_exact: ReadExact | None = None,
    read_coded: ReadCoded | None = None,
) -> Iterator[tuple[int, memoryview]]:
    """``(offset, bytes)`` of the whole file, ascending. ``read(name, dtype)`` gives a checkpoint
    tensor [out, in] (or [n]) as uint16 bf16 bits or float32. Raises what the readers raise, and
    CheckpointError for a tensor that does not have the rows and columns that the layout counts on.
    """
    exact = read_exact or (lambda name: read(name, "fp32"))
    coded = read_coded or (lambda name, form: None)
    for tensor in layout.tensors:
        offset = tensor.offset
        is_coded = tensor.format is not None
        chunks = coded_chunks(tensor, exact, coded) if is_coded else tensor_chunks(tensor, read)
        for chunk in chunks:
            yield offset, chunk.reshape(-1).view(np.uint8).data
            offset += chunk.nbytes


def pack(tensor: PackedTensor, read: Read) -> NDArray[Any]:
    """One packed tensor whole, flat, as uint16 (bf16) or float32; in codes, as bytes."""
    if tensor.format is not None:
        chunks = coded_chunks(tensor, lambda name: read(name, "fp32"), lambda name, form: None)
    else:
        chunks = tensor_chunks(tensor, read)
    return np.concatenate([chunk.reshape(-1) for chunk in chunks])


def unpack(tensor: PackedTensor, packed: NDArray[Any]) -> NDArray[Any]:
    """The inverse of ``pack``: [n, k] columns in packed order (``vector``: [n]); what codes stand
    for comes back as float32."""
    if tensor.format is not None:
        return unpack_codes(tensor, packed).dequantise()
    if tensor.kind == "vector":
        return packed.reshape(tensor.n)
    if tensor.kind == "rows":
        return packed.reshape(tensor.n, tensor.k)
    if tensor.kind == "tiles":
        tiles = packed.reshape(tensor.n // PANEL, tensor.k // PANEL, PANEL, PANEL)
        return tiles.transpose(0, 2, 1, 3).reshape(tensor.n, tensor.k)
    if tensor.kind == "pitched":
        return packed.reshape(tensor.n, -1)[:, : tensor.k]
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
        yield _ORDERS[tensor.kind](columns) if tensor.kind in _ORDERS else columns


def coded_chunks(
    tensor: PackedTensor, read_exact: ReadExact, read_coded: ReadCoded
) -> Iterator[NDArray[np.uint8]]:
    """The panels of one tensor in codes, in order; floats are quantised as they come."""
    form = tensor.format
    assert form is not None
    width = max(PANEL, min(_CHUNK_COLUMNS, _CHUNK_BYTES // tensor.k) // PANEL * PANEL)
    floats: dict[str, NDArray[Any]] = {}
    codes: dict[str, CodedMatrix] = {}
    for first in range(0, tensor.n, width):
        last = min(first + width, tensor.n)
        writer = PanelWriter(tensor, last - first)
        for segment in tensor.segments:
            lo, hi = max(segment.at, first), min(_end(segment), last)
            if lo >= hi:
                continue
            name, start, stop = segment.weight, lo - segment.at, hi - segment.at
            start, stop = segment.start + start, segment.start + stop
            if name not in codes and name not in floats:
                ready = read_coded(name, form)
                if ready is not None:
                    codes[name] = _checked_codes(tensor, name, ready)
                else:
                    floats[name] = _checked(tensor, name, read_exact(name))
            if name in codes:
                writer.put(lo - first, rows_of(codes[name], start, stop))
                continue
            rows = floats[name][start:stop]
            wide = from_bf16(rows) if rows.dtype == np.uint16 else rows
            writer.put(lo - first, in_format(wide, form))
        yield writer.bytes()


def _end(segment: Segment) -> int:
    """One past the last packed column."""
    return segment.at + segment.stop - segment.start


def _matrix(tensor: PackedTensor, weight: str, read: Read) -> NDArray[Any]:
    """A checkpoint tensor as [rows, k_real]."""
    wanted: Literal["bf16", "fp32"] = "bf16" if tensor.dtype == "bf16" else "fp32"
    found = read(weight, wanted)
    return _checked(tensor, weight, found, np.uint16 if wanted == "bf16" else np.float32)


def _checked(
    tensor: PackedTensor, weight: str, found: NDArray[Any], element: type | None = None
) -> NDArray[Any]:
    """``found`` [rows, k_real]. Raises CheckpointError for another shape or ``element``."""
    needed = _rows_needed(tensor, weight)
    expected = (needed,) if tensor.kind == "vector" else (needed, tensor.k_real)
    element = element or (np.uint16 if found.dtype == np.uint16 else np.float32)
    if found.shape != expected or found.dtype != element:
        raise CheckpointError(
            f"tensor {weight!r} was read as {found.dtype}{list(found.shape)}, and {tensor.name!r} "
            f"is packed from {np.dtype(element)}{list(expected)}; compile the checkpoint again"
        )
    return found.reshape(needed, tensor.k_real)


def _checked_codes(tensor: PackedTensor, weight: str, found: CodedMatrix) -> CodedMatrix:
    """``found``. Raises CheckpointError for another shape."""
    expected = (_rows_needed(tensor, weight), tensor.k_real)
    if found.codes.shape != expected:
        raise CheckpointError(
            f"the codes of tensor {weight!r} are {list(found.codes.shape)}, and {tensor.name!r} is "
            f"packed from {list(expected)}; compile the checkpoint again"
        )
    return found


def _rows_needed(tensor: PackedTensor, weight: str) -> int:
    return max(s.stop for s in tensor.segments if s.weight == weight)


def _panels(columns: NDArray[Any]) -> NDArray[Any]:
    """[n, k] -> [n/64][k/P][64][P]; bf16 pairs move as one 32-bit word."""
    words = columns.view(np.uint32)
    cut = words.reshape(len(words) // PANEL, PANEL, words.shape[1])
    return np.ascontiguousarray(cut.transpose(0, 2, 1)).view(columns.dtype)


def _tiles(columns: NDArray[Any]) -> NDArray[Any]:
    """[n, k] -> [n/64][k/64][64][64]."""
    cut = columns.reshape(len(columns) // PANEL, PANEL, columns.shape[1] // PANEL, PANEL)
    return np.ascontiguousarray(cut.transpose(0, 2, 1, 3))


def _pitched(columns: NDArray[Any]) -> NDArray[Any]:
    """[n, k] -> [n][pitch_of(k)]."""
    k = columns.shape[1]
    return np.pad(columns, ((0, 0), (0, pitch_of(k) - k)))


#: How the columns of a chunk are put in order, by the kind of tensor.
_ORDERS: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "panels": _panels, "tiles": _tiles, "pitched": _pitched,
}  # fmt: skip
