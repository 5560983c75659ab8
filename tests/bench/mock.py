"""The stand-in server of ``scripts/mock_openai.py``, as a process of its own."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from scripts.mock_openai import Plan

from sinterlm.bench.ready import fetch
from tests.conftest import ROOT


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass(frozen=True)
class Mock:
    url: str

    def script(self, plans: Sequence[Plan]) -> None:
        """What the next requests get."""
        assert fetch(self.url + "/script", method="POST", body=[asdict(p) for p in plans])[0] == 200

    def sent(self) -> dict[str, Any]:
        """Times of what it sent, and bodies of what it was sent, by request id."""
        return dict(json.loads(fetch(self.url + "/sent")[1]))


@contextmanager
def running_mock() -> Iterator[Mock]:
    port = free_port()
    command = [sys.executable, str(ROOT / "scripts/mock_openai.py"), "--port", str(port)]
    mock = Mock(f"http://127.0.0.1:{port}")
    with subprocess.Popen(command) as child:
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    fetch(mock.url + "/health")
                    break
                except OSError:
                    assert time.monotonic() < deadline and child.poll() is None
                    time.sleep(0.05)
            yield mock
        finally:
            child.terminate()
