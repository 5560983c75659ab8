"""What a sweep found, on disk: one line for each launch and each point, added as it is measured.

A line that was cut off by a crash is dropped when it is read; its point is measured again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sinterlm.artifact.storage import disk_errors
from sinterlm.bench.raw import RawRun, read_raw, write_raw
from sinterlm.bench.serve_stats import ServeStats, serve_stats
from sinterlm.bench.sweep_plan import AGAIN


@dataclass(frozen=True)
class Point:
    """One batch size of one launch."""

    round_number: int
    arm: str
    variant: str
    batch_size: int
    raw: str | None  #: file name of the raw record; None when it failed
    failure: str | None = None  #: why, with the end of the server's log
    remarks: tuple[str, ...] = ()  #: what was odd about the answers
    result: Mapping[str, float] = field(default_factory=dict)  #: of offline runs

    @property
    def is_good(self) -> bool:
        """Whether its figures may be used."""
        return self.failure is None and (self.raw is not None or bool(self.result))


@dataclass(frozen=True)
class LaunchFacts:
    """What is known of one start."""

    round_number: int
    arm: str
    variant: str
    command: tuple[str, ...]
    env: Mapping[str, str]
    startup_s: float | None  #: launch to first useful answer
    peak_memory: int | None  #: bytes
    answer: str  #: to "The capital of France is"
    bytes_per_s: float | None  #: of this machine, just before
    flops_per_s: float | None
    failure: str | None = None


class SweepStore:
    """The folder of a sweep."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, line: Point | LaunchFacts) -> None:
        """Append one line and make sure it is on the disk. Raises ResourceError when it is full."""
        name = "points.jsonl" if isinstance(line, Point) else "launches.jsonl"
        advice = "free some space, and run the same command again"
        with (
            disk_errors(self.folder, advice),
            open(self.folder / name, "a", encoding="utf-8") as file,
        ):
            file.write(json.dumps(asdict(line)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def add_raw(self, name: str, raw: RawRun) -> None:
        """Keep the timestamps of a point. Raises ResourceError when the disk is full."""
        write_raw(self.folder / "raw" / name, raw)

    def points(self) -> list[Point]:
        """Of every point the last line that was written."""
        found: dict[tuple[Any, ...], Point] = {}
        for data in self._lines("points.jsonl"):
            point = Point(**{**data, "remarks": tuple(data["remarks"])})
            found[(point.round_number, point.arm, point.variant, point.batch_size)] = point
        return list(found.values())

    def launches(self) -> list[LaunchFacts]:
        """All starts."""
        return [
            LaunchFacts(**{**data, "command": tuple(data["command"])})
            for data in self._lines("launches.jsonl")
        ]

    def raw(self, point: Point) -> RawRun:
        """The timestamps of a point."""
        assert point.raw is not None
        return read_raw(self.folder / "raw" / point.raw)

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        path = self.folder / name
        if not path.exists():
            return
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                data = json.loads(line)
            except ValueError:
                continue
            yield data


@dataclass(frozen=True)
class Series:
    """All rounds of one arm at one batch size."""

    arm: str
    batch_size: int
    points: tuple[Point, ...]
    store: SweepStore

    @cached_property
    def stats(self) -> dict[int, ServeStats]:
        """Statistics by round, from raw."""
        return {
            point.round_number: serve_stats(self.store.raw(point), (90.0, 99.0))
            for point in self.points
            if point.raw is not None
        }

    def values(self, name: str) -> dict[int, float]:
        """One figure by round, a key of ``ServeStats.to_json``; rounds without it are left out."""
        if any(point.result for point in self.points):
            return {p.round_number: p.result[name] for p in self.points if name in p.result}
        found = {number: stats.to_json().get(name) for number, stats in self.stats.items()}
        return {number: float(value) for number, value in found.items() if value is not None}

    @cached_property
    def requests(self) -> RawRun:
        """The requests of all rounds in one record, for percentiles that need many."""
        runs = [self.store.raw(point) for point in self.points if point.raw is not None]
        return RawRun(runs[0].run, tuple(r for run in runs for r in run.requests))


def series_of(store: SweepStore) -> dict[tuple[str, int], Series]:
    """Good points of the rounds that count, by arm and batch size."""
    grouped: dict[tuple[str, int], list[Point]] = {}
    for point in store.points():
        if point.round_number >= 0 and point.is_good:
            grouped.setdefault((point.arm, point.batch_size), []).append(point)
    return {
        key: Series(*key, tuple(sorted(points, key=lambda p: p.round_number)), store)
        for key, points in grouped.items()
    }


def is_again(arm: str) -> bool:
    """Whether this is the A/A arm."""
    return arm.endswith(AGAIN)
