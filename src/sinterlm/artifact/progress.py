"""How long work reports itself: a protocol small enough for a progress bar, a log or nothing."""

from __future__ import annotations

import logging
from typing import Protocol


class Progress(Protocol):
    """Receives stages, amounts and one-line messages, all from the calling thread."""

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        """A stage begins (and the one before it has ended); ``total`` amounts of ``unit``."""
        ...

    def advance(self, amount: int) -> None:
        """``amount`` more of the current stage is done."""
        ...

    def notify(self, message: str) -> None:
        """Something a person should read: what will be written, or what had to be mended."""
        ...


class LogProgress:
    """The default: no bars; messages go to the logger ``sinterlm`` as warnings, so that a program
    which set up no logging still shows them on stderr."""

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        """Stages are logged at debug level."""
        logging.getLogger("sinterlm").debug("%s", name)

    def advance(self, amount: int) -> None:
        """Amounts are not shown."""

    def notify(self, message: str) -> None:
        """Logged as a warning."""
        logging.getLogger("sinterlm").warning("%s", message)
