"""A sound graph passes; each way of breaking one is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings

from sinterlm.ir.graph import DecoderConfig, Graph, Value, Weight
from sinterlm.ir.ops import (
    Add,
    Attention,
    KvAppend,
    MatMul,
    NormQkvRopeKv,
    Op,
    OResidual,
    RmsNorm,
    Sample,
)
from sinterlm.ir.verify import VerifyError, verify
from sinterlm.passes.pipeline import fuse
from tests.ir.graphs import config, configs, plain_graph

PLAIN = plain_graph(config(qkv_bias=True, qk_norm=True))
FUSED = fuse(PLAIN)


@settings(max_examples=30)
@given(configs())
def test_sound_graphs_pass(c: DecoderConfig) -> None:
    for dtype in ("bf16", "fp32"):
        graph = plain_graph(c, dtype)
        verify(graph)
        verify(fuse(graph))


def with_op(graph: Graph, kind: type[Op], **changes: object) -> Graph:
    """The first op of ``kind`` with other fields."""
    op = next(op for op in graph.ops if isinstance(op, kind))
    ops = tuple(replace(op, **changes) if o is op else o for o in graph.ops)
    return replace(graph, ops=ops)


def with_value(graph: Graph, value: Value) -> Graph:
    return replace(graph, values={**graph.values, value.name: value})


def with_weight(graph: Graph, weight: Weight) -> Graph:
    return replace(graph, weights={**graph.weights, weight.name: weight})


BROKEN: dict[str, tuple[Callable[[], Graph], str]] = {
    "dtype": (lambda: replace(PLAIN, dtype="fp16"), "dtype is 'fp16'"),
    "use before def": (
        lambda: with_op(PLAIN, RmsNorm, x="1.out"), r"op 1 \(rmsnorm\) reads '1.out' before",
    ),
    "second def": (
        lambda: with_op(PLAIN, Add, y="stream"), r"\(add\) writes 'stream' a second time",
    ),
    "order": (
        lambda: replace(PLAIN, ops=(PLAIN.ops[1], PLAIN.ops[0], *PLAIN.ops[2:])),
        "reads 'stream' before anything writes it",
    ),
    "value missing": (
        lambda: replace(PLAIN, values={n: v for n, v in PLAIN.values.items() if n != "0.h"}),
        "'0.h'",
    ),
    "value shape": (
        lambda: with_value(PLAIN, Value("0.h", ("T", 81), "bf16")), r"silu_mul.* writes .*'T', 80",
    ),
    "value dtype": (
        lambda: with_value(PLAIN, Value("stream", ("T", 48), "bf16")), "'stream'.*fp32",
    ),
    "input": (lambda: with_value(PLAIN, Value("rows", ("T",), "i32")), "input .*'rows'"),
    "stray value": (
        lambda: with_value(PLAIN, Value("ghost", ("T",), "fp32")), "lists value 'ghost'",
    ),
    "weight missing": (
        lambda: with_op(PLAIN, MatMul, weight="ghost"), "uses weight 'ghost', which",
    ),
    "stray weight": (lambda: with_weight(PLAIN, Weight("ghost", (3,))), "lists weight 'ghost'"),
    "weight depth": (
        lambda: with_weight(PLAIN, Weight("0.o.weight", (48, 63))), r"0.o.weight.*\(48, 64\)",
    ),
    "weight width": (
        lambda: with_weight(PLAIN, Weight("0.o.weight", (49, 64))), "'0.o:y'",
    ),
    "bias": (lambda: with_weight(PLAIN, Weight("0.q.bias", (63,))), r"0.q.bias.*\(64,\)"),
    "norm": (
        lambda: with_weight(PLAIN, Weight("final_norm.weight", (47,))), "final_norm.weight",
    ),
    "fused weight": (
        lambda: with_weight(FUSED, Weight("1.k.weight", (33, 48))), "1.k.weight.*32, 48",
    ),
    "fused norm": (
        lambda: with_op(FUSED, OResidual, norm_weight="0.q_norm.weight"), "0.q_norm.weight",
    ),
    "fused residual": (
        lambda: with_op(FUSED, OResidual, y="stream"), "reads .*'stream'.*bf16",
    ),
    "by-product": (lambda: with_op(FUSED, NormQkvRopeKv, xw="stream"), "'stream'"),
    "layer of pages": (
        lambda: with_op(PLAIN, KvAppend, layer=1), "layer 0 reads the pages of layer 1",
    ),
    "heads": (
        lambda: with_op(PLAIN, Attention, num_kv_heads=4), "not those of the config",
    ),
    "no draw": (
        lambda: replace(
            PLAIN,
            ops=tuple(op for op in PLAIN.ops if not isinstance(op, Sample)),
            values={n: v for n, v in PLAIN.values.items() if n != "ids"},
        ),
        "does not end with the draw",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_graphs_are_named(name: str) -> None:
    build, message = BROKEN[name]
    with pytest.raises(VerifyError, match=message):
        verify(build())
