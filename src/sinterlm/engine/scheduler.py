"""Which tokens run in the next step: continuous batching, chunked prefill, preemption by recompute.

First come, first served. Decodes go first, then prefill chunks, all under one token budget. When
pages run out the request that arrived last gives its pages up and is recomputed later. Pure
Python; decides, never computes. Refuses a request that could not finish even alone.

Why nobody starves: whatever runs arrived before whatever waits, and only a later arrival (or the
request itself, when it is the last) is ever preempted; so the oldest request always keeps its pages
and finishes, and then the next one is the oldest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sinterlm.engine.pages import PagePool
from sinterlm.engine.request import Request, Status
from sinterlm.errors import ResourceError


@dataclass(frozen=True, slots=True)
class Chunk:
    """``num_tokens`` tokens of one request in this step."""

    request: Request
    num_tokens: int
    samples: bool  #: whether it reaches the request's last token, so that a new one is drawn


@dataclass(slots=True)
class Schedule:
    """One step's work, and who lost their pages for it."""

    chunks: list[Chunk] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens over all chunks."""
        return sum(chunk.num_tokens for chunk in self.chunks)


class Scheduler:
    """Owns the waiting and running queues and the page pool."""

    def __init__(self, pool: PagePool, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        assert max_num_seqs >= 1 and max_num_batched_tokens >= 1
        self.pool = pool
        self.max_num_batched_tokens = max_num_batched_tokens
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # in order of arrival
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        """Requests that hold no pages yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold pages."""
        return len(self._running)

    def check_fits(self, num_prompt: int, max_total_tokens: int) -> None:
        """Raise ResourceError, with the numbers, for a request that could not finish even alone."""
        # The last drawn token is never fed back, so it needs no place in the cache.
        needed = self.pool.pages_for(max_total_tokens - 1)
        if needed > self.pool.num_pages:
            have = self.pool.num_pages * self.pool.page_tokens
            raise ResourceError(
                f"a prompt of {num_prompt} tokens with up to {max_total_tokens - num_prompt} new "
                f"ones needs {needed} KV pages, and there are {self.pool.num_pages} "
                f"({have} tokens); lower max_tokens or raise kv_cache_memory_bytes"
            )

    def add(self, request: Request) -> None:
        """Queue a request. Raises ResourceError for one that could never finish."""
        self.check_fits(request.tokens.num_prompt, request.max_total_tokens)
        self._waiting.append(request)

    def schedule(self) -> Schedule:
        """Decide the next step. Empty only when there is nothing to do."""
        planned: dict[Request, int] = {}
        preempted: list[Request] = []
        budget = self._plan_running(planned, preempted)
        if not preempted:
            self._admit(planned, budget)
        chunks = [Chunk(r, n, n == r.num_uncomputed) for r, n in planned.items()]
        return Schedule(chunks, preempted)

    def commit(self, schedule: Schedule, tokens: Sequence[int]) -> list[Request]:
        """Record a step that ran: ``tokens`` are the drawn ones, in the order of sampling chunks.

        Returns the requests that drew, in the same order.
        """
        drew: list[Request] = []
        for chunk in schedule.chunks:
            chunk.request.num_computed += chunk.num_tokens
            if chunk.samples:
                chunk.request.tokens.append(tokens[len(drew)])
                drew.append(chunk.request)
        return drew

    def finish(self, request: Request) -> None:
        """Take a request out, wherever it stands, and free what it holds. Idempotent."""
        if request.status is Status.RUNNING:
            self._running.remove(request)
            self._give_back(request)
        elif request.status is Status.WAITING:
            self._waiting.remove(request)
        request.status = Status.FINISHED

    # -- running requests ------------------------------------------------------------------------

    def _plan_running(self, planned: dict[Request, int], preempted: list[Request]) -> int:
        """Plan what runs already, decodes first; returns the budget left."""
        budget = self.max_num_batched_tokens
        decodes = [r for r in self._running if r.num_uncomputed == 1]
        prefills = [r for r in self._running if r.num_uncomputed > 1]
        for request in decodes + prefills:
            if budget == 0:
                break
            if request.status is not Status.RUNNING:
                continue  # lost its pages to an earlier one in this very step
            num_tokens = min(request.num_uncomputed, budget)
            while not self._grow(request, request.num_computed + num_tokens):
                # Only decodes grow, and they are planned in order of arrival: the last arrival is
                # not planned yet, so there is nothing to take back.
                victim = self._running[-1]
                assert victim not in planned
                self._preempt(victim)
                preempted.append(victim)
                if victim is request:
                    break
            if request.status is Status.RUNNING:
                planned[request] = num_tokens
                budget -= num_tokens
        return budget

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Give the request pages for ``num_tokens`` cached tokens; False when there are too few."""
        missing = self.pool.pages_for(num_tokens) - len(request.pages)
        if missing > 0:
            if not self.pool.can_allocate(missing):
                return False
            request.pages += self.pool.allocate(missing)
        return True

    def _preempt(self, request: Request) -> None:
        """Send a running request back to the head of the queue, its cache dropped."""
        self._running.remove(request)
        self._give_back(request)
        request.num_computed = 0
        request.num_preemptions += 1
        request.status = Status.WAITING
        self._waiting.appendleft(request)  # it arrived before everything that waits
        self.num_preemptions += 1

    def _give_back(self, request: Request) -> None:
        self.pool.release(request.pages)
        self._free_slots.append(request.slot)
        request.pages, request.slot = [], -1

    # -- waiting requests ------------------------------------------------------------------------

    def _admit(self, planned: dict[Request, int], budget: int) -> None:
        """Start waiting requests, in order, while seats, budget and pages last."""
        while self._waiting and self._free_slots and budget > 0:
            request = self._waiting[0]
            # Pages for the whole known sequence at once: a prefill never stalls half-way.
            needed = self.pool.pages_for(request.num_tokens)
            reserve = self._growth_reserve() if request.num_preemptions else 0
            if not self.pool.can_allocate(needed + reserve):
                break
            self._waiting.popleft()
            request.pages = self.pool.allocate(needed)
            request.slot, request.table_filled = self._free_slots.pop(), 0
            request.status = Status.RUNNING
            self._running.append(request)
            planned[request] = min(request.num_uncomputed, budget)
            budget -= planned[request]

    def _growth_reserve(self) -> int:
        """One page for each running request that may still need one.

        New requests are admitted in the hope that others end first. One that was preempted already
        comes back only when the older ones can grow beside it: else it would be recomputed over
        and over. Zero when nothing runs, so that a lone request can take the whole pool.
        """
        return sum(
            self.pool.pages_for(r.max_total_tokens - 1) > len(r.pages) for r in self._running
        )

    def requests(self) -> Iterable[Request]:
        """Everything unfinished, running first."""
        return [*self._running, *self._waiting]
