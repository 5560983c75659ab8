"""Server-sent events: one JSON object each, then ``[DONE]``; and answers nobody waits for any more.

The response begins with its first event, so that what fails before it is an ordinary error with an
ordinary status; what fails later is an error event. A reader that goes away ends the generation.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sinterlm.serve.errors import ApiError, from_exception

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # or nginx would hold tokens back
}


def encode_event(event: msgspec.Struct) -> bytes:
    """``data: {…}`` and a blank line. A fresh bytes object is faster than a reused buffer."""
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


class EventStream(Response):
    """A response whose body is ``events``, encoded already; ``[DONE]`` is added.

    ``cancel`` is called once nobody reads any more, whatever the reason.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        cancel: Callable[[], None],
    ) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._events = events
        self._cancel = cancel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, or stop when the client has gone."""
        watcher = asyncio.create_task(_after_disconnect(receive, self._cancel))
        try:
            await self._send_all(scope, receive, send)
        finally:
            watcher.cancel()
            self._cancel()

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        async for event in _ended_by_error(self._events):
            if isinstance(event, ApiError):
                if not begun:
                    raise event
                event = b"data: " + event.encoded() + b"\n\n"
            if not begun:
                begun = True
                await self._begin(send)
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _begin(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )


async def _ended_by_error(events: AsyncIterator[bytes]) -> AsyncIterator[bytes | ApiError]:
    """``events``; what they raise is the last item. What sending raises is another matter."""
    try:
        async for event in events:
            yield event
    except Exception as exc:
        yield from_exception(exc)


async def while_connected(work: Awaitable[T], receive: Receive, cancel: Callable[[], None]) -> T:
    """The result of ``work``; ``cancel`` is called as soon as the client has gone."""
    watcher = asyncio.create_task(_after_disconnect(receive, cancel))
    try:
        return await work
    finally:
        watcher.cancel()
        cancel()


async def _after_disconnect(receive: Receive, cancel: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    cancel()
