"""From measurements to a tile table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sinterlm.backends.gpu.table import Kernel
from sinterlm.backends.gpu.tuning import MEASURED, TUNED, Entry, TileTable
from sinterlm.tune.journal import Result
from sinterlm.tune.search import Search
from sinterlm.tune.tasks import Task

Chosen = tuple[Task, Kernel, Result]


def choose(searches: Sequence[Search]) -> list[Chosen]:
    """The best measured candidate of each task that has one. Those of the head have one BN, as one
    merge reads what all of them leave: where not all of its kernels are tuned it stays."""
    found = []
    heads = [s for s in searches if s.task.num_joined]
    width = _head_width(heads) if heads else 0
    for search in searches:
        allowed = {
            cut: pair
            for cut, pair in search.measured().items()
            if not search.task.num_joined or width == cut.width
        }
        if allowed:
            kernel, result = min(allowed.values(), key=lambda pair: pair[1].cost_us)
            found.append((search.task, kernel, result))
    return found


def _head_width(heads: Sequence[Search]) -> int:
    """The width whose best candidates are, on the geometric mean, nearest to the best of all."""
    start = heads[0].space[0].width
    if len(heads) < heads[0].task.num_joined:
        return start
    costs: dict[int, float] = {}
    widths = set.intersection(*({cut.width for cut in s.measured()} for s in heads))
    for width in sorted(widths):
        costs[width] = sum(
            math.log(min(r.cost_us for c, (_, r) in s.measured().items() if width == c.width))
            for s in heads
        )
    return min(costs, key=lambda width: costs[width], default=start)


def entry_for(task: Task, kernel: Kernel, result: Result) -> Entry:
    """The tile table's entry, with times and the rate at which weights, or keys and values, were
    read."""
    us = {label: round(value, 3) for label, value in result.us.items()}
    rates = {label: round(rate, 1) for label, rate in rates_of(task, us).items()}
    source = f"{MEASURED}{result.device}, {result.driver}, {result.date[:10]}"
    return task.entry(kernel, source, us=us, gb_per_s=rates)


def rates_of(task: Task, us: Mapping[str, float]) -> dict[str, float]:
    """GB/s by label, where bytes decide."""
    nbytes = {task.label(step): task.nbytes(step) for step in task.steps}
    return {label: nbytes[label] / value / 1e3 for label, value in us.items() if nbytes[label]}


def tuned_table(target: str, chosen: Sequence[Chosen], before: TileTable | None) -> TileTable:
    """The table of what was chosen, and of what ``before`` holds for other kernels on the same
    device. ``chosen`` is not empty."""
    device = chosen[0][2].device
    entries = [entry_for(*one) for one in chosen]
    kept = [
        old
        for old in (before.entries if before is not None and before.device == device else ())
        if all(_subject(old) != _subject(new) for new in entries)
    ]
    latest = max((result for *_, result in chosen), key=lambda result: result.date)
    return TileTable(target, TUNED, (*entries, *kept), device, latest.driver, latest.date)


def _subject(entry: Entry) -> tuple[object, ...]:
    return entry.kernel, entry.weights, entry.max_rows, entry.made_for
