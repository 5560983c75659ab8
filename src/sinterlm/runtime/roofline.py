"""The roof: the least time a step can take on a machine of given bandwidth and compute peak.

time >= sum over ops of max(bytes / B, flops / F), after Williams, Waterman and Patterson,
"Roofline" (CACM 2009), with KV bytes, causal attention flops, and the head for sampled rows only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sinterlm.artifact.manifest import OpCost

#: A share of a measured peak above this is not possible from memory: caches held what was counted
#: as memory traffic, or the probe was disturbed. No such share is ever given.
MOST_CREDIBLE = 1.02


@dataclass(frozen=True)
class Step:
    """One sequence's share of a step: its last ``num_tokens`` of ``context_len`` are computed."""

    num_tokens: int  #: T, >= 1
    context_len: int  #: tokens in the cache after the step, >= num_tokens
    num_rows: int = 1  #: R, rows sampled

    def cached_tokens(self, window: int) -> int:
        """C: tokens of the cache that a layer reads; ``window`` 0 = all of them."""
        if window <= 0:
            return self.context_len
        return min(self.context_len, window + self.num_tokens - 1)

    def pairs(self, window: int) -> int:
        """P: (query, key) pairs a layer attends, causal, ``window`` 0 = full."""
        first, last = self.context_len - self.num_tokens + 1, self.context_len
        if window <= 0 or last <= window:
            return (first + last) * self.num_tokens // 2
        growing = max(0, window - first + 1)  # queries that do not fill their window yet
        return (first + window) * growing // 2 + (self.num_tokens - growing) * window


@dataclass(frozen=True)
class OpLoad:
    """What one op of one layer does in a step."""

    name: str
    layer: int  #: -1 outside layers
    nbytes: int
    flops: int

    def seconds(self, bytes_per_s: float, flops_per_s: float) -> float:
        """The roof of this op."""
        return max(self.nbytes / bytes_per_s, self.flops / flops_per_s)

    def is_memory_bound(self, bytes_per_s: float, flops_per_s: float) -> bool:
        """Whether bandwidth, not arithmetic, sets its roof."""
        return self.nbytes / bytes_per_s >= self.flops / flops_per_s


def load_of(op: OpCost, step: Step, window: int = 0) -> OpLoad:
    """Bytes and flops of ``op`` in ``step`` (the formula of ``OpCost``)."""
    return _load(op, _Totals.of([step], window))


def step_loads(ops: Sequence[OpCost], windows: Sequence[int], step: Step) -> list[OpLoad]:
    """Every op of a model in ``step``, in execution order; ``windows`` per layer, 0 = full."""
    return batch_loads(ops, windows, [step])


def batch_loads(
    ops: Sequence[OpCost], windows: Sequence[int], sequences: Sequence[Step]
) -> list[OpLoad]:
    """Every op in one step of several sequences: weights are read once for all of them."""
    totals = {window: _Totals.of(sequences, window) for window in {0, *windows}}
    return [_load(op, totals[windows[op.layer] if op.layer >= 0 else 0]) for op in ops]


@dataclass(frozen=True)
class _Totals:
    """T, R, C and P of ``OpCost`` over the sequences of a step, for one window."""

    num_tokens: int
    num_rows: int
    cached_tokens: int
    pairs: int

    @classmethod
    def of(cls, sequences: Sequence[Step], window: int) -> _Totals:
        return cls(
            sum(one.num_tokens for one in sequences),
            sum(one.num_rows for one in sequences),
            sum(one.cached_tokens(window) for one in sequences),
            sum(one.pairs(window) for one in sequences),
        )


def _load(op: OpCost, totals: _Totals) -> OpLoad:
    # A step that samples nothing leaves the head unread.
    is_idle = totals.num_rows == 0 and op.flops_per_row > 0 and op.flops_per_token == 0
    nbytes = (
        (0 if is_idle else op.weight_bytes)
        + totals.num_tokens * op.bytes_per_token
        + totals.num_rows * op.bytes_per_row
        + totals.cached_tokens * op.bytes_per_cached_token
    )
    flops = (
        totals.num_tokens * op.flops_per_token
        + totals.num_rows * op.flops_per_row
        + totals.pairs * op.flops_per_pair
    )
    return OpLoad(op.name, op.layer, nbytes, flops)


def total_bytes(loads: Iterable[OpLoad]) -> int:
    """Bytes that all ops move."""
    return sum(load.nbytes for load in loads)


def roof_seconds(loads: Iterable[OpLoad], bytes_per_s: float, flops_per_s: float) -> float:
    """The roof of a whole step."""
    return sum(load.seconds(bytes_per_s, flops_per_s) for load in loads)


def fraction(roof_s: float, measured_s: float) -> float | None:
    """Share of the roof that was reached; None where it would exceed ``MOST_CREDIBLE``."""
    share = roof_s / measured_s
    return share if share <= MOST_CREDIBLE else None
