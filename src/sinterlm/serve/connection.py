"""Connection: uvicorn's HTTP protocol with limits on what one client may hold up.

Bounded are the size of a request's head, the time for its head and for its body, and the time a
client may leave bytes unread. What is no HTTP gets an answer in OpenAI's shape, never a second
one in the middle of a first or behind it. A request that is answered before its body is there is
read to its end, within bounds: closing earlier would reset the connection, and lose the answer.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from http import HTTPStatus

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from sinterlm.serve.errors import ApiError

MAX_HEAD_BYTES = 64 << 10  #: request line and headers
MAX_HEADERS = 128
MAX_URL_BYTES = 8 << 10
MAX_UNWANTED_BYTES = 64 << 20  #: of a body whose request has been answered
#: Of an answer, in the kernel, for a client that is slow to read. Linux would grow it to 4 MiB,
#: where a client that reads nothing looks like one that reads all.
SEND_BUFFER_BYTES = 128 << 10


@dataclass(frozen=True)
class ConnectionLimits:
    """Seconds; see ``ServeOptions``."""

    read_timeout: float
    send_timeout: float


class ServerConfig(uvicorn.Config):
    """uvicorn's settings, and the limits that ``Connection`` reads from them."""

    limits: ConnectionLimits


class _RefusedHead(Exception):
    """Ends the parsing of a head; the connection knows the status."""


class _AnswerTransport:
    """What an answer writes to: the connection's transport, closed when the body has been read."""

    def __init__(self, connection: Connection) -> None:
        self.write = connection.transport.write
        self.close = connection.close_after_body


class Connection(HttpToolsProtocol):
    """One client. ``sweep`` is called about once a second."""

    config: ServerConfig
    _refusal = HTTPStatus.BAD_REQUEST
    _head_bytes = 0
    _header_bytes = 0
    #: When the head, then the body of the request being read began; None between requests.
    _head_since: float | None = None
    _body_since: float | None = None
    _unwanted_bytes = 0
    _closes_after_body = False
    _unsent = 0  #: bytes that the client had not taken at the last sweep
    _stuck_since: float | None = None

    # -- reading ---------------------------------------------------------------------------------

    def connection_made(self, transport: object) -> None:
        """A client that connects owes a head."""
        super().connection_made(transport)  # type: ignore[arg-type]  # as uvicorn itself
        peer = self.transport.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self._head_since = time.monotonic()

    def data_received(self, data: bytes) -> None:
        """Parse; refuse a head that grows beyond its limit before it is complete."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._head_since is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._head_since, self._body_since = time.monotonic(), None
        self._head_bytes = self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        """A piece of the request's target."""
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            self._refusal = HTTPStatus.REQUEST_URI_TOO_LONG
            raise _RefusedHead

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        super().on_header(name, value)
        self._header_bytes += len(name) + len(value)
        if len(self.headers) > MAX_HEADERS or self._header_bytes > MAX_HEAD_BYTES:
            self._refusal = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            raise _RefusedHead

    def on_headers_complete(self) -> None:
        """The head is complete; the body, if any, begins."""
        self._head_since, self._body_since = None, time.monotonic()
        self._unwanted_bytes = 0
        super().on_headers_complete()
        cycle: RequestResponseCycle = self.cycle
        cycle.transport = _AnswerTransport(self)  # type: ignore[assignment]  # all that it uses

    def on_body(self, body: bytes) -> None:
        """A piece of the body; dropped when the answer is complete."""
        super().on_body(body)
        if self.cycle.response_complete:
            self._unwanted_bytes += len(body)
            if self._unwanted_bytes > MAX_UNWANTED_BYTES:
                self.transport.close()

    def on_message_complete(self) -> None:
        """The request is complete."""
        self._body_since = None
        super().on_message_complete()
        if self._closes_after_body:
            self.transport.close()

    def close_after_body(self) -> None:
        """Close; first read what is left of a body, for as long as a body may take."""
        self._closes_after_body = True
        if self._body_since is None:
            self.transport.close()

    def resume_writing(self) -> None:
        """The client has taken most of what waited for it."""
        self._stuck_since = None
        super().resume_writing()

    # -- refusing --------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """Answer what could not be parsed; called by uvicorn."""
        self._refuse(self._refusal)

    def _refuse(self, status: HTTPStatus) -> None:
        """Answer with ``status`` and close; close alone when there is an answer, or one begun."""
        cycle: RequestResponseCycle | None = self.cycle
        was_answered = cycle is not None and cycle.response_complete
        is_of_the_next = was_answered and self._body_since is None
        if cycle is None or is_of_the_next or not cycle.response_started:
            self.transport.write(_raw_answer(status))
        self._head_since = self._body_since = None
        self.transport.close()

    def sweep(self, now: float) -> None:
        """Drop a client that keeps us waiting for too long. ``now``: ``time.monotonic``."""
        if self.transport.is_closing():
            # Closing waits for what the client has not taken yet.
            if self._is_stuck(now):
                self.transport.abort()
            return
        limits = self.config.limits
        since = self._head_since if self._head_since is not None else self._body_since
        if since is not None and now - since > limits.read_timeout:
            if self._head_since is not None and self._head_bytes == 0:
                self.transport.close()  # it never asked for anything
            else:
                self._refuse(HTTPStatus.REQUEST_TIMEOUT)
        elif self._is_stuck(now):
            self.transport.abort()

    def _is_stuck(self, now: float) -> bool:
        """Whether bytes have waited for the client, and none were taken, for too long."""
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0:
            self._stuck_since = None
        elif self._stuck_since is None or unsent < self._unsent:
            self._stuck_since = now
        self._unsent = unsent
        return self._stuck_since is not None and (
            now - self._stuck_since > self.config.limits.send_timeout
        )


_WORDS = {
    HTTPStatus.BAD_REQUEST: "this is no HTTP/1.1 request",
    HTTPStatus.REQUEST_TIMEOUT: "the request did not arrive in time",
    HTTPStatus.REQUEST_URI_TOO_LONG: f"the URL is longer than {MAX_URL_BYTES} bytes",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: (
        f"more than {MAX_HEADERS} headers, or {MAX_HEAD_BYTES} bytes of them"
    ),
}


def _raw_answer(status: HTTPStatus) -> bytes:
    body = ApiError(status, _WORDS[status]).encoded()
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode("ascii") + body
