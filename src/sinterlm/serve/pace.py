"""Pace: how many decode steps run in one native call of a server."""

from __future__ import annotations

#: What a call may take, in seconds: 30 updates of a stream in a second, which read as steady text.
PERIOD_S = 0.033


class Pace:
    """A fixed number of steps, or (``stream_interval`` None) as many as take ``PERIOD_S``.

    Between two calls Python runs on the CPUs that the next step needs, its own data driven out of
    their caches by the weights, which short steps notice and long ones do not.
    The number follows the call before, and is 1 where a step alone takes longer; at most ``most``.
    """

    def __init__(self, stream_interval: int | None, most: int) -> None:
        self.max_steps = 1 if stream_interval is None else stream_interval
        self._most = most if stream_interval is None else None

    def note(self, step_seconds: float) -> None:
        """One step of the last call took so long; 0 before there was any."""
        if self._most is not None and step_seconds > 0:
            self.max_steps = max(1, min(self._most, int(PERIOD_S / step_seconds)))
