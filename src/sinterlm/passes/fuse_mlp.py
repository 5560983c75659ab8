"""Fusions of the MLP, and of both ends of the model."""

from __future__ import annotations

from sinterlm.ir.graph import Graph
from sinterlm.ir.ops import (
    Add,
    DownResidual,
    Embed,
    EmbedNorm,
    LmHead,
    MatMul,
    NormGateUpAct,
    NormLmHeadSample,
    Op,
    RmsNorm,
    Sample,
    SiluMul,
)
from sinterlm.passes.fuse_attention import next_norm
from sinterlm.passes.rewrite import Matcher, with_ops


def fuse_gate_up(graph: Graph) -> Graph:
    """Norm, gate and up projections and the activation become one op.

    before:  x ─ rmsnorm ─┬─ matmul gate ─┐
                          └─ matmul up ───┴─ silu_mul ─ h
    after:   x.xw, x.ssq ─── norm_gate_up_act ─── h
    """
    match = Matcher(graph, "fuse_gate_up")
    fused: dict[Op, Op] = {}
    gone: set[Op] = set()
    for layer, act in enumerate(op for op in graph.ops if isinstance(op, SiluMul)):
        gate, up = match.writer(act.gate, MatMul), match.writer(act.up, MatMul)
        norm = match.writer(gate.x, RmsNorm)
        if up.x != norm.y:
            raise match.error(up.x, "is not the norm that gate reads")
        fused[act] = NormGateUpAct(
            xw=f"{norm.x}.xw",
            ssq=f"{norm.x}.ssq",
            h=act.y,
            layer=layer,
            eps=norm.eps,
            gate_weight=gate.weight,
            up_weight=up.weight,
            gate_bias=gate.bias,
            up_bias=up.bias,
        )
        gone |= {gate, up}
    ops = [fused.get(op, op) for op in graph.ops if op not in gone]
    return Graph(graph.config, graph.dtype, tuple(ops), graph.values, graph.weights)


def fuse_down_residual(graph: Graph) -> Graph:
    """The down projection and the addition to the residual stream become one op.

    before:  h ─ matmul down ─┐
             x ───────────────┴─ add ─ x'
    after:   h, x ─── down_residual ─── x', x'.xw, x'.ssq
    """
    match = Matcher(graph, "fuse_down_residual")
    fused: dict[Op, Op] = {}
    gone: set[Op] = set()
    for act in (op for op in graph.ops if isinstance(op, NormGateUpAct)):
        proj = match.sole_reader(act.h, MatMul)
        add = match.sole_reader(proj.y, Add)
        fused[add] = DownResidual(
            h=act.h,
            x=add.a if add.b == proj.y else add.b,
            x_out=add.y,
            xw=f"{add.y}.xw",
            ssq=f"{add.y}.ssq",
            layer=act.layer,
            weight=proj.weight,
            norm_weight=next_norm(match, add.y).weight,
            bias=proj.bias,
        )
        gone.add(proj)
    ops = [fused.get(op, op) for op in graph.ops if op not in gone]
    return Graph(graph.config, graph.dtype, tuple(ops), graph.values, graph.weights)


def fuse_head(graph: Graph) -> Graph:
    """The final norm, the projection of the sampled rows and the draw become one op.

    before:  x ─ rmsnorm ─ lm_head(rows) ─ logits ─ sample ─ ids
    after:   x.xw, x.ssq ─── norm_lm_head_sample(rows) ─── ids
    """
    match = Matcher(graph, "fuse_head")
    sample = next(op for op in graph.ops if isinstance(op, Sample))
    head = match.writer(sample.logits, LmHead)
    norm = match.writer(head.x, RmsNorm)
    fused = NormLmHeadSample(
        xw=f"{norm.x}.xw",
        ssq=f"{norm.x}.ssq",
        rows=head.rows,
        ids=sample.ids,
        eps=norm.eps,
        weight=head.weight,
    )
    ops = [fused if op is sample else op for op in graph.ops if op is not head]
    return Graph(graph.config, graph.dtype, tuple(ops), graph.values, graph.weights)


def fold_norms(graph: Graph) -> Graph:
    """Norms vanish: the embedding too writes the by-products that the first norm's readers use.

    before:  tokens ─ embed ─ x ─ rmsnorm ─ (readers already fused: they use x.xw and x.ssq)
    after:   tokens ─ embed_norm ─ x, x.xw, x.ssq

    Comes last: it infers the value table anew, which checks that every x.xw has a writer.
    """
    match = Matcher(graph, "fold_norms")
    embed = next(op for op in graph.ops if isinstance(op, Embed))
    folded = EmbedNorm(
        tokens=embed.tokens,
        x=embed.y,
        xw=f"{embed.y}.xw",
        ssq=f"{embed.y}.ssq",
        table=embed.table,
        norm_weight=next_norm(match, embed.y).weight,
    )
    for op in graph.ops:
        if isinstance(op, RmsNorm) and match.readers(op.y):
            raise match.error(op.y, "is still read by an op that was not fused")
    ops = [folded if op is embed else op for op in graph.ops if not isinstance(op, RmsNorm)]
    return with_ops(graph, ops)
