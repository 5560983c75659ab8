"""Which tokens run in the next step: continuous batching, chunked prefill, preemption by recompute.

By priority, then first come, first served. Decodes go first, then prefill chunks, then guesses for
decodes, all under one budget of tokens; beside decodes, prefill gets a budget of its own, so that
no decode waits long. Where nobody waits for single tokens, prompts may go first instead: then all
decode together, in fewer steps. When pages run out, or a seat for a request of a better priority,
the last in order gives its pages up and is recomputed later. Pure Python; decides, never computes.
Refuses a request that could not finish even alone.

Why nobody of one priority starves: whatever runs stands, within its priority, before whatever
waits, and only a later one in order (or the request itself, when it is the last) is ever preempted;
so the first in order always keeps its pages and finishes, and then the next one is the first.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from sinterlm.engine.pages import PagePool
from sinterlm.engine.prefix import PrefixCache
from sinterlm.engine.request import Request, Status
from sinterlm.engine.schedule import Chunk, Drawn, Schedule, StepLimits, fit_chunk
from sinterlm.engine.speculation import NgramProposer
from sinterlm.engine.stats import Counters
from sinterlm.errors import ResourceError

_ORDER = attrgetter("order")


@dataclass(slots=True)
class _Plan:
    """A step in the making: what is in it, and how much more it takes."""

    num_tokens: int  #: left
    num_rows: int  #: left
    chunks: dict[Request, Chunk] = field(default_factory=dict)
    preempted: list[Request] = field(default_factory=list)

    @property
    def has_room(self) -> bool:
        """Whether anything can be added."""
        return self.num_tokens > 0 and self.num_rows > 0

    def put(self, chunk: Chunk) -> None:
        """Add the chunk of a request, or put it in the place of its earlier one."""
        self._count(self.chunks.get(chunk.request), 1)
        self.chunks[chunk.request] = chunk
        self._count(chunk, -1)

    def drop(self, request: Request) -> None:
        """Take a request's chunk out, if it has one."""
        self._count(self.chunks.pop(request, None), 1)

    def _count(self, chunk: Chunk | None, sign: int) -> None:
        if chunk is not None:
            self.num_tokens += sign * chunk.num_tokens
            self.num_rows += sign * chunk.num_rows


class Scheduler:
    """Owns the waiting and running queues, the page pool and what can be found in it."""

    def __init__(
        self,
        pool: PagePool,
        limits: StepLimits,
        counters: Counters,
        *,
        prefix_caching: bool = True,
        proposer: NgramProposer | None = None,
    ) -> None:
        assert limits.max_num_seqs >= 1 and limits.max_num_batched_tokens >= 1
        assert limits.max_mixed_prefill_tokens >= 1 and limits.max_sample_rows >= 1
        self.pool = pool
        self.limits = limits
        self._counters = counters
        self._prefix = PrefixCache(pool, counters, enabled=prefix_caching)
        self._proposer = proposer
        self._waiting: list[Request] = []  # both in order
        self._running: list[Request] = []
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))

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
        insort(self._waiting, request, key=_ORDER)

    def schedule(self, *, max_steps: int = 1, prompts_first: bool = False) -> Schedule:
        """Decide the next step. Empty only when there is nothing to do.

        With ``max_steps`` above 1 it may be one that runs on by itself for so many. With
        ``prompts_first`` decodes wait while prompts fill half a step.
        """
        plan = _Plan(self.limits.max_num_batched_tokens, self.limits.max_sample_rows)
        if not prompts_first or not self._prompts_fill(plan.num_tokens // 2):
            self._plan_decodes(plan)
        self._plan_prefills(plan)
        if not plan.chunks:
            self._plan_decodes(plan)  # prompts could not go first: their pages are in use
        self._plan_drafts(plan)
        for request, chunk in plan.chunks.items():
            known = request.num_computed + chunk.num_tokens - chunk.num_drafts
            self._prefix.name_pages(request, known)
        num_steps = self._plan_repeats(plan, max_steps) if max_steps > 1 else 1
        return Schedule(list(plan.chunks.values()), plan.preempted, num_steps)

    def commit(self, schedule: Schedule, tokens: Sequence[int]) -> list[Drawn]:
        """Record a step that ran: ``tokens`` has one entry for each row of its chunks, in order.

        Returns who drew what; the caller appends it, as far as the sequence goes on.
        """
        drew: list[Drawn] = []
        row = 0
        for chunk in schedule.chunks:
            request = chunk.request
            request.num_computed += chunk.num_tokens - chunk.num_drafts
            row += len(chunk.scored)
            if chunk.samples:
                right = self._count_right(chunk, tokens[row : row + chunk.num_drafts])
                request.num_computed += right
                drew.append(Drawn(request, row, list(tokens[row : row + 1 + right])))
                row += chunk.num_drawn
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

    def _plan_decodes(self, plan: _Plan) -> None:
        """One token for everything that decodes, in order; makes room for those that grow."""
        for request in [r for r in self._running if r.num_uncomputed == 1]:
            if not plan.has_room:
                break
            if request.status is not Status.RUNNING:
                continue  # lost its pages to an earlier one in this very step
            while not self._grow(request, request.num_tokens):
                # Only decodes grow, and they are planned in order: the last is not planned yet.
                victim = self._running[-1]
                assert victim not in plan.chunks
                self._preempt(victim, plan)
                if victim is request:
                    break
            if request.status is Status.RUNNING:
                plan.put(Chunk(request, 1, samples=True))

    def _plan_drafts(self, plan: _Plan) -> None:
        """Guesses for decodes, from budget and pages that nobody else wants."""
        if self._proposer is None:
            return
        for request, chunk in list(plan.chunks.items()):
            if chunk.num_tokens > 1 or not chunk.samples or not request.can_draft:
                continue
            room = request.max_total_tokens - request.num_tokens - 1
            most = min(plan.num_tokens, plan.num_rows, room)
            drafts = self._proposer.propose(request.tokens.known, most)
            if len(drafts) and self._grow(request, request.num_tokens + len(drafts)):
                request.tokens.stage(drafts)
                plan.put(Chunk(request, 1 + len(drafts), samples=True, num_drafts=len(drafts)))

    def _plan_repeats(self, plan: _Plan, max_steps: int) -> int:
        """How many steps may run before anything but a stop token needs a decision: until the first
        sequence is full, as far as pages reach, if nothing waits and all that runs decodes."""
        if self._proposer or self._waiting or len(plan.chunks) < len(self._running):
            return 1
        if any(c.num_tokens > 1 or c.num_rows != 1 for c in plan.chunks.values()):
            return 1
        steps = max_steps
        for request in plan.chunks:
            if not request.can_repeat:
                return 1
            steps = min(steps, request.max_total_tokens - request.num_tokens)
            while steps > 1 and not self._grow(request, request.num_tokens + steps - 1):
                steps -= 1
        return steps

    def _count_right(self, chunk: Chunk, drawn: Sequence[int]) -> int:
        """How many of a chunk's guesses, from the first on, are what was drawn in their place."""
        start = chunk.request.num_tokens
        guesses = chunk.request.tokens.slice(start, start + chunk.num_drafts).tolist()
        right = 0
        while right < len(guesses) and guesses[right] == drawn[right]:
            right += 1
        self._counters.draft_tokens += len(guesses)
        self._counters.accepted_tokens += right
        return right

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Give the request pages for ``num_tokens`` cached tokens; False when there are too few."""
        missing = self.pool.pages_for(num_tokens) - len(request.pages)
        if missing > 0:
            if not self.pool.can_allocate(missing):
                return False
            request.pages += self.pool.allocate(missing)
        return True

    def _preempt(self, request: Request, plan: _Plan) -> None:
        """Send a running request back to its place in the queue, its pages given back."""
        plan.drop(request)
        plan.preempted.append(request)
        self._running.remove(request)
        self._give_back(request)
        request.num_preemptions += 1
        request.status = Status.WAITING
        insort(self._waiting, request, key=_ORDER)
        self._counters.preemptions += 1

    def _give_back(self, request: Request) -> None:
        # The last tokens may have filled a page since pages were last named.
        self._prefix.name_pages(request, min(request.num_computed, request.num_tokens))
        self.pool.release(request.pages)
        self._free_slots.append(request.slot)
        request.pages, request.slot = [], -1
        request.num_computed = request.num_named = 0

    # -- prefills --------------------------------------------------------------------------------

    def _prompts_fill(self, num_tokens: int) -> bool:
        """Whether prompts that run, or have seats and pages to start, are so many tokens."""
        due = sum(r.num_uncomputed for r in self._running if r.num_uncomputed > 1)
        pages = self.pool.num_free
        for request in self._waiting[: len(self._free_slots)]:
            pages -= self.pool.pages_for(request.num_tokens)
            if due >= num_tokens or pages < 0:
                break
            due += request.num_uncomputed
        return due >= num_tokens

    def _plan_prefills(self, plan: _Plan) -> None:
        """Chunks of prompts, running and waiting, in order.

        A prompt that does not fit leaves a quarter of the room to those behind it: short prompts
        need not wait for a long one, which takes at most 4/3 as long. What they leave it gets back.
        """
        prompts = (r for r in self._running if r.num_uncomputed > 1)  # and no decode that waits
        running = deque(r for r in prompts if r not in plan.chunks)
        most = self.limits.max_num_batched_tokens
        left = self.limits.max_mixed_prefill_tokens if plan.chunks else most
        may_start = not plan.preempted  # else pages are short, and belong to those who run
        planned = []
        while left > 0 and (plan.has_room or (may_start and self._is_outranked())):
            if may_start and self._goes_first(running):
                request = self._waiting[0]
                if request in plan.preempted or not self._start(request, plan):
                    may_start = False
                    continue
            elif running:
                request = running.popleft()
                if request.status is not Status.RUNNING:
                    continue  # lost its seat to one of a better priority
                self._catch_up(request)
            else:
                break
            others = bool(running) or (may_start and bool(self._waiting))
            chunk = _prefill_chunk(request, min(left, plan.num_tokens), plan.num_rows, others)
            if chunk is not None:
                left -= self._put_prefill(chunk, plan)
                planned.append(request)
        for request in planned:
            chunk, room = plan.chunks[request], min(left, plan.num_tokens)
            if room > 0 and chunk.num_tokens < request.num_uncomputed:
                more = fit_chunk(request, chunk.num_tokens + room, plan.num_rows + chunk.num_rows)
                assert more is not None
                left -= self._put_prefill(more, plan) - chunk.num_tokens

    def _put_prefill(self, chunk: Chunk, plan: _Plan) -> int:
        """Plan a chunk, and let those behind find its pages; the number of its tokens."""
        plan.put(chunk)
        self._prefix.name_pages(chunk.request, chunk.request.num_computed + chunk.num_tokens)
        return chunk.num_tokens

    def _goes_first(self, running: Sequence[Request]) -> bool:
        """Whether the first that waits stands before the running prefills."""
        if not self._waiting:
            return False
        return not running or self._waiting[0].order < running[0].order

    def _is_outranked(self) -> bool:
        """Whether something runs that has to give way to the first that waits."""
        if not self._waiting or not self._running:
            return False
        return self._waiting[0].group.priority < self._running[-1].group.priority

    def _start(self, request: Request, plan: _Plan) -> bool:
        """Give the first waiting request a seat and pages for all its known tokens at once, so that
        a prefill never stalls half-way; False when it has to wait."""
        found = self._prefix.find(request)
        victims = self._victims(request, found)
        if victims is None:
            return False
        for victim in victims:
            self._preempt(victim, plan)
        self._waiting.remove(request)
        request.slot, request.table_filled = self._free_slots.pop(), 0
        if request.num_preemptions == 0:
            self._prefix.count(request)
        self._prefix.adopt(request, found)
        request.pages += self.pool.allocate(self.pool.pages_for(request.num_tokens) - len(found))
        request.status = Status.RUNNING
        insort(self._running, request, key=_ORDER)
        return True

    def _catch_up(self, request: Request) -> None:
        """Take over what another prefill of the same beginning computed meanwhile."""
        found = self._prefix.find(request)
        if found:
            self._prefix.adopt(request, found)

    def _victims(self, request: Request, found: list[int]) -> list[Request] | None:
        """Who must give way so that ``request`` can start: of worse priorities, the last in order
        first, and no more than needed. None when even that would not do."""
        needed = self.pool.pages_for(request.num_tokens) - len(found)
        if request.num_preemptions:
            needed += self._growth_reserve(request)
        victims: list[Request] = []
        lost: Counter[int] = Counter()  # references per page that the victims give back
        for victim in [None, *reversed(self._running)]:
            if victim is not None:
                if victim.group.priority <= request.group.priority:
                    return None
                victims.append(victim)
                lost.update(victim.pages)
            freed = sum(self.pool.ref_count(page) == refs for page, refs in lost.items())
            revived = sum(self.pool.ref_count(page) == lost[page] for page in found)
            seats = len(self._free_slots) + len(victims)
            if seats > 0 and needed + revived <= self.pool.num_free + freed:
                return victims
        return None

    def _growth_reserve(self, request: Request) -> int:
        """One page for each running request before ``request`` that may still need one.

        New requests are admitted in the hope that others end first. One that was preempted already
        comes back only when those before it can grow beside it: else it would be recomputed over
        and over. Zero when none runs, so that a lone request can take the whole pool.
        """
        return sum(
            self.pool.pages_for(r.max_total_tokens - 1) > len(r.pages)
            for r in self._running
            if r.order < request.order
        )


def _prefill_chunk(request: Request, num_tokens: int, num_rows: int, others: bool) -> Chunk | None:
    """The next chunk of a prompt: all of the room, or three quarters if it is not done then and
    there are others."""
    chunk = fit_chunk(request, num_tokens, num_rows)
    if chunk is None or chunk.samples or not others:
        return chunk
    return fit_chunk(request, num_tokens - num_tokens // 4, num_rows - num_rows // 4)
