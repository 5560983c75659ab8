"""Engine: the loop that turns requests into tokens. schedule -> batch -> model.step -> commit.

Not thread-safe; its owner serialises calls. Knows nothing of files, HTTP or compiling.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

from sinterlm.engine.admission import Limits, constrain, make_group
from sinterlm.engine.batching import BatchBuilder, logits_batch
from sinterlm.engine.booking import (
    Ending,
    book_logprobs,
    book_prompt_logprobs,
    book_token,
    completion,
)
from sinterlm.engine.constraints import Grammars
from sinterlm.engine.deadlines import Deadlines
from sinterlm.engine.outputs import Delta, RequestOutput, TokenLogprobs
from sinterlm.engine.pages import PagePool
from sinterlm.engine.request import Request, RequestGroup
from sinterlm.engine.sampling import SamplingParams
from sinterlm.engine.schedule import Chunk, Schedule, StepLimits
from sinterlm.engine.scheduler import Scheduler
from sinterlm.engine.speculation import NgramProposer
from sinterlm.engine.stats import Counters, EngineStats
from sinterlm.engine.tokenizer import Tokenizer
from sinterlm.errors import UsageError
from sinterlm.runtime.batch import Float32, Int32, StepBatch, StepResult

#: Seconds. CPython hands the GIL over only every 5 ms by default: a thread that tokenises or serves
#: HTTP would hold up the return from a native step, itself a few milliseconds long, by that much.
GIL_SWITCH_INTERVAL = 0.0002


class StepModel(Protocol):
    """What the engine needs of a model; ``runtime.model.Model`` is one."""

    def step(self, batch: StepBatch) -> StepResult:
        """Run one step."""
        ...

    def decode(self, batch: StepBatch, num_steps: int) -> list[StepResult]:
        """Run up to so many steps, each on what the one before drew."""
        ...


class Engine:
    """Runs requests on a model whose KV cache has ``num_pages`` pages of ``page_tokens`` tokens.

    ``proposer`` guesses tokens that the model then checks; None = no speculation.
    """

    def __init__(
        self,
        model: StepModel,
        tokenizer: Tokenizer,
        limits: Limits,
        step_limits: StepLimits,
        *,
        num_pages: int,
        page_tokens: int,
        prefix_caching: bool = True,
        proposer: NgramProposer | None = None,
        seed: int = 0,
    ) -> None:
        self.limits = limits
        self.step_limits = step_limits
        self.tokenizer = tokenizer
        self.grammars = Grammars(tokenizer, limits.vocab_size)
        self._model = model
        self._num_pages, self._page_tokens = num_pages, page_tokens
        self._prefix_caching, self._proposer = prefix_caching, proposer
        self._seed = seed
        self._num_requests = 0  # ever submitted: arrival order, and a seed for those without one
        self._builder = BatchBuilder(step_limits, -(-limits.max_model_len // page_tokens))
        self._groups: dict[str, RequestGroup] = {}
        self._deadlines = Deadlines()
        self._counters = Counters()
        self.last_step_seconds = 0.0  # of the model, one step of the last call; 0 before the first
        self.scheduler = self._new_scheduler()
        self._found_interval = sys.getswitchinterval()

    @property
    def has_unfinished(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._groups)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Iterable[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        stream: bool = False,
        priority: int = 0,
        deadline: float | None = None,
        cache_salt: str | None = None,
    ) -> None:
        """Queue a request of ``params.n`` sequences.

        ``stream`` makes deltas carry text as it appears; without it text may come only at the
        end, which costs less. A lower ``priority`` runs earlier. ``deadline`` is a time of
        ``time.perf_counter``: past it the request ends with finish_reason "abort" and stop_reason
        "deadline". Only requests of the same ``cache_salt`` share cached pages. Raises PromptError,
        UsageError or ResourceError, and queues nothing then, for a request that could not be
        served.
        """
        self.admit(
            self.make_request(
                request_id,
                prompt_token_ids,
                params,
                prompt=prompt,
                stream=stream,
                priority=priority,
                deadline=deadline,
                cache_salt=cache_salt,
            )
        )

    def make_request(
        self,
        request_id: str,
        prompt_token_ids: Iterable[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        stream: bool = False,
        priority: int = 0,
        deadline: float | None = None,
        cache_salt: str | None = None,
    ) -> RequestGroup:
        """The request of ``add_request``, checked but not queued yet.

        Touches nothing that a step does, so that one other thread may make requests while the
        engine's own steps; arrival, and with it the order and the default seed, is counted here.
        """
        group = make_group(
            request_id,
            prompt,
            prompt_token_ids,
            params,
            limits=self.limits,
            tokenizer=self.tokenizer,
            engine_seed=self._seed,
            first_arrival=self._num_requests,
            stream=stream,
            priority=priority,
            deadline=deadline,
            cache_salt=cache_salt,
        )
        first = group.requests[0]
        self.scheduler.check_fits(first.tokens.num_prompt, first.max_total_tokens)
        constrain(group, self.grammars)
        self._num_requests += len(group.requests)
        return group

    def admit(self, group: RequestGroup) -> None:
        """Queue a request that ``make_request`` made. Raises UsageError for an id in use."""
        if group.request_id in self._groups:
            raise UsageError(f"request_id={group.request_id!r} is already running")
        self._groups[group.request_id] = group
        self._deadlines.add(group)
        self._counters.prompt_tokens += group.requests[0].tokens.num_prompt
        for request in group.requests:
            self.scheduler.add(request)

    def step(
        self,
        *,
        max_steps: int = 1,
        prompts_first: bool = False,
        launching: Callable[[], None] | None = None,
    ) -> list[Delta]:
        """Run one step of everything that fits in it; what it drew, one delta for each token.

        Up to ``max_steps`` of them, where nobody can tell the difference but by the clock: what is
        added, aborted or past its deadline meanwhile waits for them all. ``prompts_first`` is for
        callers who wait for whole answers: nothing decodes while prompts fill half a step.
        First, whatever is past its deadline ends; with a delta too, which has no token. After an
        exception only ``reset`` may follow: pages were promised what was not computed.
        ``launching`` is called last before the model runs: whom it wakes has the interpreter to
        himself for as long as that takes.
        """
        self._lower_switch_interval()
        now = time.perf_counter()
        deltas = self._expire(now)
        schedule = self.scheduler.schedule(max_steps=max_steps, prompts_first=prompts_first)
        for chunk in schedule.chunks:
            chunk.request.group.begin(now)
        if schedule.chunks:
            for result in self._run(schedule, launching):
                deltas += self._commit(schedule, result)
        return deltas

    def abort(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        """End requests early, freeing their pages at once; what they have so far. Unknown and
        finished ids are ignored."""
        outputs = []
        for request_id in request_ids:
            group = self._groups.get(request_id)
            if group is not None:
                for request in group.requests:
                    if request.finish_reason is None:
                        self._finish(request, Ending("abort"))
                outputs.append(self._close_group(group, time.perf_counter()))
        return outputs

    def reset(self) -> None:
        """Drop everything and free every page; for use after an interruption at any point."""
        unfinished = [r for g in self._groups.values() for r in g.requests if not r.finish_reason]
        self._counters.finished["error"] += len(unfinished)
        self._groups.clear()
        self._deadlines.clear()
        self.scheduler = self._new_scheduler()

    def reset_prefix_cache(self) -> None:
        """Forget what is in every page; running requests keep theirs and go on."""
        self.scheduler.pool.forget()

    def wrap_model(self, wrap: Callable[[StepModel], StepModel]) -> None:
        """Run what follows through ``wrap(model)``; for whoever wants to see the steps."""
        self._model = wrap(self._model)

    def stats(self) -> EngineStats:
        """A snapshot, from any thread; ``ops`` is left to whoever can ask the model."""
        counters, scheduler = self._counters, self.scheduler
        pool = scheduler.pool
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_preemptions=counters.preemptions,
            kv_pages_total=pool.num_pages,
            kv_pages_used=pool.num_pages - pool.num_free,
            kv_pages_cached=pool.num_cached,
            prefix_cache_queries=counters.prefix_queries,
            prefix_cache_hits=counters.prefix_hits,
            prompt_tokens_total=counters.prompt_tokens,
            generation_tokens_total=counters.generation_tokens,
            spec_draft_tokens=counters.draft_tokens,
            spec_accepted_tokens=counters.accepted_tokens,
            requests_finished=dict(counters.finished),
            steps=counters.steps,
            step_seconds_total=counters.step_seconds,
        )

    def forward_logits(self, token_ids: Int32, vocab_size: int) -> Float32:
        """Raw logits [len(token_ids), vocab_size] after each token. Needs an idle engine."""
        assert not self._groups, "forward_logits needs an idle engine"
        self.scheduler.check_fits(len(token_ids), len(token_ids) + 1)
        pool = self.scheduler.pool
        pages = pool.allocate(pool.pages_for(len(token_ids)))
        try:
            table = np.array(pages, np.int32)
            logits = np.empty((len(token_ids), vocab_size), np.float32)
            limits = self.step_limits
            rows = min(limits.max_sample_rows, limits.max_num_batched_tokens)
            for start in range(0, len(token_ids), rows):
                chunk = token_ids[start : start + rows]
                result = self._model.step(logits_batch(chunk, start, table))
                assert result.logits is not None
                logits[start : start + len(chunk)] = result.logits
            return logits
        finally:
            pool.release(pages)

    def close(self) -> None:
        """Drop every request and give the interpreter's switch interval back. Idempotent."""
        self.reset()
        if sys.getswitchinterval() <= GIL_SWITCH_INTERVAL:
            sys.setswitchinterval(self._found_interval)

    # -- one step --------------------------------------------------------------------------------

    def _expire(self, now: float) -> list[Delta]:
        """End what is past its deadline, running or waiting."""
        deltas = []
        for group in self._deadlines.pop_due(now):
            for request in group.requests:
                if request.finish_reason is None:
                    self._finish(request, Ending("abort", "deadline"))
                    deltas.append(self._delta(request, (), None, now))
        return deltas

    def _run(self, schedule: Schedule, launching: Callable[[], None] | None) -> list[StepResult]:
        batch = self._builder.build(schedule)
        if launching is not None:
            launching()
        start = time.perf_counter()
        if schedule.num_steps > 1:
            results = self._model.decode(batch, schedule.num_steps)
        else:
            results = [self._model.step(batch)]
        seconds = time.perf_counter() - start
        self.last_step_seconds = seconds / len(results)
        self._counters.step_seconds += seconds
        self._counters.steps += len(results)
        return results

    def _commit(self, schedule: Schedule, result: StepResult) -> list[Delta]:
        now = time.perf_counter()
        drew = self.scheduler.commit(schedule, result.tokens.tolist())
        self._book_prompts(schedule.chunks, result)
        deltas = []
        for drawn in drew:
            for row, token_id in enumerate(drawn.token_ids, drawn.first_row):
                deltas.append(self._advance(drawn.request, token_id, result, row, now))
                if drawn.request.finish_reason is not None:
                    break
        self._counters.generation_tokens += len(deltas)
        return deltas

    def _book_prompts(self, chunks: Sequence[Chunk], result: StepResult) -> None:
        row = 0
        for chunk in chunks:
            if chunk.scored:
                book_prompt_logprobs(chunk, result, row, self.tokenizer.token_text)
            row += chunk.num_rows

    def _advance(
        self, request: Request, token_id: int, result: StepResult, row: int, now: float
    ) -> Delta:
        """Book one drawn token: its logprobs, its text, and whether it ends the sequence."""
        if request.group.first_token_time is None:
            request.group.first_token_time = now
        logprobs = book_logprobs(request, result, row, self.tokenizer.token_text)
        ending = book_token(request, token_id)
        if ending is not None:
            self._finish(request, ending)
        return self._delta(request, (token_id,), logprobs, now)

    def _delta(
        self,
        request: Request,
        token_ids: tuple[int, ...],
        logprobs: TokenLogprobs | None,
        now: float,
    ) -> Delta:
        group = request.group
        output = self._close_group(group, now) if group.is_finished else None
        shown = request.text.take_delta() if group.stream and request.text is not None else ""
        return Delta(
            request_id=group.request_id,
            index=request.index,
            text=shown,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            prompt_logprobs=request.prompt_logprobs if request.num_output == 1 else None,
            output=output,
        )

    def _finish(self, request: Request, ending: Ending) -> None:
        request.finish_reason, request.stop_reason = ending.reason, ending.stop_reason
        self._counters.finished[ending.reason] += 1
        if request.text is not None:
            request.text.finish()
        self.scheduler.finish(request)

    def _close_group(self, group: RequestGroup, now: float) -> RequestOutput:
        del self._groups[group.request_id]
        first = group.requests[0]
        return RequestOutput(
            request_id=group.request_id,
            prompt=group.prompt,
            prompt_token_ids=tuple(first.tokens.prompt.tolist()),
            outputs=[completion(request) for request in group.requests],
            metrics=group.metrics(now),
            prompt_logprobs=first.prompt_logprobs,
            num_cached_tokens=first.num_cached,
        )

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(
            PagePool(self._num_pages, self._page_tokens),
            self.step_limits,
            self._counters,
            prefix_caching=self._prefix_caching,
            proposer=self._proposer,
        )

    def _lower_switch_interval(self) -> None:
        # Looked at each step, not set once: another engine that closes gives back what it found.
        if sys.getswitchinterval() > GIL_SWITCH_INTERVAL:
            self._found_interval = sys.getswitchinterval()
            sys.setswitchinterval(GIL_SWITCH_INTERVAL)
