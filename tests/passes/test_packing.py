"""Packed bytes: the layouts of ``ir/plan.py`` written out as loops, at odd shapes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinterlm.errors import CheckpointError
from sinterlm.ir.bf16 import to_bf16
from sinterlm.ir.graph import DecoderConfig
from sinterlm.ir.plan import PackedTensor, Segment
from sinterlm.passes import packing
from sinterlm.passes.packing import pack, packed_chunks, unpack
from sinterlm.passes.pipeline import plan
from tests.ir.graphs import config, configs, plain_graph, random_weights


class Reader:
    """Checkpoint tensors from memory; counts reads."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.tensors = tensors
        self.reads: list[tuple[str, str]] = []

    def __call__(self, name: str, dtype: str) -> np.ndarray:
        self.reads.append((name, dtype))
        tensor = self.tensors[name]
        return to_bf16(tensor) if dtype == "bf16" else tensor


def bits(x: np.ndarray) -> np.ndarray:
    return x if x.dtype == np.uint16 else x.view(np.uint32)


@settings(max_examples=40)
@given(configs(), st.sampled_from(["bf16", "fp32"]))
def test_every_column_is_where_the_layout_says(c: DecoderConfig, dtype: str) -> None:
    graph = plain_graph(c, dtype)
    layout, read = plan(graph).layout, Reader(random_weights(graph))
    file = np.full(layout.nbytes, 0xAA, np.uint8)
    at = 0
    for offset, chunk in packed_chunks(layout, read):
        assert at <= offset
        file[offset : offset + len(chunk)] = np.frombuffer(chunk, np.uint8)
        at = offset + len(chunk)
    for t in layout.tensors:
        element = np.uint16 if t.dtype == "bf16" else np.float32
        packed = file[t.offset : t.offset + t.nbytes].view(element)
        assert np.array_equal(bits(packed), bits(pack(t, read)))
        columns = unpack(t, packed).reshape(t.n, t.k)
        expected = np.zeros((t.n, t.k), element)
        for s in t.segments:
            rows = read(s.weight, t.dtype)[s.start : s.stop].reshape(s.stop - s.start, -1)
            expected[s.at : s.at + len(rows), : t.k_real] = rows
        assert np.array_equal(bits(columns), bits(expected)), t.name


@pytest.mark.parametrize(("dtype", "pair"), [("bf16", 2), ("fp32", 1)])
def test_panel_order(dtype: str, pair: int) -> None:
    """[N/64][K/P][64][P], element by element."""
    t = PackedTensor("w", "panels", dtype, 128, 16, 11, (Segment("w", 0, 100, 0),), 0, 0)
    w = np.arange(1100, dtype=np.float32).reshape(100, 11) % 250  # exact in bf16
    packed = pack(t, Reader({"w": w}))
    full = np.zeros((128, 16), np.float32)
    full[:100, :11] = w
    full = to_bf16(full) if dtype == "bf16" else full
    for n in (0, 1, 63, 64, 99, 100, 127):
        for k in range(16):
            at = ((n // 64 * (16 // pair) + k // pair) * 64 + n % 64) * pair + k % pair
            assert packed[at] == full[n, k]


def test_special_values_pass_through() -> None:
    stored = np.arange(1 << 16, dtype=np.uint16).reshape(64, 1024)  # every bf16 there is
    t = PackedTensor("w", "panels", "bf16", 64, 1024, 1024, (Segment("w", 0, 64, 0),), 0, 0)
    assert np.array_equal(unpack(t, pack(t, lambda name, dtype: stored)), stored)


def test_reads_each_tensor_once_and_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_CHUNK_BYTES", 1 << 14)
    graph = plain_graph(config(layers=1, ffn=1000, vocab=3000, hidden=64))
    layout, read = plan(graph).layout, Reader(random_weights(graph))
    chunks = list(packed_chunks(layout, read))
    assert sorted(name for name, _ in read.reads) == sorted(graph.weights)
    assert {d for name, d in read.reads if "norm" in name} == {"fp32"}
    panels = [t for t in layout.tensors if t.kind == "panels"]
    largest = max(64 * t.k * 2 for t in panels)
    assert max(len(chunk) for _, chunk in chunks) <= max(1 << 14, largest)
    assert len(chunks) > len(layout.tensors)
    whole = {t.name: pack(t, read) for t in layout.tensors}
    monkeypatch.setattr(packing, "_CHUNK_BYTES", 1 << 20)
    for t in layout.tensors:
        assert np.array_equal(bits(whole[t.name]), bits(pack(t, read))), "chunks change nothing"


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((64, 15), np.uint16),
        np.zeros((63, 16), np.uint16),
        np.zeros((65, 16), np.uint16),
        np.zeros((64, 16), np.float32),
        np.zeros(1024, np.uint16),
    ],
)
def test_refuses_a_tensor_that_is_not_as_planned(wrong: np.ndarray) -> None:
    t = PackedTensor("layers.0.o", "panels", "bf16", 64, 16, 16, (Segment("w", 0, 64, 0),), 0, 0)
    with pytest.raises(CheckpointError, match=r"'w' was read as .*'layers.0.o' is packed from"):
        pack(t, lambda name, dtype: wrong)
