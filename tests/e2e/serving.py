"""``sinterlm serve`` as a process of its own, and the smallest client of it."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.support import command, environment


@dataclass(frozen=True)
class Serving:
    """A server that takes requests at ``url``."""

    url: str
    process: subprocess.Popen[str]

    def open(self, path: str, body: object = None) -> tuple[int, bytes]:
        """One request: POST when there is a body."""
        request = urllib.request.Request(self.url + path)
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("content-type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def ask(self, path: str, body: object = None) -> Any:
        """The JSON of an answer that must be a 200."""
        status, text = self.open(path, body)
        assert status == 200, text
        return json.loads(text)

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a stream, [DONE] aside."""
        status, text = self.open(path, {**body, "stream": True})
        assert status == 200, text
        lines = [line for line in text.decode().split("\n\n") if line]
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]


@contextmanager
def serving(cache: Path, *flags: str, **variables: str) -> Iterator[Serving]:
    """The demo model on a free port; stopped, and its exit code checked, at the end."""
    process = subprocess.Popen(
        command("serve", "smollm2", "--port", "0", "--num-threads", "1", *flags),
        env=environment(cache, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        found = re.search(r"at (http://\S+) ", line)
        assert found, line + process.stderr.read()
        yield Serving(found[1], process)
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
