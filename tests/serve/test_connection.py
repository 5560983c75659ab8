"""Clients that are wrong, slow or too large get an answer or an end, and the next one is served."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from sinterlm.options import ServeOptions
from sinterlm.serve.connection import MAX_HEAD_BYTES, MAX_HEADERS, MAX_UNWANTED_BYTES, MAX_URL_BYTES
from sinterlm.serve.middleware import BodyLimit
from tests.serve.wire import Address, head, read_answer, read_from, serving

LIMIT = 1 << 20
FLOOD = 64 << 20  #: bytes of an answer; more than any socket holds


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Says how long the body was; ``/flood`` writes more than a client that sleeps can take."""
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/flood":
        for _ in range(FLOOD >> 16):
            await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
    await send({"type": "http.response.body", "body": b"%d" % len(body)})


@pytest.fixture(scope="module")
def server() -> Iterator[Address]:
    options = ServeOptions(read_timeout=1, send_timeout=1, keep_alive_timeout=0.2)
    with serving(BodyLimit(app, max_bytes=LIMIT), options) as address:
        yield address


@pytest.fixture(autouse=True)
def still_answers(server: Address) -> Iterator[None]:
    yield
    assert server.post("/", b"12345").body == b"5"


def wait_closed(connection: socket.socket, seconds: float) -> float:
    """Seconds until the server closes."""
    start = time.monotonic()
    connection.settimeout(seconds)
    while connection.recv(1 << 16):
        pass
    return time.monotonic() - start


def wait_alone(server: Address, seconds: float) -> None:
    """Until no connection is left in the server."""
    deadline = time.monotonic() + seconds
    while server.server.server_state.connections or server.server.server_state.tasks:
        assert time.monotonic() < deadline, "a connection or a task is left"
        time.sleep(0.02)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost test\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
        b"GET / HTTP/1.1\r\nx: a\r\n b\x00\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),  # TLS to a plain port
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_no_http_gets_a_400(server: Address, sent: bytes) -> None:
    answer = server.ask(sent)
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert answer.headers["connection"] == "close"


def test_random_bytes_never_hang(server: Address) -> None:
    for _ in range(50):
        with server.connect() as connection:
            connection.sendall(os.urandom(200))
            connection.shutdown(socket.SHUT_WR)
            wait_closed(connection, 3)


def test_a_long_url_is_a_414(server: Address) -> None:
    assert server.get("/" + "a" * MAX_URL_BYTES).status == 414


@pytest.mark.parametrize(
    "headers",
    [
        {f"x{i}": "1" for i in range(MAX_HEADERS + 1)},
        {"x": "a" * (MAX_HEAD_BYTES + 1)},
        {f"x{i}": "a" * 1000 for i in range(100)},
    ],
)
def test_too_many_headers_are_a_431(server: Address, headers: dict[str, str]) -> None:
    assert server.get("/", **headers).status == 431


def test_an_endless_header_is_a_431(server: Address) -> None:
    with server.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nx: ")
        for _ in range(MAX_HEAD_BYTES >> 10):
            connection.sendall(b"a" * 1024)
        connection.sendall(b"a" * 1024)
        assert read_answer(connection).status == 431


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize(("length", "status"), [(LIMIT, 200), (LIMIT + 1, 413), (5 * LIMIT, 413)])
def test_body_limit(server: Address, length: int, status: int, is_chunked: bool) -> None:
    if is_chunked:
        sent = head("POST", "/", transfer_encoding="chunked")
        for begin in range(0, length, 1 << 16):
            size = min(1 << 16, length - begin)
            sent += b"%x\r\n" % size + bytes(size) + b"\r\n"
        answer = server.ask(sent + b"0\r\n\r\n")
    else:
        answer = server.post("/", bytes(length))
    assert answer.status == status
    if status == 413:
        assert answer.error["param"] == "body"
        assert str(LIMIT) in answer.error["message"]


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
def test_a_client_that_sends_all_before_it_reads_has_its_answer(
    server: Address, connection: str
) -> None:
    for _ in range(3):
        answer = server.post("/", bytes(32 * LIMIT), connection=connection)
        assert answer.status == 413
        assert answer.headers["connection"] == "close"
    wait_alone(server, 2)


def test_a_client_of_today_is_told_of_a_body_twice_the_limit(server: Address) -> None:
    url = f"http://127.0.0.1:{server.port}/"
    for content in (bytes(2 * LIMIT), iter([bytes(1 << 16)] * 32)):
        assert httpx.post(url, content=content, timeout=10).status_code == 413


@pytest.mark.parametrize("pause", [0.05, 0])
def test_a_body_that_does_not_end_has_one_answer(server: Address, pause: float) -> None:
    sent = 0
    with server.connect() as connection:
        connection.sendall(head("POST", "/", content_length=str(8 * MAX_UNWANTED_BYTES)))
        assert read_answer(connection).status == 413
        start = time.monotonic()
        with pytest.raises(OSError):
            while True:
                sent += connection.send(bytes(1 << 10 if pause else 1 << 20))
                time.sleep(pause)
        assert time.monotonic() - start < 4
        connection.settimeout(0.1)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    assert sent < 2 * MAX_UNWANTED_BYTES


def test_clients_that_send_nothing_more_are_dropped(server: Address) -> None:
    silent = server.connect()
    begun = [
        b"GET / HT",
        b"GET / HTTP/1.1\r\nhost: t\r\nx",
        head("POST", "/", content_length="9"),
        head("POST", "/", transfer_encoding="chunked") + b"1\r\na\r\n",
    ]
    waiting = [server.connect() for _ in begun]
    for connection, sent in zip(waiting, begun, strict=True):
        connection.sendall(sent)
    dripping = server.connect()
    dripping.sendall(b"GET / HTTP/1.1\r\nx: a")
    with pytest.raises(OSError):
        for _ in range(40):
            time.sleep(0.1)
            dripping.sendall(b"a")
    assert wait_closed(silent, 1) < 1
    for connection in waiting:
        answer = read_answer(connection)
        assert answer.status == 408
        assert "in time" in answer.error["message"]
        assert wait_closed(connection, 1) < 1
    for connection in (silent, dripping, *waiting):
        connection.close()


def test_an_idle_connection_is_closed(server: Address) -> None:
    with server.connect() as connection:
        connection.sendall(head("GET", "/"))
        assert read_answer(connection).status == 200
        assert wait_closed(connection, 3) < 1


def test_a_client_that_never_reads_is_dropped(server: Address) -> None:
    with server.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(head("GET", "/flood"))
        wait_alone(server, 5)


def test_a_client_that_reads_slowly_gets_everything(server: Address) -> None:
    with server.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        connection.sendall(head("GET", "/flood", connection="close"))
        length = 0
        start = time.monotonic()
        while data := connection.recv(1 << 18):
            length += len(data)
            if time.monotonic() - start < 2.5:
                time.sleep(0.05)
        assert length > FLOOD
    wait_alone(server, 2)


def test_a_client_that_leaves_early_is_not_served(server: Address) -> None:
    with server.connect() as connection:
        connection.sendall(head("POST", "/", content_length="100") + b"half")
    wait_alone(server, 2)


def test_requests_in_one_packet_are_answered_in_order(server: Address) -> None:
    one = head("POST", "/", content_length="1") + b"a"
    two = head("POST", "/", content_length="2") + b"bb"
    with server.connect() as connection, connection.makefile("rb") as file:
        connection.sendall(one + two)
        assert [read_from(file).body for _ in range(2)] == [b"1", b"2"]
