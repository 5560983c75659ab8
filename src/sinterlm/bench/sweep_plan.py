"""What a sweep measures and in which order: every launch of every round, drawn before the first.

A launch is one start of one engine with one set of flags; within it every batch size runs once.
Rounds interleave the engines in random order, so that a machine that drifts drifts for all.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sinterlm.bench.raw import write_whole
from sinterlm.errors import UsageError

#: Ending of the name of the engine that runs twice.
AGAIN = " (again)"
TUNE, COLD = -1, -2  #: rounds beside those that count: 0, 1, 2, ...


@dataclass(frozen=True)
class SweepPlan:
    """Everything that decides what is measured; a sweep can be resumed with an equal one only."""

    model: str
    engines: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    rounds: int
    input_len: int
    output_len: int
    waves: int  #: requests of a point = batch size times this, at least ``min_requests``
    min_requests: int
    seed: int
    tunes: bool  #: try every flag set of the peers first
    has_cold: bool  #: start each once with empty caches
    again: str | None  #: the engine of the A/A arm
    mode: str = "serve"  #: or "offline"

    def __post_init__(self) -> None:
        if len(set(self.engines)) < len(self.engines):
            raise UsageError("an engine is named twice; the A/A arm is --again")
        if self.again is not None and self.again not in self.engines:
            raise UsageError(f"--again {self.again} is none of the engines")

    @property
    def most_seqs(self) -> int:
        """Requests at once, at most."""
        return max(self.batch_sizes)

    def num_requests(self, batch_size: int) -> int:
        """Of one point."""
        return max(self.waves * batch_size, self.min_requests)

    def prompt_seed(self, round_number: int, batch_size: int) -> int:
        """Of a point's prompts: the same for every engine, and never drawn twice."""
        return self.seed * 1_000_003 + (round_number + 3) * 10_007 + batch_size

    def arms(self) -> list[str]:
        """Engines and the A/A arm."""
        return [*self.engines, *([] if self.again is None else [self.again + AGAIN])]


@dataclass(frozen=True)
class LaunchSpec:
    """One start of one engine."""

    round_number: int  #: TUNE and COLD do not count
    arm: str  #: an engine's name, or it with AGAIN
    variant: str  #: of the flag grid; "" = the best found for each batch size
    batch_sizes: tuple[int, ...]

    @property
    def engine(self) -> str:
        """The arm's engine."""
        return self.arm.removesuffix(AGAIN)

    @property
    def key(self) -> str:
        """For file names."""
        number = {TUNE: "tune", COLD: "cold"}.get(self.round_number, f"r{self.round_number}")
        name = "".join(c if c.isalnum() or c in "+.-" else "_" for c in self.arm)
        return f"{number}-{name}-{self.variant}"


def side_launches(plan: SweepPlan, variants: Mapping[str, Sequence[str]]) -> list[LaunchSpec]:
    """Starts before the rounds: cold ones, then every flag set of engines that have several."""
    cold = [
        LaunchSpec(COLD, engine, variants[engine][0], ()) for engine in plan.engines
    ] if plan.has_cold else []  # fmt: skip
    tune = [
        LaunchSpec(TUNE, engine, variant, _shuffled(plan, TUNE, engine, plan.batch_sizes))
        for engine in plan.engines
        for variant in variants[engine]
        if plan.tunes and len(variants[engine]) > 1
    ]
    random.Random(f"{plan.seed} side").shuffle(tune)
    return [*cold, *tune]


def round_launches(
    plan: SweepPlan, round_number: int, best: dict[str, dict[int, str]]
) -> list[LaunchSpec]:
    """Starts of one round, in random order; ``best``: engine -> batch size -> flag set. An engine
    whose best flags differ between batch sizes is started once for each set."""
    launches = []
    for arm in plan.arms():
        chosen = best[arm.removesuffix(AGAIN)]
        for variant in sorted(set(chosen.values())):
            sizes = [size for size in plan.batch_sizes if chosen[size] == variant]
            order = _shuffled(plan, round_number, arm, sizes)
            launches.append(LaunchSpec(round_number, arm, variant, order))
    random.Random(f"{plan.seed} round {round_number}").shuffle(launches)
    return launches


def _shuffled(
    plan: SweepPlan, round_number: int, arm: str, sizes: Sequence[int]
) -> tuple[int, ...]:
    order = list(sizes)
    random.Random(f"{plan.seed} {round_number} {arm}").shuffle(order)
    return tuple(order)


def save_or_check(plan: SweepPlan, folder: Path) -> None:
    """Write ``plan`` into ``folder``, or raise UsageError where it holds another one."""
    path = folder / "sweep.json"
    if not path.exists():
        write_whole(path, json.dumps(asdict(plan), indent=1) + "\n")
        return
    before, now = read_plan(folder), plan
    for field in fields(SweepPlan):
        old, new = getattr(before, field.name), getattr(now, field.name)
        if old != new and field.name != "rounds":
            raise UsageError(
                f"{folder} holds a sweep with {field.name} {old!r}, not {new!r}; resume it with "
                "the same flags (more --rounds are welcome), or give another --output"
            )
    if now.rounds > before.rounds:
        write_whole(path, json.dumps(asdict(plan), indent=1) + "\n")


def read_plan(folder: Path) -> SweepPlan:
    """The plan of a sweep. Raises UsageError where there is none."""
    path = folder / "sweep.json"
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        lists = {name: tuple(data[name]) for name in ("engines", "batch_sizes")}
        return SweepPlan(**{**data, **lists})
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise UsageError(f"{folder} holds no sweep ({exc}); run `sinterlm bench sweep`") from exc
