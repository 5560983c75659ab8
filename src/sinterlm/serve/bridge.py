"""Bridge: one asyncio front, one engine thread. Requests go in, deltas come out, in order.

The engine thread alone touches the engine. What one step drew reaches the event loop in a single
wake-up, however many streams it belongs to. Only monotonic clocks are read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from sinterlm.engine.llm import LLM
from sinterlm.engine.outputs import Delta
from sinterlm.engine.sampling import SamplingParams
from sinterlm.engine.stats import EngineStats

T = TypeVar("T")

#: Why a stream ended early: its reader, its deadline, or the server's shutdown.
AbortReason = Literal["cancel", "timeout", "shutdown"]


@dataclass(frozen=True)
class Submission:
    """One request as the protocol hands it over."""

    request_id: str  #: unique among those in flight
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    prompt: str | None = None  #: only repeated in the output
    priority: int = 0  #: lower runs earlier, as in vLLM
    timeout_s: float | None = None  #: from now; then it ends with finish_reason "abort"
    cache_salt: str | None = None  #: prefix-cache pages are shared only with the same salt


class Stream:
    """What one request gives: ``async for delta in stream``, by one reader on the event loop.

    One delta per drawn token per sequence; the last one carries ``.output``. A reader may be slow
    or never come: at most ``n * max_tokens`` deltas wait for it, and nobody else does.
    Iterating raises EngineDeadError when the engine died under the request.
    """

    request_id: str
    #: Set together with the end of a stream whose finish_reason is "abort".
    abort_reason: AbortReason | None

    def __aiter__(self) -> AsyncIterator[Delta]:
        raise NotImplementedError

    def cancel(self) -> None:
        """End the request: its pages are free after the next step. Idempotent.

        The stream still ends with a delta whose finish_reason is "abort", for a reader that stays.
        """
        raise NotImplementedError


class Bridge:
    """Runs ``llm``'s engine on a thread of its own for the event loop that called ``start``.

    At most ``max_waiting`` requests wait; one more is refused with QueueFullError. While the
    bridge lives, other calls of the LLM that need its engine raise UsageError.
    """

    def __init__(self, llm: LLM, *, max_waiting: int) -> None:
        raise NotImplementedError

    @property
    def is_ready(self) -> bool:
        """Whether a submission would be admitted, the queue aside."""
        raise NotImplementedError

    @property
    def failure(self) -> str | None:
        """Id and type of the exception that ended the engine thread; None while it lives."""
        raise NotImplementedError

    async def start(self) -> None:
        """Take the engine and start its thread. Raises UsageError while the LLM is in use."""
        raise NotImplementedError

    async def stop(self, timeout_s: float) -> None:
        """Admit nothing, finish what was admitted, end the thread and give the engine back.

        What is not done after ``timeout_s`` seconds is aborted. Idempotent; a later call may
        shorten the time.
        """
        raise NotImplementedError

    async def prepare(self, params: SamplingParams) -> None:
        """Compile the grammar of ``params``, if it has one, off the event loop, and keep it.

        ``submit`` then finds it. Raises UsageError as ``submit`` would.
        """
        raise NotImplementedError

    def submit(self, submission: Submission) -> Stream:
        """Queue a request; from the event loop's thread.

        Raises at once, and queues nothing then: PromptError, UsageError, ResourceError for a
        request that could not be served; QueueFullError, DrainingError, EngineDeadError for one
        that cannot be served now.
        """
        raise NotImplementedError

    async def run_idle(self, fn: Callable[[LLM], T]) -> T:
        """Run ``fn`` on the engine thread between two steps; its result or its exception."""
        raise NotImplementedError

    def stats(self) -> EngineStats:
        """A snapshot of the engine, from any thread, also after it died."""
        raise NotImplementedError
