"""The OpenAPI document, made from the structs that decode requests: it cannot lag behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from sinterlm import __version__
from sinterlm.serve.errors import ErrorBody
from sinterlm.serve.protocol.answers import ModelCard, ModelList, ResetAnswer, Version
from sinterlm.serve.protocol.chat import ChatAnswer, ChatEvent, ChatRequest
from sinterlm.serve.protocol.completion import CompletionAnswer, CompletionRequest
from sinterlm.serve.protocol.tokens import (
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
)

Struct = type[msgspec.Struct]

#: Every error, as the operation that may answer with it describes it.
_POST_ERRORS = {
    "400": "A field or value is wrong; error.param names it",
    "401": "No valid API key",
    "404": "Another model is served here",
    "408": "The request's time was up",
    "413": "The body is longer than --max-body-bytes",
    "415": "The body is not sent as application/json",
    "429": "Too many requests wait; see Retry-After",
    "500": "The server failed; error.code is the id under which its log has the reason",
    "503": "The server is stopping",
}
_GET_ERRORS = {
    "400": "The header x-request-id cannot be sent back",
    "401": "No valid API key",
    "404": "There is no such thing",
    "503": "Not ready, or the engine died",
}


@dataclass(frozen=True)
class Operation:
    """One row of the document."""

    method: str
    path: str
    summary: str
    request: Struct | None = None
    answer: Struct | None = None
    event: Struct | None = None  #: of a stream
    text: bool = False  #: the answer is plain text


OPERATIONS: tuple[Operation, ...] = (
    Operation("post", "/v1/chat/completions", "Answer a conversation", ChatRequest, ChatAnswer,
              ChatEvent),
    Operation("post", "/v1/completions", "Go on with a text", CompletionRequest, CompletionAnswer,
              CompletionAnswer),
    Operation("get", "/v1/models", "Names of the served model", answer=ModelList),
    Operation("get", "/v1/models/{name}", "One name of the served model", answer=ModelCard),
    Operation("post", "/tokenize", "Token ids of a text or a conversation", TokenizeRequest,
              TokenizeAnswer),
    Operation("post", "/detokenize", "Text of token ids", DetokenizeRequest, DetokenizeAnswer),
    Operation("get", "/health", "200 while the engine lives"),
    Operation("get", "/ready", "200 while requests are admitted"),
    Operation("get", "/version", "Version of SinterLM", answer=Version),
    Operation("get", "/metrics", "Prometheus metrics", text=True),
)  # fmt: skip

#: Only with SINTERLM_SERVER_DEV_MODE=1.
DEV_OPERATIONS: tuple[Operation, ...] = (
    Operation("post", "/reset_prefix_cache", "Forget every cached prefix", answer=ResetAnswer),
)


def openapi_document(*, dev_mode: bool) -> dict[str, Any]:
    """The document of this server."""
    operations = OPERATIONS + (DEV_OPERATIONS if dev_mode else ())
    kinds = [
        kind for op in operations for kind in (op.request, op.answer, op.event) if kind is not None
    ]
    unique: list[Struct] = list(dict.fromkeys([*kinds, ErrorBody]))
    schemas, components = msgspec.json.schema_components(
        unique, ref_template="#/components/schemas/{name}"
    )
    schema_of: dict[Struct, Any] = dict(zip(unique, schemas, strict=True))
    paths: dict[str, Any] = {}
    for op in operations:
        paths.setdefault(op.path, {})[op.method] = _operation(op, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "SinterLM", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _event(answer: dict[str, Any], error: dict[str, Any]) -> dict[str, Any]:
    """One event of a stream: an answer's next piece, an error that ends it, or the end's mark."""
    piece = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [answer, error]},
    }
    data = {"anyOf": [{"const": "[DONE]"}, piece]}
    return {"type": "object", "required": ["data"], "properties": {"data": data}}


def _operation(op: Operation, schema_of: dict[Struct, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if op.answer is not None:
        content["application/json"] = {"schema": schema_of[op.answer]}
    if op.event is not None:
        content["text/event-stream"] = {"schema": _event(schema_of[op.event], schema_of[ErrorBody])}
    if op.text:
        content["text/plain"] = {"schema": {"type": "string"}}
    success: dict[str, Any] = {"description": op.summary}
    if content:
        success["content"] = content
    error = {"application/json": {"schema": schema_of[ErrorBody]}}
    errors = _POST_ERRORS if op.method == "post" else _GET_ERRORS
    made: dict[str, Any] = {
        "summary": op.summary,
        "operationId": f"{op.method}{op.path.replace('/', '_').replace('{name}', 'name')}",
        "responses": {
            "200": success,
            **{code: {"description": text, "content": error} for code, text in errors.items()},
        },
    }
    if op.request is not None:
        body = {"application/json": {"schema": schema_of[op.request]}}
        made["requestBody"] = {"required": True, "content": body}
    if "{name}" in op.path:
        made["parameters"] = [
            {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return made
