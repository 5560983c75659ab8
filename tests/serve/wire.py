"""A server in a thread around any ASGI application, and a client that sends bytes as they are."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from starlette.types import ASGIApp

from sinterlm.options import ServeOptions
from sinterlm.serve.http_server import HttpServer, Listener, http_server
from sinterlm.serve.listening import bind_sockets, tls_context


@dataclass(frozen=True)
class Answer:
    """One HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object."""
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    port: int
    server: HttpServer

    def connect(self) -> socket.socket:
        """A plain connection that gives up after ten seconds."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def ask(self, request: bytes, tls: ssl.SSLContext | None = None) -> Answer:
        """Send ``request`` and read one response."""
        with self.connect() as plain:
            made = tls.wrap_socket(plain, server_hostname="localhost") if tls else plain
            with made:
                made.sendall(request)
                return read_answer(made)

    def get(self, path: str, **headers: str) -> Answer:
        """``GET path``."""
        return self.ask(head("GET", path, **headers))

    def post(self, path: str, body: bytes, **headers: str) -> Answer:
        """``POST path`` with a body of declared length."""
        headers = {"content_type": "application/json", "content_length": str(len(body)), **headers}
        return self.ask(head("POST", path, **headers) + body)


def head(method: str, path: str, **headers: str) -> bytes:
    """Request line and headers; an underscore in a name is a dash."""
    lines = [f"{method} {path} HTTP/1.1", "host: test"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def read_answer(connection: socket.socket) -> Answer:
    """The next response, its body complete; nothing may follow it."""
    with connection.makefile("rb") as file:
        return read_from(file)


def read_from(file: BinaryIO) -> Answer:
    """The next response, its body complete."""
    line = file.readline().decode("latin-1")
    assert line.startswith("HTTP/1.1 "), line
    status = int(line.split()[1])
    headers: dict[str, str] = {}
    while (line := file.readline().decode("latin-1").strip()) != "":
        name, _, value = line.partition(": ")
        headers[name] = value
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while (size := int(file.readline(), 16)) > 0:
            body += file.read(size)
            file.readline()
        file.readline()
    else:
        body = file.read(int(headers.get("content-length", 0)))
    return Answer(status, headers, body)


@contextmanager
def serving(app: ASGIApp, options: ServeOptions | None = None) -> Iterator[Address]:
    """``app`` on a free port of this machine."""
    options = options or ServeOptions()
    listener = Listener(bind_sockets("127.0.0.1", 0), tls_context(options))
    server = http_server(app, options, listener)
    thread = threading.Thread(target=lambda: asyncio.run(server.run()))
    port = listener.sockets[0].getsockname()[1]
    thread.start()
    try:
        while not server.started:
            threading.Event().wait(0.005)
        yield Address(port, server)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        assert not thread.is_alive()
