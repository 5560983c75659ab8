"""Bytes and flops of every op, linear in what a step holds; see ``OpCost`` in ``manifest.py``.

The least that the mathematics needs, which is what the roof is made of. Bytes: weights once per
step, real columns only (padding is our own overhead); of an embedding table the gathered row of
each token; KV written per token and read per cached token. Activations are not counted: they can
stay in cache. Flops: 2 per multiply-add of a GEMM, and 4 per query head, element of it and (query,
key) pair of attention. What runs beside the dot products (norms, rope, activations, sampling) is
not counted. A step without sampled rows need not read the head; ``weight_bytes`` counts it anyway.
"""

from __future__ import annotations

from sinterlm.artifact.manifest import OpCost, kv_head_bytes
from sinterlm.ir import ops
from sinterlm.ir.graph import Graph
from sinterlm.ir.plan import Plan
from sinterlm.ir.quant import GemmFormat

FP32_BYTES = 4


def plan_costs(plan: Plan) -> tuple[OpCost, ...]:
    """The cost of every op of a planned graph, in order."""
    return tuple(op_cost(op, plan.graph) for op in plan.graph.ops)


def op_cost(op: ops.Op, graph: Graph) -> OpCost:
    """The cost of one op, plain or fused."""
    head = kv_head_bytes(graph.config.head_dim, graph.kv_dtype)
    kv_row = 2 * graph.config.num_kv_heads * head  # one token's k and v
    row_bytes = kv_written = kv_read = pair_flops = 0
    skip: frozenset[str] = frozenset()
    if isinstance(op, ops.Embed | ops.EmbedNorm):
        row_bytes, skip = _row_bytes(graph, op.table), frozenset({op.table})
    elif isinstance(op, ops.NormQkvRopeKv | ops.KvAppend):
        kv_written = kv_row
    elif isinstance(op, ops.Attention):
        kv_read, pair_flops = kv_row, 4 * op.num_heads * op.head_dim
    streamed = [name for name in op.weights if name not in skip]
    gemm_flops = 2 * sum(_size(graph, name) for name in streamed if _is_matrix(graph, name))
    is_head = isinstance(op, ops.LmHead | ops.NormLmHeadSample)
    return OpCost(
        name=op.kind,
        layer=getattr(op, "layer", -1),
        weight_bytes=sum(_weight_bytes(graph, name) for name in streamed),
        bytes_per_token=row_bytes + kv_written,
        bytes_per_row=0,
        bytes_per_cached_token=kv_read,
        flops_per_token=0 if is_head else gemm_flops,
        flops_per_row=gemm_flops if is_head else 0,
        flops_per_pair=pair_flops,
    )


def operand_bytes(graph: Graph) -> int:
    """Bytes of one element of a GEMM operand or of q."""
    return 2 if graph.dtype == "bf16" else FP32_BYTES


def _is_matrix(graph: Graph, weight: str) -> bool:
    return len(graph.weights[weight].shape) == 2


def _size(graph: Graph, weight: str) -> int:
    size = 1
    for dim in graph.weights[weight].shape:
        size *= dim
    return size


def _weight_bytes(graph: Graph, weight: str) -> int:
    """Matrices are packed in the graph's dtype or in codes, vectors in fp32."""
    shape = graph.weights[weight].shape
    if _is_matrix(graph, weight):
        form = graph.formats.get(weight)
        if form is not None and form.rows > 1:  # a row's share of a block's scale is no whole byte
            blocks = -(-shape[0] // form.rows) * -(-shape[1] // form.group)
            return shape[0] * shape[1] * form.bits // 8 + blocks * form.scale_bytes
        return shape[0] * _row_bytes(graph, weight)
    return shape[0] * FP32_BYTES


def _row_bytes(graph: Graph, matrix: str) -> int:
    """Bytes of one row of a matrix: its numbers, or its codes, scales and offsets."""
    depth = graph.weights[matrix].shape[1]
    form: GemmFormat | None = graph.formats.get(matrix)
    if form is None:
        return depth * operand_bytes(graph)
    groups = -(-depth // form.group) if form.group else 1
    per_group = form.scale_bytes + (0 if form.symmetric else FP32_BYTES)
    return -(-depth * form.bits // 8) + groups * per_group
