"""Matrices in codes: rounding to nearest, formats of a graph, and panels written out as loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinterlm.errors import CheckpointError, UnsupportedModelError
from sinterlm.frontend.dummy import DummyCheckpoint
from sinterlm.ir.graph import DecoderConfig
from sinterlm.ir.plan import PackedTensor, Segment
from sinterlm.ir.quant import CodedMatrix, GemmFormat, PanelShape
from sinterlm.passes.formats import Scheme
from sinterlm.passes.packing import coded_chunks, pack, packed_chunks, unpack
from sinterlm.passes.packing_codes import unpack_codes
from sinterlm.passes.pipeline import plan
from sinterlm.passes.quantise import quantise
from tests.ir.graphs import config, configs, plain_graph, random_weights

SCHEMES = [Scheme(8, 0, "int8"), Scheme(4, 32, "int8"), Scheme(4, 128, "graph")]
BITS = pytest.mark.parametrize("bits", [8, 4])
GROUPS = pytest.mark.parametrize("group", [0, 32, 64, 128])
SYMMETRIC = pytest.mark.parametrize("symmetric", [True, False])


def normal(rows: int, depth: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, depth)).astype(np.float32)


class TestQuantise:
    @SYMMETRIC
    def test_scales_of_groups_are_fp16_numbers(self, symmetric: bool) -> None:
        scales = quantise(normal(9, 64), 4, 32, symmetric).scales
        assert np.array_equal(scales, scales.astype(np.float16))

    @BITS
    @SYMMETRIC
    def test_a_constant_row_is_kept(self, bits: int, symmetric: bool) -> None:
        for value in (0.0, 0.25, -0.25):
            coded = quantise(np.full((1, 64), value, np.float32), bits, 32, symmetric)
            assert np.abs(coded.dequantise() - value).max() <= 2**-11 * abs(value)

    @SYMMETRIC
    @pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf])
    def test_damage_stays_in_its_group_and_is_seen(self, symmetric: bool, damage: float) -> None:
        matrix = normal(2, 64)
        matrix[1, 40] = damage
        back = quantise(matrix, 4, 32, symmetric).dequantise()
        assert np.isnan(back[1, 32:]).all()
        assert np.isfinite(back[0]).all() and np.isfinite(back[1, :32]).all()


class TestFormats:
    def test_heads_decide_the_groups_of_what_attention_writes(self) -> None:
        graph = plain_graph(config(head_dim=48), "bf16")
        formats = plan(graph, scheme=Scheme(4, 32, "int8")).graph.formats
        assert formats["0.o.weight"].name == "w4g32-a8g16"
        assert formats["0.down.weight"].name == "w4g32-a8g64"
        assert formats["embed"].name == "w8-a8g64"
        assert not any("norm" in name or "bias" in name for name in formats)

    @pytest.mark.parametrize(
        ("scheme", "expected"),
        [
            (Scheme(), "w4g128z"),
            (Scheme(4), "w4g128z"),
            (Scheme(4, 128), "w4g128z"),
            (Scheme(4, act="int8"), "w4g128z-a8g64"),
            (Scheme(act="int8"), "w4g128z-a8g64"),
            (Scheme(4, 32), "w4g32-a8g64"),  # asked for, so it is quantised again
            (Scheme(8), "w8g128-a8g64"),
            (Scheme(8, act="graph"), "w8g128"),
        ],
    )
    def test_codes_of_the_checkpoint_are_kept_unless_others_are_asked_for(
        self, scheme: Scheme, expected: str
    ) -> None:
        stored = {"0.down.weight": GemmFormat(4, 128, False, "graph", 64)}
        made = plan(plain_graph(config(), "bf16"), scheme=scheme, stored=stored)
        down = made.layout.find("layers.0.down")
        assert down is not None and down.format is not None and down.format.name == expected

    @pytest.mark.parametrize(
        ("scheme", "expected"),
        [
            (Scheme(fp8="e4m3fn"), "e4m3fn-b128-a8g64"),
            (Scheme(act="graph", fp8="e4m3fnuz"), "e4m3fnuz-b128"),
            (Scheme(act="fp8", fp8="e4m3fn"), "e4m3fn-b128-a8g64"),
            (Scheme(8, act="graph", is_fp8=True, fp8="e4m3fn"), "e4m3fn-b128"),
            (Scheme(8, act="graph"), "w8g128"),
            (Scheme(4, act="graph", fp8="e4m3fn"), "w4g32"),
        ],
    )
    def test_fp8_of_the_checkpoint_is_kept_unless_other_codes_are_asked_for(
        self, scheme: Scheme, expected: str
    ) -> None:
        stored = {"0.down.weight": GemmFormat(8, 128, True, "fp8", 64, "e4m3fn", 128)}
        made = plan(plain_graph(config(ffn=192), "bf16"), scheme=scheme, stored=stored)
        assert made.graph.formats["0.down.weight"].name == expected

    def test_fp8_beside_floats_is_refused_unless_other_codes_are_asked_for(self) -> None:
        graph = plain_graph(config(), "bf16")
        stored = {"0.k.weight": GemmFormat(8, 0, True, "graph", 64, "e4m3fn")}
        with pytest.raises(UnsupportedModelError, match=r"0\.k\.weight.*0\.q\.weight.*--quant"):
            plan(graph, None, Scheme(act="graph", fp8="e4m3fn"), stored)
        scheme = Scheme(8, act="graph", is_fp8=True, fp8="e4m3fn")
        assert plan(graph, None, scheme, stored).graph.formats["0.q.weight"].name == "e4m3fn"

    def test_fp8_of_floats_leaves_the_ends_as_whole_numbers(self) -> None:
        scheme = Scheme(8, act="fp8", is_fp8=True, fp8="e4m3fnuz")
        made = plan(plain_graph(config(hidden=256, ffn=320), "bf16"), scheme=scheme)
        names = {n: f.name for n, f in made.graph.formats.items() if n[:2] in ("0.", "em", "he")}
        assert names["embed"] == "w8"
        assert names["0.q.weight"] == "e4m3fnuz-a8g128"
        assert names["0.down.weight"] == "e4m3fnuz-a8g64"
        tensor = made.layout.find("layers.0.down")
        assert tensor is not None and tensor.dtype == "fp8"
        stored = {"0.down.weight": GemmFormat(4, 128, False, "graph", 64)}
        kept = plan(plain_graph(config(), "bf16"), None, Scheme(act="fp8", fp8="e4m3fn"), stored)
        assert kept.graph.formats["0.down.weight"].name == "w4g128z"

    def test_one_gemm_takes_one_format(self) -> None:
        stored = {"0.k.weight": GemmFormat(4, 32, True, "int8", 64)}
        formats = plan(plain_graph(config(), "bf16"), stored=stored).graph.formats
        assert formats == {}
        formats = plan(plain_graph(config(), "bf16"), None, Scheme(4), stored).graph.formats
        assert {formats[f"0.{x}.weight"].name for x in "qkv"} == {"w4g32-a8g64"}

    def test_the_hash_of_the_layout_covers_the_format(self) -> None:
        graph = plain_graph(config(), "bf16")
        schemes = [Scheme(), *SCHEMES, Scheme(4, 32, "graph"), Scheme(8, 0, "graph")]
        hashes = {plan(graph, scheme=scheme).layout.layout_hash for scheme in schemes}
        assert len(hashes) == len(schemes)


def byte_at(form: GemmFormat, k: int, column: int, at: int) -> tuple[int, int]:
    """Where the code of weight (column, at) lies in its panel, and its shift in the byte."""
    shape = PanelShape(form, k)
    group, inside = divmod(at, shape.group)
    start = group * (64 * shape.group * form.bits // 8 + shape.tail_bytes)
    if form.bits == 8:
        return start + inside // 4 * 256 + column * 4 + inside % 4, 0
    return start + inside // 8 * 256 + column * 4 + inside % 4, 4 * (inside // 4 % 2)


@BITS
@GROUPS
@SYMMETRIC
def test_every_code_is_where_the_layout_says(bits: int, group: int, symmetric: bool) -> None:
    form, k = GemmFormat(bits, group, symmetric, "int8", 64), 192
    nbytes = 2 * PanelShape(form, k).nbytes
    segments = (Segment("a", 2, 70, 0), Segment("b", 0, 40, 80))
    tensor = PackedTensor("t", "panels", "int4", 128, k, 150, segments, 0, nbytes, form)
    matrices = {"a": normal(70, 150), "b": normal(40, 150, 1)}
    packed = pack(tensor, lambda name, dtype: matrices[name])
    assert packed.nbytes == nbytes
    columns = unpack_codes(tensor, packed)
    for name, start, stop, at in [("a", 2, 70, 0), ("b", 0, 40, 80)]:
        want = quantise(matrices[name][start:stop], bits, group, symmetric)
        width, groups = len(want.codes), want.scales.shape[1]
        assert np.array_equal(columns.codes[at : at + width, :150], want.codes)
        assert np.array_equal(columns.scales[at : at + width, :groups], want.scales)
        for column, depth in [(at, 0), (at + 1, 149), (at + width - 1, 77), (at + 33, 128)]:
            where, shift = byte_at(form, k, column % 64, depth)
            raw = int(packed.reshape(2, -1)[column // 64, where])
            code = raw >> shift & (1 << bits) - 1
            assert code == want.codes[column - at, depth]
    padding = unpack(tensor, packed)
    assert not padding[68:80].any() and not padding[120:].any()
    if symmetric:
        assert not padding[:, 150:].any()


@settings(max_examples=15)
@given(configs(), st.sampled_from(SCHEMES))
def test_a_plan_in_codes_packs_to_its_size(c: DecoderConfig, scheme: Scheme) -> None:
    graph = plain_graph(c, "bf16")
    layout, weights = plan(graph, scheme=scheme).layout, random_weights(graph)

    def read(name: str, dtype: str) -> np.ndarray:
        return weights[name] if dtype == "fp32" else weights[name].view(np.uint32) >> 16

    sizes = dict.fromkeys((t.name for t in layout.tensors), 0)
    for offset, chunk in packed_chunks(layout, read):
        tensor = next(t for t in layout.tensors if t.offset <= offset < t.offset + t.nbytes)
        assert offset == tensor.offset + sizes[tensor.name]
        sizes[tensor.name] += len(chunk)
    assert sizes == {t.name: t.nbytes for t in layout.tensors}


def tensor_of(form: GemmFormat, rows: int = 64, k: int = 64) -> PackedTensor:
    size = -(-rows // 64) * PanelShape(form, k).nbytes
    return PackedTensor("t", "panels", "int4", 64, k, k, (Segment("w", 0, rows, 0),), 0, size, form)


def brought(coded: CodedMatrix, form: GemmFormat) -> np.ndarray:
    chunks = coded_chunks(tensor_of(form), lambda name: normal(64, 64), lambda name, form: coded)
    return np.concatenate([chunk.reshape(-1) for chunk in chunks])


def test_codes_of_the_checkpoint_are_kept_exactly() -> None:
    form, coded = GemmFormat(4, 32, False, "int8", 64), quantise(normal(64, 64), 4, 32, False)
    back = unpack_codes(tensor_of(form), brought(coded, form))
    assert np.array_equal(back.codes, coded.codes)
    assert np.array_equal(back.dequantise(), coded.dequantise())


def test_codes_that_cannot_be_kept_are_refused() -> None:
    form, coded = GemmFormat(4, 32, True, "int8", 64), quantise(normal(64, 64), 4, 32, True)
    with pytest.raises(CheckpointError, match=r"w4g32.*group 64"):
        brought(quantise(normal(64, 64), 4, 64, True), form)
    with pytest.raises(CheckpointError, match=r"\[63, 64\].*\[64, 64\]"):
        brought(quantise(normal(63, 64), 4, 32, True), form)
    coded.scales[3, 1] = np.float32(0.1)
    with pytest.raises(CheckpointError, match="16-bit float"):
        brought(coded, form)


@BITS
@SYMMETRIC
def test_dummy_codes(bits: int, symmetric: bool) -> None:
    form = GemmFormat(bits, 32, symmetric, "int8", 64)
    dummy = DummyCheckpoint("x", config(ffn=333))
    name = "model.layers.0.mlp.up_proj.weight"
    coded = dummy.read_coded(name, form)
    assert np.array_equal(coded.codes, dummy.read_coded(name, form).codes)
    weights = coded.dequantise()
    assert weights.shape == (333, dummy.config.hidden_size)
    assert abs(weights.std() / 0.02 - 1) < 0.05 and abs(weights.mean()) < 0.001
