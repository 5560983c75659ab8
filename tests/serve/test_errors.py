"""Bad bodies and bad moments: each gets OpenAI's error object, the right status, and the field."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from sinterlm.errors import (
    DrainingError,
    EngineDeadError,
    PromptError,
    QueueFullError,
    ResourceError,
    RuntimeFault,
)
from sinterlm.options import ServeOptions
from tests.serve.conftest import MakeServer, Server, chat_body

BAD_BODIES: list[tuple[bytes, str | None]] = [
    (b"", None),
    (b"null", None),
    (b"[]", None),
    (b'"prompt"', None),
    (b"{", None),
    (b'{"prompt":"a"} x', None),
    (b'{"prompt":"a","temperature":NaN}', "temperature"),
    (b'{"prompt":"a","temperature":-Infinity}', "temperature"),
    (b'{"prompt":"a","temperature":1e999}', "temperature"),
    (b'{"prompt":"a","temperature":1e308}', "temperature"),
    (b'{"prompt":"a","temperature":-1}', "temperature"),
    (b'{"prompt":"a","temperature":"1"}', "temperature"),
    (b'{"prompt":"a","n":1' + b"0" * 5000 + b"}", "n"),
    (b'{"prompt":"a","n":10000000000000000000000}', "n"),
    (b'{"prompt":"a","n":0}', "n"),
    (b'{"prompt":"a","n":true}', "n"),
    (b'{"prompt":"a","n":1.5}', "n"),
    (b'{"prompt":"a","seed":1e3}', "seed"),
    (b'{"prompt":"a","seed":99999999999999999999}', "seed"),
    (b'{"prompt":"a","top_p":0}', "top_p"),
    (b'{"prompt":"a","top_k":-2}', "top_k"),
    (b'{"prompt":"a","min_tokens":17}', "min_tokens"),
    (b'{"prompt":"a","logprobs":21}', "logprobs"),
    (b'{"prompt":"a","stop":[""]}', "stop"),
    (b'{"prompt":"a","stop":[1]}', "stop[0]"),
    (b'{"prompt":"a","stop_token_ids":[99999]}', "stop_token_ids"),
    (b'{"prompt":"a","logit_bias":{"a":1}}', "logit_bias"),
    (b'{"prompt":"a","logit_bias":{"99999":1}}', "logit_bias"),
    (b'{"prompt":"a","logit_bias":{"1":101}}', "logit_bias"),
    (b'{"prompt":"a","stream_options":{}}', "stream_options"),
    (b'{"prompt":"a","best_of":2}', "best_of"),
    (b'{"prompt":"a","suffix":"b"}', "suffix"),
    (b'{"prompt":"a","store":true}', "store"),
    (b'{"prompt":"a","cache_salt":""}', "cache_salt"),
    (b'{"prompt":"a","priority":99999999999999999999}', "priority"),
    (b'{"prompt":"a","request_id":"a b"}', "request_id"),
    (b'{"prompt":"a","truncate_prompt_tokens":0}', "truncate_prompt_tokens"),
    (b'{"prompt":"a","truncation_side":"left"}', "truncation_side"),
    (b'{"prompt":"\xff"}', "prompt"),
    (b'{"prompt":"\\ud800"}', "prompt"),
    (b'{"prompt":"a\x00b"}', "prompt"),
    (b'{"prompt":"a","user":"\x07"}', "user"),
    (b'{"prompt":"a","model":"other"}', "model"),
    (b'{"prompt":"a","temprature":1}', "temprature"),
    (b'{"prompt":"a","stream_options":{"include":true}}', "stream_options.include"),
    (b'{"prompt":' + b"[" * 100 + b"]" * 100 + b"}", None),
    (b"[" * 200_000, None),
    (b'{"prompt":"a","metadata":' + b'{"a":' * 100 + b"1" + b"}" * 101, None),
]


@pytest.mark.parametrize(("body", "param"), BAD_BODIES)
def test_bad_bodies_name_the_field(server: Server, body: bytes, param: str | None) -> None:
    answer = server.post("/v1/completions", body)
    assert answer.status in (400, 404), answer.body
    error = answer.error
    assert error["param"] == param and error["type"]
    assert param is None or param in error["message"]
    assert not server.bridge.submissions
    assert server.complete().status == 200


def test_an_unknown_field_says_what_was_probably_meant(server: Server) -> None:
    error = server.chat({"max_token": 3}).error
    assert "did you mean max_tokens?" in error["message"]
    assert error["code"] == "unknown_parameter"


def test_unknown_fields_may_be_ignored(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = make_server(options=ServeOptions(unknown_fields="warn"))
    message = {"role": "user", "content": "a", "colour": 1}
    with caplog.at_level(logging.WARNING):
        assert server.chat({"messages": [message], "max_token": 3}).status == 200
    assert "max_token" in caplog.text and "messages[0].colour" in caplog.text
    assert server.chat({"use_beam_search": True}).status == 400


def test_a_long_value_is_not_sent_back_whole(server: Server) -> None:
    answer = server.complete({"stop": ["a"] * 65})
    assert answer.status == 400
    answer = server.complete({"truncation_side": "x" * 100_000})
    assert answer.status == 400 and len(answer.body) < 2000


def test_another_content_type(server: Server) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = server.complete(headers={"content-type": kind})
        assert answer.status == 415 and answer.error["param"] == "content-type"
    assert server.complete(headers={"content-type": "application/json; charset=utf-8"}).json


def test_routes_there_are_not(server: Server) -> None:
    assert server.get("/v1/nothing").status == 404
    assert server.get("/v1/nothing").error["type"] == "not_found_error"
    answer = server.get("/v1/completions")
    assert answer.status == 405 and "POST" in answer.error["message"]
    assert server.get("/v1/models/other").error["code"] == "model_not_found"
    assert server.post("/reset_prefix_cache").status == 404


@pytest.mark.parametrize(
    ("refusal", "status", "code", "retry"),
    [
        (QueueFullError("512 wait", retry_after_s=7), 429, "queue_full", "7"),
        (DrainingError("stopping"), 503, "draining", "1"),
        (EngineDeadError("dead", error_id="e1"), 500, "e1", None),
        (PromptError("prompt of 9 > max_model_len"), 400, "context_length_exceeded", None),
        (ResourceError("too few pages"), 400, "context_length_exceeded", None),
    ],
)
def test_refusals_of_the_engine(
    server: Server, refusal: Exception, status: int, code: str, retry: str | None
) -> None:
    server.bridge.refusal = refusal
    for answer in (server.complete(), server.complete({"stream": True}), server.chat()):
        assert answer.status == status and answer.error["code"] == code
        assert answer.headers.get("retry-after") == retry


def test_a_refused_prompt_takes_its_siblings_along(server: Server) -> None:
    submit = server.bridge.submit

    def second_fails(submission: Any) -> Any:
        if len(server.bridge.submissions) == 1:
            raise QueueFullError("full", retry_after_s=1)
        return submit(submission)

    server.bridge.submit = second_fails  # type: ignore[method-assign]
    assert server.complete({"prompt": ["a", "b", "c"]}).status == 429
    assert [stream.cancelled for stream in server.bridge.streams] == [True]


class TestFaults:
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_fault_of_ours_is_an_id(
        self, server: Server, stream: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        server.bridge.error = RuntimeFault("/secret/path failed")
        with caplog.at_level(logging.ERROR):
            answer = server.chat({"stream": stream})
        assert answer.status == 500 and answer.error["type"] == "server_error"
        assert answer.error["code"] in caplog.text
        assert b"secret" not in answer.body and b"Traceback" not in answer.body

    def test_after_the_stream_began_it_is_an_event(self, server: Server) -> None:
        server.bridge.error, server.bridge.error_at = EngineDeadError("dead", error_id="e1"), 3
        events = server.chat({"stream": True}).events
        assert len(events) == 4 and events[-1]["error"]["code"] == "e1"

    @pytest.mark.parametrize(
        ("reason", "status", "kind"),
        [("timeout", 408, "timeout_error"), ("shutdown", 503, "service_unavailable_error")],
    )
    @pytest.mark.parametrize("held", [0, 2])
    def test_an_early_end(
        self, server: Server, reason: Any, status: int, kind: str, held: int
    ) -> None:
        server.bridge.hold = held

        async def run(stream: bool) -> Any:
            body = {"prompt": "a", "stream": stream}
            task = asyncio.create_task(server.client.post("/v1/completions", body))
            while not server.bridge.streams:
                await asyncio.sleep(0.001)
            server.bridge.streams.pop().end(reason)
            return await task

        answer = asyncio.run(run(False))
        assert answer.status == status and answer.error["type"] == kind
        answer = asyncio.run(run(True))
        if held:
            assert answer.status == 200 and answer.events[-1]["error"]["type"] == kind
        else:
            assert answer.status == status and answer.error["type"] == kind

    def test_health(self, server: Server) -> None:
        assert server.get("/health").status == server.get("/ready").status == 200
        server.bridge.is_ready = False
        assert server.get("/health").status == 200 and server.get("/ready").status == 503
        server.bridge.failure = "e1 RuntimeFault"
        assert server.get("/health").status == 503 and server.get("/ready").status == 503


class TestLeaving:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("held", [0, 2])
    def test_a_client_that_goes_away_ends_its_request(
        self, server: Server, stream: bool, held: int
    ) -> None:
        server.bridge.hold = held

        async def run() -> None:
            leave = asyncio.Event()
            body = {"prompt": ["a", "b"], "stream": stream}
            task = asyncio.create_task(server.client.post("/v1/completions", body, leave=leave))
            await asyncio.sleep(0.05)
            assert not task.done()
            leave.set()
            await asyncio.wait_for(task, 5)

        asyncio.run(run())
        assert [s.cancelled for s in server.bridge.streams] == [True, True]

    def test_a_connection_that_breaks_ends_its_request(self, server: Server) -> None:
        async def run() -> None:
            scope = {
                "type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [
                    (b"content-type", b"application/json")], "query_string": b"", "state": {},
            }  # fmt: skip
            unread = [json.dumps(chat_body(stream=True)).encode()]
            sent = 0

            async def receive() -> Any:
                if unread:
                    return {"type": "http.request", "body": unread.pop(), "more_body": False}
                await asyncio.Event().wait()

            async def send(message: Any) -> None:
                nonlocal sent
                sent += 1
                if sent == 3:
                    raise OSError("connection reset")

            with pytest.raises(OSError, match="reset"):
                await server.app(scope, receive, send)

        asyncio.run(run())
        assert server.bridge.streams[0].cancelled


class TestRequestIds:
    def test_the_client_s_own(self, server: Server) -> None:
        answer = server.chat(headers={"x-request-id": "bench-1"})
        assert answer.headers["x-request-id"] == "bench-1"
        assert answer.json["id"] == "chatcmpl-bench-1"
        # Retried while the first one runs: the engine sees another id.
        server.chat(headers={"x-request-id": "bench-1"})

    def test_in_the_body(self, server: Server) -> None:
        assert server.complete({"request_id": "r1"}).json["id"] == "cmpl-r1"

    def test_errors_have_one_too(self, server: Server) -> None:
        assert server.get("/nothing").headers["x-request-id"]

    @pytest.mark.parametrize("bad", ["a b", "x" * 129, "é"])
    def test_bad_ones(self, server: Server, bad: str) -> None:
        answer = server.chat(headers={"x-request-id": bad})
        assert answer.status == 400 and answer.error["param"] == "x-request-id"
        assert server.get("/health", headers={"x-request-id": bad}).status == 200
