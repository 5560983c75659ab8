"""One arena for activations, planned by lifetime: buffers that never live together share bytes.

Every activation scales with the tokens of a step ("T") or the rows sampled ("R"), so offsets and
sizes are per token and per row. The fused op sequence repeats in every layer, so lifetimes are
taken inside one layer; what crosses layers lives throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sinterlm.ir.graph import Graph
from sinterlm.ir.plan import Buffer, MemoryPlan
from sinterlm.passes.layout import LANES, PANEL, round_up

ALIGN = 64  #: bytes


@dataclass(frozen=True)
class Lifetime:
    """A buffer and the phases of a layer, first to last, in which it holds something."""

    name: str
    unit: Literal["T", "R"]
    nbytes: int
    first: int
    last: int


#: Phases of a layer. A buffer lives from the phase that writes it to the last that reads it.
QKV, ATTENTION, O_PROJ, GATE_UP, DOWN = range(5)


def plan_memory(graph: Graph) -> MemoryPlan:
    """Offsets of every activation of a fused graph."""
    token = place(lifetimes(graph, "T"))
    row = place(lifetimes(graph, "R"))
    return MemoryPlan((*token[0], *row[0]), token[1], row[1])


def lifetimes(graph: Graph, unit: Literal["T", "R"]) -> list[Lifetime]:
    """What a fused graph keeps per token or per row."""
    config, size = graph.config, 2 if graph.dtype == "bf16" else 4
    hidden = round_up(config.hidden_size, LANES)
    heads = round_up(config.num_heads * config.head_dim, LANES)
    ffn = round_up(config.intermediate_size, PANEL)
    vocab = round_up(config.vocab_size, PANEL)
    if unit == "R":
        return [
            Lifetime("logits", unit, vocab * 4, QKV, DOWN),
            Lifetime("gathered", unit, hidden * size, QKV, DOWN),
        ]
    return [
        Lifetime("x", unit, hidden * 4, QKV, DOWN),
        Lifetime("xw", unit, hidden * size, QKV, DOWN),
        Lifetime("ssq", unit, hidden // LANES * 4, QKV, DOWN),
        Lifetime("q", unit, heads * size, QKV, ATTENTION),
        Lifetime("y", unit, heads * size, ATTENTION, O_PROJ),
        Lifetime("h", unit, ffn * size, GATE_UP, DOWN),
    ]


def place(buffers: list[Lifetime]) -> tuple[list[Buffer], int]:
    """First fit in the given order; returns the buffers and the bytes per unit."""
    placed: list[tuple[Lifetime, Buffer]] = []
    for want in buffers:
        size = round_up(want.nbytes, ALIGN)
        taken = sorted(
            (b.offset, b.offset + round_up(b.nbytes, ALIGN))
            for other, b in placed
            if other.first <= want.last and want.first <= other.last
        )
        offset = 0
        for start, end in taken:
            if offset + size <= start:
                break
            offset = max(offset, end)
        placed.append((want, Buffer(want.name, want.unit, want.nbytes, offset)))
    total = max((b.offset + round_up(b.nbytes, ALIGN) for _, b in placed), default=0)
    return [b for _, b in placed], total
