"""Keys: who may ask for what. Cross-origin rules. One log line per request, and what it tells."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from sinterlm.options import EngineOptions, ServeOptions
from sinterlm.serve.journal import Journal, record_of
from sinterlm.serve.server import Service, layered
from tests.serve.test_metrics import made_metrics

KEYS = ("alpha", "beta")
BASIC = base64.b64encode(b"me:alpha").decode()


async def generate(request: Request) -> Response:
    record = record_of(request, stream=False)
    record.model, record.prompt_tokens, record.output_tokens = "m", 2, 3
    record.ttft_s, record.finish_reasons = 0.25, ["stop"]
    return Response("ok")


async def plain(request: Request) -> Response:
    return Response("ok")


async def broken(scope: Scope, receive: Receive, send: Send) -> None:
    raise RuntimeError("/etc/secret in a message")


ROUTES = [
    Route("/v1/completions", generate, methods=["POST"]),
    *(Route(path, plain) for path in (
        "/", "/ui/app.js", "/ui/stats", "/health", "/ready", "/version", "/metrics", "/v1/models",
    )),
]  # fmt: skip


def client(*keys: str, **options: Any) -> TestClient:
    service = Service("m", EngineOptions(), ServeOptions(api_key=keys, **options), None)
    app = layered(Starlette(routes=ROUTES), service, made_metrics())
    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize("path", ["/health", "/ready", "/version"])
def test_load_balancers_need_no_key(path: str) -> None:
    assert client(*KEYS).get(path).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/", "/ui/app.js", "/ui/stats", "/no"])
def test_everything_else_does(path: str) -> None:
    server = client(*KEYS)
    answer = server.get(path)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["x-request-id"]
    is_file = path in ("/", "/ui/app.js")
    assert answer.headers["www-authenticate"].startswith("Basic" if is_file else "Bearer")
    for key in KEYS:
        known = server.get(path, headers={"authorization": f"Bearer {key}"})
        assert known.status_code == (404 if path == "/no" else 200)


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "Bearer alph", "Bearer alphaa", "bearer ALPHA", "Token alpha",
     "alpha", "Basic alpha", "Basic !!",
     f"Basic {base64.b64encode(b'alpha').decode()}", "Bearer é"],
)  # fmt: skip
def test_what_is_no_key(value: str) -> None:
    headers = {"authorization": value.encode("utf-8")}
    assert client(*KEYS).get("/v1/models", headers=headers).status_code == 401


def test_a_browser_may_use_basic_authentication_from_this_origin_only() -> None:
    server, headers = client(*KEYS), {"authorization": f"Basic {BASIC}"}
    assert server.get("/", headers=headers).status_code == 200
    for origin, status in [("http://testserver", 200), ("https://evil.example", 403)]:
        answer = server.post("/v1/completions", headers={**headers, "origin": origin})
        assert answer.status_code == status


def test_what_may_be_public_when_told_so() -> None:
    server = client(*KEYS, allow_unauthenticated_metrics=True, allow_unauthenticated_page=True)
    for path in ("/metrics", "/", "/ui/app.js"):
        assert server.get(path).status_code == 200
    for path in ("/ui/stats", "/v1/models"):
        assert server.get(path).status_code == 401


def test_no_keys_no_question() -> None:
    assert client().get("/v1/models").status_code == 200


def test_cors_is_off_unless_an_origin_is_named() -> None:
    asked = {
        "origin": "https://a.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    assert client(*KEYS).options("/v1/completions", headers=asked).status_code == 401
    server = client(*KEYS, allowed_origins=("https://a.example",))
    preflight = server.options("/v1/completions", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://a.example"
    refused = server.get("/v1/models", headers={"origin": "https://a.example"})
    assert refused.status_code == 401, "and the browser may read why:"
    assert refused.headers["access-control-allow-origin"] == "https://a.example"
    other = server.options("/v1/completions", headers={**asked, "origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[dict[str, Any]]]:
    """Fields of every request that was logged."""
    caplog.set_level(logging.INFO, "sinterlm.serve.journal")
    found: list[dict[str, Any]] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(getattr(record, "fields"))  # type: ignore[method-assign]  # noqa: B009
    logging.getLogger("sinterlm.serve.journal").addHandler(handler)
    yield found
    logging.getLogger("sinterlm.serve.journal").removeHandler(handler)


def test_a_generating_request_is_logged_without_its_text(lines: list[dict[str, Any]]) -> None:
    headers = {"x-request-id": "mine"}
    client().post("/v1/completions", json={"prompt": "secret"}, headers=headers)
    (line,) = lines
    assert line["id"] == "mine"
    assert line["duration_s"] > 0
    assert {name: line[name] for name in line if name not in ("id", "duration_s")} == {
        "method": "POST", "route": "/v1/completions", "status": 200, "client_gone": False,
        "model": "m", "stream": False, "prompt_tokens": 2, "output_tokens": 3, "ttft_s": 0.25,
        "finish_reason": "stop",
    }  # fmt: skip
    assert "secret" not in json.dumps(line)


def test_other_requests_are_logged_when_asked_for(lines: list[dict[str, Any]]) -> None:
    client().get("/v1/models")
    assert lines == []
    client(access_log=True).get("/v1/made-up?key=1")
    assert (lines[0]["route"], lines[0]["status"]) == ("other", 404)


def test_a_fault_is_an_id_for_the_client_and_a_traceback_for_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = Journal(broken, metrics=made_metrics(), routes=(), access_log=False)
    answer = TestClient(app).get("/")
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert "secret" not in answer.text and "Traceback" not in answer.text
    assert error["code"] in error["message"]
    assert error["code"] in caplog.text
    assert "/etc/secret in a message" in caplog.text
