"""The rule of every op: the values and checkpoint tensors it needs and the values it writes, with
shapes and dtypes. ``verify.py`` holds graphs against the rules; passes infer value tables by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

from sinterlm.ir import ops
from sinterlm.ir.graph import Graph, Value, Weight

#: Columns whose squares a producer of the residual stream sums up together.
LANES = 16


@dataclass(frozen=True)
class Signature:
    """What an op reads, writes and uses, each as its table must have it."""

    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    weights: tuple[Weight, ...] = ()


def infer_values(op: ops.Op, graph: Graph) -> tuple[Value, ...]:
    """What ``op`` writes, in order. The tables must hold what a ``MatMul`` reads and uses."""
    return signature(op, graph).writes


@singledispatch
def signature(op: ops.Op, graph: Graph) -> Signature:
    """The rule of ``op``. An op without one is our own bug."""
    raise AssertionError(f"no shape rule for {op.kind!r}")


def _tokens(name: str) -> Value:
    return Value(name, ("T",), "i32")


def _rows(name: str) -> Value:
    return Value(name, ("R",), "i32")


def _kv(name: str) -> Value:
    return Value(name, (), "i32")


def _stream(name: str, graph: Graph) -> Value:
    """A value of the residual stream."""
    return Value(name, ("T", graph.config.hidden_size), "fp32")


def _operand(name: str, width: int, graph: Graph) -> Value:
    """The operand of a GEMM, or q, k, y, h."""
    return Value(name, ("T", width), graph.dtype)


def _sums(name: str, width: int) -> Value:
    """What comes out of a GEMM."""
    return Value(name, ("T", width), "fp32")


def _by_products(xw: str, ssq: str, graph: Graph) -> tuple[Value, Value]:
    hidden = graph.config.hidden_size
    return _operand(xw, hidden, graph), _sums(ssq, -(-hidden // LANES))


def _norm_weight(name: str, graph: Graph) -> Weight:
    return Weight(name, (graph.config.hidden_size,))


def _linear(weight: str, bias: str | None, n: int, k: int) -> tuple[Weight, ...]:
    matrix = Weight(weight, (n, k))
    return (matrix,) if bias is None else (matrix, Weight(bias, (n,)))


# ---------------------------------------------------------------- plain ops


@signature.register
def _(op: ops.Embed, graph: Graph) -> Signature:
    table = Weight(op.table, (graph.config.vocab_size, graph.config.hidden_size))
    return Signature((_tokens(op.tokens),), (_stream(op.y, graph),), (table,))


@signature.register
def _(op: ops.RmsNorm, graph: Graph) -> Signature:
    y = _operand(op.y, graph.config.hidden_size, graph)
    return Signature((_stream(op.x, graph),), (y,), (_norm_weight(op.weight, graph),))


@signature.register
def _(op: ops.MatMul, graph: Graph) -> Signature:
    k, n = graph.values[op.x].shape[-1], graph.weights[op.weight].shape[0]
    assert isinstance(k, int), f"{op.x!r} has no width"
    weights = _linear(op.weight, op.bias, n, k)
    return Signature((_operand(op.x, k, graph),), (_sums(op.y, n),), weights)


@signature.register
def _(op: ops.QkNorm, graph: Graph) -> Signature:
    width = op.num_heads * op.head_dim
    weight = Weight(op.weight, (op.head_dim,))
    return Signature((_sums(op.x, width),), (_sums(op.y, width),), (weight,))


@signature.register
def _(op: ops.RotaryEmbedding, graph: Graph) -> Signature:
    width = op.num_heads * op.head_dim
    reads = (_sums(op.x, width), _tokens(op.positions))
    return Signature(reads, (_operand(op.y, width, graph),))


@signature.register
def _(op: ops.KvAppend, graph: Graph) -> Signature:
    width = graph.config.num_kv_heads * graph.config.head_dim
    reads = (_operand(op.k, width, graph), _sums(op.v, width), _tokens(op.positions))
    return Signature(reads, (_kv(op.kv),))


@signature.register
def _(op: ops.Attention, graph: Graph) -> Signature:
    width = op.num_heads * op.head_dim
    reads = (_operand(op.q, width, graph), _kv(op.kv))
    return Signature(reads, (_operand(op.y, width, graph),))


@signature.register
def _(op: ops.SiluMul, graph: Graph) -> Signature:
    width = graph.config.intermediate_size
    reads = (_sums(op.gate, width), _sums(op.up, width))
    return Signature(reads, (_operand(op.y, width, graph),))


@signature.register
def _(op: ops.Add, graph: Graph) -> Signature:
    return Signature((_stream(op.a, graph), _stream(op.b, graph)), (_stream(op.y, graph),))


@signature.register
def _(op: ops.LmHead, graph: Graph) -> Signature:
    vocab, hidden = graph.config.vocab_size, graph.config.hidden_size
    return Signature(
        reads=(_operand(op.x, hidden, graph), _rows(op.rows)),
        writes=(Value(op.logits, ("R", vocab), "fp32"),),
        weights=(Weight(op.weight, (vocab, hidden)),),
    )


@signature.register
def _(op: ops.Sample, graph: Graph) -> Signature:
    logits = Value(op.logits, ("R", graph.config.vocab_size), "fp32")
    return Signature((logits,), (_rows(op.ids),))


# ---------------------------------------------------------------- fused ops


@signature.register
def _(op: ops.SplitNorm, graph: Graph) -> Signature:
    weights = (_norm_weight(op.norm_weight, graph),)
    return Signature((_stream(op.x, graph),), _by_products(op.xw, op.ssq, graph), weights)


@signature.register
def _(op: ops.EmbedNorm, graph: Graph) -> Signature:
    table = Weight(op.table, (graph.config.vocab_size, graph.config.hidden_size))
    return Signature(
        reads=(_tokens(op.tokens),),
        writes=(_stream(op.x, graph), *_by_products(op.xw, op.ssq, graph)),
        weights=(table, _norm_weight(op.norm_weight, graph)),
    )


@signature.register
def _(op: ops.NormQkvRopeKv, graph: Graph) -> Signature:
    hidden = graph.config.hidden_size
    width, kv_width = op.num_heads * op.head_dim, op.num_kv_heads * op.head_dim
    norms = tuple(Weight(n, (op.head_dim,)) for n in (op.q_norm, op.k_norm) if n is not None)
    return Signature(
        reads=(*_by_products(op.xw, op.ssq, graph), _tokens(op.positions)),
        writes=(_operand(op.q, width, graph), _kv(op.kv)),
        weights=(
            *_linear(op.q_weight, op.q_bias, width, hidden),
            *_linear(op.k_weight, op.k_bias, kv_width, hidden),
            *_linear(op.v_weight, op.v_bias, kv_width, hidden),
            *norms,
        ),
    )


def _residual(op: ops.OResidual | ops.DownResidual, operand: Value, graph: Graph) -> Signature:
    hidden, k = graph.config.hidden_size, operand.shape[-1]
    assert isinstance(k, int)
    return Signature(
        reads=(operand, _stream(op.x, graph)),
        writes=(_stream(op.x_out, graph), *_by_products(op.xw, op.ssq, graph)),
        weights=(*_linear(op.weight, op.bias, hidden, k), _norm_weight(op.norm_weight, graph)),
    )


@signature.register
def _(op: ops.OResidual, graph: Graph) -> Signature:
    width = graph.config.num_heads * graph.config.head_dim
    return _residual(op, _operand(op.y, width, graph), graph)


@signature.register
def _(op: ops.NormGateUpAct, graph: Graph) -> Signature:
    width, hidden = graph.config.intermediate_size, graph.config.hidden_size
    return Signature(
        reads=_by_products(op.xw, op.ssq, graph),
        writes=(_operand(op.h, width, graph),),
        weights=(
            *_linear(op.gate_weight, op.gate_bias, width, hidden),
            *_linear(op.up_weight, op.up_bias, width, hidden),
        ),
    )


@signature.register
def _(op: ops.DownResidual, graph: Graph) -> Signature:
    return _residual(op, _operand(op.h, graph.config.intermediate_size, graph), graph)


@signature.register
def _(op: ops.NormLmHeadSample, graph: Graph) -> Signature:
    weight = Weight(op.weight, (graph.config.vocab_size, graph.config.hidden_size))
    return Signature(
        reads=(*_by_products(op.xw, op.ssq, graph), _rows(op.rows)),
        writes=(_rows(op.ids),),
        weights=(weight,),
    )
