"""HttpServer: uvicorn's server on sockets that are bound already, with our connections.

Signals are left to whoever runs it. Clients that keep it waiting are dropped once a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp

from sinterlm.options import ServeOptions
from sinterlm.serve.connection import Connection, ConnectionLimits, ServerConfig

_SWEEP_S = 1.0
_POLL_S = 0.02


@dataclass(frozen=True)
class Listener:
    """Where to serve; whatever can be wrong about it has been checked."""

    sockets: list[socket.socket]  #: bound, not listening yet
    tls: ssl.SSLContext | None


class HttpServer(uvicorn.Server):
    """Runs once, from ``run`` to ``close``."""

    def __init__(self, config: ServerConfig, sockets: list[socket.socket]) -> None:
        super().__init__(config)
        self._sockets = sockets

    async def run(self) -> None:  # type: ignore[override]  # uvicorn's makes a loop of its own
        """Serve until closed."""
        sweeping = asyncio.create_task(self._sweep())
        try:
            await self.serve(self._sockets)
        finally:
            sweeping.cancel()

    async def close(self, timeout_s: float) -> None:
        """Stop listening; answers under way get ``timeout_s`` seconds to leave, then are cut.

        ``run`` then returns.
        """
        self.should_exit = True
        deadline = time.monotonic() + timeout_s
        while self.server_state.connections and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
        self.force_exit = True
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing to capture."""
        yield

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.sweep(now)


def http_server(app: ASGIApp, options: ServeOptions, listener: Listener) -> HttpServer:
    """A server of ``app`` that has not begun to listen."""
    config = ServerConfig(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        interface="asgi3",
        loop="asyncio",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        root_path=options.root_path,
        timeout_keep_alive=options.keep_alive_timeout,  # type: ignore[arg-type]  # any number does
    )
    config.limits = ConnectionLimits(options.read_timeout, options.send_timeout)
    config.load()
    config.ssl = listener.tls
    return HttpServer(config, listener.sockets)
