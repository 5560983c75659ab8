"""One log line per request, and the status of every response in the metrics.

A line holds ids, counts and times, and the prompt's text only when asked for. The outermost layer:
nothing an application raises gets past it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sinterlm.serve.errors import from_exception
from sinterlm.serve.metrics import Metrics
from sinterlm.serve.middleware import answer_error, path_of

logger = logging.getLogger(__name__)

_KEY = "record"


@dataclass
class RequestRecord:
    """What a handler tells about the request it serves. One without a model is not generating."""

    model: str | None = None
    stream: bool = False
    prompts: list[str] = field(default_factory=list)  #: their texts, only where logged
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft_s: float | None = None  #: of the first prompt that drew a token
    finish_reasons: list[str] = field(default_factory=list)  #: one per completion


def record_of(request: Request, *, stream: bool | None) -> RequestRecord:
    """The record of a generating request; one that nobody reads where there is no journal."""
    record = request.scope.get("state", {}).get(_KEY, RequestRecord())
    assert isinstance(record, RequestRecord)
    record.stream = bool(stream)
    return record


class Journal:
    """ASGI middleware. ``routes`` are the paths that metrics and logs may name."""

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, routes: Collection[str], access_log: bool
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = frozenset(routes)
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen = _Exchange(receive, send)
        record = scope.setdefault("state", {})[_KEY] = RequestRecord()
        try:
            await self._app(scope, seen.receive, seen.send)
        except Exception as exc:
            # Starlette answers and raises again; before an answer has begun it is up to us.
            if seen.status is None:
                await answer_error(from_exception(exc), seen.send)
        finally:
            self._write(scope, seen, record)

    def _write(self, scope: Scope, seen: _Exchange, record: RequestRecord) -> None:
        path = path_of(scope)
        route = path if path in self._routes else "other"
        if seen.status is not None:
            self._metrics.responded(route, seen.status)
        if record.model is None and not self._access_log:
            return
        fields: dict[str, object] = {
            "id": scope["state"].get("request_id"),
            "method": scope["method"],
            "route": route,
            "status": seen.status,
            "duration_s": round(time.perf_counter() - seen.start, 6),
            "client_gone": seen.is_client_gone,
        }
        if record.model is not None:
            fields |= _generation(record)
        logger.info("request", extra={"fields": fields})


def _generation(record: RequestRecord) -> dict[str, object]:
    fields: dict[str, object] = {
        "model": record.model,
        "stream": record.stream,
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": record.output_tokens,
        "ttft_s": None if record.ttft_s is None else round(record.ttft_s, 6),
        "finish_reason": ",".join(record.finish_reasons) or None,
    }
    return fields | ({"prompts": record.prompts} if record.prompts else {})


class _Exchange:
    """One request and its response, watched as they pass."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self.start = time.perf_counter()
        self.status: int | None = None
        self.is_client_gone = False
        self._is_complete = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._is_complete:
            self.is_client_gone = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif not message.get("more_body", False):
            self._is_complete = True
        await self._send(message)
