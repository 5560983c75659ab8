"""The shape rule of every op: the values it writes, from the values it reads and the config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sinterlm.ir import ops
from sinterlm.ir.graph import Graph, Value

LANES = 16


def infer_values(op: ops.Op, graph: Graph) -> tuple[Value, ...]:
    """What ``op`` writes, with shapes and dtypes; its inputs must be in the graph's value table."""
    rule = _RULES.get(type(op))
    assert rule is not None, f"no shape rule for {op.kind}"
    return rule(op, graph)


def _residual(op: Any, graph: Graph, x: str) -> tuple[Value, ...]:
    """x, and the by-products the next norm needs."""
    hidden = graph.config.hidden_size
    return (
        Value(x, ("T", hidden), "fp32"),
        Value(op.xw, ("T", hidden), graph.dtype),
        Value(op.ssq, ("T", -(-hidden // LANES)), "fp32"),
    )


def _same(op: Any, graph: Graph, source: str, dtype: str) -> tuple[Value, ...]:
    return (Value(op.y, graph.values[source].shape, dtype),)


def _heads(op: Any, graph: Graph, name: str) -> Value:
    return Value(name, ("T", op.num_heads * op.head_dim), graph.dtype)


def _matmul(op: ops.MatMul, graph: Graph) -> tuple[Value, ...]:
    rows = graph.values[op.x].shape[0]
    return (Value(op.y, (rows, graph.weights[op.weight].shape[0]), "fp32"),)


def _lm_head(op: ops.LmHead, graph: Graph) -> tuple[Value, ...]:
    return (Value(op.logits, ("R", graph.config.vocab_size), "fp32"),)


_RULES: dict[type[ops.Op], Callable[[Any, Graph], tuple[Value, ...]]] = {
    ops.Embed: lambda op, g: (Value(op.y, ("T", g.config.hidden_size), "fp32"),),
    ops.RmsNorm: lambda op, g: _same(op, g, op.x, g.dtype),
    ops.MatMul: _matmul,
    ops.QkNorm: lambda op, g: _same(op, g, op.x, "fp32"),
    ops.RotaryEmbedding: lambda op, g: _same(op, g, op.x, g.dtype),
    ops.KvAppend: lambda op, g: (Value(op.kv, (), "i32"),),
    ops.Attention: lambda op, g: (_heads(op, g, op.y),),
    ops.SiluMul: lambda op, g: _same(op, g, op.gate, g.dtype),
    ops.Add: lambda op, g: _same(op, g, op.a, "fp32"),
    ops.LmHead: _lm_head,
    ops.Sample: lambda op, g: (Value(op.ids, ("R",), "i32"),),
    ops.EmbedNorm: lambda op, g: _residual(op, g, op.x),
    ops.NormQkvRopeKv: lambda op, g: (_heads(op, g, op.q), Value(op.kv, (), "i32")),
    ops.OResidual: lambda op, g: _residual(op, g, op.x_out),
    ops.NormGateUpAct: lambda op, g: (Value(op.h, ("T", g.config.intermediate_size), g.dtype),),
    ops.DownResidual: lambda op, g: _residual(op, g, op.x_out),
    ops.NormLmHeadSample: lambda op, g: (Value(op.ids, ("R",), "i32"),),
}
