"""RoofMeter: how close each kind of op comes to the machine's measured peaks, in live steps.

Looks at one step in sixteen: a description and the arithmetic of every op take longer than what a
server would like to spend on each.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sinterlm.artifact.manifest import OpCost
from sinterlm.runtime.batch import StepBatch, StepResult
from sinterlm.runtime.roofline import Step, batch_loads, fraction

_EVERY = 16


class DescribedModel(Protocol):
    """A model that can say what its ops have taken; ``runtime.model.Model`` is one."""

    def step(self, batch: StepBatch) -> StepResult:
        """Run one step."""
        ...

    def decode(self, batch: StepBatch, num_steps: int) -> list[StepResult]:
        """Run up to so many steps, each on what the one before drew."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """What it says of itself, among it calls and ns of each kind of op."""
        ...


class RoofMeter:
    """Steps as ``model`` does. ``ops`` and ``windows`` are the manifest's, the peaks measured."""

    def __init__(
        self,
        model: DescribedModel,
        ops: Sequence[OpCost],
        windows: Sequence[int],
        *,
        bytes_per_s: float,
        flops_per_s: float,
    ) -> None:
        self._model = model
        self._ops, self._windows = ops, windows
        self._peaks = bytes_per_s, flops_per_s
        self._num_steps = 0
        self._roof_s: defaultdict[str, float] = defaultdict(float)
        self._taken_s: defaultdict[str, float] = defaultdict(float)

    def step(self, batch: StepBatch) -> StepResult:
        """Run one step, and now and then see how long its ops took."""
        self._num_steps += 1
        if self._num_steps % _EVERY:
            return self._model.step(batch)
        before = self._seconds()
        result = self._model.step(batch)
        for name, seconds in self._seconds().items():
            self._taken_s[name] += seconds - before.get(name, math.nan)
        for load in batch_loads(self._ops, self._windows, _steps(batch)):
            self._roof_s[load.name] += load.seconds(*self._peaks)
        return result

    def decode(self, batch: StepBatch, num_steps: int) -> list[StepResult]:
        """Run several steps in one call; these are not looked at, a server takes one at a time."""
        return self._model.decode(batch, num_steps)

    def fraction(self, name: str) -> float | None:
        """Share of the roof that ops of this kind have reached; None where it is not known."""
        taken = self._taken_s.get(name, 0.0)
        return fraction(self._roof_s[name], taken) if taken > 0 and name in self._roof_s else None

    def _seconds(self) -> dict[str, float]:
        return {op["name"]: op["ns"] / 1e9 for op in self._model.describe()["ops"]}


def _steps(batch: StepBatch) -> list[Step]:
    """The sequences of a batch as the roof counts them."""
    starts = batch.query_start.tolist()
    rows = [0] * batch.num_seqs
    sequence = 0
    for row in batch.sample_rows.tolist():
        while row >= starts[sequence + 1]:
            sequence += 1
        rows[sequence] += 1
    return [
        Step(end - start, context, num_rows)
        for start, end, context, num_rows in zip(
            starts, starts[1:], batch.context_lens.tolist(), rows, strict=False
        )
    ]
