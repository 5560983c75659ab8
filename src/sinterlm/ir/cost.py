"""Bytes and flops of every fused op, linear in what a step holds; see ``manifest.OpCost``.

Counted as bytes: packed weights, once per step; the gathered row of an embedding table; KV pages
written and read. Activations are not: they stay in cache. Flops: 2 per multiply-add of real (not
padded) columns; attention 4 per query head, head element and visible key.
"""

from __future__ import annotations

from collections.abc import Iterable

from sinterlm.artifact.manifest import OpCost
from sinterlm.ir import ops
from sinterlm.ir.graph import Graph
from sinterlm.ir.plan import Plan, WeightLayout


def plan_costs(plan: Plan) -> tuple[OpCost, ...]:
    """The cost of every op of a fused graph, in order."""
    return tuple(op_cost(op, plan.graph, plan.layout) for op in plan.graph.ops)


def op_cost(op: ops.Op, graph: Graph, layout: WeightLayout) -> OpCost:
    """The cost of one fused op."""
    config, size = graph.config, 2 if graph.dtype == "bf16" else 4
    kv_width = config.num_kv_heads * config.head_dim
    names = _packed_names(op)
    weight_bytes = sum(t.nbytes for t in layout.tensors if t.name in names)
    flops = 2 * sum(_elements(graph, name) for name in op.weights)
    per_token = per_row = cached = row_flops = pair_flops = 0
    if isinstance(op, ops.EmbedNorm):
        per_token, flops = config.hidden_size * size, 0
    elif isinstance(op, ops.NormQkvRopeKv):
        per_token = 2 * kv_width * size
    elif isinstance(op, ops.Attention):
        cached, pair_flops = 2 * kv_width * size, 4 * op.num_heads * op.head_dim
    elif isinstance(op, ops.NormLmHeadSample):
        row_flops, flops = flops, 0
    return OpCost(
        name=op.kind,
        layer=getattr(op, "layer", -1),
        weight_bytes=weight_bytes,
        bytes_per_token=per_token,
        bytes_per_row=per_row,
        bytes_per_cached_token=cached,
        flops_per_token=flops,
        flops_per_row=row_flops,
        flops_per_pair=pair_flops,
    )


def _elements(graph: Graph, weight: str) -> int:
    """Elements of a matrix; vectors cost no multiply-adds worth counting."""
    shape = graph.weights[weight].shape
    return shape[0] * shape[1] if len(shape) == 2 else 0


def _packed_names(op: ops.Op) -> frozenset[str]:
    """Packed tensors that an op streams whole in every step."""
    layer = f"layers.{getattr(op, 'layer', -1)}."
    if isinstance(op, ops.NormQkvRopeKv):
        return frozenset(layer + n for n in ("qkv", "qkv_bias", "q_norm", "k_norm"))
    if isinstance(op, ops.OResidual):
        return frozenset(layer + n for n in ("o", "o_bias", "mlp_norm"))
    if isinstance(op, ops.NormGateUpAct):
        return frozenset(layer + n for n in ("gate_up", "gate_up_bias"))
    if isinstance(op, ops.DownResidual):
        return frozenset(layer + n for n in ("down", "down_bias"))
    if isinstance(op, ops.NormLmHeadSample):
        return frozenset({"lm_head"})
    return frozenset()


def roof_seconds(
    costs: Iterable[OpCost],
    *,
    tokens: int,
    rows: int,
    pairs: int,
    cached: int,
    bandwidth: float,
    flops: float,
) -> float:
    """The roof of one step: the sum over ops of max(bytes / bandwidth, flops / peak), in seconds.

    ``pairs``: (query, visible key) pairs; ``cached``: tokens of KV read; ``bandwidth`` in bytes/s
    and ``flops`` in flop/s, both measured on the machine.
    """
    total = 0.0
    for c in costs:
        moved = c.weight_bytes + tokens * c.bytes_per_token + rows * c.bytes_per_row
        moved += cached * c.bytes_per_cached_token
        work = tokens * c.flops_per_token + rows * c.flops_per_row + pairs * c.flops_per_pair
        total += max(moved / bandwidth, work / flops)
    return total
