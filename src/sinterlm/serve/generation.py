"""Generation: one HTTP request under way in the engine, a stream per prompt.

Books the latencies, turns an early end into the error it is, and ends everything when its reader
goes away.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from sinterlm.engine.outputs import Delta, RequestOutput
from sinterlm.engine.prompts import Prompt
from sinterlm.engine.sampling import SamplingParams
from sinterlm.errors import SinterError
from sinterlm.serve.bridge import Submission
from sinterlm.serve.context import Context
from sinterlm.serve.errors import ApiError, draining, from_exception, timed_out
from sinterlm.serve.journal import RequestRecord
from sinterlm.serve.stream import Stream


@dataclass(frozen=True)
class Job:
    """What one HTTP request asks of the engine."""

    request_id: str  #: as the client sees it
    prompts: Sequence[Prompt]  #: token ids as lists
    params: SamplingParams  #: of every prompt
    priority: int
    cache_salt: str | None
    param: str  #: the field of the request that the prompts came from
    record: RequestRecord  #: told what becomes of it


class Generation:
    """Submitted prompts. Read it once, by ``events`` or by ``outputs``.

    Construction raises ApiError, and leaves nothing behind, for what the engine refuses.
    """

    def __init__(self, context: Context, job: Job) -> None:
        self._context = context
        self._arrival = time.perf_counter()
        self._last: dict[tuple[int, int], float] = {}  # (prompt, index) -> its latest token
        self._streams: list[Stream] = []
        for i, prompt in enumerate(job.prompts):
            param = f"{job.param}[{i}]" if len(job.prompts) > 1 else job.param
            try:
                self._streams.append(self._submit(job, prompt))
            except SinterError as exc:
                self.cancel()
                error = from_exception(exc, param=param)
                context.metrics.rejected(error.status)
                raise error from exc
        self._record = job.record
        self._record.model = context.served.name
        self._record.prompt_tokens = sum(len(list(prompt.token_ids)) for prompt in job.prompts)
        if context.options.log_prompts:
            self._record.prompts = [prompt.text or str(prompt.token_ids) for prompt in job.prompts]
        for _ in job.prompts:
            context.metrics.request_started(
                n=job.params.n, max_tokens=job.params.max_tokens or context.served.max_model_len
            )

    def _submit(self, job: Job, prompt: Prompt) -> Stream:
        ids = prompt.token_ids
        assert isinstance(ids, list)
        return self._context.bridge.submit(
            Submission(
                # Clients repeat their ids, retrying; the engine's must differ.
                request_id=f"{job.request_id}-{next(self._context.numbers)}",
                prompt_token_ids=ids,
                params=job.params,
                prompt=prompt.text,
                priority=job.priority,
                timeout_s=self._context.options.request_timeout,
                cache_salt=job.cache_salt,
            )
        )

    def cancel(self) -> None:
        """End every prompt; their pages are free after the next step. Idempotent."""
        for stream in self._streams:
            stream.cancel()

    async def events(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """Pairs of a prompt's index and what a step drew for it, as they come.

        Raises ApiError when the engine, a deadline or a shutdown ended one early.
        """
        try:
            async with aclosing(self._merged()) as merged:
                async for i, delta in merged:
                    self._book(i, delta)
                    yield i, delta
        except SinterError as exc:
            raise from_exception(exc) from exc
        finally:
            self.cancel()

    async def outputs(self) -> list[RequestOutput]:
        """Everything, once it is done: one per prompt. Raises as ``events``."""
        done: dict[int, RequestOutput] = {}
        async with aclosing(self.events()) as events:
            async for i, delta in events:
                if delta.output is not None:
                    done[i] = delta.output
        return [done[i] for i in range(len(self._streams))]

    # -- inside ----------------------------------------------------------------------------------

    async def _merged(self) -> AsyncGenerator[tuple[int, Delta], None]:
        if len(self._streams) == 1:
            async for delta in self._streams[0]:
                yield 0, delta
            return
        queue: asyncio.Queue[tuple[int, Delta] | BaseException | None] = asyncio.Queue()
        tasks = [
            asyncio.create_task(_pump(i, stream, queue)) for i, stream in enumerate(self._streams)
        ]
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()

    def _book(self, prompt: int, delta: Delta) -> None:
        """Record latencies; raise for a sequence that was ended early."""
        self._record.output_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            self._record.finish_reasons.append(delta.finish_reason)
        if delta.finish_reason == "abort":
            raise self._early_end(self._streams[prompt])
        metrics, now = self._context.metrics, time.perf_counter()
        key = (prompt, delta.index)
        last = self._last.get(key)
        self._last[key] = now
        if last is not None:
            metrics.token(now - last)
        elif delta.index == 0:
            metrics.first_token(now - self._arrival)
            self._record.ttft_s = self._record.ttft_s or now - self._arrival
        if delta.output is not None:
            self._book_end(delta.output, now)

    def _book_end(self, output: RequestOutput, now: float) -> None:
        times = output.metrics
        for one in output.outputs:
            self._context.metrics.finished(
                e2e_s=now - self._arrival,
                prompt_tokens=len(output.prompt_token_ids),
                output_tokens=len(one.token_ids),
                ttft_s=times.ttft,
                queue_s=times.queue_time,
            )

    def _early_end(self, stream: Stream) -> ApiError:
        if stream.abort_reason == "timeout":
            return timed_out(self._context.options.request_timeout)
        if stream.abort_reason == "shutdown":
            return draining()
        return ApiError(499, "the client closed the request", code="client_closed_request")


async def _pump(
    i: int, stream: Stream, queue: asyncio.Queue[tuple[int, Delta] | BaseException | None]
) -> None:
    """Move one stream into the queue of all; its end is None, its failure the exception."""
    try:
        async for delta in stream:
            queue.put_nowait((i, delta))
        queue.put_nowait(None)
    except Exception as exc:
        queue.put_nowait(exc)
