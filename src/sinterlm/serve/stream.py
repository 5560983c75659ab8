"""Stream: what one request gives, as an async iterator of the engine's deltas.

Lives on the event loop; its bridge pushes, one reader reads.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Literal

from sinterlm.engine.outputs import Delta
from sinterlm.errors import UsageError

#: Why a stream ended early: its reader, its deadline, or the server's shutdown.
AbortReason = Literal["cancel", "timeout", "shutdown"]


class Stream:
    """``async for delta in stream``: one delta per drawn token per sequence, by one reader.

    The last delta carries ``.output``. A reader may be slow or never come: at most
    ``n * max_tokens`` deltas wait for it, and nobody else does. Iterating raises EngineDeadError
    when the engine died under the request, UsageError when its grammar became too complex.
    """

    def __init__(
        self,
        request_id: str,
        loop: asyncio.AbstractEventLoop,
        abort: Callable[[Stream, AbortReason], None],
    ) -> None:
        self.request_id = request_id
        #: Set no later than the end of a stream whose finish_reason is "abort".
        self.abort_reason: AbortReason | None = None
        self._loop = loop
        self._abort = abort
        self._deltas: deque[Delta] = deque()
        self._is_complete = False  # nothing more will be pushed
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        while not self._deltas:
            if self._error is not None:
                raise self._error
            if self._is_complete:
                raise StopAsyncIteration
            self._waiter = self._loop.create_future()
            await self._waiter
        delta = self._deltas.popleft()
        if delta.finish_reason == "error":
            self.cancel()  # the other sequences, if there are any
            raise UsageError(str(delta.stop_reason))
        return delta

    def cancel(self) -> None:
        """End the request: its pages are free after the next step. Idempotent.

        The stream still ends with a delta whose finish_reason is "abort", for a reader that stays.
        """
        self._abort(self, "cancel")

    def push(self, delta: Delta) -> None:
        """Add a delta; for the bridge."""
        if delta.finish_reason == "abort" and self.abort_reason is None:
            self.abort_reason = "timeout"  # nobody asked for it: its time was up
        self._deltas.append(delta)
        self._is_complete = delta.output is not None
        self._wake()

    def fail(self, error: Exception) -> None:
        """End with ``error`` once the deltas so far are read; for the bridge."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None:
            if not self._waiter.done():
                self._waiter.set_result(None)
            self._waiter = None
