"""Fusions around attention: one op from the residual stream to q and the pages, one back."""

from __future__ import annotations

from sinterlm.ir.graph import Graph
from sinterlm.ir.ops import (
    Add,
    Attention,
    KvAppend,
    MatMul,
    NormQkvRopeKv,
    Op,
    OResidual,
    QkNorm,
    RmsNorm,
    RotaryEmbedding,
    SplitNorm,
)
from sinterlm.passes.rewrite import Matcher, Rewrite, ssq_of, xw_of


def fuse_qkv(graph: Graph) -> Graph:
    """Norm, three projections, per-head norms, rope and the page write become one op.

    before:  x ─ rmsnorm ─┬─ matmul q ─ (qk_norm) ─ rope ─────────────── q
                          ├─ matmul k ─ (qk_norm) ─ rope ─┐
                          └─ matmul v ────────────────────┴─ kv_append ─ kv
    after:   x ─ split_norm ─ x.xw, x.ssq ─ norm_qkv_rope_kv ─ q, kv
    """
    match = Matcher(graph, "fuse_qkv")
    rewrite = Rewrite(match)
    for attention in match.all(Attention):
        append = match.writer(attention.kv, KvAppend)
        q_proj, q_norm, q_ops = _projection(match, attention.q)
        k_proj, k_norm, k_ops = _projection(match, append.k)
        v_proj = match.writer(append.v, MatMul)
        norm = match.writer(q_proj.x, RmsNorm)
        _check_alike(match, attention, append, (q_ops, k_ops), (q_proj, k_proj, v_proj))
        split = SplitNorm(norm.x, xw_of(norm.x), ssq_of(norm.x), norm.weight)
        fused = NormQkvRopeKv(
            xw=split.xw,
            ssq=split.ssq,
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
        rewrite.replace([norm, *q_ops, *k_ops, v_proj, append], [split, fused])
    return rewrite.apply()


def _projection(match: Matcher, value: str) -> tuple[MatMul, QkNorm | None, list[Op]]:
    """The matmul and optional per-head norm behind a rotated head, and all ops on the way."""
    rope = match.writer(value, RotaryEmbedding)
    norm = match.writer(rope.x, QkNorm) if match.is_written_by(rope.x, QkNorm) else None
    proj = match.writer(norm.x if norm else rope.x, MatMul)
    return proj, norm, [rope, *([norm] if norm else []), proj]


def _check_alike(
    match: Matcher,
    attention: Attention,
    append: KvAppend,
    rotated: tuple[list[Op], list[Op]],
    projections: tuple[MatMul, MatMul, MatMul],
) -> None:
    """The fused op has one input, one layer, one eps and one set of positions for all three."""
    q_proj, k_proj, v_proj = projections
    for proj in (k_proj, v_proj):
        if proj.x != q_proj.x:
            raise match.error(proj.x, f"feeds {proj.y!r}, and q is made of {q_proj.x!r}")
    if append.layer != attention.layer:
        raise match.error(append.kv, f"is of layer {append.layer}, not {attention.layer}")
    norms = {op.eps for ops in rotated for op in ops if isinstance(op, QkNorm)}
    if len(norms) > 1 or len(rotated[0]) != len(rotated[1]):
        raise match.error(append.kv, "has q and k with different per-head norms")
    for ops in rotated:
        for op in ops:
            if isinstance(op, RotaryEmbedding) and op.positions != append.positions:
                raise match.error(op.positions, f"turns {op.y!r}, not {append.positions!r}")


def fuse_o_residual(graph: Graph) -> Graph:
    """The output projection, the addition to the residual stream and the next norm's first half
    become one op.

    before:  y ─ matmul o ─┐
             x ────────────┴─ add ─ x' ─ split_norm ─ x'.xw, x'.ssq
    after:   y, x ─ o_residual ─ x', x'.xw, x'.ssq
    """
    match = Matcher(graph, "fuse_o_residual")
    rewrite = Rewrite(match)
    for attention in match.all(Attention):
        proj = match.sole_reader(attention.y, MatMul)
        add = match.sole_reader(proj.y, Add)
        split = match.reader(add.y, SplitNorm)
        fused = OResidual(
            y=attention.y,
            x=add.a if add.b == proj.y else add.b,
            x_out=add.y,
            xw=split.xw,
            ssq=split.ssq,
            layer=attention.layer,
            weight=proj.weight,
            norm_weight=split.norm_weight,
            bias=proj.bias,
        )
        rewrite.replace([proj, add, split], [fused])
    return rewrite.apply()
