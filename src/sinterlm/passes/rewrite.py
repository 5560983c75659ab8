"""Pattern helpers for passes: who writes a value, who reads it, and a graph with other ops.

Refuses nothing by itself; a pass that meets an unexpected pattern raises PassError, which is our
own bug, never the user's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from sinterlm.ir.shapes import infer_values
from sinterlm.ir.graph import Graph, Value
from sinterlm.ir.ops import Op

OpT = TypeVar("OpT", bound=Op)


class PassError(AssertionError):
    """A pass met a graph it does not understand. Names the pass, the op and the value."""


class Matcher:
    """Producers and consumers of every value of a graph."""

    def __init__(self, graph: Graph, pass_name: str) -> None:
        self.graph = graph
        self.pass_name = pass_name
        self._writer = {name: op for op in graph.ops for name in op.writes}
        self._readers: dict[str, list[Op]] = {}
        for op in graph.ops:
            for name in op.reads:
                self._readers.setdefault(name, []).append(op)

    def writer(self, value: str, kind: type[OpT]) -> OpT:
        """The op that writes ``value``, which must be of ``kind``."""
        op = self._writer.get(value)
        if not isinstance(op, kind):
            raise self.error(value, f"is written by {_name(op)}, not by {kind.__name__}")
        return op

    def is_written_by(self, value: str, kind: type[Op]) -> bool:
        """Whether the writer of ``value`` is of ``kind``."""
        return isinstance(self._writer.get(value), kind)

    def readers(self, value: str) -> list[Op]:
        """The ops that read ``value``, in order."""
        return self._readers.get(value, [])

    def sole_reader(self, value: str, kind: type[OpT]) -> OpT:
        """The one op that reads ``value``, which must be of ``kind``."""
        readers = self.readers(value)
        if len(readers) != 1 or not isinstance(readers[0], kind):
            names = ", ".join(map(_name, readers)) or "nobody"
            raise self.error(value, f"is read by {names}, not by one {kind.__name__}")
        return readers[0]

    def error(self, value: str, what: str) -> PassError:
        """A PassError about ``value``."""
        return PassError(f"{self.pass_name}: value {value!r} {what}")


def with_ops(graph: Graph, ops: Iterable[Op]) -> Graph:
    """The graph with other ops: its value table is inferred anew from its inputs, in order."""
    ops = tuple(ops)
    values: dict[str, Value] = {n: graph.values[n] for n in ("tokens", "positions", "rows")}
    out = Graph(graph.config, graph.dtype, ops, values, graph.weights)
    for op in ops:
        for value in infer_values(op, out):
            values[value.name] = value
    return out


def _name(op: Op | None) -> str:
    return "nobody" if op is None else type(op).__name__
