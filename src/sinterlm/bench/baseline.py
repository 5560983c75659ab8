"""Tracked baselines: the figures of a sweep by round, small enough for a repository.

``benchmarks/results/*.json`` hold them; ``sinterlm bench compare`` sets one against another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sinterlm.bench.bootstrap import Ratio, log_ratio, noise_band
from sinterlm.bench.facts import read_facts
from sinterlm.bench.raw import write_whole
from sinterlm.bench.sweep_plan import AGAIN, read_plan
from sinterlm.bench.sweep_store import SweepStore, series_of
from sinterlm.errors import UsageError

METRICS = ("output_throughput", "total_token_throughput", "mean_ttft_ms", "mean_tpot_ms",
           "median_itl_ms", "mean_e2el_ms")  # fmt: skip
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Baseline:
    """Figures of one sweep."""

    model: str
    plan: Mapping[str, Any]
    machine: Mapping[str, Any]
    #: arm -> batch size -> metric -> one value for each round
    series: Mapping[str, Mapping[str, Mapping[str, tuple[float, ...]]]]
    noise: Mapping[str, float]  #: batch size -> factor of the A/A arm, output throughput


def baseline_of(folder: Path) -> Baseline:
    """From a sweep. Raises UsageError where there is none."""
    plan, found = read_plan(folder), series_of(SweepStore(folder))
    series: dict[str, dict[str, dict[str, tuple[float, ...]]]] = {}
    for (arm, size), one in sorted(found.items()):
        values = {name: tuple(one.values(name).values()) for name in METRICS}
        series.setdefault(arm, {})[str(size)] = {k: v for k, v in values.items() if v}
    noise = {}
    for size in plan.batch_sizes:
        once = found.get((plan.again or "", size))
        again = found.get(((plan.again or "") + AGAIN, size))
        if once is not None and again is not None:
            name = "output_throughput"
            band = noise_band(log_ratio(once.values(name), again.values(name)))
            if band is not None:
                noise[str(size)] = band
    plan_json = json.loads(json.dumps(asdict(plan)))  # as a file would hold it
    return Baseline(plan.model, plan_json, read_facts(folder).machine, series, noise)


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Raises ResourceError on a full disk."""
    write_whole(path, json.dumps(asdict(baseline), indent=1, sort_keys=True) + "\n")


def read_baseline(path: Path) -> Baseline:
    """A file of ``write_baseline``, or the folder of a sweep. Raises UsageError."""
    if path.is_dir():
        return baseline_of(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        series = {
            arm: {size: {m: tuple(v) for m, v in ms.items()} for size, ms in sizes.items()}
            for arm, sizes in data["series"].items()
        }
        return Baseline(data["model"], data["plan"], data["machine"], series, data["noise"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise UsageError(f"{path} is neither a baseline nor the folder of a sweep ({exc})") from exc


@dataclass(frozen=True)
class Change:
    """One arm at one batch size, B against A."""

    arm: str
    batch_size: int
    ratio: Ratio  #: of output throughput, B / A
    noise: float | None

    def is_regression(self, tolerance: float) -> bool:
        """Slower by more than ``tolerance`` with the whole interval, and beyond the noise band.

        With one round on either side there is no interval, and the ratio alone is judged."""
        high = self.ratio.value if self.ratio.high is None else self.ratio.high
        return high < (1 - tolerance) and high < 1 / (self.noise or 1.0)


def changes(a: Baseline, b: Baseline) -> list[Change]:
    """What both have. Raises UsageError where nothing can be compared."""
    if a.model != b.model:
        raise UsageError(f"A measured {a.model} and B {b.model}; only the same model compares")
    for name in ("input_len", "output_len", "waves", "mode"):
        if a.plan.get(name) != b.plan.get(name):
            raise UsageError(f"A has {name} {a.plan.get(name)} and B {b.plan.get(name)}")
    found = []
    for arm in sorted(set(a.series) & set(b.series)):
        for size in sorted(set(a.series[arm]) & set(b.series[arm]), key=int):
            before = a.series[arm][size].get("output_throughput", ())
            after = b.series[arm][size].get("output_throughput", ())
            if before and after:
                noise = max(a.noise.get(size, 1.0), b.noise.get(size, 1.0))
                found.append(Change(arm, int(size), unpaired(after, before), noise))
    if not found:
        raise UsageError("A and B have no engine and batch size in common")
    return found


def unpaired(after: tuple[float, ...], before: tuple[float, ...], seed: int = 0) -> Ratio:
    """Ratio of geometric means; rounds of two runs have nothing in common, so each is drawn
    alone."""
    x, y = np.log(np.asarray(after)), np.log(np.asarray(before))
    value = math.exp(float(x.mean() - y.mean()))
    if min(x.size, y.size) < 2:
        return Ratio(value, None, None, int(min(x.size, y.size)))
    draw = np.random.default_rng(seed)
    means = x[draw.integers(0, x.size, (_RESAMPLES, x.size))].mean(axis=1)
    means = means - y[draw.integers(0, y.size, (_RESAMPLES, y.size))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Ratio(value, math.exp(float(low)), math.exp(float(high)), int(min(x.size, y.size)))
