"""A graph as text: one op per line, values with shapes, for people and for ``diff``."""

from __future__ import annotations

from dataclasses import fields

from sinterlm.ir.graph import Graph
from sinterlm.ir.ops import Op


def graph_text(graph: Graph) -> str:
    """The whole graph, weights after the ops."""
    config = graph.config
    kv = f", KV in {graph.kv_dtype}" if graph.kv_dtype != graph.dtype else ""
    lines = [f"graph {config.architecture} {graph.dtype}{kv}"]
    lines += [op_text(op, graph) for op in graph.ops]
    lines.append("weights")
    for weight in graph.weights.values():
        form = graph.formats.get(weight.name)
        lines.append(f"  {weight.name} {list(weight.shape)}{f' {form.name}' if form else ''}")
    return "\n".join(lines) + "\n"


def op_text(op: Op, graph: Graph) -> str:
    """``writes = kind(reads; weights by role; numbers)``."""
    named = {*op._reads, *op._writes, *op._weights}
    roles = [f"{f}={getattr(op, f)}" for f in op._weights if getattr(op, f) is not None]
    numbers = [f"{f.name}={getattr(op, f.name)}" for f in fields(op) if f.name not in named]
    groups = (", ".join(group) for group in (op.reads, roles, numbers))
    writes = ", ".join(_value(name, graph) for name in op.writes)
    return f"  {writes} = {op.kind}({'; '.join(group for group in groups if group)})"


def _value(name: str, graph: Graph) -> str:
    value = graph.values.get(name)
    if value is None:
        return f"%{name}"
    return f"%{name}: {value.dtype}[{', '.join(map(str, value.shape))}]"
