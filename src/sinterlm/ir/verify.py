"""Holds a graph against the rules of its ops, between passes. A failure is our own bug."""

from __future__ import annotations

from sinterlm.ir import ops
from sinterlm.ir.graph import Graph, Value
from sinterlm.ir.shapes import signature

#: What a step brings along; every other value is written by an op.
INPUTS = (
    Value("tokens", ("T",), "i32"),
    Value("positions", ("T",), "i32"),
    Value("rows", ("R",), "i32"),
)


class VerifyError(AssertionError):
    """A graph that breaks a rule; names the op, the field or value, and what was expected."""


def verify(graph: Graph) -> None:
    """Raise VerifyError unless the graph is sound.

    Every value is written once, before it is read, and stands in the table as the rule of its
    writer and of each reader says; every weight is listed, used, and of the shape that its op
    needs; attention reads the pages of its own layer; a token is drawn.
    """
    if graph.dtype not in ("bf16", "fp32"):
        raise VerifyError(f"graph dtype is {graph.dtype!r}, expected bf16 or fp32")
    for value in INPUTS:
        _expect("the graph", "input", value, graph.values.get(value.name))
    written: dict[str, ops.Op | None] = {value.name: None for value in INPUTS}
    used: set[str] = set()
    for index, op in enumerate(graph.ops):
        _check_op(graph, op, f"op {index} ({op.kind})", written)
        used.update(op.weights)
    for what, listed, real in (
        ("value", graph.values, written), ("weight", graph.weights, used),
    ):  # fmt: skip
        for name in listed:
            if name not in real:
                raise VerifyError(f"the graph lists {what} {name!r}, which no op has to do with")
    if not graph.ops or not isinstance(graph.ops[-1], ops.Sample | ops.NormLmHeadSample):
        raise VerifyError("the graph does not end with the draw of a token")


def _check_op(graph: Graph, op: ops.Op, where: str, written: dict[str, ops.Op | None]) -> None:
    """One op against its rule; notes what it writes in ``written``."""
    for name in op.reads:
        if name not in written:
            raise VerifyError(f"{where} reads {name!r} before anything writes it")
        if name not in graph.values:
            raise VerifyError(f"{where} reads {name!r}, which is not in the value table")
    for name in op.weights:
        if name not in graph.weights:
            raise VerifyError(f"{where} uses weight {name!r}, which the graph does not list")
    for name in op.writes:
        if name in written:
            raise VerifyError(f"{where} writes {name!r} a second time")
        written[name] = op
    rule = signature(op, graph)
    for value in rule.reads:
        _expect(where, "reads", value, graph.values.get(value.name))
    for value in rule.writes:
        _expect(where, "writes", value, graph.values.get(value.name))
    for weight in rule.weights:
        _expect(where, "uses", weight, graph.weights.get(weight.name))
    if isinstance(op, ops.Attention):
        _check_attention(graph, op, where, written[op.kv])


def _check_attention(graph: Graph, op: ops.Attention, where: str, writer: ops.Op | None) -> None:
    """The pages are its own layer's, and the heads those of the config."""
    layer = getattr(writer, "layer", None)
    if layer != op.layer:
        raise VerifyError(f"{where}: layer {op.layer} reads the pages of layer {layer}")
    heads = (op.num_heads, op.num_kv_heads, op.head_dim)
    config = graph.config
    if heads != (config.num_heads, config.num_kv_heads, config.head_dim):
        raise VerifyError(f"{where}: heads {heads} are not those of the config")
    if config.num_heads % config.num_kv_heads:
        raise VerifyError(f"{where}: num_heads is no multiple of num_kv_heads, {heads}")


def _expect(where: str, verb: str, expected: object, found: object) -> None:
    if found != expected:
        raise VerifyError(f"{where} {verb} {expected}, and the table has {found}")
