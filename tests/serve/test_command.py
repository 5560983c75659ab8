"""``sinterlm serve`` as people run it: what it refuses, says, logs, and how it ends."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from sinterlm.cli import main
from tests.serve.process import WORDS, Process, started, wait_until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with started(tmp_path_factory.mktemp("serve")) as process:
        yield process


def later(process: Process, max_tokens: int) -> tuple[threading.Thread, list[tuple[int, Any]]]:
    """A completion under way in a thread, and where its answer will be."""
    answers: list[tuple[int, Any]] = []

    def complete() -> None:
        with suppress(OSError):  # the server may be told to end without an answer
            answers.append(process.complete(max_tokens))

    thread = threading.Thread(target=complete)
    thread.start()
    return thread, answers


def running(process: Process) -> float:
    """Requests that the engine works on."""
    lines = process.ask("/metrics")[1].splitlines()
    (line,) = [line for line in lines if line.startswith("vllm:num_requests_running{")]
    return float(line.split()[-1])


def open_stream(process: Process) -> socket.socket:
    """A streamed completion that has begun."""
    host, port = process.url.removeprefix("http://").split(":")
    body = b'{"prompt": [5, 6, 7], "max_tokens": 200, "ignore_eos": true, "stream": true}'
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % len(body) + body
    )
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    return connection


def test_it_answers(server: Process) -> None:
    status, answer = server.complete(8)
    assert status == 200
    assert answer["model"] == "tiny"
    assert answer["usage"]["completion_tokens"] == 8
    assert server.complete(8)[1]["choices"] == answer["choices"]
    for path in ("/health", "/ready", "/version", "/v1/models", "/", "/openapi.json"):
        assert server.ask(path)[0] == 200, path


def test_a_request_is_one_line_of_the_log(server: Process) -> None:
    before = len(server.log_lines())
    server.complete(8)
    wait_until(lambda: len(server.log_lines()) > before)
    (line,) = server.log_lines()[before:]
    assert (line["route"], line["status"], line["model"]) == ("/v1/completions", 200, "tiny")
    assert (line["prompt_tokens"], line["output_tokens"]) == (3, 8)
    assert line["finish_reason"] == "length"
    assert 0 < line["ttft_s"] <= line["duration_s"]
    assert "prompts" not in line


def test_what_it_did_is_in_the_metrics(server: Process) -> None:
    server.complete(8)
    text = server.ask("/metrics")[1]
    for name in (
        "vllm:time_to_first_token_seconds_count", "vllm:inter_token_latency_seconds_count",
        "vllm:generation_tokens_total", 'vllm:request_success_total{engine="0",finished_reason',
        "vllm:cache_config_info", "sinterlm:engine_steps_total", "process_resident_memory_bytes",
    ):  # fmt: skip
        assert name in text, name


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b"{}", "application/json", 400),
        (b'{"prompt": "a"}', "text/plain", 415),
        (b"prompt=a", "application/x-www-form-urlencoded", 415),
        (b"--x\r\n\r\n--x--", "multipart/form-data; boundary=x", 415),
        (b'{"prompt": "\xff"}', "application/json", 400),
        (b'{"prompt": NaN}', "application/json", 400),
        (b'{"prompt": "' + b"a" * (10 << 20) + b'"}', "application/json", 400),
        (b'{"prompt": [' + b"5," * (5 << 20) + b"5]}", "application/json", 400),
        (b"[" * (10 << 20), "application/json", 400),
        (b" " * (17 << 20), "application/json", 413),
    ],
    ids=lambda value: str(value)[:24],
)
def test_bad_bodies_get_an_error_and_the_next_request_its_tokens(
    server: Process, body: bytes, kind: str, status: int
) -> None:
    before = server.complete(8)[1]["choices"]
    host, port = server.url.removeprefix("http://").split(":")
    connection = HTTPConnection(host, int(port), timeout=60)
    connection.request("POST", "/v1/completions", body, {"content-type": kind})
    answer = connection.getresponse()
    assert answer.status == status
    assert set(json.loads(answer.read())["error"]) == {"message", "type", "param", "code"}
    connection.close()
    assert server.complete(8)[1]["choices"] == before


def test_keys_strangers_and_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SINTERLM_API_KEY", "third")
    with started(tmp_path, "--api-key", "first", "--api-key", "second") as process:
        assert process.ask("/v1/models")[0] == 401
        for key in ("first", "second", "third"):
            assert process.ask("/v1/models", key=key)[0] == 200
        assert process.ask("/metrics")[0] == process.ask("/")[0] == 401
        assert process.ask("/health")[0] == 200
        process.send(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.process.stderr is not None
        assert process.process.stderr.read() == ""


def test_a_client_that_leaves_then_a_drain(tmp_path: Path) -> None:
    """A dropped stream frees its pages; SIGTERM finishes what runs and refuses what comes."""
    with started(tmp_path, "--host", "0.0.0.0", step_s=0.02) as process:
        open_stream(process).close()
        wait_until(lambda: running(process) == 0)
        wait_until(lambda: len(process.log_lines()) > 0)
        line = process.log_lines()[-1]
        assert line["client_gone"] is True
        assert 0 < line["output_tokens"] < 200

        thread, answers = later(process, 100)
        wait_until(lambda: running(process) == 1)
        process.send(signal.SIGTERM)
        wait_until(lambda: process.ask("/ready")[0] == 503)
        assert process.ask("/health")[0] == 200
        status, body = process.complete(4)
        assert (status, body["error"]["code"]) == (503, "draining")
        thread.join(60)
        status, body = answers[0]
        assert (status, body["usage"]["completion_tokens"]) == (200, 100)
        assert process.wait(20) == 0
        assert process.process.stderr is not None
        assert "there is no --api-key" in process.process.stderr.read()
    assert process.log_lines()[-1]["message"] == "stopped"


def test_what_is_not_done_in_time_is_told_so(tmp_path: Path) -> None:
    with started(tmp_path, "--shutdown-timeout", "0.5", step_s=0.1) as process:
        thread, answers = later(process, 200)
        wait_until(lambda: running(process) == 1)
        start = time.monotonic()
        process.send(signal.SIGTERM)
        assert process.wait(20) == 0
        assert time.monotonic() - start < 5
        thread.join(10)
        assert answers[0][0] == 503


def test_a_second_signal_aborts(tmp_path: Path) -> None:
    with started(tmp_path, "--shutdown-timeout", "600", step_s=0.1) as process:
        thread, _ = later(process, 200)
        wait_until(lambda: running(process) == 1)
        process.send(signal.SIGTERM)
        wait_until(lambda: process.ask("/ready")[0] == 503)
        process.send(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM
        thread.join(10)
        assert not thread.is_alive()


def test_an_engine_that_hangs_does_not_outlive_a_second_signal(tmp_path: Path) -> None:
    with started(tmp_path, step_s=60) as process:
        thread, _ = later(process, 200)
        time.sleep(0.5)
        process.send(signal.SIGTERM)
        wait_until(lambda: process.ask("/ready")[0] == 503)
        process.send(signal.SIGINT)
        assert process.wait(10) == 128 + signal.SIGINT
        thread.join(10)
        assert not thread.is_alive()


def test_an_engine_that_dies_takes_the_server_with_it(tmp_path: Path) -> None:
    """Every client is told, health turns red, and the supervisor sees a failure."""
    with started(tmp_path, dies_at=50) as process:
        status, body = process.complete(200)
        assert status == 500
        error = body["error"]
        assert error["code"] in error["message"]
        assert "secret" not in str(body)
        assert process.ask("/health")[0] == process.ask("/ready")[0] == 503
        assert process.complete(4)[0] == 500
        assert process.wait(20) == 70
    log = process.log.read_text()
    assert error["code"] in log and "/secret/path" in log


# -- what it refuses -----------------------------------------------------------------------------


def refusal(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a server that does not start says; it exits with 2."""
    try:
        code: object = main(["serve", *WORDS, *words])
    except SystemExit as exc:
        code = exc.code
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    return said.err


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = refusal(["--port", str(port)], capsys)
    assert f"cannot listen on 127.0.0.1 port {port}: another program does" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "203.0.113.7"], "cannot listen on 203.0.113.7"),
        (["--port", "65536"], "port=65536 must be an integer between 0 and 65535"),
        (["--ssl-keyfile", "/no/key.pem"], "ssl_keyfile needs ssl_certfile"),
        (["--ssl-certfile", "/no/cert.pem"], "ssl_certfile='/no/cert.pem' cannot be read"),
        (["--chat-template", "/no/t.jinja"], "chat_template='/no/t.jinja' cannot be read"),
        (["--log-file", "/no/folder/log"], "log_file='/no/folder/log' cannot be written"),
        (["--tool-call-parser", "pythonic"], "tool_call_parser='pythonic' is none of auto"),
        (["--api-key", ""], "api_key must be printable ASCII"),
        (["--max-waiting", "-1"], "max_waiting=-1 must be an integer"),
        (["--request-timeout", "0"], "request_timeout=0.0 must be"),
        (["--max-num-seqs", "0"], "max_num_seqs=0 must be an integer"),
        (["--code-only"], "--code-only leaves nothing to serve"),
        (["--apikey", "x"], "did you mean --api-key?"),
        (["--enable-auto-tool-choice"], "enable_auto_tool_choice needs a parser"),
    ],
)
def test_what_it_refuses(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(words, capsys)
