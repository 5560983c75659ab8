"""Where a server listens: bound before a model is loaded, so that a wrong address costs no wait.

Refuses an address that is taken, forbidden or unknown, and certificates that do not fit, by name.
"""

from __future__ import annotations

import errno
import socket
import ssl
from pathlib import Path

from sinterlm.errors import UsageError
from sinterlm.options import ServeOptions

#: Connections that may wait to be accepted; the system may allow fewer.
_BACKLOG = 2048


def bind_sockets(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to every address of ``host``, not listening yet. Raises UsageError."""
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )
    except (OSError, UnicodeError) as exc:
        raise UsageError(f"host={host!r} is no address of this machine: {exc}") from exc
    sockets: list[socket.socket] = []
    try:
        for family, _, _, _, address in dict.fromkeys(found):
            sockets.append(_bound(family, (address[0], port, *address[2:])))
            port = sockets[0].getsockname()[1]  # one port for all where the system picks it
    except OSError as exc:
        for bound in sockets:
            bound.close()
        raise UsageError(_why_not(exc, host, port)) from exc
    return sockets


def _bound(family: int, address: tuple[str | int, ...]) -> socket.socket:
    # By its protocol asyncio tells that it may send without delay (TCP_NODELAY): else a first token
    # behind the headers waits for the client's acknowledgement of them, some 40 ms.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
    except BaseException:
        made.close()
        raise
    return made


def listen(sockets: list[socket.socket]) -> None:
    """Let clients connect. Raises UsageError when somebody else took the port since."""
    for bound in sockets:
        try:
            bound.listen(_BACKLOG)
        except OSError as exc:
            host, port = bound.getsockname()[:2]
            raise UsageError(_why_not(exc, host, port)) from exc


def _why_not(exc: OSError, host: str, port: int) -> str:
    where = f"cannot listen on {host} port {port}"
    if exc.errno == errno.EADDRINUSE:
        return f"{where}: another program does; choose another --port, or 0 for a free one"
    if exc.errno == errno.EACCES:
        return f"{where}: that port needs privileges; choose one above 1023"
    return f"{where}: {exc.strerror}; choose another --host"


def url_of(bound: socket.socket, *, host: str, is_tls: bool) -> str:
    """The address to type into a browser on this machine."""
    port = bound.getsockname()[1]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    if ":" in shown and not shown.startswith("["):
        shown = f"[{shown}]"
    return f"http{'s' if is_tls else ''}://{shown}:{port}"


def is_loopback(bound: socket.socket) -> bool:
    """Whether only programs of this machine can reach it."""
    address = str(bound.getsockname()[0])
    return address == "::1" or address.startswith("127.")


def tls_context(options: ServeOptions) -> ssl.SSLContext | None:
    """What ``ssl_certfile`` and its like ask for; None = plain HTTP. Raises UsageError."""
    if options.ssl_certfile is None:
        return None
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        _check_readable(name, getattr(options, name))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        # Without a password function OpenSSL would ask on the terminal.
        context.load_cert_chain(options.ssl_certfile, options.ssl_keyfile, password=_no_password)
    except (ssl.SSLError, ValueError) as exc:
        raise UsageError(_tls_fault(options, exc)) from exc
    if options.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(options.ssl_ca_certs)
        except ssl.SSLError as exc:
            raise UsageError(
                f"ssl_ca_certs={str(options.ssl_ca_certs)!r} holds no PEM certificate"
            ) from exc
    context.verify_mode = ssl.VerifyMode(options.ssl_cert_reqs)
    return context


class _Encrypted(ValueError):
    """A key that needs a password."""


def _no_password() -> str:
    raise _Encrypted


def _check_readable(name: str, path: Path | None) -> None:
    if path is None:
        return
    try:
        with path.open("rb"):
            pass
    except OSError as exc:
        raise UsageError(f"{name}={str(path)!r} cannot be read: {exc.strerror}") from exc


def _tls_fault(options: ServeOptions, exc: Exception) -> str:
    key = options.ssl_keyfile or options.ssl_certfile
    if isinstance(exc, _Encrypted):
        return f"the key in {str(key)!r} is encrypted; write it out with `openssl pkey`"
    reason = getattr(exc, "reason", None) or str(exc)
    if reason == "KEY_VALUES_MISMATCH":
        return (
            f"ssl_keyfile={str(key)!r} is not the key of ssl_certfile={str(options.ssl_certfile)!r}"
        )
    return (
        f"ssl_certfile={str(options.ssl_certfile)!r} with key {str(key)!r} is no certificate and "
        f"its key in PEM ({reason})"
    )
