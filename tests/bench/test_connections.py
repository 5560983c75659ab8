"""Whether the benchmark's client keeps connections, seen from a server that counts them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sinterlm.bench.client import Target
from sinterlm.bench.load import Load, run_load
from sinterlm.bench.workload import Request

EVENT = b'data: {"choices": [{"index": 0, "text": "x", "finish_reason": "length"}]}\n\n'
ANSWER = EVENT + b"data: [DONE]\n\n"


class Counting(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Streamed)
        self.ports: set[int] = set()  # one per connection


class Streamed(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        assert isinstance(self.server, Counting)
        self.server.ports.add(self.client_address[1])
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", str(len(ANSWER)))
        self.end_headers()
        self.wfile.write(ANSWER)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Counting]:
    with Counting() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(("keep_alive", "num_connections"), [(True, 1), (False, 6)])
def test_connections(server: Counting, keep_alive: bool, num_connections: int) -> None:
    target = Target(f"http://127.0.0.1:{server.server_port}", "m", keep_alive=keep_alive)
    asked = [Request(f"bench-t-{i}", f"prompt {i}", 5, 1, (1, 2, i)) for i in range(6)]
    raw = run_load(target, Load(max_concurrency=1), asked)
    assert all(record.is_success for record in raw.requests)
    assert len(server.ports) == num_connections
