"""A real ``sinterlm serve`` in a process of its own, on a tiny model."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from tests.conftest import ROOT

MODEL = ROOT / "tests/goldens/models/llama-tied-mha"


@dataclass
class Process:
    """One server."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    def ask(
        self, path: str, body: dict[str, Any] | None = None, key: str | None = None
    ) -> tuple[int, Any]:
        """Status and JSON (or text) of one request."""
        headers = {"content-type": "application/json"}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, _loaded(answer.read())
        except HTTPError as error:
            return error.code, _loaded(error.read())

    def complete(self, max_tokens: int, **fields: Any) -> tuple[int, Any]:
        """Status and body of a completion of exactly ``max_tokens``, when all goes well."""
        body = {"prompt": [5, 6, 7], "max_tokens": max_tokens, "ignore_eos": True, **fields}
        return self.ask("/v1/completions", {"temperature": 0, **body})

    def send(self, number: signal.Signals) -> None:
        """Signal the process."""
        self.process.send_signal(number)

    def wait(self, seconds: float) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        return self.process.wait(seconds)

    def log_lines(self) -> list[dict[str, Any]]:
        """What was logged so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def _loaded(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode()


#: A tiny model and a free port.
WORDS = (
    str(MODEL), "--served-model-name", "tiny", "--port", "0", "--num-threads", "1",
    "--kv-cache-memory-bytes", "16M",
)  # fmt: skip


@contextmanager
def started(folder: Path, *words: str, step_s: float = 0.0, dies_at: int = 0) -> Iterator[Process]:
    """A server that takes requests; killed if it is still there at the end.

    Its engine waits ``step_s`` seconds before each step, and dies at step ``dies_at``.
    """
    log = folder / "log.json"
    driver = [str(ROOT / "tests/serve/driver.py"), str(step_s), str(dies_at)]
    program = driver if step_s or dies_at else ["-m", "sinterlm.cli", "serve"]
    process = subprocess.Popen(
        [sys.executable, *program, *WORDS, "--log-file", str(log), "--log-format", "json", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stderr is not None
        ready = process.stdout.readline()
        found = re.search(r" at (http://127\.0\.0\.1:\d+) ", ready)
        assert found, ready + process.stderr.read()
        yield Process(found[1], process, log)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=30)


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Poll ``condition``; fail when it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
