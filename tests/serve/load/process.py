"""``sinterlm serve`` as a process of its own: started, watched from outside, stopped, killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Runs the command line after a test's own words, which may break things on purpose.
_START = "from sinterlm.cli import main; import sys; sys.exit(main(sys.argv[1:]))"


@dataclass
class ServerProcess:
    """A running server."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 60.0) -> int:
        """Send a signal and wait; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)

    # -- seen from outside -----------------------------------------------------------------------

    def rss(self) -> int:
        """Resident bytes that are its own (the mapped weights are not)."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        match = re.search(r"^RssAnon:\s+(\d+) kB", text, re.MULTILINE)
        assert match is not None
        return int(match[1]) * 1024

    def threads(self) -> int:
        """Threads of the process."""
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def sockets(self) -> int:
        """Open sockets of the process."""
        count = 0
        for name in os.listdir(f"/proc/{self.pid}/fd"):
            try:
                count += os.readlink(f"/proc/{self.pid}/fd/{name}").startswith("socket:")
            except FileNotFoundError:  # closed meanwhile
                continue
        return count

    # -- asked -----------------------------------------------------------------------------------

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as got:
                return got.status, got.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and the JSON answer to a JSON body."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as got:
                return got.status, json.load(got)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def engine(self) -> dict[str, Any]:
        """EngineStats, by way of the dashboard."""
        status, body = self.get("/ui/stats")
        assert status == 200, body
        return dict(json.loads(body)["engine"])

    def wait_until_idle(self, within_s: float = 30.0) -> dict[str, Any]:
        """Wait until nothing runs, waits, or holds pages; the stats then."""
        deadline = time.monotonic() + within_s
        while True:
            engine = self.engine()
            busy = engine["num_running"], engine["num_waiting"], engine["kv_pages_used"]
            if busy == (0, 0, 0):
                return engine
            assert time.monotonic() < deadline, f"running, waiting, pages are still {busy}"
            time.sleep(0.1)


@contextmanager
def running(
    *flags: str, model: str = "smollm2", port: int = 0, prelude: str = ""
) -> Iterator[ServerProcess]:
    """A server of ``model``, ready. ``prelude`` is Python that its process runs first."""
    with tempfile.TemporaryDirectory(prefix="sinterlm-serve-") as folder:
        log = Path(folder) / "log"
        code = f"{prelude}\n{_START}" if prelude else _START
        command = [sys.executable, "-c", code, "serve", model, "--port", str(port)]
        command += ["--num-threads", "1"]  # the other CPUs are for the clients
        with log.open("w") as errors:
            process = subprocess.Popen(
                [*command, *flags], stdout=subprocess.PIPE, stderr=errors, text=True
            )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            match = re.search(r" at http://[\d.]+:(\d+)", line)
            assert match is not None, f"{line!r}\n{log.read_text()}"
            yield ServerProcess(process, int(match[1]), log)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
