"""Engine: the loop that turns requests into tokens. schedule -> batch -> model.step -> commit.

Not thread-safe; its owner serialises calls. Knows nothing of files, HTTP or compiling.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from sinterlm.engine.admission import Limits, make_group
from sinterlm.engine.batching import BatchBuilder, logits_batch
from sinterlm.engine.outputs import (
    CompletionOutput,
    Delta,
    FinishReason,
    Logprob,
    RequestOutput,
    TokenLogprobs,
)
from sinterlm.engine.pages import PagePool
from sinterlm.engine.request import Request, RequestGroup
from sinterlm.engine.sampling import SamplingParams
from sinterlm.engine.scheduler import Schedule, Scheduler
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


class Engine:
    """Runs requests on a model whose KV cache has ``num_pages`` pages of ``page_tokens`` tokens.

    ``max_sample_rows`` is the most rows the model samples, or gives logits of, in one step.
    """

    def __init__(
        self,
        model: StepModel,
        tokenizer: Tokenizer,
        limits: Limits,
        *,
        num_pages: int,
        page_tokens: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_sample_rows: int,
        seed: int = 0,
    ) -> None:
        self.limits = limits
        self.tokenizer = tokenizer
        self._model = model
        self._num_pages, self._page_tokens = num_pages, page_tokens
        self._max_num_seqs, self._max_tokens = max_num_seqs, max_num_batched_tokens
        self._max_sample_rows = max_sample_rows
        self._seed = seed
        self._num_requests = 0  # ever submitted: arrival order, and a seed for those without one
        max_pages = -(-limits.max_model_len // page_tokens)
        self._builder = BatchBuilder(max_num_seqs, max_num_batched_tokens, max_pages)
        self._groups: dict[str, RequestGroup] = {}
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
        for name, value, neutral in (
            ("priority", priority, 0),
            ("deadline", deadline, None),
            ("cache_salt", cache_salt, None),
        ):
            if value != neutral:
                raise UsageError(f"{name}={value!r} is not built yet; leave it out")
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
        )
        first = group.requests[0]
        self.scheduler.check_fits(first.tokens.num_prompt, first.max_total_tokens)
        self._num_requests += len(group.requests)
        return group

    def admit(self, group: RequestGroup) -> None:
        """Queue a request that ``make_request`` made. Raises UsageError for an id in use."""
        if group.request_id in self._groups:
            raise UsageError(f"request_id={group.request_id!r} is already running")
        self._groups[group.request_id] = group
        for request in group.requests:
            self.scheduler.add(request)

    def step(self) -> list[Delta]:
        """Run one step of everything that fits in it; what it drew, at most one delta each."""
        self._lower_switch_interval()
        schedule = self.scheduler.schedule()
        if not schedule.chunks:
            return []
        batch = self._builder.build(schedule)
        result = self._model.step(batch)
        return self._commit(schedule, result)

    def abort(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        """End requests early; what they have so far. Unknown and finished ids are ignored."""
        outputs = []
        for request_id in request_ids:
            group = self._groups.get(request_id)
            if group is not None:
                for request in group.requests:
                    if request.finish_reason is None:
                        self._finish(request, "abort")
                outputs.append(self._close_group(group, time.perf_counter()))
        return outputs

    def reset(self) -> None:
        """Drop everything and free every page; for use after an interruption at any point."""
        self._groups.clear()
        self.scheduler = self._new_scheduler()

    def forward_logits(self, token_ids: Int32, vocab_size: int) -> Float32:
        """Raw logits [len(token_ids), vocab_size] after each token. Needs an idle engine."""
        assert not self._groups, "forward_logits needs an idle engine"
        self.scheduler.check_fits(len(token_ids), len(token_ids) + 1)
        pool = self.scheduler.pool
        pages = pool.allocate(pool.pages_for(len(token_ids)))
        try:
            table = np.array(pages, np.int32)
            logits = np.empty((len(token_ids), vocab_size), np.float32)
            rows = min(self._max_sample_rows, self._max_tokens)
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

    def _commit(self, schedule: Schedule, result: StepResult) -> list[Delta]:
        now = time.perf_counter()
        tokens: list[int] = result.tokens.tolist()
        drew = self.scheduler.commit(schedule, tokens)
        return [
            self._advance(request, token_id, self._book_logprobs(request, result, row), now)
            for row, (request, token_id) in enumerate(zip(drew, tokens, strict=True))
        ]

    def _advance(
        self, request: Request, token_id: int, logprobs: TokenLogprobs | None, now: float
    ) -> Delta:
        """Book one drawn token: its text, and whether it ends the sequence."""
        group = request.group
        if group.first_token_time is None:
            group.first_token_time = now
        self._check_end(request, token_id)
        output = self._close_group(group, now) if group.is_finished else None
        shown = request.text.take_delta() if group.stream and request.text is not None else ""
        return Delta(
            request_id=group.request_id,
            index=request.index,
            text=shown,
            token_ids=(token_id,),
            logprobs=logprobs,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            output=output,
        )

    def _check_end(self, request: Request, token_id: int) -> None:
        params = request.group.params
        may_stop = request.num_output >= params.min_tokens
        if may_stop and request.row_after_min_tokens is not None:
            request.row, request.row_after_min_tokens = request.row_after_min_tokens, None
        if token_id in request.stop_token_ids:
            if request.text is not None and params.include_stop_str_in_output:
                request.text.push(token_id, may_stop=False)
            # Only a token the caller named is worth reporting; eos is the ordinary end.
            request.stop_reason = token_id if token_id in params.stop_ids else None
            self._finish(request, "stop")
            return
        if request.text is not None:
            stop = request.text.push(token_id, may_stop=may_stop)
            if stop is not None:
                request.stop_reason = stop
                self._finish(request, "stop")
                return
        if request.num_tokens >= request.max_total_tokens:
            self._finish(request, "length")

    def _book_logprobs(
        self, request: Request, result: StepResult, row: int
    ) -> TokenLogprobs | None:
        if request.logprobs is None:
            return None
        token_id = int(result.tokens[row])
        text = self.tokenizer.token_text
        drawn = float(result.logprobs[row])
        entry = {token_id: Logprob(drawn, int(result.ranks[row]), text(token_id))}
        for i in range(request.row.num_logprobs):
            other = int(result.top_ids[row, i])
            if other not in entry:
                entry[other] = Logprob(float(result.top_logprobs[row, i]), i + 1, text(other))
        request.logprobs.append(entry)
        request.cumulative_logprob += drawn
        return entry

    def _finish(self, request: Request, reason: FinishReason) -> None:
        request.finish_reason = reason
        if request.text is not None:
            request.text.finish()
        self.scheduler.finish(request)

    def _close_group(self, group: RequestGroup, now: float) -> RequestOutput:
        del self._groups[group.request_id]
        return RequestOutput(
            request_id=group.request_id,
            prompt=group.prompt,
            prompt_token_ids=tuple(group.requests[0].tokens.prompt.tolist()),
            outputs=[_completion(request) for request in group.requests],
            metrics=group.metrics(now),
        )

    def _new_scheduler(self) -> Scheduler:
        pool = PagePool(self._num_pages, self._page_tokens)
        return Scheduler(pool, self._max_num_seqs, self._max_tokens)

    def _lower_switch_interval(self) -> None:
        # Looked at each step, not set once: another engine that closes gives back what it found.
        if sys.getswitchinterval() > GIL_SWITCH_INTERVAL:
            self._found_interval = sys.getswitchinterval()
            sys.setswitchinterval(GIL_SWITCH_INTERVAL)


def _completion(request: Request) -> CompletionOutput:
    assert request.finish_reason is not None
    return CompletionOutput(
        index=request.index,
        text="" if request.text is None else request.text.text,
        token_ids=tuple(request.tokens.output.tolist()),
        logprobs=request.logprobs,
        cumulative_logprob=None if request.logprobs is None else request.cumulative_logprob,
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
    )
