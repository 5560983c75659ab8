"""What stands between the network and the routes: keys, and the size of bodies.

Plain ASGI, so that a token's event passes through two function calls and no task.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Collection, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sinterlm.serve.errors import ApiError

#: Nothing to steal, and needed by load balancers that hold no key.
PUBLIC_PATHS = ("/health", "/ready", "/version")


def path_of(scope: Scope) -> str:
    """The path as routes know it, without the prefix of a reverse proxy."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def is_page_file(path: str) -> bool:
    """Whether ``path`` is of the page's files, which hold nothing about this server."""
    return path == "/" or (path.startswith("/ui/") and path != "/ui/stats")


async def answer_error(error: ApiError, send: Send) -> None:
    """Send a whole answer that is an error."""
    body = error.encoded()
    given = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in error.headers.items()]
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        *given,
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Keys:
    """Lets a request through that brings one of ``keys``, or wants what is public.

    A key comes as bearer token, or as the password of basic authentication, which is what a
    browser can offer for a page. Every key is compared in full, whichever one fits.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[str],
        public: Collection[str],
        is_page_public: bool,
    ) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]
        self._public = frozenset(public)
        self._is_page_public = is_page_public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve or refuse one request."""
        if scope["type"] != "http" or not self._digests or self._is_public(path_of(scope)):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scheme, _, value = headers.get("authorization", "").partition(" ")
        is_basic = scheme.lower() == "basic"
        offered = _password(value) if is_basic else value.strip().encode("latin-1")
        if scheme.lower() not in ("bearer", "basic") or not self._is_known(offered):
            await answer_error(_unauthorised(path_of(scope), bool(scheme)), send)
        elif is_basic and _is_foreign(headers):
            await answer_error(_FOREIGN, send)
        else:
            await self._app(scope, receive, send)

    def _is_public(self, path: str) -> bool:
        return path in self._public or (self._is_page_public and is_page_file(path))

    def _is_known(self, offered: bytes) -> bool:
        digest = _digest(offered)
        return any([hmac.compare_digest(digest, known) for known in self._digests])


def _digest(key: bytes) -> bytes:
    """Of one length whatever the key's, so that comparing tells nothing of it."""
    return hashlib.sha256(key).digest()


def _password(value: str) -> bytes:
    try:
        return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""


def _is_foreign(headers: Headers) -> bool:
    """Whether a page of another origin asks: browsers add basic credentials by themselves."""
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2] != headers.get("host")


_FOREIGN = ApiError(
    403,
    "basic authentication is for this server's own page; use a bearer token",
    kind="authentication_error",
    code="foreign_origin",
)


def _unauthorised(path: str, has_key: bool) -> ApiError:
    challenge = 'Basic realm="SinterLM", charset="UTF-8"' if is_page_file(path) else "Bearer"
    fault = "is not one of this server's" if has_key else "is missing"
    return ApiError(
        401,
        f"the API key {fault}; send it as `Authorization: Bearer KEY`",
        kind="authentication_error",
        code="invalid_api_key",
        headers={"www-authenticate": challenge},
    )


class BodyLimit:
    """Reads a body before anybody else does, up to ``max_bytes``: a handler never waits for one.

    Holds for chunked bodies too. A client that leaves meanwhile is not served.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve or refuse one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdigit() or int(declared) > self._max_bytes:
            await answer_error(self._too_large(), send)
            return
        parts: list[bytes] = []
        length, more = 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            parts.append(message.get("body", b""))
            length += len(parts[-1])
            more = message.get("more_body", False)
            if length > self._max_bytes:
                await answer_error(self._too_large(), send)
                return
        await self._app(scope, _Replay(b"".join(parts), receive), send)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is longer than the {self._max_bytes} bytes this server takes",
            param="body",
            code="body_too_large",
            headers={"connection": "close"},  # whoever listens while sending stops
        )


class _Replay:
    """A body that was read already, then whatever still comes."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}
