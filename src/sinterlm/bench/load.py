"""Runs a load: sends requests at their times, so many at once, and collects the raw record.

Interrupted, it keeps what had been answered. The statistics are made elsewhere, from the record.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from sinterlm.bench.client import Target, import_http, open_session, send
from sinterlm.bench.raw import RawRun, RequestRecord, RunRecord
from sinterlm.bench.workload import Load, Request, arrival_times, conversations
from sinterlm.engine.tokenizer import Tokenizer
from sinterlm.errors import RuntimeFault, UsageError

if TYPE_CHECKING:
    import aiohttp

#: Told how many of how many requests are done.
Advance = Callable[[int, int], None]


def run_load(
    target: Target,
    load: Load,
    requests: Sequence[Request],
    tokenizer: Tokenizer | None = None,
    facts: dict[str, Any] | None = None,
    advance: Advance | None = None,
) -> RawRun:
    """Send ``requests`` and return everything that came back. ``tokenizer`` counts the tokens of
    servers that do not. Ctrl-C ends the run early; its record then says so."""
    if not requests:
        raise UsageError("no requests to send")
    import_http()
    runner = _Runner(target, load, requests, advance or (lambda done, total: None))
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(runner.run())
    records = [_counted(record, tokenizer) for record in runner.in_order()]
    return RawRun(runner.summary(facts or {}), tuple(records))


def _counted(record: RequestRecord, tokenizer: Tokenizer | None) -> RequestRecord:
    if record.usage_tokens or tokenizer is None or not tokenizer.has_vocabulary:
        return record
    return replace(record, text_tokens=len(tokenizer.encode(record.text, add_special_tokens=False)))


class _Runner:
    def __init__(
        self, target: Target, load: Load, requests: Sequence[Request], advance: Advance
    ) -> None:
        self._target, self._load, self._requests = target, load, requests
        self._advance = advance
        self._records: dict[int, RequestRecord] = {}
        self._zero = self._end = self._wall = self._wall_end = 0.0
        self._cpu = self._cpu_end = 0.0
        self._is_complete = False

    async def run(self) -> None:
        async with open_session(self._target, self._load.max_concurrency) as session:
            await self._warm_up(session)
            # Nothing made so far will ever be garbage: collections during the run stay short.
            gc.collect()
            gc.freeze()
            try:
                self._begin()
                await self._send_all(session)
                self._is_complete = True
            finally:
                self._finish()
                gc.unfreeze()

    async def _warm_up(self, session: aiohttp.ClientSession) -> None:
        limit = asyncio.Semaphore(self._load.max_concurrency or max(1, self._load.num_warmups))

        async def one() -> RequestRecord:
            async with limit:
                now = time.perf_counter()
                return await send(session, self._target, self._requests[0], 0, now, now)

        done = await asyncio.gather(*(one() for _ in range(self._load.num_warmups)))
        failed = next((record.error for record in done if not record.is_success), None)
        if failed is not None:
            raise RuntimeFault(f"the warm-up of {self._target.url} failed: {failed}")

    async def _send_all(self, session: aiohttp.ClientSession) -> None:
        limit = self._load.max_concurrency
        seats: contextlib.AbstractAsyncContextManager[Any] = (
            asyncio.Semaphore(limit) if limit else contextlib.nullcontext()
        )

        async def user(indices: list[int], arrival: float) -> None:
            async with seats:
                history: list[tuple[str, str]] = []
                for index in indices:
                    request = self._requests[index]
                    record = await send(
                        session, self._target, request, index, self._zero, arrival, history
                    )
                    self._records[index] = record
                    self._advance(len(self._records), len(self._requests))
                    history.append((request.prompt, record.text))
                    arrival = time.perf_counter()

        times = arrival_times(self._requests, self._load)
        tasks = []
        try:
            for indices in conversations(self._requests):
                wait = self._zero + times[indices[0]] - time.perf_counter()
                if wait > 0:
                    await asyncio.sleep(wait)
                tasks.append(asyncio.create_task(user(indices, time.perf_counter())))
            await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    def _begin(self) -> None:
        self._cpu, self._wall = _cpu_seconds(), time.time()
        self._zero = time.perf_counter()

    def _finish(self) -> None:
        self._end = time.perf_counter()
        self._wall_end, self._cpu_end = time.time(), _cpu_seconds()

    def in_order(self) -> list[RequestRecord]:
        """Records by index; a request that was cut off has none."""
        return [self._records[index] for index in sorted(self._records)]

    def summary(self, facts: dict[str, Any]) -> RunRecord:
        """The run's own line."""
        rate = self._load.request_rate
        return RunRecord(
            duration_s=max(self._end - self._zero, 1e-9),
            wall_s=self._wall_end - self._wall,
            client_cpu_s=self._cpu_end - self._cpu,
            started_at=datetime.fromtimestamp(self._wall, timezone.utc).isoformat(),
            max_concurrency=self._load.max_concurrency,
            request_rate=rate if rate < float("inf") else None,
            zero_s=self._zero,
            is_complete=self._is_complete,
            facts=facts,
        )


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
