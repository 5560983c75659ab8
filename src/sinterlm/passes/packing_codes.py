"""Panels and tiles of coded weights as bytes, and back; see ``ir/plan.py`` for the layout.

Refuses a scale that the panel's fp16 cannot hold, and columns of one panel that should share scales
and do not: codes that a checkpoint brings are kept exactly or not at all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinterlm.errors import CheckpointError
from sinterlm.ir.plan import PackedTensor
from sinterlm.ir.quant import PANEL_COLUMNS, CodedMatrix, GemmFormat, PanelShape

Bytes = NDArray[np.uint8]
F32 = NDArray[np.float32]

TILE_DEPTH = 64  #: of k that lie side by side in a column of a tile


class PanelWriter:
    """Gathers rows of coded matrices into panels of a tensor of depth ``k``."""

    def __init__(self, tensor: PackedTensor, columns: int) -> None:
        """Room for ``columns`` columns, a multiple of 64, all of them zero for now."""
        assert tensor.format is not None
        self.form, self.name, self.kind = tensor.format, tensor.name, tensor.kind
        self.shape = PanelShape(tensor.format, tensor.k)
        zero = 0 if self.form.is_fp8 else 1 << (self.form.bits - 1)
        self.codes = np.full((columns, tensor.k), zero, np.uint8)
        self.scales = np.zeros((columns, self.shape.num_groups), np.float32)
        self.offsets = np.zeros_like(self.scales)

    def put(self, at: int, rows: CodedMatrix) -> None:
        """Columns ``at``, ``at + 1``, … are ``rows``. Raises CheckpointError where they are coded
        otherwise than the tensor, or fp16 cannot hold a scale."""
        form = self.form
        brought = (rows.bits, rows.group, rows.offsets is None, rows.code)
        if brought != (form.bits, form.group, form.symmetric, form.code):
            raise CheckpointError(
                f"{self.name!r} is packed as {form.name}, and its weights came with {rows.bits} "
                f"bits ({rows.code}), group {rows.group}, {'no ' if brought[2] else ''}offsets"
            )
        last = at + len(rows.codes)
        self.codes[at:last, : rows.codes.shape[1]] = rows.codes
        self.scales[at:last, : rows.scales.shape[1]] = rows.scales
        if rows.offsets is not None:
            self.offsets[at:last, : rows.offsets.shape[1]] = rows.offsets
        if form.scale_bytes == 2 and not _fits_fp16(rows.scales):
            raise CheckpointError(
                f"{self.name!r}: a scale of its weights is not a 16-bit float, which is what "
                "quantised weights are stored with; compile the checkpoint that it was made from"
            )

    def bytes(self) -> Bytes:
        """The bytes [columns / 64, bytes of a panel] in the tensor's order."""
        return self.tiles() if self.kind == "tiles" else self.panels()

    def tiles(self) -> Bytes:
        """As a GPU reads them: codes, then all scales, then all offsets."""
        shape, count = self.shape, len(self.codes) // PANEL_COLUMNS
        cut = self.codes.reshape(count, PANEL_COLUMNS, shape.k // TILE_DEPTH, TILE_DEPTH)
        codes = np.ascontiguousarray(cut.transpose(0, 2, 1, 3))
        if self.form.bits == 4:
            half = TILE_DEPTH // 2
            codes = codes[..., :half] | (codes[..., half:] << np.uint8(4))
        parts = [codes]
        if self.form.rows > 1:
            parts.append(self._shared_scales().view(np.uint8))
        else:
            for tail in self._tails(slice(None)):
                rows = tail.reshape(count, PANEL_COLUMNS, shape.num_groups).transpose(0, 2, 1)
                parts.append(np.ascontiguousarray(rows).view(np.uint8))
        flat = np.concatenate([part.reshape(count, -1) for part in parts], axis=1)
        return np.pad(flat, ((0, 0), (0, shape.nbytes - flat.shape[1])))

    def _shared_scales(self) -> F32:
        """[panels, groups], of panels whose columns share them but for those of padding, which are
        zero. Raises CheckpointError."""
        cut = self.scales.reshape(-1, PANEL_COLUMNS, self.shape.num_groups)
        shared = cut[:, 0]
        real = cut.any(axis=2, keepdims=True)
        if not np.array_equal(cut, np.where(real, shared[:, None], 0), equal_nan=True):
            raise CheckpointError(
                f"{self.name!r}: columns of one panel have scales of different blocks; this is a "
                "fault of SinterLM"
            )
        return np.ascontiguousarray(shared)

    def _tails(self, groups: slice) -> list[NDArray[Any]]:
        """Scales, and offsets where the format has them, [columns, groups]."""
        kind = np.float16 if self.form.scale_bytes == 2 else np.float32
        tails: list[NDArray[Any]] = [self.scales[:, groups].astype(kind)]
        return tails if self.form.symmetric else [*tails, self.offsets[:, groups]]

    def panels(self) -> Bytes:
        """The bytes [columns / 64, bytes of a panel]."""
        shape, bits = self.shape, self.form.bits
        whole = shape.k // shape.group  # groups that are not shorter
        out = np.empty((len(self.codes) // PANEL_COLUMNS, shape.nbytes), np.uint8)
        size = PANEL_COLUMNS * shape.group * bits // 8 + shape.tail_bytes
        at = whole * size
        if whole:
            full = out[:, :at].reshape(len(out), whole, size)
            self._groups(full, self.codes[:, : whole * shape.group], slice(0, whole))
        if whole < shape.num_groups:
            rest = out[:, at:].reshape(len(out), 1, shape.nbytes - at)
            self._groups(rest, self.codes[:, whole * shape.group :], slice(whole, None))
        return out

    def _groups(self, out: Bytes, codes: Bytes, groups: slice) -> None:
        """Fill ``out`` [panels, groups, bytes] from ``codes`` [columns, k of these groups]."""
        panels, count, size = out.shape
        words = _words(codes, self.form.bits)  # [columns, steps]
        cut = words.reshape(panels, PANEL_COLUMNS, count, -1).transpose(0, 2, 3, 1)
        end = size - self.shape.tail_bytes
        out[:, :, :end] = np.ascontiguousarray(cut).view(np.uint8).reshape(panels, count, end)
        for tail in self._tails(groups):
            rows = tail.reshape(panels, PANEL_COLUMNS, count).transpose(0, 2, 1)
            flat = np.ascontiguousarray(rows).view(np.uint8)
            out[:, :, end : end + flat.shape[2]] = flat
            end += flat.shape[2]


def unpack_codes(tensor: PackedTensor, packed: Bytes) -> CodedMatrix:
    """The columns [n, k] of a packed tensor, padding included."""
    assert tensor.format is not None
    form, shape = tensor.format, PanelShape(tensor.format, tensor.k)
    panels = packed.reshape(-1, shape.nbytes)
    if tensor.kind == "tiles":
        return _unpack_tiles(panels, shape)
    columns = len(panels) * PANEL_COLUMNS
    codes: list[Bytes] = []
    scales: list[F32] = []
    offsets: list[F32] = []
    at = 0
    for first in range(0, shape.k, shape.group):
        depth = min(shape.group, shape.k - first)
        end = at + PANEL_COLUMNS * depth * form.bits // 8
        codes.append(_codes(np.ascontiguousarray(panels[:, at:end]), form))
        kind = np.dtype(np.float16 if form.scale_bytes == 2 else np.float32)
        for into, dtype in ((scales, kind), (offsets, np.dtype(np.float32)))[: 2 - form.symmetric]:
            stop = end + PANEL_COLUMNS * dtype.itemsize
            into.append(np.ascontiguousarray(panels[:, end:stop]).view(dtype).reshape(columns))
            end = stop
        at = end
    return CodedMatrix(
        codes=np.concatenate(codes, axis=1),
        scales=np.stack(scales, axis=1).astype(np.float32),
        offsets=None if form.symmetric else np.stack(offsets, axis=1),
        bits=form.bits,
        group=form.group,
    )


def _unpack_tiles(panels: Bytes, shape: PanelShape) -> CodedMatrix:
    """Inverse of ``PanelWriter.tiles``."""
    form, count, groups = shape.form, len(panels), shape.num_groups
    end = PANEL_COLUMNS * shape.k * form.bits // 8
    codes = panels[:, :end].reshape(count, shape.k // TILE_DEPTH, PANEL_COLUMNS, -1)
    if form.bits == 4:
        codes = np.concatenate([codes & 15, codes >> 4], axis=3)
    tails: list[F32] = []
    kinds = (np.dtype(np.float16 if form.scale_bytes == 2 else np.float32), np.dtype(np.float32))
    for kind in kinds[: 2 - form.symmetric]:
        stop = end + groups * shape.scale_columns * kind.itemsize
        rows = np.ascontiguousarray(panels[:, end:stop]).view(kind)
        each = rows.reshape(count, groups, shape.scale_columns)
        cut = np.broadcast_to(each, (count, groups, PANEL_COLUMNS)).transpose(0, 2, 1)
        tails.append(cut.reshape(-1, groups).astype(np.float32))
        end = stop
    return CodedMatrix(
        codes=np.ascontiguousarray(codes.transpose(0, 2, 1, 3)).reshape(-1, shape.k),
        scales=tails[0],
        offsets=None if form.symmetric else tails[1],
        bits=form.bits,
        group=form.group,
        code=form.code,
    )


def _words(codes: Bytes, bits: int) -> NDArray[np.uint32]:
    """[columns, k] -> the 32-bit words of each column: a quad of bytes, or two of nibbles."""
    if bits == 8:
        return np.ascontiguousarray(codes).view(np.uint32)
    quads = np.ascontiguousarray(codes).view(np.uint32)
    return np.asarray(quads[:, 0::2] | (quads[:, 1::2] << np.uint32(4)))


def _codes(raw: Bytes, form: GemmFormat) -> Bytes:
    """Bytes [panels, steps · 64 · 4] of one group -> codes [columns, k]."""
    words = raw.reshape(len(raw), -1, PANEL_COLUMNS, 4).transpose(0, 2, 1, 3)
    rows = words.reshape(len(raw) * PANEL_COLUMNS, -1, 4)
    if form.bits == 4:
        rows = np.stack([rows & 15, rows >> 4], axis=2)
    return np.ascontiguousarray(rows).reshape(len(rows), -1)


def _fits_fp16(scales: F32) -> bool:
    with np.errstate(over="ignore"):
        back = scales.astype(np.float16).astype(np.float32)
    return bool(np.array_equal(back, scales, equal_nan=True))


def rows_of(matrix: CodedMatrix, first: int, last: int) -> CodedMatrix:
    """Rows [first, last) of a coded matrix, as views."""
    offsets: Any = None if matrix.offsets is None else matrix.offsets[first:last]
    return replace(
        matrix, codes=matrix.codes[first:last], scales=matrix.scales[first:last], offsets=offsets
    )
