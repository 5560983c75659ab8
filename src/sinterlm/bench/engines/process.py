"""A server as a child process: started on a free port, watched, and stopped with all it started.

Its output goes to a file; a server that dies is told with the last lines of it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sinterlm.bench.engines.base import Launch
from sinterlm.bench.ready import fetch, first_model, wait_ready
from sinterlm.errors import RuntimeFault, UsageError

_TAIL_LINES = 20
_STOP_S = 20.0  #: a server has to end by itself before it is killed
_PROBE = "The capital of France is"


class ServerDied(RuntimeFault):
    """The server ended, or never answered; the message holds the end of its log."""


@dataclass
class Server:
    """One that runs."""

    url: str
    model: str
    launch: Launch
    child: subprocess.Popen[bytes] | None  #: None = somebody else's
    log: Path | None
    startup_s: float = 0.0  #: launch to the first useful answer
    answer: str = ""  #: that answer

    def is_alive(self) -> bool:
        """Whether the process has not ended."""
        return self.child is None or self.child.poll() is None

    def reset_prefix_cache(self) -> None:
        """Forget every prompt; a server that answers 501 keeps none. Raises RuntimeFault where it
        refuses."""
        if self.launch.reset_path is None:
            return
        status, said = fetch(self.url + self.launch.reset_path, method="POST", timeout_s=30)
        if status not in (200, 501):
            raise RuntimeFault(
                f"{self.url}{self.launch.reset_path} answered {status}: {said[:200]!r}"
            )

    def peak_memory(self) -> int | None:
        """Bytes of all its processes at their highest, shared pages counted in each; None for
        somebody else's."""
        return None if self.child is None else peak_memory(self.child.pid)

    def log_tail(self) -> str:
        """The end of what it wrote."""
        return "" if self.log is None else tail(self.log)


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def require_free(port: int) -> None:
    """Raises UsageError where something listens on ``port`` already: it would be measured."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as exc:
            raise UsageError(
                f"port {port} is in use ({exc.strerror}); stop what listens there, or leave --port "
                "out"
            ) from exc


@contextmanager
def serving(launch: Launch, port: int, log: Path, timeout_s: float) -> Iterator[Server]:
    """Start ``launch``, wait until it answers a question, and stop it at the end.

    Raises ServerDied with the end of its log, UsageError for a port in use.
    """
    if launch.url is not None:
        name = first_model(launch.url)[0]
        yield Server(launch.url, name, launch, None, None)
        return
    require_free(port)
    url = f"http://127.0.0.1:{port}"
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with open(log, "wb") as output:
        try:
            child = subprocess.Popen(
                launch.command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env={**os.environ, **launch.env}, start_new_session=True,
            )  # fmt: skip
        except OSError as exc:
            raise ServerDied(f"{launch.command[0]} cannot be started: {exc}") from exc
    server = Server(url, launch.model, launch, child, log)
    try:
        _wait_for_answer(server, start, timeout_s)
        yield server
    finally:
        stop(child)


def _wait_for_answer(server: Server, start: float, timeout_s: float) -> None:
    try:
        wait_ready(server.url, timeout_s, server.is_alive)
        server.model = server.model or first_model(server.url)[0]
        body = {"model": server.model, "prompt": _PROBE, "max_tokens": 8, "temperature": 0.0,
                **server.launch.extra_body}  # fmt: skip
        status, said = fetch(server.url + "/v1/completions", method="POST", body=body,
                             timeout_s=timeout_s)  # fmt: skip
        if status != 200:
            raise RuntimeFault(f"its first answer is HTTP {status}: {said[:300]!r}")
        server.answer = first_text(said)
    except (RuntimeFault, OSError) as exc:
        raise ServerDied(f"{exc}\n{server.log_tail()}") from exc
    server.startup_s = time.perf_counter() - start


def first_text(body: bytes) -> str:
    """Text of a completion. Raises RuntimeFault where it holds none."""
    import json

    try:
        return str(json.loads(body)["choices"][0]["text"])
    except (ValueError, KeyError, IndexError, TypeError) as exc:
        raise RuntimeFault(f"its first answer is no completion: {body[:300]!r}") from exc


def stop(child: subprocess.Popen[bytes]) -> None:
    """End a server and every process it left in its session: asked first, then killed, at once
    where a second Ctrl-C interrupts the asking."""
    try:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_STOP_S)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def peak_memory(session: int) -> int:
    """Sum of VmHWM over the processes of a session, in bytes."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text(errors="replace")
            if int(stat.rpartition(")")[2].split()[3]) != session:
                continue
            status = (folder / "status").read_text(errors="replace")
        except (OSError, ValueError, IndexError):
            continue  # ended meanwhile
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                total += int(line.split()[1]) * 1024
    return total


def tail(path: Path) -> str:
    """The last lines of a log."""
    try:
        text = path.read_bytes()[-16384:].decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-_TAIL_LINES:])
