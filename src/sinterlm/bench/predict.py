"""Roofline predictions: what a device allows, and what to expect of it. Never a measurement.

The roof of a step is that of ``roofline``. What is expected is the roof divided by a share of it,
an interval: from the least to the most that was measured of such code, see ``SHARES``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sinterlm.artifact.manifest import OpCost
from sinterlm.bench.published import DEVICES, published_rows
from sinterlm.bench.results import Peaks
from sinterlm.errors import UsageError
from sinterlm.runtime.roofline import Step, batch_loads, roof_seconds, total_bytes


@dataclass(frozen=True)
class Device:
    """Peaks of a device as its maker states them, dense, without sparsity."""

    name: str
    bytes_per_s: float
    flops_per_s: Mapping[str, float]  #: by dtype of the operands
    source: str
    target: str  #: what ``--target`` calls it

    def peaks(self, dtype: str) -> Peaks:
        """Raises UsageError for a dtype without a figure."""
        if dtype not in self.flops_per_s:
            known = ", ".join(self.flops_per_s)
            raise UsageError(f"--dtype {dtype}: {self.name} has figures for {known}")
        return Peaks(self.bytes_per_s, self.flops_per_s[dtype])


DEVICES_BY_NAME = {
    "mi300x": Device(
        "mi300x", 5.3e12, {"bf16": 1307.4e12, "fp32": 163.4e12, "int8": 2614.9e12},
        "AMD Instinct MI300X data sheet: 5.3 TB/s, matrix peaks", "gfx942",
    ),
    "h200": Device(
        "h200", 4.8e12, {"bf16": 989.5e12, "fp32": 66.9e12, "int8": 1979e12},
        "NVIDIA H200 SXM data sheet: 4.8 TB/s, tensor-core peaks without sparsity", "sm_90",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Shares:
    """Of the roof: the least, what is typical, the most."""

    least: float
    typical: float
    most: float
    why: str


#: On this kind of machine our own steps, on a device that we have not run on what others reach.
SHARES = {
    "cpu": Shares(0.60, 0.80, 0.95, "decode and prefill of docs/benchmarks.md"),
    "gpu": Shares(0.579, 0.628, 0.662, "published figures of QwQ-32B at batch size 1"),
}


#: Seconds from one kernel to the next: within a CUDA graph, and on a stream.
LAUNCH_GAPS = (1.3e-6, 2.1e-6)
LAUNCH_GAPS_SOURCE = "HazyResearch, on an H100: within a CUDA graph, and on a stream"


def with_launches(roof_s: float, launches: int) -> tuple[float, float]:
    """Seconds of a step at its roof with the gaps between its launches, least and most."""
    least, most = LAUNCH_GAPS
    return roof_s + launches * least, roof_s + launches * most


@dataclass(frozen=True)
class Prediction:
    """One batch size."""

    batch_size: int
    context: int
    roof_s: float  #: least time of a decode step
    expected_s: tuple[float, float, float]  #: least, typical, most
    bound: str  #: "memory" or "compute": what sets most of the roof
    gbytes: float  #: read and written in a step
    measured_s: float | None = None

    @property
    def error(self) -> float | None:
        """Measured against the typical expectation: +0.1 = 10 % slower than predicted."""
        return None if self.measured_s is None else self.measured_s / self.expected_s[1] - 1

    @property
    def is_inside(self) -> bool | None:
        """Whether the measurement lies in the interval."""
        if self.measured_s is None:
            return None
        return self.expected_s[0] <= self.measured_s <= self.expected_s[2]

    @property
    def tokens_per_s(self) -> float:
        """Of the roof."""
        return self.batch_size / self.roof_s


def predict(
    ops: Sequence[OpCost],
    windows: Sequence[int],
    peaks: Peaks,
    shares: Shares,
    batch_sizes: Sequence[int],
    context: int,
    measured: Mapping[int, float] | None = None,
) -> list[Prediction]:
    """A decode step of each batch size, every sequence at ``context`` tokens."""
    found = []
    for size in batch_sizes:
        loads = batch_loads(ops, windows, [Step(1, context)] * size)
        pair = (peaks.bytes_per_s, peaks.flops_per_s)
        roof = roof_seconds(loads, *pair)
        memory = sum(load.seconds(*pair) for load in loads if load.is_memory_bound(*pair))
        expected = (roof / shares.most, roof / shares.typical, roof / shares.least)
        bound = "memory" if memory * 2 >= roof else "compute"
        step = (measured or {}).get(size)
        found.append(
            Prediction(size, context, roof, expected, bound, total_bytes(loads) / 1e9, step)
        )
    return found


def serving_roof_s(
    ops: Sequence[OpCost],
    windows: Sequence[int],
    peaks: Peaks,
    batch_size: int,
    lens: tuple[int, int],
) -> float:
    """Least seconds for ``batch_size`` requests of ``lens`` (input, output) tokens at once: one
    prefill of all prompts, then decode steps of all."""
    prompt, output = lens
    pair = (peaks.bytes_per_s, peaks.flops_per_s)
    total = roof_seconds(batch_loads(ops, windows, [Step(prompt, prompt)] * batch_size), *pair)
    for done in range(1, output):
        loads = batch_loads(ops, windows, [Step(1, prompt + done)] * batch_size)
        total += roof_seconds(loads, *pair)
    return total


@dataclass(frozen=True)
class PublishedShare:
    """A published point beside the roof of its device."""

    system: str
    batch_size: int
    output_tokens_per_s: float
    roof_tokens_per_s: float

    @property
    def share(self) -> float:
        """Of the decode roof. A burst that drains is not always full: at large batch sizes the
        share is a lower bound."""
        return self.output_tokens_per_s / self.roof_tokens_per_s


def published_shares(device: str, predictions: Sequence[Prediction]) -> list[PublishedShare]:
    """Published systems on ``device`` at the predicted batch sizes."""
    roofs = {one.batch_size: one.tokens_per_s for one in predictions}
    return [
        PublishedShare(row.system, row.batch_size, row.output_tokens_per_s, roofs[row.batch_size])
        for row in published_rows()
        if DEVICES[row.system] == device and row.batch_size in roofs
    ]
