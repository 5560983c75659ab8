"""Shares of the roof in live steps: what a step holds is counted, and only what was looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sinterlm.artifact.manifest import OpCost
from sinterlm.engine.roof_meter import RoofMeter
from sinterlm.runtime.batch import RowSampling, StepBatch, StepResult

OPS = (
    OpCost("gemm", 0, 1000, 10, 0, 0, 100, 0, 0),
    OpCost("gemm", 1, 1000, 10, 0, 0, 100, 0, 0),
    OpCost("attention", 0, 0, 0, 0, 8, 0, 0, 4),
    OpCost("head", -1, 500, 0, 2, 0, 0, 50, 0),
)


class TimedModel:
    """Takes 1 ms for each kind of op and step; "head" less than its roof can be."""

    def __init__(self) -> None:
        self.num_steps = 0

    def step(self, batch: StepBatch) -> Any:
        self.num_steps += 1
        return self.num_steps

    def decode(self, batch: StepBatch, num_steps: int) -> list[StepResult]:
        return [self.step(batch) for _ in range(num_steps)]

    def describe(self) -> dict[str, Any]:
        ns = {"gemm": 10**6, "attention": 10**6, "head": 1, "sample": 10**6}
        return {"ops": [{"name": k, "calls": 0, "ns": v * self.num_steps} for k, v in ns.items()]}


def batch() -> StepBatch:
    """A prompt's 3 tokens of a context of 5, and a decode of a context of 9; both are sampled."""
    return StepBatch(
        token_ids=np.zeros(4, np.int32),
        positions=np.array([2, 3, 4, 8], np.int32),
        query_start=np.array([0, 3, 4], np.int32),
        context_lens=np.array([5, 9], np.int32),
        page_table=np.zeros((2, 1), np.int32),
        sample_rows=np.array([2, 3], np.int32),
        sampling=(RowSampling(), RowSampling()),
    )


def test_fractions_follow_what_the_steps_held() -> None:
    model = TimedModel()
    meter = RoofMeter(model, OPS, (0, 0), bytes_per_s=1e6, flops_per_s=1e5)
    assert meter.fraction("gemm") is None
    for step in range(1, 40):
        assert meter.step(batch()) == step  # type: ignore[comparison-overlap]
    # Two layers: max(1040 bytes / 1e6, 400 flops / 1e5) = 4 ms each, more than the 1 ms it took.
    assert meter.fraction("gemm") is None
    # 14 cached tokens of 8 bytes; (3 + 4 + 5) + 9 pairs of 4 flops: 0.84 ms of the 1 ms.
    assert meter.fraction("attention") == pytest.approx(0.84)
    assert meter.fraction("head") is None and meter.fraction("sample") is None
    assert len(meter.decode(batch(), 3)) == 3


def test_two_looks_are_averaged() -> None:
    model = TimedModel()
    meter = RoofMeter(model, OPS, (0, 0), bytes_per_s=1e7, flops_per_s=1e6)
    for _ in range(32):
        meter.step(batch())
    assert meter.fraction("gemm") == pytest.approx(0.8)
