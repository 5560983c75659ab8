"""The interactive chat on a real (pseudo) terminal: Ctrl-C stops an answer, Ctrl-D leaves."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
import time
from typing import Any


def read_until(fd: int, words: str, seconds: float = 120.0) -> str:
    """What the terminal shows until ``words`` appear in it."""
    text = ""
    end = time.monotonic() + seconds
    while words not in text:
        ready, _, _ = select.select([fd], [], [], max(0.0, end - time.monotonic()))
        assert ready, f"{words!r} did not appear in {text!r}"
        try:
            text += os.read(fd, 4096).decode(errors="replace")
        except OSError:  # the other end has closed
            assert words in text, text
    return text


def test_chat_on_a_terminal(compiled: dict[str, Any]) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "sinterlm.cli", "run", "smollm2", "--chat", "--temperature", "0",
         "--ignore-eos", "--max-tokens", "3000"],
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        env={**os.environ, "TERM": "xterm"},
        # The terminal becomes the new session's own, so that \x03 raises SIGINT as it would.
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)
    try:
        read_until(master, "> ")
        os.write(master, b"Name the planets of the solar system in order.\n")
        read_until(master, "Mercury")
        os.write(master, b"\x03")
        read_until(master, "(stopped)")
        read_until(master, "> ")
        os.write(master, b"/reset\n")
        read_until(master, "(forgotten)")
        read_until(master, "> ")
        os.write(master, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
