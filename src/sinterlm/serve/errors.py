"""What a client is told when something is wrong: OpenAI's error object, and the right status.

Every message names the field and the value. No path and no traceback leaves the server: a fault of
ours is an id, and the log has the rest under it.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from typing import Literal

import msgspec

from sinterlm.errors import (
    DrainingError,
    EngineDeadError,
    PromptError,
    QueueFullError,
    ResourceError,
    UsageError,
)

logger = logging.getLogger(__name__)

ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "not_found_error",
    "rate_limit_error",
    "timeout_error",
    "service_unavailable_error",
    "server_error",
]

_MAX_MESSAGE = 600  #: characters; a message may quote what a client sent


class ErrorObject(msgspec.Struct, kw_only=True):
    """OpenAI's description of one error."""

    message: str
    type: ErrorType
    param: str | None = None  #: path of the field that is wrong, such as ``messages[0].role``
    code: str | None = None  #: a word for programs, such as ``unknown_parameter``


class ErrorBody(msgspec.Struct):
    """The body of every answer that is an error, and the data of an error event."""

    error: ErrorObject


class ApiError(Exception):
    """An answer other than 2xx, ready to be sent."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: ErrorType = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = ErrorBody(
            ErrorObject(message=_shortened(message), type=kind, param=param, code=code)
        )

    def encoded(self) -> bytes:
        """The body as JSON."""
        return msgspec.json.encode(self.body)


def bad_request(message: str, *, param: str | None, code: str = "invalid_value") -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, message, param=param, code=code)


def from_exception(exc: BaseException, *, param: str | None = None) -> ApiError:
    """The answer for anything a request may raise. ``param`` is where a prompt came from.

    What nobody foresaw is logged under an id, and the client is told the id.
    """
    if isinstance(exc, ApiError):
        return exc
    if isinstance(exc, PromptError):
        too_long = "max_model_len" in str(exc)
        code = "context_length_exceeded" if too_long else "invalid_value"
        return bad_request(str(exc), param=param, code=code)
    if isinstance(exc, UsageError):
        return bad_request(str(exc), param=exc.field or param)
    if isinstance(exc, ResourceError):
        return bad_request(str(exc), param=param, code="context_length_exceeded")
    if isinstance(exc, QueueFullError):
        return ApiError(
            429,
            str(exc),
            kind="rate_limit_error",
            code="queue_full",
            headers={"retry-after": str(exc.retry_after_s)},
        )
    if isinstance(exc, DrainingError):
        return draining()
    if isinstance(exc, EngineDeadError):
        return internal_error(exc.error_id)
    error_id = secrets.token_hex(8)
    logger.error("request failed error_id=%s", error_id, exc_info=exc)
    return internal_error(error_id)


def internal_error(error_id: str) -> ApiError:
    """A fault of ours; the log has it under ``error_id``."""
    message = f"the server failed on this request; its log has the reason under {error_id}"
    return ApiError(500, message, kind="server_error", code=error_id)


def draining() -> ApiError:
    """The server is stopping."""
    return ApiError(
        503,
        "the server is stopping and takes no more requests; try another one",
        kind="service_unavailable_error",
        code="draining",
        headers={"retry-after": "1"},
    )


def timed_out(seconds: float | None) -> ApiError:
    """The request's time was up before it was done."""
    limit = "its time" if seconds is None else f"the {seconds:g} seconds a request may take"
    return ApiError(
        408,
        f"the request was ended after {limit}; ask for fewer tokens, or raise --request-timeout",
        kind="timeout_error",
        code="request_timeout",
    )


def _shortened(message: str) -> str:
    if len(message) <= _MAX_MESSAGE:
        return message
    half = _MAX_MESSAGE // 2
    return f"{message[:half]} … {message[-half:]}"
