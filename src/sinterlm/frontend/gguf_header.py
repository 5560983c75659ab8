"""A strict reader of GGUF headers: metadata and where each tensor lies, checked before any use.

Every length is compared with what is left of the file before anything is allocated. Refuses other
magics, versions and byte orders, nested arrays, absurd counts, duplicate names, unknown tensor
types (by name), and tensors that overlap, leave holes, or reach outside the file.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sinterlm.errors import CheckpointError, UnsupportedModelError
from sinterlm.frontend.checkpoint import TensorInfo
from sinterlm.frontend.fields import show

#: Limits: bytes of a header, of a key, of a tensor's name; entries; elements of all arrays.
MAX_HEADER_BYTES = 512 << 20
MAX_KEY_BYTES, MAX_NAME_BYTES = 1 << 16, 1 << 10
MAX_KEYS, MAX_TENSORS, MAX_ARRAY_ELEMENTS = 1 << 16, 1 << 17, 1 << 24
MAX_DIMS, MAX_ELEMENTS = 4, 1 << 44

_STRING, _ARRAY, _BOOL = 8, 9, 7
#: Scalar metadata types: id -> (struct code, NumPy dtype).
_SCALARS: dict[int, tuple[str, str]] = {
    0: ("<B", "<u1"), 1: ("<b", "<i1"), 2: ("<H", "<u2"), 3: ("<h", "<i2"), 4: ("<I", "<u4"),
    5: ("<i", "<i4"), 6: ("<f", "<f4"), 7: ("<B", "<u1"), 10: ("<Q", "<u8"), 11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}  # fmt: skip


@dataclass(frozen=True)
class BlockType:
    """How a GGML tensor type is stored: blocks of ``elements`` in ``nbytes`` bytes."""

    name: str
    elements: int
    nbytes: int


#: Tensor types that are read, by their number in the file.
BLOCK_TYPES: dict[int, BlockType] = {
    0: BlockType("fp32", 1, 4),
    1: BlockType("fp16", 1, 2),
    30: BlockType("bf16", 1, 2),
    2: BlockType("q4_0", 32, 18),
    3: BlockType("q4_1", 32, 20),
    6: BlockType("q5_0", 32, 22),
    7: BlockType("q5_1", 32, 24),
    8: BlockType("q8_0", 32, 34),
    12: BlockType("q4_k", 256, 144),
    13: BlockType("q5_k", 256, 176),
    14: BlockType("q6_k", 256, 210),
}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as stored; shape outermost dimension first, ``offset`` absolute in bytes."""

    info: TensorInfo
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says before its data."""

    metadata: dict[str, Any]  #: int, float, bool, str, or a list of one of them
    tensors: dict[str, GgufTensor]  #: by the file's own names


def read_gguf_header(path: Path) -> GgufHeader:
    """Parse and check a header. Raises CheckpointError, UnsupportedModelError."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        size = path.stat().st_size
        with path.open("rb", buffering=1 << 20) as file:
            return _Parser(path, file, size).parse()
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read ({exc})") from exc


class _Parser:
    """A cursor over the file that never asks for more bytes than the file has left."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.at = 0
        self.elements_left = MAX_ARRAY_ELEMENTS

    def parse(self) -> GgufHeader:
        """Magic, version, counts, metadata, tensors."""
        if self.take(4) != b"GGUF":
            raise CheckpointError(f"{self.path}: not a GGUF file")
        version = self.number("<I")
        if version not in (2, 3):
            raise UnsupportedModelError(
                f"{self.path}: GGUF version {version} (or another byte order) is not supported; "
                "supported: 2 and 3, little-endian"
            )
        num_tensors = self.count("<Q", MAX_TENSORS, "tensors", 24)
        num_keys = self.count("<Q", MAX_KEYS, "metadata keys", 13)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string(MAX_KEY_BYTES)
            if key in metadata:
                raise CheckpointError(f"{self.path}: metadata key {show(key)} appears twice")
            metadata[key] = self.value(self.number("<I"), key)
        entries = [self.tensor() for _ in range(num_tensors)]
        return GgufHeader(metadata, self.place(entries, self.alignment(metadata)))

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        left = min(self.size, MAX_HEADER_BYTES) - self.at
        data = self.file.read(count) if 0 <= count <= left else b""
        if len(data) != count:
            raise CheckpointError(
                f"{self.path}: header needs {count} bytes at offset {self.at}, {max(left, 0)} are "
                "left; the file is truncated or damaged, download it again"
            )
        self.at += count
        return data

    def number(self, code: str) -> Any:
        """One scalar."""
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def count(self, code: str, high: int, what: str, least: int) -> int:
        """A count of things that take at least ``least`` bytes each."""
        count = int(self.number(code))
        if count > high or count * least > self.size - self.at:
            raise CheckpointError(
                f"{self.path}: {count} {what} cannot be true of a file of {self.size} bytes"
            )
        return count

    def string(self, high: int = MAX_HEADER_BYTES) -> str:
        """A length-prefixed UTF-8 string of at most ``high`` bytes."""
        length = int(self.number("<Q"))
        if length > high:
            raise CheckpointError(f"{self.path}: a string of {length} bytes at offset {self.at}")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as exc:
            raise CheckpointError(
                f"{self.path}: a string at offset {self.at - length} is not UTF-8"
            ) from exc

    def value(self, kind: int, key: str) -> Any:
        """A metadata value of a type given by number."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: {show(key)} has unknown value type {kind}")
        value = self.number(_SCALARS[kind][0])
        return self.truth(value, key) if kind == _BOOL else value

    def truth(self, value: int, key: str) -> bool:
        """A stored byte as a bool."""
        if value not in (0, 1):
            raise CheckpointError(f"{self.path}: {show(key)} holds {value}, expected a bool")
        return bool(value)

    def array(self, key: str) -> list[Any]:
        """An array of scalars or strings."""
        kind = self.number("<I")
        if kind != _STRING and kind not in _SCALARS:
            what = "nested arrays" if kind == _ARRAY else f"unknown value type {kind}"
            raise CheckpointError(f"{self.path}: {show(key)} is an array of {what}")
        least = 8 if kind == _STRING else np.dtype(_SCALARS[kind][1]).itemsize
        count = self.count("<Q", self.elements_left, f"elements of {show(key)}", least)
        self.elements_left -= count
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        values = np.frombuffer(self.take(count * least), np.dtype(_SCALARS[kind][1])).tolist()
        return [self.truth(v, key) for v in values] if kind == _BOOL else list(values)

    def tensor(self) -> tuple[str, TensorInfo, int]:
        """Name, info and relative offset of the next tensor."""
        name = self.string(MAX_NAME_BYTES)
        where = f"{self.path}: tensor {show(name)}"
        num_dims = int(self.number("<I"))
        if not 1 <= num_dims <= MAX_DIMS:
            raise CheckpointError(f"{where} has {num_dims} dimensions, expected 1 to {MAX_DIMS}")
        dims = tuple(int(self.number("<Q")) for _ in range(num_dims))
        kind, offset = int(self.number("<I")), int(self.number("<Q"))
        if kind not in BLOCK_TYPES:
            raise UnsupportedModelError(
                f"{where} has type {_type_name(kind)}, which is not supported; supported: "
                f"{', '.join(t.name.upper() for t in BLOCK_TYPES.values())}"
            )
        block = BLOCK_TYPES[kind]
        elements = math.prod(dims)
        if not 1 <= elements <= MAX_ELEMENTS or dims[0] % block.elements:
            raise CheckpointError(
                f"{where} has shape {show(list(dims))}, which cannot be stored as {block.name}"
            )
        nbytes = elements // block.elements * block.nbytes
        return name, TensorInfo(dims[::-1], block.name, nbytes), offset

    def alignment(self, metadata: dict[str, Any]) -> int:
        """Bytes to which the data section and every tensor in it are aligned."""
        value = metadata.get("general.alignment", 32)
        power = type(value) is int and 8 <= value <= 1 << 20 and value & (value - 1) == 0
        if not power:
            raise CheckpointError(
                f"{self.path}: general.alignment is {show(value)}, expected a power of two"
            )
        return int(value)

    def place(
        self, entries: list[tuple[str, TensorInfo, int]], alignment: int
    ) -> dict[str, GgufTensor]:
        """Tensors at absolute offsets, after checking that they follow each other in the file."""
        base = -(-self.at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        expected = 0
        for name, info, offset in sorted(entries, key=lambda entry: entry[2]):
            if name in tensors:
                raise CheckpointError(f"{self.path}: tensor {show(name)} appears twice")
            if offset != expected:
                raise CheckpointError(
                    f"{self.path}: tensor {show(name)} is at offset {offset}, expected {expected}"
                )
            if base + offset + info.nbytes > self.size:
                raise CheckpointError(
                    f"{self.path}: tensor {show(name)} ends at byte {base + offset + info.nbytes} "
                    f"of a file of {self.size}; the file is truncated, download it again"
                )
            tensors[name] = GgufTensor(info, base + offset)
            expected = -(-(offset + info.nbytes) // alignment) * alignment
        return tensors


def _type_name(kind: int) -> str:
    from gguf.constants import GGMLQuantizationType  # here: only errors need it

    try:
        return GGMLQuantizationType(kind).name
    except ValueError:
        return f"number {kind}"
