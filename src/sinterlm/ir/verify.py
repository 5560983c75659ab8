"""Checks a graph between passes: SSA, order, shapes, dtypes, weights. A failure is our own bug."""

from __future__ import annotations

from sinterlm.ir import ops
from sinterlm.ir.graph import Graph
from sinterlm.ir.shapes import infer_values

INPUTS = ("tokens", "positions", "rows")


class VerifyError(AssertionError):
    """A graph that breaks a rule; names the op and what is wrong with it."""


def verify(graph: Graph, *, folded: bool = True) -> None:
    """Raise VerifyError unless every op reads what was written before and writes what its rule says.

    ``folded=False`` allows reads of a norm's by-products (``x.xw``, ``x.ssq``) before the pass that
    gives them a writer has run.
    """
    written = set(INPUTS)
    for index, op in enumerate(graph.ops):
        where = f"op {index} ({op.kind})"
        for name in op.reads:
            if name in written or (not folded and name.endswith((".xw", ".ssq"))):
                continue
            raise VerifyError(f"{where} reads {name!r} before anything writes it")
        for name in op.weights:
            if name not in graph.weights:
                raise VerifyError(f"{where} uses weight {name!r}, which the graph does not list")
        for name in op.writes:
            if name in written:
                raise VerifyError(f"{where} writes {name!r} a second time")
            written.add(name)
        _check_values(graph, op, where, folded)
        _check_depth(graph, op, where)
    if not any(isinstance(op, ops.Sample | ops.NormLmHeadSample) for op in graph.ops):
        raise VerifyError("the graph draws no token")


def _check_values(graph: Graph, op: ops.Op, where: str, folded: bool) -> None:
    """Written values stand in the table as the shape rule says."""
    for value in infer_values(op, graph):
        found = graph.values.get(value.name)
        if found is None and not folded:
            continue
        if found != value:
            raise VerifyError(f"{where} writes {value}, and the value table has {found}")


def _check_depth(graph: Graph, op: ops.Op, where: str) -> None:
    """A projection's weight is as deep as its operand is wide."""
    pairs: list[tuple[str, str]] = []
    if isinstance(op, ops.MatMul):
        pairs = [(op.x, op.weight)]
    elif isinstance(op, ops.OResidual):
        pairs = [(op.y, op.weight)]
    elif isinstance(op, ops.DownResidual):
        pairs = [(op.h, op.weight)]
    elif isinstance(op, ops.LmHead):
        pairs = [(op.x, op.weight)]
    for value, weight in pairs:
        width, shape = graph.values[value].shape[-1], graph.weights[weight].shape
        if len(shape) != 2 or shape[1] != width:
            raise VerifyError(f"{where}: {value!r} is {width} wide, and {weight!r} is {shape}")
