"""The exception tree. Every message says what, which value, and the next command.

SinterError
├── UsageError            bad flag, field or value given by the user      (exit 2, HTTP 400)
│   └── PromptError       a prompt the model cannot take
├── CheckpointError       a checkpoint that is missing, damaged or hostile (exit 2)
│   └── UnsupportedModelError   readable, but of a kind we do not compile
├── CompileError          the compiler is missing or failed               (exit 2)
├── BundleError           a bundle or cache entry that cannot be used     (exit 2)
├── ResourceError         memory, disk or KV space that does not suffice  (exit 2, HTTP 400)
├── RuntimeFault          the native library reported a fault             (exit 2, HTTP 500)
└── ServingError          a server that cannot take or finish a request now
    ├── QueueFullError    too many requests wait already                  (HTTP 429, Retry-After)
    ├── DrainingError     the server is stopping and admits nothing       (HTTP 503)
    └── EngineDeadError   the engine thread ended with an exception       (HTTP 500)
"""

from __future__ import annotations


class SinterError(Exception):
    """Root of everything SinterLM raises on purpose; the CLI prints it and exits with 2."""


class UsageError(SinterError):
    """A flag, field or value the user gave is wrong; the message names it."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field  #: its name alone, where one field is to blame


class PromptError(UsageError):
    """A prompt that is empty, too long, or holds a token id outside the vocabulary."""


class CheckpointError(SinterError):
    """A checkpoint is missing, truncated, inconsistent or hostile; the message names the file."""


class UnsupportedModelError(CheckpointError):
    """A checkpoint we can read but do not compile; the message lists what is supported."""


class CompileError(SinterError):
    """No usable compiler, or it failed; carries the compiler's own message, shortened."""


class BundleError(SinterError):
    """A bundle or cache entry is corrupt, unsafe to load, or built for another machine."""


class ResourceError(SinterError):
    """Memory, disk or KV space does not suffice; says how much is needed and how to get it."""


class RuntimeFault(SinterError):
    """The native library reported an error from a call; carries ``sl_last_error()``."""


class ServingError(SinterError):
    """The request is fine, but this server cannot take it now, or could not finish it."""


class QueueFullError(ServingError):
    """The waiting queue is full; ``retry_after_s`` is when a place is likely free."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s  #: whole seconds, at least 1, as Retry-After wants them


class DrainingError(ServingError):
    """The server is stopping: what runs is finished, and nothing is admitted."""


class EngineDeadError(ServingError):
    """The engine thread ended with an exception; the log has it under ``error_id``."""

    def __init__(self, message: str, *, error_id: str) -> None:
        super().__init__(message)
        self.error_id = error_id  #: what the client is shown and the log line carries
