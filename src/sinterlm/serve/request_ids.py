"""The header ``x-request-id``: the client's or one made up, and told in every answer."""

from __future__ import annotations

import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sinterlm.serve.errors import bad_request

HEADER = "x-request-id"
_FORM = re.compile(r"[\x21-\x7e]{1,128}")


class RequestIds:
    """ASGI middleware: ``scope["state"]["request_id"]``, and the header of the answer.

    Of two around one another only the outer one does anything.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or "request_id" in scope.get("state", {}):
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER)
        usable = given is not None and _FORM.fullmatch(given) is not None
        request_id = given if given is not None and usable else secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id
        scope["state"]["request_id_given"] = given

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


def request_id_of(request: Request, field: str | None) -> str:
    """The id of a generating request: the header's, else the body's, else a made-up one.

    Raises ApiError 400 for one that cannot be sent back in a header.
    """
    header = request.scope["state"]["request_id_given"]
    given, name = (header, HEADER) if header is not None else (field, "request_id")
    if given is None:
        return str(request.scope["state"]["request_id"])
    if _FORM.fullmatch(given) is None:
        raise bad_request(
            f"{name} must be 1 to 128 printable ASCII characters without blanks", param=name
        )
    return str(given)
