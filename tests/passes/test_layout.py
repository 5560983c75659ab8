"""Where weights lie: names, order, padding, alignment, and a hash that sees every change."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given

from sinterlm.ir.graph import DecoderConfig
from sinterlm.ir.plan import PackedTensor, WeightLayout
from sinterlm.passes.pipeline import plan
from tests.ir.graphs import config, configs, plain_graph


def layout(c: DecoderConfig, dtype: str = "bf16") -> WeightLayout:
    return plan(plain_graph(c, dtype)).layout


def tensor(found: WeightLayout, name: str) -> PackedTensor:
    t = found.find(name)
    assert t is not None
    return t


def test_names_in_order_of_use() -> None:
    full = config(layers=2, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True, tied=False)
    per_layer = [
        "qkv", "qkv_bias", "q_norm", "k_norm", "o", "o_bias", "mlp_norm", "gate_up",
        "gate_up_bias", "down", "down_bias",
    ]  # fmt: skip
    names = [t.name for t in layout(full).tensors]
    assert names == [
        "embed", "layers.0.attn_norm", *(f"layers.0.{n}" for n in per_layer),
        "layers.1.attn_norm", *(f"layers.1.{n}" for n in per_layer), "final_norm", "lm_head",
    ]  # fmt: skip
    bare = [t.name for t in layout(config(layers=1, tied=True)).tensors]
    assert bare == [
        "layers.0.attn_norm", "layers.0.qkv", "layers.0.o", "layers.0.mlp_norm",
        "layers.0.gate_up", "layers.0.down", "final_norm", "lm_head",
    ]  # fmt: skip


def test_shapes_are_padded() -> None:
    found = layout(
        config(hidden=37, heads=10, kv_heads=2, head_dim=20, ffn=70, vocab=150, layers=1,
               qkv_bias=True, qk_norm=True, o_bias=True, mlp_bias=True)
    )  # fmt: skip
    shapes = {t.name.removeprefix("layers.0."): (t.n, t.k, t.k_real) for t in found.tensors}
    assert shapes == {
        "embed": (150, 48, 37), "attn_norm": (48, 1, 1),
        "qkv": (448, 48, 37), "qkv_bias": (448, 1, 1),  # 14 heads of 32 columns
        "q_norm": (32, 1, 1), "k_norm": (32, 1, 1),
        "o": (64, 208, 200), "o_bias": (64, 1, 1), "mlp_norm": (48, 1, 1),
        "gate_up": (256, 48, 37), "gate_up_bias": (256, 1, 1),
        "down": (64, 128, 70), "down_bias": (64, 1, 1),
        "final_norm": (48, 1, 1), "lm_head": (192, 48, 37),
    }  # fmt: skip


def test_heads_are_grouped_by_kv_head() -> None:
    found = layout(config(heads=4, kv_heads=2, head_dim=20, layers=1))
    qkv = [(s.weight, s.start, s.stop, s.at) for s in tensor(found, "layers.0.qkv").segments]
    q, k, v = (f"0.{m}.weight" for m in "qkv")
    assert qkv == [
        (q, 0, 20, 0), (q, 20, 40, 32), (k, 0, 20, 64), (v, 0, 20, 96),
        (q, 40, 60, 128), (q, 60, 80, 160), (k, 20, 40, 192), (v, 20, 40, 224),
    ]  # fmt: skip


def test_gate_and_up_alternate() -> None:
    found = layout(config(ffn=100, layers=1))
    gate_up = tensor(found, "layers.0.gate_up").segments
    assert [(s.weight, s.start, s.stop, s.at) for s in gate_up] == [
        ("0.gate.weight", 0, 64, 0), ("0.up.weight", 0, 64, 64),
        ("0.gate.weight", 64, 100, 128), ("0.up.weight", 64, 100, 192),
    ]  # fmt: skip


@given(configs())
def test_every_weight_is_placed_once_and_aligned(c: DecoderConfig) -> None:
    for dtype in ("bf16", "fp32"):
        graph = plain_graph(c, dtype)
        found = plan(graph).layout
        end = 0
        rows: dict[str, list[tuple[int, int]]] = {}
        for t in found.tensors:
            assert t.offset % (64 if t.kind == "vector" else 4096) == 0
            assert end <= t.offset < end + 4096
            size = 2 if t.dtype == "bf16" else 4
            assert t.dtype == ("fp32" if t.kind == "vector" else dtype)
            assert t.nbytes == t.n * t.k * size
            assert t.k >= t.k_real and (t.kind == "vector" or t.k % 16 == 0)
            assert t.kind != "panels" or t.n % 64 == 0
            end = t.offset + t.nbytes
            at = 0
            for s in t.segments:
                assert at <= s.at and s.start < s.stop
                at = s.at + s.stop - s.start
                rows.setdefault(s.weight, []).append((s.start, s.stop))
            assert at <= t.n
        assert end <= found.nbytes < end + 4096 and found.nbytes % 64 == 0
        for name, weight in graph.weights.items():
            spans = sorted(rows.pop(name))
            assert spans[0][0] == 0 and spans[-1][1] == weight.shape[0]
            assert all(a[1] == b[0] for a, b in pairwise(spans))
        assert not rows


BASE = config(qkv_bias=True)


@pytest.mark.parametrize(
    "changed",
    [
        {"tie_word_embeddings": True},
        {"vocab_size": 51},
        {"intermediate_size": 81},
        {"num_layers": 3},
        {"num_kv_heads": 4},
        {"qkv_bias": False},
        {"qk_norm": True},
    ],
)
def test_hash_sees_every_change(changed: dict[str, int]) -> None:
    assert layout(replace(BASE, **changed)).layout_hash != layout(BASE).layout_hash


def test_hash_is_of_the_layout_alone() -> None:
    found = layout(BASE)
    assert 0 <= found.layout_hash < 1 << 64
    assert layout(replace(BASE, rms_norm_eps=0.1)).layout_hash == found.layout_hash
    assert layout(BASE, "fp32").layout_hash != found.layout_hash


def test_hash_is_the_same_everywhere() -> None:
    """Another number here means that libraries and weights packed before no longer go together."""
    assert layout(config(layers=1)).layout_hash == 0x133685FF03772963
