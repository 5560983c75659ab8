"""Fusions around attention: one op from the residual stream to q and the pages, one back."""

from __future__ import annotations

from sinterlm.ir.graph import Graph
from sinterlm.ir.ops import (
    Add,
    KvAppend,
    MatMul,
    NormQkvRopeKv,
    Op,
    OResidual,
    QkNorm,
    RmsNorm,
    RotaryEmbedding,
)
from sinterlm.ir.ops import Attention as AttentionOp
from sinterlm.passes.rewrite import Matcher


def fuse_qkv(graph: Graph) -> Graph:
    """Norm, three projections, per-head norm, rope and the page write become one op.

    before:  x ─ rmsnorm ─┬─ matmul q ─ (qk_norm) ─ rope ────────────── q
                          ├─ matmul k ─ (qk_norm) ─ rope ─┐
                          └─ matmul v ────────────────────┴─ kv_append ─ kv
    after:   x.xw, x.ssq ─── norm_qkv_rope_kv ─── q, kv

    ``x.xw`` and ``x.ssq`` are written by the producer of x: ``fold_norms`` adds them.
    """
    match = Matcher(graph, "fuse_qkv")
    fused: dict[Op, Op] = {}
    gone: set[Op] = set()
    for attention in (op for op in graph.ops if isinstance(op, AttentionOp)):
        append = match.writer(attention.kv, KvAppend)
        q_proj, q_norm, q_ops = _projection(match, attention.q)
        k_proj, k_norm, k_ops = _projection(match, append.k)
        v_proj = match.writer(append.v, MatMul)
        norm = match.writer(q_proj.x, RmsNorm)
        for proj in (k_proj, v_proj):
            if proj.x != norm.y:
                raise match.error(proj.x, "is not the norm that q reads")
        fused[append] = NormQkvRopeKv(
            xw=f"{norm.x}.xw",
            ssq=f"{norm.x}.ssq",
            positions=append.positions,
            q=attention.q,
            kv=append.kv,
            layer=attention.layer,
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            eps=norm.eps,
            q_weight=q_proj.weight,
            k_weight=k_proj.weight,
            v_weight=v_proj.weight,
            q_bias=q_proj.bias,
            k_bias=k_proj.bias,
            v_bias=v_proj.bias,
            q_norm=q_norm.weight if q_norm else None,
            k_norm=k_norm.weight if k_norm else None,
            qk_eps=q_norm.eps if q_norm else 0.0,
        )
        gone |= {*q_ops, *k_ops, v_proj}
    ops = [fused.get(op, op) for op in graph.ops if op not in gone]
    return Graph(graph.config, graph.dtype, tuple(ops), graph.values, graph.weights)


def _projection(match: Matcher, value: str) -> tuple[MatMul, QkNorm | None, list[Op]]:
    """The matmul and optional per-head norm behind a rotated head, and all ops on the way."""
    rope = match.writer(value, RotaryEmbedding)
    ops: list[Op] = [rope]
    norm, source = None, rope.x
    if match.is_written_by(rope.x, QkNorm):
        norm = match.writer(rope.x, QkNorm)
        ops.append(norm)
        source = norm.x
    proj = match.writer(source, MatMul)
    return proj, norm, [*ops, proj]


def fuse_o_residual(graph: Graph) -> Graph:
    """The output projection and the addition to the residual stream become one op.

    before:  y ─ matmul o ─┐
             x ────────────┴─ add ─ x'
    after:   y, x ─── o_residual ─── x', x'.xw, x'.ssq
    """
    match = Matcher(graph, "fuse_o_residual")
    fused: dict[Op, Op] = {}
    gone: set[Op] = set()
    for attention in (op for op in graph.ops if isinstance(op, AttentionOp)):
        proj = match.sole_reader(attention.y, MatMul)
        add = match.sole_reader(proj.y, Add)
        fused[add] = OResidual(
            y=attention.y,
            x=add.a if add.b == proj.y else add.b,
            x_out=add.y,
            xw=f"{add.y}.xw",
            ssq=f"{add.y}.ssq",
            layer=attention.layer,
            weight=proj.weight,
            norm_weight=next_norm(match, add.y).weight,
            bias=proj.bias,
        )
        gone.add(proj)
    ops = [fused.get(op, op) for op in graph.ops if op not in gone]
    return Graph(graph.config, graph.dtype, tuple(ops), graph.values, graph.weights)


def next_norm(match: Matcher, value: str) -> RmsNorm:
    """The one norm that reads a value of the residual stream."""
    norms = [op for op in match.readers(value) if isinstance(op, RmsNorm)]
    if len(norms) != 1:
        raise match.error(value, f"is read by {len(norms)} norms, not by one")
    return norms[0]
