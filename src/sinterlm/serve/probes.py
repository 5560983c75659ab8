"""What watches a server: ``/health``, ``/ready``, ``/version``, ``/metrics``, and in dev mode
``/reset_prefix_cache``.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from sinterlm import __version__
from sinterlm.serve.context import Context
from sinterlm.serve.errors import ApiError, draining
from sinterlm.serve.models import json_answer
from sinterlm.serve.protocol.answers import ResetAnswer, Version


class Probes:
    """The handlers."""

    def __init__(self, context: Context) -> None:
        self._bridge = context.bridge
        self._metrics = context.metrics

    async def health(self, request: Request) -> Response:
        """200 with an empty body while the engine lives, a draining server included; else 503."""
        if self._bridge.failure is not None:
            raise ApiError(
                503,
                f"the engine died ({self._bridge.failure}); restart the server",
                kind="service_unavailable_error",
                code="engine_dead",
            )
        return Response(status_code=200)

    async def ready(self, request: Request) -> Response:
        """200 while requests are admitted: not while starting, draining, or dead."""
        await self.health(request)
        if not self._bridge.is_ready:
            raise draining()
        return Response(status_code=200)

    async def version(self, request: Request) -> Response:
        """The version of SinterLM."""
        return json_answer(Version(__version__))

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text format."""
        body, content_type = self._metrics.render(request.headers.get("accept"))
        return Response(body, headers={"content-type": content_type})

    async def reset_prefix_cache(self, request: Request) -> Response:
        """Forget every cached prefix, between two steps; for measuring a cold cache."""
        await self._bridge.run_idle(lambda engine: engine.reset_prefix_cache())
        return json_answer(ResetAnswer(success=True))
