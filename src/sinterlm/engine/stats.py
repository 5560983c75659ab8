"""EngineStats: what the engine has done and holds, as one immutable snapshot.

Plain data. Counters only ever grow while the engine lives; gauges describe the moment. Between
snapshots the counters live in ``Counters``, which whoever does the counted thing moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FinishKind = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class Counters:
    """What ``EngineStats`` counts, as it grows; each is explained there."""

    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    finished: dict[FinishKind, int] = field(
        default_factory=lambda: {"stop": 0, "length": 0, "abort": 0, "error": 0}
    )
    steps: int = 0
    step_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class OpStats:
    """Calls and time of one kind of fused op, summed over layers and steps."""

    name: str
    calls: int
    seconds: float
    roof_fraction: float | None  #: of the machine's measured roof; None where it is not measured


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One moment of an engine. Cheap to take; never changes afterwards."""

    num_running: int  #: sequences that hold KV pages
    num_waiting: int  #: sequences that wait for their first, or after preemption next, pages
    num_preemptions: int
    kv_pages_total: int
    kv_pages_used: int  #: held by sequences
    kv_pages_cached: int  #: held by nobody, but their content may be reused
    prefix_cache_queries: int  #: prompt tokens looked up
    prefix_cache_hits: int  #: prompt tokens found, so not computed again
    prompt_tokens_total: int  #: of admitted requests, cached ones included
    generation_tokens_total: int
    spec_draft_tokens: int  #: proposed by speculation
    spec_accepted_tokens: int  #: and kept
    requests_finished: Mapping[FinishKind, int]  #: sequences; "error" = lost to a fault
    steps: int
    step_seconds_total: float  #: inside the native step
    ops: tuple[OpStats, ...] = ()  #: in the order they run


def op_stats(
    description: Mapping[str, Any], fraction: Callable[[str], float | None]
) -> tuple[OpStats, ...]:
    """The ops of ``Model.describe()``; ``fraction`` gives a kind's share of its roof."""
    return tuple(
        OpStats(op["name"], op["calls"], op["ns"] / 1e9, fraction(op["name"]))
        for op in description["ops"]
    )
