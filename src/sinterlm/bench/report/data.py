"""What a report is made of: a sweep, read back, with the questions that its tables ask.

Every figure is computed from raw timestamps at this moment; a sweep keeps nothing but them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from sinterlm.artifact.manifest import OpCost
from sinterlm.bench.bootstrap import Ratio, log_ratio, mean_interval, noise_band
from sinterlm.bench.facts import SweepFacts, read_facts
from sinterlm.bench.predict import serving_roof_s
from sinterlm.bench.results import Peaks
from sinterlm.bench.sweep_plan import AGAIN, COLD, SweepPlan, read_plan
from sinterlm.bench.sweep_store import LaunchFacts, Point, Series, SweepStore, series_of
from sinterlm.runtime.roofline import MOST_CREDIBLE

#: A 99th percentile of fewer requests is one of the three slowest ones, by name.
ENOUGH_FOR_P99 = 300

#: Bits of a weight, to tell equal precision from unequal.
WIDTHS = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "q8_0": 8, "int4": 4, "q4_0": 4}


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval over rounds (None with fewer than two)."""

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Tail:
    """The slow end of a metric, pooled over rounds, in milliseconds."""

    name: str  #: "P99", or "P90" with too few samples
    value: float
    maximum: float
    count: int


@dataclass(frozen=True)
class Costs:
    """Bytes and flops of the model's ops at one precision of weights."""

    ops: tuple[OpCost, ...]
    windows: tuple[int, ...]


@dataclass(frozen=True)
class ReportData:
    """One sweep."""

    plan: SweepPlan
    facts: SweepFacts
    points: tuple[Point, ...]
    launches: tuple[LaunchFacts, ...]
    series: Mapping[tuple[str, int], Series]
    costs: Mapping[str, Costs] = field(default_factory=dict)  #: by precision
    accuracy: tuple[Mapping[str, Any], ...] = ()  #: scores of `sinterlm eval --json`
    price_per_hour: float | None = None

    @property
    def arms(self) -> list[str]:
        """Engines that have figures, in the plan's order; without the A/A arm."""
        have = {arm for arm, _ in self.series}
        return [engine for engine in self.plan.engines if engine in have]

    @property
    def reference(self) -> str | None:
        """Ours: what others are compared with."""
        ours = [arm for arm in self.arms if arm.startswith("sinterlm")]
        return next(iter(ours or self.arms), None)

    def sizes(self, arm: str) -> list[int]:
        """Batch sizes with figures."""
        return [size for size in self.plan.batch_sizes if (arm, size) in self.series]

    def precision(self, arm: str) -> str:
        """Of its weights."""
        found = self.facts.engines.get(arm)
        return "unknown" if found is None else found.precision

    def estimate(self, arm: str, size: int, metric: str) -> Estimate | None:
        """Mean over rounds of a key of ``ServeStats.to_json``; None without data."""
        one = self.series.get((arm, size))
        values = {} if one is None else one.values(metric)
        if not values:
            return None
        return Estimate(float(np.mean(list(values.values()))), mean_interval(values))

    def tail(self, arm: str, size: int, metric: str) -> Tail | None:
        """P99 with at least ``ENOUGH_FOR_P99`` requests, else P90; None without a sample."""
        one = self.series.get((arm, size))
        if one is None or not one.stats:
            return None
        done = [request for request in one.requests.requests if request.is_success]
        seconds = {
            "ttft": lambda: [r.ttft_s for r in done],
            "tpot": lambda: [t for r in done if (t := r.tpot_s) is not None],
            "itl": lambda: [gap for r in done for gap in r.gaps_s],
            "e2el": lambda: [r.latency_s for r in done],
        }[metric]()
        if not seconds:
            return None
        p = 99 if len(done) >= ENOUGH_FOR_P99 else 90
        ms = np.asarray(seconds) * 1e3
        return Tail(f"P{p}", float(np.percentile(ms, p)), float(ms.max()), len(seconds))

    def ratio(self, first: str, second: str, size: int, metric: str) -> Ratio | None:
        """First over second."""
        pair = (self.series.get((first, size)), self.series.get((second, size)))
        if pair[0] is None or pair[1] is None:
            return None
        return log_ratio(pair[0].values(metric), pair[1].values(metric))

    def band(self, size: int, metric: str = "output_throughput") -> float | None:
        """Factor by which the A/A arm differs from itself."""
        again = self.plan.again
        if again is None:
            return None
        return noise_band(self.ratio(again, again + AGAIN, size, metric))

    @cached_property
    def peaks(self) -> Peaks | None:
        """Best probe of the sweep."""
        found = [
            Peaks(one.bytes_per_s, one.flops_per_s)
            for one in self.launches
            if one.bytes_per_s is not None and one.flops_per_s is not None
        ]
        return Peaks.best(found) if found else None

    def roof_share(self, arm: str, size: int) -> float | None:
        """Total throughput over that of the roof; None without costs, probes or belief."""
        costs = self.costs.get(self.precision(arm))
        got = self.estimate(arm, size, "total_token_throughput")
        if costs is None or got is None or self.peaks is None:
            return None
        lens = (self.plan.input_len, self.plan.output_len)
        roof_s = serving_roof_s(costs.ops, costs.windows, self.peaks, size, lens)
        share = got.value * roof_s / (size * sum(lens))
        return share if share <= MOST_CREDIBLE else None

    def startup(self, arm: str, *, cold: bool) -> float | None:
        """Median seconds from launch to the first useful answer."""
        found = [
            one.startup_s
            for one in self.launches
            if one.arm == arm and (one.round_number == COLD) == cold and one.startup_s is not None
        ]
        return median(found) if found else None

    def peak_memory(self, arm: str) -> int | None:
        """Most bytes of any launch."""
        found = [one.peak_memory for one in self.launches if one.arm == arm and one.peak_memory]
        return max(found) if found else None

    def same_width(self, first: str, second: str) -> bool:
        """Whether both hold weights of as many bits."""
        widths = [WIDTHS.get(self.precision(arm)) for arm in (first, second)]
        return widths[0] is not None and widths[0] == widths[1]


def load_data(
    folder: Path,
    costs: Mapping[str, Costs],
    accuracy: Sequence[Mapping[str, Any]] = (),
    price_per_hour: float | None = None,
) -> ReportData:
    """Read a sweep. Raises UsageError where ``folder`` holds none."""
    plan, store = read_plan(folder), SweepStore(folder)
    return ReportData(
        plan,
        read_facts(folder),
        tuple(store.points()),
        tuple(store.launches()),
        series_of(store),
        costs,
        tuple(accuracy),
        price_per_hour,
    )
