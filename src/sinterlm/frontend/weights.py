"""Reading safetensors files: a strict check of the header, then tensors as views of the file.

Refuses, before anything is mapped: truncated files, headers beyond 100 MB, offsets outside the
file, overlapping tensors and holes, sizes that disagree with shapes, duplicate names, and shard
names that leave the checkpoint's directory.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sinterlm.errors import CheckpointError, UnsupportedModelError
from sinterlm.frontend.checkpoint import DIGEST_CHUNK, TensorInfo
from sinterlm.frontend.fields import Fields, parse_json, read_json, show
from sinterlm.frontend.numeric import INTEGERS, STORAGE, Array

#: Limits of a header: bytes (the format's own), dimensions of a tensor, and one dimension.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMS = 8
MAX_DIM = 1 << 40

#: Floats are weights; the rest are parts of a matrix in codes, which ``coded_tensors`` reads.
_FLOATS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_DTYPES = _FLOATS | {"F8_E4M3": "e4m3fn", "I8": "int8", "I32": "int32", "I64": "int64"}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_SIZES = {name: kind.itemsize for name, kind in (STORAGE | INTEGERS).items()}
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: absolute byte offset in ``file``."""

    info: TensorInfo
    file: Path
    offset: int


def is_buffer(name: str) -> bool:
    """Whether a tensor is a rotary table that old checkpoints carry; it is derived, not learned."""
    return name.endswith(".rotary_emb.inv_freq")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one safetensors file, checked. Raises CheckpointError."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; download the checkpoint again")
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: not a safetensors file, or a truncated one (header of {length} bytes "
                    f"in a file of {size}); download it again"
                )
            text = file.read(length)
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read ({exc})") from exc
    entries = parse_json(text, f"{path}: header", unique_keys=True)
    entries.pop("__metadata__", None)
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, StoredTensor] = {}
    for name, entry in entries.items():
        info, start = _entry(path, name, entry)
        spans.append((start, start + info.nbytes, name))
        tensors[name] = StoredTensor(info, path, 8 + length + start)
    _check_spans(path, spans, size - 8 - length)
    return {name: tensor for name, tensor in tensors.items() if not is_buffer(name)}


def _entry(path: Path, name: str, entry: object) -> tuple[TensorInfo, int]:
    """One header entry: the tensor and its offset in the data section."""
    where = f"{path}: tensor {show(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets")
    shape = _ints(entry["shape"], MAX_DIM)
    if shape is None or len(shape) > MAX_DIMS:
        raise CheckpointError(f"{where}: shape {show(entry['shape'])} is not a list of sizes")
    offsets = _ints(entry["data_offsets"], 1 << 62)
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {show(entry['data_offsets'])} are no range")
    nbytes = offsets[1] - offsets[0]
    if is_buffer(name):
        return TensorInfo(shape, "buffer", nbytes), offsets[0]
    dtype = Fields(entry, where).text("dtype")
    if dtype not in _DTYPES:
        raise UnsupportedModelError(
            f"{where}: dtype {show(dtype)} is not supported; supported: {', '.join(_FLOATS)}"
        )
    expected = math.prod(shape) * _SIZES[_DTYPES[dtype]]
    if nbytes != expected:
        raise CheckpointError(
            f"{where}: {dtype} {list(shape)} takes {expected} bytes, data_offsets span {nbytes}"
        )
    return TensorInfo(shape, _DTYPES[dtype], nbytes), offsets[0]


def check_floats(tensors: Mapping[str, StoredTensor]) -> None:
    """Raises UnsupportedModelError for integers and fp8 that are no part of a matrix in codes."""
    for name, tensor in tensors.items():
        if tensor.info.dtype in INTEGERS:
            raise UnsupportedModelError(
                f"{tensor.file}: tensor {show(name)}: dtype {_NAMES[tensor.info.dtype]} is not "
                f"supported here; supported: {', '.join(_FLOATS)}, and codes that "
                "quantization_config in config.json describes"
            )


def _ints(value: object, high: int) -> tuple[int, ...] | None:
    """A JSON list of integers in [0, high] as a tuple, or None."""
    if not isinstance(value, list):
        return None
    if not all(type(item) is int and 0 <= item <= high for item in value):
        return None
    return tuple(value)


def _check_spans(path: Path, spans: list[tuple[int, int, str]], size: int) -> None:
    """Tensors must fill the data section of ``size`` bytes exactly, without overlap."""
    at = 0
    for start, stop, name in sorted(spans):
        if start != at:
            fault = "overlaps another" if start < at else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {show(name)} at byte {start} {fault}")
        at = stop
    if at != size:
        raise CheckpointError(
            f"{path}: holds {size} bytes of tensors, its header describes {at}; the file is "
            "truncated or damaged, download it again"
        )


def find_shards(directory: Path) -> tuple[dict[str, StoredTensor], tuple[Path, ...]]:
    """Tensors and files of a checkpoint directory: ``model.safetensors``, else the shards of its
    index, else the only ``*.safetensors``. Raises CheckpointError."""
    single = directory / "model.safetensors"
    if single.is_file():
        return read_header(single), (single,)
    index = directory / _INDEX
    if index.is_file():
        return _read_index(directory, index)
    found = sorted(directory.glob("*.safetensors"))
    if len(found) == 1:
        return read_header(found[0]), (found[0],)
    if found:
        raise CheckpointError(
            f"{directory}: {len(found)} safetensors files but no {_INDEX}; download it"
        )
    _refuse_pickles(directory)
    raise CheckpointError(f"{directory}: no *.safetensors file; download the weights")


def _refuse_pickles(directory: Path) -> None:
    for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt"):
        for pickle in sorted(directory.glob(pattern)):
            raise UnsupportedModelError(
                f"{pickle}: pickle files can run code when loaded and are never read; supported: "
                "*.safetensors and .gguf (convert it, or download the safetensors version)"
            )


def _read_index(directory: Path, index: Path) -> tuple[dict[str, StoredTensor], tuple[Path, ...]]:
    data = read_json(index)
    weight_map = data.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: 'weight_map' is {show(weight_map)}, expected an object")
    shards: dict[str, dict[str, StoredTensor]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise CheckpointError(
                f"{index}: shard {show(shard)} of tensor {show(name)} is not the name of a "
                "safetensors file in this directory"
            )
        if shard not in shards:
            shards[shard] = read_header(directory / shard)
        if name not in shards[shard] and not is_buffer(name):
            raise CheckpointError(f"{index}: tensor {show(name)} is not in {shard}")
    tensors: dict[str, StoredTensor] = {}
    for shard, held in shards.items():
        for name, tensor in held.items():
            if weight_map.get(name) != shard:
                raise CheckpointError(f"{directory / shard}: tensor {show(name)} is not in {index}")
            tensors[name] = tensor
    return tensors, (index, *(directory / shard for shard in sorted(shards)))


def _is_plain_name(shard: str) -> bool:
    return (
        shard.endswith(".safetensors")
        and len(shard) <= 255
        and not any(c in shard for c in ("/", "\\", "\0"))
    )


class MappedFiles:
    """Read-only memory maps of weight files, made on first use."""

    def __init__(self) -> None:
        self._maps: dict[Path, Any] = {}

    def bytes_at(self, path: Path, offset: int, nbytes: int) -> Array:
        """uint8 view of [offset, offset + nbytes). Raises CheckpointError if the file shrank."""
        if nbytes == 0:
            return np.empty(0, np.uint8)
        if path not in self._maps:
            try:
                self._maps[path] = np.memmap(path, np.uint8, "r")
            except (OSError, ValueError) as exc:
                raise CheckpointError(f"{path}: cannot be mapped ({exc})") from exc
        mapped: Array = np.asarray(self._maps[path])
        if offset + nbytes > mapped.size:
            raise CheckpointError(f"{path}: the file shrank while it was read; download it again")
        return mapped[offset : offset + nbytes]

    def pieces(self, path: Path, offset: int, nbytes: int) -> Iterator[memoryview]:
        """The same bytes in pieces of at most DIGEST_CHUNK."""
        view = self.bytes_at(path, offset, nbytes).data
        for start in range(0, nbytes, DIGEST_CHUNK):
            yield view[start : start + DIGEST_CHUNK]

    def close(self) -> None:
        """Drop the maps; arrays already handed out stay valid."""
        self._maps.clear()
