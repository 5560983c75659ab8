"""build_app(): every route of the server, in one table.

Middleware (keys, limits, logs, CORS) is laid around it by the server; the page at / and /metrics
are mounted here and written elsewhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from functools import cached_property

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sinterlm.options import ServeOptions
from sinterlm.serve.bridge import Bridge
from sinterlm.serve.chat import ChatEndpoint
from sinterlm.serve.completions import CompletionEndpoint
from sinterlm.serve.context import Context
from sinterlm.serve.errors import ApiError, ErrorType, from_exception
from sinterlm.serve.metrics import Metrics
from sinterlm.serve.models import Models
from sinterlm.serve.openapi import openapi_document
from sinterlm.serve.probes import Probes
from sinterlm.serve.request_ids import RequestIds
from sinterlm.serve.served import ServedModel
from sinterlm.serve.tokens import TokensEndpoint
from sinterlm.serve.web import page_routes

Handler = Callable[[Request], Awaitable[Response]]


def build_app(
    bridge: Bridge, info: ServedModel, options: ServeOptions, metrics: Metrics
) -> Starlette:
    """The application of one served model. The bridge is started and stopped by the caller."""
    context = Context(bridge, info, options, metrics, itertools.count())
    models, probes, tokens = Models(info), Probes(context), TokensEndpoint(context)
    routes = [
        _post("/v1/chat/completions", ChatEndpoint(context)),
        _post("/v1/completions", CompletionEndpoint(context)),
        _get("/v1/models", models.list_models),
        _get("/v1/models/{name:path}", models.show_model),
        _post("/tokenize", tokens.tokenize),
        _post("/detokenize", tokens.detokenize),
        _get("/health", probes.health),
        _get("/ready", probes.ready),
        _get("/version", probes.version),
        _get("/openapi.json", _Document(dev_mode=options.dev_mode)),
        _get("/metrics", probes.metrics),
        *page_routes(context),
    ]
    if options.dev_mode:
        routes.append(_post("/reset_prefix_cache", probes.reset_prefix_cache))
    return Starlette(
        routes=routes,
        middleware=[Middleware(RequestIds)],
        exception_handlers={
            ApiError: _answer_error,
            HTTPException: _answer_http_error,
            Exception: _answer_error,
        },
    )


class _Document:
    """Answers with the OpenAPI document, made when it is first asked for."""

    def __init__(self, *, dev_mode: bool) -> None:
        self._dev_mode = dev_mode

    @cached_property
    def _body(self) -> bytes:
        return msgspec.json.encode(openapi_document(dev_mode=self._dev_mode))

    async def __call__(self, request: Request) -> Response:
        return Response(self._body, media_type="application/json")


def _get(path: str, handler: Handler) -> Route:
    return Route(path, _guarded(handler), methods=["GET"])


def _post(path: str, handler: Handler) -> Route:
    return Route(path, _guarded(handler), methods=["POST"])


def _guarded(handler: Handler) -> Handler:
    """``handler`` with everything it may raise turned into an answer, and logged if it is ours."""

    async def guarded(request: Request) -> Response:
        try:
            return await handler(request)
        except Exception as exc:
            raise from_exception(exc) from exc

    return guarded


async def _answer_error(request: Request, exc: Exception) -> Response:
    error = from_exception(exc)
    return Response(
        error.encoded(), error.status, media_type="application/json", headers=error.headers
    )


async def _answer_http_error(request: Request, exc: Exception) -> Response:
    """Starlette's own refusals (no such route, wrong method) in OpenAI's shape."""
    assert isinstance(exc, HTTPException)
    what = f"{request.method[:10]} {request.url.path[:100]}"
    message = {
        404: f"there is no {what}; see /openapi.json for the routes there are",
        405: f"{what} is not possible; allowed: {(exc.headers or {}).get('Allow', '')}",
    }.get(exc.status_code, exc.detail)
    kind: ErrorType = "not_found_error" if exc.status_code == 404 else "invalid_request_error"
    error = ApiError(exc.status_code, message, kind=kind, headers=exc.headers)
    return await _answer_error(request, error)
