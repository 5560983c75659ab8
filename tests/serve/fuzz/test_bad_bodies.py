"""A thousand bad bodies: each gets a 4xx that names the field, and the server goes on as before."""

from __future__ import annotations

import collections
import json
import urllib.error
import urllib.request

import pytest

from tests.serve.fuzz.bad_bodies import CATEGORIES, BadBody, bad_bodies
from tests.serve.load.process import ServerProcess, running

pytestmark = pytest.mark.slow

COUNT = 1000
CANARY = {"prompt": "The capital of France is", "max_tokens": 6, "temperature": 0,
          "return_token_ids": True}  # fmt: skip


def send(server: ServerProcess, bad: BadBody) -> tuple[int, bytes]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}{bad.path}",
        bad.body,
        {"content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as got:
            return got.status, got.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def fault_of(bad: BadBody, status: int, answer: bytes) -> str | None:
    """What is wrong with an answer to ``bad``; None = it is as it should be."""
    if not 400 <= status < 500:
        return f"status {status}: {answer[:200]!r}"
    error = json.loads(answer)["error"]
    said = f"{error['param']} {error['message']}"
    if not error["message"]:
        return "no message"
    if bad.field is not None and bad.field not in said:
        return f"does not name {bad.field}: {said}"
    if any(word in said for word in ("Traceback", "/src/", ".py")):
        return f"tells too much: {said}"
    return None


def test_a_thousand_bad_bodies() -> None:
    with running("--max-model-len", "1024", "--log-level", "error") as server:
        before = server.post("/v1/completions", CANARY)[1]["choices"][0]["token_ids"]
        faults, seen = [], collections.Counter[str]()
        for number, bad in enumerate(bad_bodies(COUNT)):
            seen[bad.category] += 1
            fault = fault_of(bad, *send(server, bad))
            if fault is not None:
                faults.append(f"{bad}\n  {fault}")
            if number % 100 == 99:
                after = server.post("/v1/completions", CANARY)[1]["choices"][0]["token_ids"]
                assert after == before, f"after {bad}"
        assert not faults, f"{len(faults)} of {COUNT}:\n" + "\n".join(faults[:40])
        assert len(seen) == len(CATEGORIES)
        assert server.wait_until_idle()["requests_finished"]["error"] == 0
        assert server.stop() == 0
