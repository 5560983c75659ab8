"""Deadlines of requests: which have passed, without looking at those that have not."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from sinterlm.engine.request import RequestGroup


class Deadlines:
    """Groups by the time they must be done; those that ended meanwhile are let go when due."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, RequestGroup]] = []
        self._count = 0  # tells equal deadlines apart: groups have no order

    def add(self, group: RequestGroup) -> None:
        """Watch a group, if it has a deadline."""
        if group.deadline is not None:
            heapq.heappush(self._heap, (group.deadline, self._count, group))
            self._count += 1

    def pop_due(self, now: float) -> Iterator[RequestGroup]:
        """Unfinished groups whose deadline is not after ``now``, each once."""
        while self._heap and self._heap[0][0] <= now:
            _, _, group = heapq.heappop(self._heap)
            if not group.is_finished:
                yield group

    def clear(self) -> None:
        """Watch nothing."""
        self._heap.clear()
