"""The search: rounds of candidates that are compiled side by side and then timed one by one.

Of every task the candidates nearest to the best one so far come next, and every third one is drawn
from all, lest the search stay where it began. All is deterministic but the times.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from sinterlm.artifact.memo import digest_json
from sinterlm.backends.gpu.objects import Object, sources_sha256, triton_version
from sinterlm.backends.gpu.table import Kernel
from sinterlm.tune.journal import Journal, Result
from sinterlm.tune.tasks import Cut, Task
from sinterlm.tune.timer import Timer, TrialFailed

#: Code object or what is wrong with it, of each kernel.
Compiler = Callable[[Sequence[Kernel]], list[Object | str]]


@dataclass
class Search:
    """One task: what may be tried, and how what was tried did."""

    task: Task
    most: int  #: candidates
    space: list[Cut] = field(init=False)
    tried: dict[Cut, tuple[Kernel, Result]] = field(default_factory=dict)
    best: Cut | None = None

    def __post_init__(self) -> None:
        self.space = self.task.cuts()
        self._drawn = random.Random(self.task.name).sample(self.space, len(self.space))

    def next(self, count: int) -> list[tuple[Cut, Kernel]]:
        """Up to ``count`` untried candidates, the starting point first."""
        around = self.best or self.space[0]
        left = {cut: None for cut in sorted(self.space, key=around.steps_to)}
        drawn = iter(self._drawn)
        found: list[tuple[Cut, Kernel]] = []
        for cut in self.tried:
            left.pop(cut, None)
        while left and len(found) < min(count, self.most - len(self.tried)):
            is_third = (len(self.tried) + len(found)) % 3 == 2
            cut = next(c for c in drawn if c in left) if is_third else next(iter(left))
            del left[cut]
            kernel = self.task.kernel_of(cut)
            if kernel is None:
                self.space.remove(cut)
            else:
                found.append((cut, kernel))
        return found

    def add(self, cut: Cut, kernel: Kernel, result: Result) -> None:
        """Note how a candidate did."""
        self.tried[cut] = kernel, result
        if result.state == "measured" and (
            self.best is None or result.cost_us < self.tried[self.best][1].cost_us
        ):
            self.best = cut

    def measured(self) -> dict[Cut, tuple[Kernel, Result]]:
        """What has times."""
        return {c: pair for c, pair in self.tried.items() if pair[1].state == "measured"}


@dataclass
class Tuner:
    """Runs searches. ``say`` gets a line for people per candidate."""

    compile: Compiler
    timer: Timer
    journal: Journal
    deadline: float  #: of time.monotonic()
    say: Callable[[str], None]
    device: str = ""
    driver: str = ""
    _referred: set[str] = field(default_factory=set)

    def run(self, searches: Sequence[Search], batch: int) -> bool:
        """Try candidates, ``batch`` of each task per round, until there are none (True) or time is
        up (False). Raises ResourceError where nothing can be timed at all."""
        while time.monotonic() < self.deadline:
            tries = [(s, *pair) for s in searches for pair in s.next(batch)]
            if not tries:
                return True
            unknown = []
            for search, cut, kernel in tries:
                known = self.journal.find(key_of(search.task, kernel))
                if known is None:
                    unknown.append((search, cut, kernel))
                else:
                    search.add(cut, kernel, known)
            objects = self.compile([kernel for *_, kernel in unknown]) if unknown else []
            for (search, cut, kernel), made in zip(unknown, objects, strict=True):
                if time.monotonic() >= self.deadline:
                    return False
                self._refer(search.task, kernel)
                result = self._try(search.task, cut, kernel, made)
                self.journal.add(result)
                search.add(cut, kernel, result)
                self.say(_line(search, result))
        return False

    def _refer(self, task: Task, kernel: Kernel) -> None:
        """Have the starting point's results before those of another candidate: the first one is
        what the others are held against, and an earlier run may have timed it."""
        if task.name in self._referred:
            return
        self._referred.add(task.name)
        if task.kernel_of(task.cut_of(task.start)) == kernel:
            return
        (made,) = self.compile([replace(task.start, id=0)])
        if not isinstance(made, str):
            with suppress(TrialFailed):
                self.timer.time(task.trial(task.start), [made])

    def _try(self, task: Task, cut: Cut, kernel: Kernel, made: Object | str) -> Result:
        facts: dict[str, Any] = {
            "key": key_of(task, kernel), "task": task.name, "cut": vars(cut),
            "device": self.device, "driver": self.driver,
        }  # fmt: skip
        if isinstance(made, str):
            return Result(**facts, state="refused", why=made[:500])
        try:
            timing = self.timer.time(task.trial(kernel), [made])
        except TrialFailed as exc:
            return Result(**facts, state="failed", why=str(exc)[:500])
        labels = map(task.label, task.steps)
        return Result(
            **facts, state="measured", samples=dict(zip(labels, timing.samples, strict=True))
        )  # fmt: skip


def key_of(task: Task, kernel: Kernel) -> str:
    """Key of all that decides a measurement, but for device and driver."""
    made_of = [kernel.name, [str(axis) for axis in kernel.grid], kernel.constants, kernel.options]
    steps = [vars(step) for step in task.steps]
    return digest_json(["trial", task.target, made_of, steps, sources_sha256(), triton_version()])


def _line(search: Search, result: Result) -> str:
    cut = " ".join(f"{name}={value}" for name, value in result.cut.items())
    if result.state != "measured":
        return f"{result.task}: {cut}: {result.state}: {result.why.splitlines()[0]}"
    times = ", ".join(f"{us:.1f} us at {label}" for label, us in result.us.items())
    is_best = search.best is not None and vars(search.best) == result.cut
    return f"{result.task}: {cut}: {times}{' (best so far)' if is_best else ''}"
