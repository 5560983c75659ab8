"""What a server cannot be started with is refused by name; certificates, addresses and the log."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trustme
from starlette.responses import PlainTextResponse

from sinterlm.errors import UsageError
from sinterlm.options import ServeOptions
from sinterlm.serve.listening import bind_sockets, is_loopback, listen, tls_context, url_of
from sinterlm.serve.logs import logging_to
from sinterlm.serve.settings import check_options, read_template, with_environment
from tests.serve.wire import head, serving

CERT = Path("cert.pem")


def test_defaults_are_fine() -> None:
    check_options(ServeOptions())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("host", ""), ("port", -1), ("port", 65536), ("root_path", "llm"), ("root_path", "/a/"),
        ("served_model_name", ("",)), ("served_model_name", ("a b",)), ("api_key", ("",)),
        ("api_key", ("two words",)), ("api_key", ("schlüssel",)),
        ("allowed_origins", ("example.org",)), ("allowed_origins", ("https://example.org/x",)),
        ("ssl_keyfile", CERT), ("ssl_ca_certs", CERT), ("ssl_cert_reqs", 3), ("max_waiting", -1),
        ("stream_interval", 0),
        ("max_body_bytes", 0), ("request_timeout", 0.0), ("read_timeout", 0.0),
        ("send_timeout", float("nan")), ("keep_alive_timeout", -1.0),
        ("shutdown_timeout", float("inf")), ("tool_call_parser", "x"), ("reasoning_parser", "x"),
    ],
)  # fmt: skip
def test_bad_options_are_named(name: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        check_options(replace(ServeOptions(), **{name: value}))
    assert str(caught.value).startswith(name)
    if name == "api_key":
        assert value[0] not in str(caught.value) or not value[0]


def test_what_the_environment_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert with_environment(ServeOptions()) == ServeOptions()
    monkeypatch.setenv("SINTERLM_API_KEY", "third")
    monkeypatch.setenv("SINTERLM_SERVER_DEV_MODE", "1")
    options = with_environment(ServeOptions(api_key=("a", "b")))
    assert options == ServeOptions(api_key=("a", "b", "third"), dev_mode=True)
    monkeypatch.setenv("SINTERLM_SERVER_DEV_MODE", "0")
    assert not with_environment(ServeOptions()).dev_mode
    monkeypatch.setenv("SINTERLM_API_KEY", "two words")
    with pytest.raises(UsageError, match=r"^SINTERLM_API_KEY must be"):
        with_environment(ServeOptions())


def test_chat_template_files(tmp_path: Path) -> None:
    assert read_template(None) is None
    file = tmp_path / "t.jinja"
    with pytest.raises(UsageError, match=r"^chat_template='.*' cannot be read: No such file"):
        read_template(file)
    file.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="is no UTF-8 text"):
        read_template(file)
    file.write_text("{% if %}")
    with pytest.raises(UsageError, match=r"^chat_template='.*': the chat template does not comp"):
        read_template(file)
    file.write_text("{{ messages }}")
    assert read_template(file) == "{{ messages }}"


# -- addresses ------------------------------------------------------------------------------------


def test_a_port_in_use_is_told() -> None:
    (first,) = bind_sockets("127.0.0.1", 0)
    listen([first])
    port = first.getsockname()[1]
    with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1 port {port}: another prog"):
        bind_sockets("127.0.0.1", port)
    first.close()
    (again,) = bind_sockets("127.0.0.1", port)
    again.close()


def test_what_is_sent_goes_out_at_once() -> None:
    (bound,) = bind_sockets("127.0.0.1", 0)

    async def delays() -> int:
        accepted: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()
        server = await asyncio.start_server(
            lambda _, writer: accepted.set_result(writer.get_extra_info("socket")), sock=bound
        )
        async with server:
            _, writer = await asyncio.open_connection(*bound.getsockname())
            no_delay = (await accepted).getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.close()
        return no_delay

    assert asyncio.run(delays()) != 0


def test_a_port_taken_since_is_told() -> None:
    (first,) = bind_sockets("127.0.0.1", 0)
    (second,) = bind_sockets("127.0.0.1", first.getsockname()[1])
    listen([second])
    with pytest.raises(UsageError, match="another program does"):
        listen([first])
    first.close()
    second.close()


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7", "a" * 300])
def test_an_address_that_is_not_ours_is_told(host: str) -> None:
    with pytest.raises(UsageError, match=r"host=|cannot listen on"):
        bind_sockets(host, 0)


@pytest.mark.parametrize(
    ("host", "url", "is_local"),
    [
        ("127.0.0.1", "http://127.0.0.1:{}", True),
        ("0.0.0.0", "http://127.0.0.1:{}", False),
        ("localhost", "http://localhost:{}", True),
    ],
)
def test_the_url_to_type(host: str, url: str, is_local: bool) -> None:
    sockets = bind_sockets(host, 0)
    ports = {bound.getsockname()[1] for bound in sockets}
    assert len(ports) == 1
    assert url_of(sockets[0], host=host, is_tls=False) == url.format(*ports)
    assert all(map(is_loopback, sockets)) == is_local
    for bound in sockets:
        bound.close()


# -- TLS ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PEM files: ca, cert, key, both, client (certificate and key), other (a key), text."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    server, client = authority.issue_cert("localhost"), authority.issue_cert("me@example.org")
    found = {name: folder / f"{name}.pem" for name in
             ("ca", "cert", "key", "both", "client", "other", "text")}  # fmt: skip
    authority.cert_pem.write_to_path(str(found["ca"]))
    server.cert_chain_pems[0].write_to_path(str(found["cert"]))
    server.private_key_pem.write_to_path(str(found["key"]))
    server.private_key_and_cert_chain_pem.write_to_path(str(found["both"]))
    client.private_key_and_cert_chain_pem.write_to_path(str(found["client"]))
    client.private_key_pem.write_to_path(str(found["other"]))
    found["text"].write_text("no certificate")
    return found


@pytest.mark.parametrize("is_one_file", [False, True])
def test_https(files: dict[str, Path], is_one_file: bool) -> None:
    options = ServeOptions(ssl_certfile=files["cert"], ssl_keyfile=files["key"])
    if is_one_file:
        options = ServeOptions(ssl_certfile=files["both"])
    trusting = ssl.create_default_context(cafile=str(files["ca"]))
    with serving(PlainTextResponse("ok"), options) as server:
        assert server.ask(head("GET", "/"), trusting).body == b"ok"
        with pytest.raises(ssl.SSLCertVerificationError):
            server.ask(head("GET", "/"), ssl.create_default_context())
        with server.connect() as plain:  # HTTP to an HTTPS port
            plain.sendall(head("GET", "/"))
            while plain.recv(100):  # an alert at most, then the end
                pass
        assert server.ask(head("GET", "/"), trusting).status == 200


def test_client_certificates(files: dict[str, Path]) -> None:
    options = ServeOptions(
        ssl_certfile=files["both"], ssl_ca_certs=files["ca"], ssl_cert_reqs=ssl.CERT_REQUIRED
    )
    stranger = ssl.create_default_context(cafile=str(files["ca"]))
    known = ssl.create_default_context(cafile=str(files["ca"]))
    known.load_cert_chain(files["client"])
    with serving(PlainTextResponse("ok"), options) as server:
        assert server.ask(head("GET", "/"), known).body == b"ok"
        with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):
            server.ask(head("GET", "/"), stranger)


def test_certificates_that_cannot_be_used(files: dict[str, Path], tmp_path: Path) -> None:
    missing = tmp_path / "missing.pem"
    for options, message in [
        (ServeOptions(ssl_certfile=missing), r"^ssl_certfile='.*' cannot be read: No such file"),
        (ServeOptions(ssl_certfile=tmp_path), r"^ssl_certfile='.*' cannot be read: Is a direc"),
        (ServeOptions(ssl_certfile=files["text"]), "is no certificate and its key in PEM"),
        (ServeOptions(ssl_certfile=files["cert"]), "is no certificate and its key in PEM"),
        (ServeOptions(ssl_certfile=files["cert"], ssl_keyfile=missing), "^ssl_keyfile='.*' cannot"),
        (ServeOptions(ssl_certfile=files["cert"], ssl_keyfile=files["other"]),
         "^ssl_keyfile='.*' is not the key of ssl_certfile"),
        (ServeOptions(ssl_certfile=files["both"], ssl_ca_certs=files["text"]),
         "^ssl_ca_certs='.*' holds no PEM certificate"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=message):
            tls_context(options)


def test_an_encrypted_key_asks_for_nothing(files: dict[str, Path], tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as s

    key = s.load_pem_private_key(files["key"].read_bytes(), None)
    encrypted = tmp_path / "encrypted.pem"
    encrypted.write_bytes(
        key.private_bytes(
            s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"secret")
        )
    )
    with pytest.raises(UsageError, match="is encrypted; write it out with `openssl pkey`"):
        tls_context(ServeOptions(ssl_certfile=files["cert"], ssl_keyfile=encrypted))


# -- the log --------------------------------------------------------------------------------------


def logged(options: ServeOptions, file: Path) -> list[str]:
    logger = logging.getLogger("sinterlm.test")
    with logging_to(replace(options, log_file=file)):
        logger.debug("hidden")
        logger.info("request", extra={"fields": {"id": "a b", "n": 3, "gone": True, "x": None}})
        logger.warning("evil\nINFO forged=1 \x1b[31m")
        try:
            raise ValueError("no")
        except ValueError:
            logger.exception("failed")
    return file.read_text().splitlines()


def test_log_lines_as_pairs(tmp_path: Path) -> None:
    lines = logged(ServeOptions(), tmp_path / "log")
    assert lines[0].split(" ", 1)[1] == 'INFO request id="a b" n=3 gone=true'
    assert lines[1].endswith(r"WARNING evil\u000aINFO forged=1 \u001b[31m")
    assert lines[-1] == "ValueError: no"


def test_log_lines_as_json(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in logged(ServeOptions(log_format="json"), tmp_path / "log")]
    assert len(lines) == 3
    assert lines[0].pop("time").endswith("Z")
    assert lines[0] == {"level": "info", "message": "request", "id": "a b", "n": 3, "gone": True}
    assert lines[2]["traceback"].endswith("ValueError: no")


def test_log_level_and_what_remains_after(tmp_path: Path) -> None:
    before = logging.getLogger("sinterlm").level
    assert len(logged(ServeOptions(log_level="debug"), tmp_path / "a")) > 4
    assert len(logged(ServeOptions(log_level="error"), tmp_path / "b")) == 5
    assert logging.getLogger("sinterlm").level == before
    assert logging.getLogger("sinterlm").handlers == []


def test_a_log_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    message = r"^log_file='.*' cannot be written: Is a directory"
    with pytest.raises(UsageError, match=message), logging_to(ServeOptions(log_file=tmp_path)):
        pass
