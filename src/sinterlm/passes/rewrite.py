"""Pattern helpers for passes: who writes a value, who reads it, and groups of ops made into others.

A pass that meets a pattern it does not know raises PassError, which is our own bug, never the
user's; a group is replaced whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

from sinterlm.ir.graph import Graph, Value
from sinterlm.ir.ops import Op
from sinterlm.ir.shapes import infer_values
from sinterlm.ir.verify import INPUTS

OpT = TypeVar("OpT", bound=Op)


class PassError(AssertionError):
    """A pass met a graph it does not understand. Names the pass, the value and what it found."""


class Matcher:
    """Writers and readers of every value of a graph."""

    def __init__(self, graph: Graph, pass_name: str) -> None:
        self.graph = graph
        self.pass_name = pass_name
        self._order = {op: index for index, op in enumerate(graph.ops)}
        self._writer = {name: op for op in graph.ops for name in op.writes}
        self._readers: dict[str, list[Op]] = {}
        for op in graph.ops:
            for name in op.reads:
                self._readers.setdefault(name, []).append(op)

    def all(self, kind: type[OpT]) -> list[OpT]:
        """Every op of ``kind``, in order."""
        return [op for op in self.graph.ops if isinstance(op, kind)]

    def writer(self, value: str, kind: type[OpT]) -> OpT:
        """The op that writes ``value``, which must be of ``kind``."""
        op = self._writer.get(value)
        if not isinstance(op, kind):
            found = "nobody" if op is None else type(op).__name__
            raise self.error(value, f"is written by {found}, not by {kind.__name__}")
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
        if len(readers) == 1 and isinstance(readers[0], kind):
            return readers[0]
        names = ", ".join(type(op).__name__ for op in readers) or "nobody"
        raise self.error(value, f"is read by {names}, not by one {kind.__name__}")

    def reader(self, value: str, kind: type[OpT]) -> OpT:
        """The one op of ``kind`` among those that read ``value``."""
        found = [op for op in self.readers(value) if isinstance(op, kind)]
        if len(found) != 1:
            raise self.error(value, f"is read by {len(found)} ops {kind.__name__}, not by one")
        return found[0]

    def last(self, group: Iterable[Op]) -> Op:
        """The op of ``group`` that runs last."""
        return max(group, key=self._order.__getitem__)

    def error(self, value: str, what: str) -> PassError:
        """A PassError about ``value``."""
        return PassError(f"{self.pass_name}: value {value!r} {what}")


class Rewrite:
    """Groups of ops to replace. New ops stand where the last op of their group stood."""

    def __init__(self, match: Matcher) -> None:
        self.match = match
        self._gone: set[Op] = set()
        self._new: dict[Op, tuple[Op, ...]] = {}

    def replace(self, old: Iterable[Op], new: Iterable[Op]) -> None:
        """``new`` instead of the group ``old``, which no other group may touch."""
        group = set(old)
        shared = group & self._gone
        if shared:
            name = min(op.writes[0] for op in shared)
            raise self.match.error(name, "is part of two patterns")
        self._gone |= group
        self._new[self.match.last(group)] = tuple(new)

    def apply(self) -> Graph:
        """The new graph. Raises PassError if an op that stays reads what is no longer written."""
        graph = self.match.graph
        ops: list[Op] = []
        for op in graph.ops:
            ops += self._new.get(op, () if op in self._gone else (op,))
        written = {value.name for value in INPUTS}.union(*(op.writes for op in ops))
        for op in ops:
            for name in op.reads:
                if name not in written:
                    raise self.match.error(name, f"is still read by {type(op).__name__}")
        return with_ops(graph, ops)


def with_ops(graph: Graph, ops: Iterable[Op]) -> Graph:
    """The graph with other ops: its value table is inferred anew from its inputs, in order."""
    ops = tuple(ops)
    values: dict[str, Value] = {value.name: value for value in INPUTS}
    out = replace(graph, ops=ops, values=values)
    for op in ops:
        for value in infer_values(op, out):
            values[value.name] = value
    return out


def xw_of(x: str) -> str:
    """Name of the by-product x * norm weight of a value of the residual stream."""
    return f"{x}.xw"


def ssq_of(x: str) -> str:
    """Name of the by-product sums of squares of a value of the residual stream."""
    return f"{x}.ssq"
