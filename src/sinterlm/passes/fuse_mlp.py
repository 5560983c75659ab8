"""Fusions of the MLP: one op from the residual stream to h, one back."""

from __future__ import annotations

from sinterlm.ir.graph import Graph
from sinterlm.ir.ops import Add, DownResidual, MatMul, NormGateUpAct, RmsNorm, SiluMul, SplitNorm
from sinterlm.passes.rewrite import Matcher, PassError, Rewrite, ssq_of, xw_of


def fuse_gate_up(graph: Graph) -> Graph:
    """Norm, gate and up projections and the activation become one op.

    before:  x ─ rmsnorm ─┬─ matmul gate ─┐
                          └─ matmul up ───┴─ silu_mul ─ h
    after:   x ─ split_norm ─ x.xw, x.ssq ─ norm_gate_up_act ─ h
    """
    match = Matcher(graph, "fuse_gate_up")
    rewrite = Rewrite(match)
    activations = match.all(SiluMul)
    if len(activations) != graph.config.num_layers:
        raise PassError(
            f"fuse_gate_up: {len(activations)} MLPs in {graph.config.num_layers} layers"
        )
    for layer, act in enumerate(activations):
        gate, up = match.writer(act.gate, MatMul), match.writer(act.up, MatMul)
        norm = match.writer(gate.x, RmsNorm)
        if up.x != gate.x:
            raise match.error(up.x, f"feeds {up.y!r}, and the gate is made of {gate.x!r}")
        split = SplitNorm(norm.x, xw_of(norm.x), ssq_of(norm.x), norm.weight)
        fused = NormGateUpAct(
            xw=split.xw,
            ssq=split.ssq,
            h=act.y,
            layer=layer,
            eps=norm.eps,
            gate_weight=gate.weight,
            up_weight=up.weight,
            gate_bias=gate.bias,
            up_bias=up.bias,
        )
        rewrite.replace([norm, gate, up, act], [split, fused])
    return rewrite.apply()


def fuse_down_residual(graph: Graph) -> Graph:
    """The down projection, the addition to the residual stream and the next norm's first half
    become one op.

    before:  h ─ matmul down ─┐
             x ───────────────┴─ add ─ x' ─ split_norm ─ x'.xw, x'.ssq
    after:   h, x ─ down_residual ─ x', x'.xw, x'.ssq
    """
    match = Matcher(graph, "fuse_down_residual")
    rewrite = Rewrite(match)
    for act in match.all(NormGateUpAct):
        proj = match.sole_reader(act.h, MatMul)
        add = match.sole_reader(proj.y, Add)
        split = match.reader(add.y, SplitNorm)
        fused = DownResidual(
            h=act.h,
            x=add.a if add.b == proj.y else add.b,
            x_out=add.y,
            xw=split.xw,
            ssq=split.ssq,
            layer=act.layer,
            weight=proj.weight,
            norm_weight=split.norm_weight,
            bias=proj.bias,
        )
        rewrite.replace([proj, add, split], [fused])
    return rewrite.apply()
