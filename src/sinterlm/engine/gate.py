"""One user of the engine at a time; whoever would wait in vain is told so instead."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sinterlm.errors import UsageError


class Gate:
    """A lock that may be left by another thread than entered it (a dropped generator is collected
    anywhere). It refuses, rather than deadlocks on, a second entry by the same thread, and refuses
    everybody while it is lent, which lasts until the borrower gives back.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._owner: int | None = None  # the thread that is inside
        self._lent = False

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread is inside."""
        return self._owner == threading.get_ident()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Wait for the turn. Raises UsageError when it would never come: the calling thread is
        inside already, or the gate is lent.
        """
        if self.is_mine:
            raise UsageError(
                "this thread is still reading a stream of the same LLM; "
                "read it to its end or close() it first"
            )
        me = threading.get_ident()
        try:  # from before the entry: an interruption can strike between any two lines
            with self._changed:
                self._changed.wait_for(lambda: self._lent or self._owner is None)
                if self._lent:
                    raise UsageError("this LLM is being served; stop its server first")
                self._owner = me
            yield
        finally:
            with self._changed:
                if self._owner == me:
                    self._owner = None
                    self._changed.notify_all()

    def lend(self) -> None:
        """Close the gate for everybody until ``give_back``. Raises UsageError if it is in use."""
        with self._changed:
            if self._lent or self._owner is not None:
                raise UsageError("this LLM is in use; a server needs it for itself")
            self._lent = True
            self._changed.notify_all()

    def give_back(self) -> None:
        """Open the gate again."""
        with self._changed:
            self._lent = False
            self._changed.notify_all()
