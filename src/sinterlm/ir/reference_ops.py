"""The NumPy meaning of every op, plain and fused. Plain and readable: this is the oracle.

Activations are unpadded. What an op writes is returned in the order of ``op.writes``. A fused op
is its formula in ``ops.py``, not a call of plain ones, so that comparing graphs tells something.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinterlm.ir import ops
from sinterlm.ir.graph import DecoderConfig
from sinterlm.ir.reference_attention import RefCache, attend, rotate, visible
from sinterlm.ir.reference_sampling import RowSampling, sample
from sinterlm.ir.shapes import LANES

Array = NDArray[Any]


@dataclass(frozen=True)
class RefBatch:
    """One step: tokens of one or more sequences, each a run of consecutive positions."""

    token_ids: NDArray[np.int64]  #: [T]
    positions: NDArray[np.int64]  #: [T]
    seqs: NDArray[np.int64]  #: [T] the sequence of each token
    rows: NDArray[np.int64]  #: [R] indices of the tokens whose successor is drawn
    sampling: tuple[RowSampling, ...] = ()  #: per row; empty = greedy

    @classmethod
    def of(
        cls, *runs: tuple[int, int, list[int]], sampling: tuple[RowSampling, ...] = ()
    ) -> RefBatch:
        """A step of ``(sequence, first position, token ids)`` runs; each one's last is sampled."""
        lengths = [len(ids) for _, _, ids in runs]
        return cls(
            token_ids=np.array([t for _, _, ids in runs for t in ids], np.int64),
            positions=np.array([first + i for _, first, ids in runs for i in range(len(ids))]),
            seqs=np.array([seq for seq, _, ids in runs for _ in ids], np.int64),
            rows=np.cumsum(lengths) - 1,
            sampling=sampling,
        )


@dataclass
class Context:
    """What an op may look at while a step runs."""

    config: DecoderConfig
    dtype: type[np.floating[Any]]  #: of everything that is not narrow
    narrow: Callable[[Array], Array]  #: rounds q and operands; returns dtype
    #: k (0) or v (1) [T, Hkv, D] of a layer as pages hold it: (values, layer, which).
    kv: Callable[[Array, int, int], Array]
    prob: Callable[[Array], Array]  #: rounds probabilities
    operand: Callable[[str, Array], Array]  #: a value by name as the GEMM that reads it sees it
    matrix: Callable[[str], Array]  #: a checkpoint tensor as a GEMM operand
    table: Callable[[str], Array]  #: an embedding table; what codes stand for is not rounded
    vector: Callable[[str], Array]  #: a checkpoint tensor (norm weight, bias) as it is
    batch: RefBatch
    cache: RefCache
    values: dict[str, Array] = field(default_factory=dict)

    def linear(self, x: Array, weight: str, bias: str | None = None) -> Array:
        """x @ weightᵀ (+ bias)."""
        y = x @ self.matrix(weight).T
        return y if bias is None else y + self.vector(bias)


@singledispatch
def evaluate(op: ops.Op, c: Context) -> tuple[Array, ...]:
    """The values that ``op`` writes, from those in ``c.values``; KV goes to ``c.cache``."""
    raise AssertionError(f"op {op.kind!r} has no meaning in the reference")


# ---------------------------------------------------------------- plain ops


@evaluate.register
def _(op: ops.Embed, c: Context) -> tuple[Array, ...]:
    return (c.matrix(op.table)[c.values[op.tokens]],)


@evaluate.register
def _(op: ops.RmsNorm, c: Context) -> tuple[Array, ...]:
    return (c.narrow(rms_norm(c.values[op.x], op.eps) * c.vector(op.weight)),)


@evaluate.register
def _(op: ops.MatMul, c: Context) -> tuple[Array, ...]:
    return (c.linear(c.values[op.x], op.weight, op.bias),)


@evaluate.register
def _(op: ops.QkNorm, c: Context) -> tuple[Array, ...]:
    heads = split_heads(c.values[op.x], op.head_dim)
    return (merge_heads(rms_norm(heads, op.eps) * c.vector(op.weight)),)


@evaluate.register
def _(op: ops.RotaryEmbedding, c: Context) -> tuple[Array, ...]:
    heads = split_heads(c.values[op.x], op.head_dim)
    return (c.narrow(merge_heads(rotate(heads, c.values[op.positions], c.config.rope))),)


@evaluate.register
def _(op: ops.KvAppend, c: Context) -> tuple[Array, ...]:
    k, v = (split_heads(c.values[x], c.config.head_dim) for x in (op.k, op.v))
    return (append_kv(c, op.layer, k, v),)


@evaluate.register
def _(op: ops.Attention, c: Context) -> tuple[Array, ...]:
    q, batch = split_heads(c.values[op.q], op.head_dim), c.batch
    y = np.empty_like(q)
    for seq in np.unique(batch.seqs):
        mine = batch.seqs == seq
        k, v = c.cache.read(op.layer, int(seq))
        mask = visible(batch.positions[mine], len(k), op.window)
        y[mine] = attend(q[mine], k, v, mask, op.scale, c.prob)
    return (c.operand(op.y, merge_heads(y)),)


@evaluate.register
def _(op: ops.SiluMul, c: Context) -> tuple[Array, ...]:
    return (c.narrow(silu(c.values[op.gate]) * c.values[op.up]),)


@evaluate.register
def _(op: ops.Add, c: Context) -> tuple[Array, ...]:
    return (c.values[op.a] + c.values[op.b],)


@evaluate.register
def _(op: ops.LmHead, c: Context) -> tuple[Array, ...]:
    return (c.linear(c.values[op.x][c.values[op.rows]], op.weight),)


@evaluate.register
def _(op: ops.Sample, c: Context) -> tuple[Array, ...]:
    return (draw(c, c.values[op.logits]),)


# ---------------------------------------------------------------- fused ops


@evaluate.register
def _(op: ops.SplitNorm, c: Context) -> tuple[Array, ...]:
    return by_products(c, c.values[op.x], op)


@evaluate.register
def _(op: ops.EmbedNorm, c: Context) -> tuple[Array, ...]:
    x = c.table(op.table)[c.values[op.tokens]]
    return (x, *by_products(c, x, op))


@evaluate.register
def _(op: ops.NormQkvRopeKv, c: Context) -> tuple[Array, ...]:
    xw, scale = c.values[op.xw], rstd(c, op.ssq, op.eps)
    projections = (
        (op.q_weight, op.q_bias, op.q_norm),
        (op.k_weight, op.k_bias, op.k_norm),
        (op.v_weight, op.v_bias, None),
    )
    heads = []
    for weight, bias, norm in projections:
        y = c.linear(xw, weight) * scale
        y = split_heads(y if bias is None else y + c.vector(bias), op.head_dim)
        heads.append(y if norm is None else rms_norm(y, op.qk_eps) * c.vector(norm))
    q, k = (rotate(h, c.values[op.positions], c.config.rope) for h in heads[:2])
    return (c.narrow(merge_heads(q)), append_kv(c, op.layer, k, heads[2]))


@evaluate.register
def _(op: ops.OResidual, c: Context) -> tuple[Array, ...]:
    x = c.values[op.x] + c.linear(c.values[op.y], op.weight, op.bias)
    return (x, *by_products(c, x, op))


@evaluate.register
def _(op: ops.NormGateUpAct, c: Context) -> tuple[Array, ...]:
    xw, scale = c.values[op.xw], rstd(c, op.ssq, op.eps)
    gate, up = c.linear(xw, op.gate_weight) * scale, c.linear(xw, op.up_weight) * scale
    if op.gate_bias is not None:
        gate = gate + c.vector(op.gate_bias)
    if op.up_bias is not None:
        up = up + c.vector(op.up_bias)
    return (c.operand(op.h, silu(gate) * up),)


@evaluate.register
def _(op: ops.DownResidual, c: Context) -> tuple[Array, ...]:
    x = c.values[op.x] + c.linear(c.values[op.h], op.weight, op.bias)
    return (x, *by_products(c, x, op))


@evaluate.register
def _(op: ops.NormLmHeadSample, c: Context) -> tuple[Array, ...]:
    rows = c.values[op.rows]
    logits = c.linear(c.values[op.xw][rows], op.weight) * rstd(c, op.ssq, op.eps)[rows]
    c.values["logits"] = logits
    return (draw(c, logits),)


# ---------------------------------------------------------------- formulas


def rms_norm(x: Array, eps: float) -> Array:
    """x / sqrt(mean(x²) + eps) over the last axis."""
    mean = np.mean(x * x, axis=-1, keepdims=True)
    return np.asarray(x / np.sqrt(mean + x.dtype.type(eps)))


def by_products(
    c: Context, x: Array, op: ops.SplitNorm | ops.EmbedNorm | ops.OResidual | ops.DownResidual
) -> tuple[Array, Array]:
    """xw [T, H] = x * norm_weight as its reader sees it, and ssq [T, H/16] = sums of 16 squares of
    x [T, H]."""
    starts = np.arange(0, x.shape[1], LANES)
    xw = c.operand(op.xw, x * c.vector(op.norm_weight))
    return xw, np.add.reduceat(x * x, starts, axis=1)


def rstd(c: Context, ssq: str, eps: float) -> Array:
    """1 / sqrt(sum(ssq) / H + eps), [T, 1]."""
    mean = c.values[ssq].sum(axis=1, keepdims=True) / c.dtype(c.config.hidden_size)
    return np.asarray(1 / np.sqrt(mean + c.dtype(eps)))


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, -0
        return np.asarray(x / (1 + np.exp(-x)))


def split_heads(x: Array, head_dim: int) -> Array:
    """[T, heads · D] -> [T, heads, D]."""
    return x.reshape(len(x), -1, head_dim)


def merge_heads(x: Array) -> Array:
    """[T, heads, D] -> [T, heads · D]."""
    return x.reshape(len(x), -1)


def append_kv(c: Context, layer: int, k: Array, v: Array) -> Array:
    """Store k and v [T, Hkv, D], as pages hold them, for every sequence of the step; returns the
    kv token."""
    for seq in np.unique(c.batch.seqs):
        mine = c.batch.seqs == seq
        first = int(c.batch.positions[mine][0])
        c.cache.append(layer, int(seq), first, c.kv(k[mine], layer, 0),
                       c.kv(v[mine], layer, 1))  # fmt: skip
    return np.zeros((), np.int32)


def draw(c: Context, logits: Array) -> Array:
    """ids [R] by each row's parameters."""
    params = c.batch.sampling or (RowSampling(),) * len(logits)
    drawn = [sample(row, p).token_id for row, p in zip(logits, params, strict=True)]
    return np.array(drawn, np.int32)
