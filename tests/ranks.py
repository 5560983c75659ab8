"""Ranks of one model as threads of this process: their sums, and running them side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from sinterlm.runtime.batch import Float32
from sinterlm.runtime.ranks import RankLink

Result = TypeVar("Result")
WAIT_S = 60


class Meeting:
    """Where ``size`` threads add their arrays up, in the order of ranks."""

    def __init__(self, size: int) -> None:
        self.sums = 0  #: made so far
        self.fails_at: int | None = None  #: the number of the sum at which rank 0 raises
        self._barrier = threading.Barrier(size)
        self._parts: list[Float32] = [np.empty(0, np.float32)] * size

    def link(self, rank: int) -> RankLink:
        """The way of one rank to this meeting."""
        return RankLink(rank, lambda data: self._sum(rank, data))

    def _sum(self, rank: int, data: Float32) -> None:
        if rank == 0 and self.sums == self.fails_at:
            self._barrier.abort()
            raise ConnectionError("the wire was cut")
        self._parts[rank] = data.copy()
        self._barrier.wait(WAIT_S)
        data[:] = sum(self._parts[1:], self._parts[0])
        # Nobody brings the next part before the slowest has read all of these.
        self._barrier.wait(WAIT_S)
        if rank == 0:
            self.sums += 1

    def mend(self) -> None:
        """After a failure: the next sums succeed."""
        self.fails_at = None
        self._barrier.reset()


def side_by_side(calls: Sequence[Callable[[], Result]]) -> list[Result | BaseException]:
    """What each call gave or raised, all running at the same time."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        return [future.exception() or future.result() for future in futures]
