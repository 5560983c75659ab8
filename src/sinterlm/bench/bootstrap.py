"""Ratios between engines, with intervals: the unit is a server launch, never a request.

Requests of one launch share its memory layout, its caches and the machine's mood; only launches
are independent. The ratio is the geometric mean over rounds, its interval the bootstrap of the log
ratio over rounds (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 10_000
_LEVEL = 95.0  #: percent


@dataclass(frozen=True)
class Ratio:
    """How many times more the first has than the second."""

    value: float
    low: float | None  #: None with fewer than two rounds
    high: float | None
    num_rounds: int

    @property
    def has_interval(self) -> bool:
        """Whether rounds suffice for one."""
        return self.low is not None and self.high is not None


def log_ratio(
    first: Mapping[int, float], second: Mapping[int, float], seed: int = 0
) -> Ratio | None:
    """Ratio of two series by round; rounds that both have count. None without one."""
    rounds = sorted(set(first) & set(second))
    logs = np.array([math.log(first[r] / second[r]) for r in rounds if first[r] > 0 < second[r]])
    if not logs.size:
        return None
    value = math.exp(float(np.mean(logs)))
    if logs.size < 2:
        return Ratio(value, None, None, 1)
    draws = np.random.default_rng(seed).integers(0, logs.size, (_RESAMPLES, logs.size))
    means = logs[draws].mean(axis=1)
    low, high = np.percentile(means, [(100 - _LEVEL) / 2, (100 + _LEVEL) / 2])
    return Ratio(value, math.exp(float(low)), math.exp(float(high)), int(logs.size))


def mean_interval(values: Mapping[int, float], seed: int = 0) -> tuple[float, float] | None:
    """Interval of the mean over rounds; None with fewer than two."""
    data = np.array([values[r] for r in sorted(values)])
    if data.size < 2:
        return None
    draws = np.random.default_rng(seed).integers(0, data.size, (_RESAMPLES, data.size))
    low, high = np.percentile(data[draws].mean(axis=1), [(100 - _LEVEL) / 2, (100 + _LEVEL) / 2])
    return float(low), float(high)


def noise_band(again: Ratio | None) -> float | None:
    """The factor by which an engine differs from itself: from the A/A arm, its interval's farther
    end. None without an A/A arm of two rounds."""
    if again is None or again.low is None or again.high is None:
        return None
    return max(again.high, 1 / again.low)


def verdict(ratio: Ratio | None, band: float | None) -> str:
    """``faster``, ``slower``, ``no difference``, or ``no data`` where neither can be said."""
    if ratio is None or ratio.low is None or ratio.high is None:
        return "no data"
    limit = band or 1.0
    if ratio.low > limit:
        return "faster"
    if ratio.high < 1 / limit:
        return "slower"
    return "no difference"
