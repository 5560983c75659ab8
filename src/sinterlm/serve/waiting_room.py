"""WaitingRoom: how many sequences are in flight, how many may wait, and when to come back.

Counts alone; the order of those who wait is the scheduler's. Reads a monotonic clock only.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

from sinterlm.errors import QueueFullError

#: Departures that the pace is measured over.
_MEASURED = 64
#: Most seconds a client is told to stay away: the estimate is worth little beyond.
_MAX_RETRY_S = 60


class WaitingRoom:
    """``seats`` sequences run at once and ``max_waiting`` more may wait.

    A burst that finds free seats waits for nothing, so it is the sum that is held to.
    """

    def __init__(
        self, seats: int, max_waiting: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.num_inside = 0  #: sequences in flight
        self._capacity = seats + max_waiting
        self._max_waiting = max_waiting
        self._clock = clock
        self._departures: deque[float] = deque(maxlen=_MEASURED)
        self._num_turned_away = 0  # and expected back before anybody new
        self._opened = clock()

    def check(self) -> None:
        """Raise QueueFullError when a request would find no place; it counts as turned away.

        A request of many sequences needs one place: it would never be served otherwise.
        """
        if self.num_inside < self._capacity:
            return
        self._num_turned_away += 1
        seconds = self._retry_after_s()
        raise QueueFullError(
            f"{self._max_waiting} requests wait already (max_waiting); try again in {seconds} s",
            retry_after_s=seconds,
        )

    def enter(self, num_seqs: int) -> None:
        """Take places."""
        if self.num_inside == 0:
            self._opened = self._clock()  # an idle hour says nothing about the pace
            self._departures.clear()
        self.num_inside += num_seqs

    def leave(self, num_seqs: int) -> None:
        """Give places back."""
        self.num_inside -= num_seqs
        self._num_turned_away = max(0, self._num_turned_away - num_seqs)
        self._departures.extend([self._clock()] * num_seqs)

    def _retry_after_s(self) -> int:
        """When as many places are free as clients have been turned away, at the measured pace.

        So those who are sent away return spread out. While nobody has left yet: after as long
        again as it has lasted.
        """
        now = self._clock()
        if self._departures:
            first = self._departures[0] if len(self._departures) == _MEASURED else self._opened
            wait = self._num_turned_away * (now - first) / len(self._departures)
        else:
            wait = now - self._opened
        return min(_MAX_RETRY_S, max(1, math.ceil(wait)))
