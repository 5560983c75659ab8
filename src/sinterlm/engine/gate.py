"""One user of the engine at a time; a thread that would wait for itself is told so instead."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sinterlm.errors import UsageError


class Gate:
    """A lock that may be left by another thread than entered it (a dropped generator is collected
    anywhere), and that refuses, rather than deadlocks on, a second entry by the same thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread is inside."""
        return self._owner == threading.get_ident()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Wait for the turn. Raises UsageError when the calling thread is inside already."""
        if self.is_mine:
            raise UsageError(
                "this thread is still reading a stream of the same LLM; "
                "read it to its end or close() it first"
            )
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None
