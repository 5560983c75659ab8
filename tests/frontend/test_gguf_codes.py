"""Codes of GGUF files: what llama.cpp's package makes of the same blocks, in the order of rows that
Hugging Face has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from sinterlm.frontend.gguf import GgufCheckpoint
from sinterlm.ir.quant import GemmFormat
from tests.frontend.builders import (
    gguf_bytes,
    gguf_metadata,
    gguf_tensors,
    tiny_arrays,
    tiny_config,
)

DATA = tiny_config(hidden_size=64, intermediate_size=128)
KEPT = {"q4_0": (4, True), "q4_1": (4, False), "q8_0": (8, True)}


def quantised_file(path: Path, kind: str) -> tuple[GgufCheckpoint, dict[str, Any]]:
    """A llama file whose matrices are of one block type, and the floats it was made of."""
    arrays, number = tiny_arrays(DATA), GGMLQuantizationType[kind.upper()]
    tensors = gguf_tensors(arrays, DATA)
    for name, (shape, _, raw) in tensors.items():
        if len(shape) == 2:
            blocks = gguf.quants.quantize(np.frombuffer(raw, "<f4").reshape(shape), number)
            tensors[name] = (shape, number.value, blocks.tobytes())
    path.write_bytes(gguf_bytes(gguf_metadata(DATA), tensors))
    return GgufCheckpoint(path), arrays


@pytest.mark.parametrize("kind", KEPT)
def test_blocks_are_kept_exactly(kind: str, tmp_path: Path) -> None:
    checkpoint, arrays = quantised_file(tmp_path / "m.gguf", kind)
    bits, symmetric = KEPT[kind]
    matrices = {name for name, array in arrays.items() if array.ndim == 2}
    assert set(checkpoint.stored_formats) == matrices
    for name in matrices:
        form = checkpoint.stored_formats[name]
        assert form == GemmFormat(bits, 32, symmetric, "graph", 64)
        coded = checkpoint.read_coded(name, form)
        assert coded is not None and (coded.offsets is None) is symmetric
        floats = coded.dequantise()
        assert np.array_equal(floats, checkpoint.read(name, "fp32"))  # by llama.cpp's package
        step = np.abs(arrays[name]).max() / (1 << (bits - 1))
        assert np.abs(floats - arrays[name]).max() < 1.01 * step  # Q4_0 clips by up to a step
        assert checkpoint.read_coded(name, replace(form, group=64)) is None
        assert checkpoint.origin(name, form) == f"as stored ({kind})"
        assert checkpoint.origin(name, replace(form, bits=12 - bits)) == f"lossy from {kind}"


def test_they_count_where_they_are_asked_for(tmp_path: Path) -> None:
    checkpoint, _ = quantised_file(tmp_path / "m.gguf", "q4_1")
    assert checkpoint.codes_for("bf16", are_asked=False) == {}
    assert checkpoint.codes_for("bf16", are_asked=True) == checkpoint.stored_formats


@pytest.mark.parametrize("kind", ["q5_0", "q5_1", "bf16"])
def test_other_types_are_floats(kind: str, tmp_path: Path) -> None:
    checkpoint, _ = quantised_file(tmp_path / "m.gguf", kind)
    assert checkpoint.stored_formats == {}
    name = "model.layers.0.mlp.up_proj.weight"
    assert checkpoint.read_coded(name, GemmFormat(4, 32, True, "graph", 64)) is None
