"""Activation arenas planned by lifetime: buffers that never hold something together share bytes.

Every activation scales with the tokens of a step ("T") or its sampled rows ("R"), so offsets and
sizes are per token and per row: buffer b of a step of up to N units lies at b.offset * N. A row's
pitch is its padded width, b.nbytes; only its place is rounded up to 64 bytes. Buffers that share
bytes overwrite each other's padding, so every kernel writes the padding it lets others read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sinterlm.ir import ops
from sinterlm.ir.cost import FP32_BYTES, operand_bytes
from sinterlm.ir.graph import Graph
from sinterlm.ir.plan import Buffer, MemoryPlan
from sinterlm.passes.layout import LANES, PANEL, hidden_width, round_up

ALIGN = 64  #: bytes
Unit = Literal["T", "R"]

#: The buffer that holds the value named by a field of a fused op. The residual stream is updated
#: in place. Fields not listed are inputs, outputs, or live in the pages.
_HOMES: tuple[tuple[type[ops.Op], dict[str, str]], ...] = (
    (ops.EmbedNorm, {"x": "x", "xw": "xw", "ssq": "ssq"}),
    (ops.NormQkvRopeKv, {"q": "q"}),
    (ops.Attention, {"y": "y"}),
    (ops.OResidual, {"x_out": "x", "xw": "xw", "ssq": "ssq"}),
    (ops.NormGateUpAct, {"h": "h"}),
    (ops.DownResidual, {"x_out": "x", "xw": "xw", "ssq": "ssq"}),
)

#: What the head keeps to itself while it runs.
_HEAD_SCRATCH = ("logits", "gathered")


@dataclass(frozen=True)
class Span:
    """A buffer holds a value from the op that writes it to the last that reads it (indices)."""

    first: int
    last: int

    def meets(self, other: Span) -> bool:
        """Whether both live during some op."""
        return self.first <= other.last and other.first <= self.last


def plan_memory(graph: Graph) -> MemoryPlan:
    """Offsets of every activation of a fused graph."""
    alive, widths = lifetimes(graph), buffer_bytes(graph)
    buffers: list[Buffer] = []
    totals: dict[Unit, int] = {"T": 0, "R": 0}
    for name, spans in alive.items():
        unit: Unit = "R" if name in _HEAD_SCRATCH else "T"
        rivals = [
            b
            for b in buffers
            if b.unit == unit and any(s.meets(t) for s in spans for t in alive[b.name])
        ]
        offset = first_gap(rivals, widths[name])
        buffers.append(Buffer(name, unit, widths[name], offset))
        totals[unit] = max(totals[unit], offset + round_up(widths[name], ALIGN))
    return MemoryPlan(tuple(buffers), totals["T"], totals["R"])


def first_gap(rivals: list[Buffer], nbytes: int) -> int:
    """The lowest offset at which ``nbytes`` meet none of ``rivals``."""
    offset, size = 0, round_up(nbytes, ALIGN)
    for rival in sorted(rivals, key=lambda b: b.offset):
        if offset + size <= rival.offset:
            break
        offset = max(offset, rival.offset + round_up(rival.nbytes, ALIGN))
    return offset


def lifetimes(graph: Graph) -> dict[str, list[Span]]:
    """The spans of every buffer, in order of first use. The stream and its sums live to the end:
    a step may copy the final hidden states out."""
    end = len(graph.ops) - 1
    last_read = {name: i for i, op in enumerate(graph.ops) for name in op.reads}
    spans: dict[str, list[Span]] = {}
    for index, op in enumerate(graph.ops):
        for value, home in homes(op).items():
            span = Span(index, last_read.get(value, end))
            before = spans.setdefault(home, [])
            # In place: the op that reads the old stream writes the new one.
            assert home == "x" or not (before and before[-1].meets(span)), f"{home} is overwritten"
            before.append(span)
    for name in _HEAD_SCRATCH:
        spans[name] = [Span(end, end)]
    return spans


def homes(op: ops.Op) -> dict[str, str]:
    """Buffer by name of each value that a fused op writes."""
    for kind, fields in _HOMES:
        if isinstance(op, kind):
            return {getattr(op, field): home for field, home in fields.items()}
    return {}


def buffer_bytes(graph: Graph) -> dict[str, int]:
    """Bytes per unit of every buffer: its padded width, in the widest form that it takes."""
    config, hidden = graph.config, hidden_width(graph)
    heads = round_up(config.num_heads * config.head_dim, LANES)
    streams = (ops.NormQkvRopeKv, ops.NormGateUpAct, ops.NormLmHeadSample)
    return {
        "x": hidden * FP32_BYTES,
        "xw": operand_row_bytes(graph, hidden, streams),
        "ssq": hidden // LANES * FP32_BYTES,
        "q": heads * operand_bytes(graph),
        "y": operand_row_bytes(graph, heads, (ops.OResidual,)),
        "h": operand_row_bytes(
            graph, round_up(config.intermediate_size, PANEL), (ops.DownResidual,)
        ),
        "logits": round_up(config.vocab_size, PANEL) * FP32_BYTES,
        "gathered": operand_row_bytes(graph, hidden, (ops.NormLmHeadSample,)),
    }


def operand_row_bytes(graph: Graph, width: int, readers: tuple[type[ops.Op], ...]) -> int:
    """Bytes of a row that ops of the kinds ``readers`` multiply, each in its own format."""
    sizes = {0}
    for op in graph.ops:
        if isinstance(op, readers):
            form = graph.formats.get(op.matrices[0])
            in_codes = form is not None and form.act == "int8"
            wide = width * operand_bytes(graph)
            sizes.add(form.operand_row_bytes(width) if form and in_codes else wide)
    return max(sizes)
