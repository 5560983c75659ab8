"""The interactive chat on a real (pseudo) terminal: Ctrl-C stops an answer, Ctrl-D leaves."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from typing import Any


class Screen:
    """What a terminal shows, read piece by piece; one read may bring more than was waited for."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.unread = ""

    def read_until(self, words: str, seconds: float = 120.0) -> None:
        """Wait for ``words``; what follows them stays unread."""
        end = time.monotonic() + seconds
        while words not in self.unread:
            ready, _, _ = select.select([self.fd], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{words!r} did not appear in {self.unread!r}"
            try:
                self.unread += os.read(self.fd, 4096).decode(errors="replace")
            except OSError:  # the other end has closed
                assert words in self.unread, self.unread
        self.unread = self.unread.partition(words)[2]


def _own_terminal() -> None:
    """The terminal becomes the new session's own, so that \\x03 raises SIGINT; a background shell
    may have left SIGINT ignored."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_chat_on_a_terminal(compiled: dict[str, Any]) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "sinterlm.cli", "run", "smollm2", "--chat", "--temperature", "0",
         "--ignore-eos", "--max-tokens", "3000"],
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        env={**os.environ, "TERM": "xterm"},
        preexec_fn=_own_terminal,
    )  # fmt: skip
    os.close(slave)
    screen = Screen(master)
    try:
        screen.read_until("> ")
        os.write(master, b"Name the planets of the solar system in order.\n")
        screen.read_until("Mercury")
        os.write(master, b"\x03")
        screen.read_until("(stopped)")
        screen.read_until("> ")
        os.write(master, b"/reset\n")
        screen.read_until("(forgotten)")
        screen.read_until("> ")
        os.write(master, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
