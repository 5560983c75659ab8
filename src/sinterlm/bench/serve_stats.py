"""Statistics of a serving benchmark, from raw records alone; definitions are vLLM's, exactly.

TTFT, TPOT and E2EL have one sample per request, ITL one per gap between chunks. What has no sample
is None, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sinterlm.bench.raw import RawRun, RequestRecord

METRICS = ("ttft", "tpot", "itl", "e2el")


@dataclass(frozen=True)
class Spread:
    """Of samples in milliseconds; population standard deviation, linear percentiles."""

    count: int
    mean: float
    median: float
    std: float
    maximum: float
    percentiles: dict[float, float]

    @classmethod
    def of(cls, seconds: Sequence[float], percentiles: Iterable[float]) -> Spread | None:
        """None without a sample."""
        if not seconds:
            return None
        ms = np.asarray(seconds) * 1e3
        return cls(
            len(seconds),
            float(np.mean(ms)),
            float(np.median(ms)),
            float(np.std(ms)),
            float(np.max(ms)),
            {p: float(np.percentile(ms, p)) for p in percentiles},
        )


@dataclass(frozen=True)
class Window:
    """The steady state: all seats taken, and new requests still coming."""

    start_s: float
    end_s: float
    num_requests: int  #: that lie wholly inside
    output_throughput: float | None  #: tokens/s that arrived inside
    request_throughput: float | None  #: requests/s that ended inside


@dataclass(frozen=True)
class ServeStats:
    """Everything `vllm bench serve` reports, and the window."""

    duration_s: float
    completed: int
    failed: int
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    request_goodput: float | None  #: None = no goal was given
    max_output_tokens_per_s: float | None  #: chunks in the fullest second
    max_concurrent_requests: int | None  #: that touch one second: an over-count, as vLLM's
    client_cpu: float  #: share of one CPU that this client used
    short_outputs: int  #: requests that ended before the length asked for
    chunks_per_token: float | None  #: 1 = one token per chunk
    spreads: dict[str, Spread | None]  #: by name in METRICS, and of the client's queue
    window: Window | None

    def to_json(self) -> dict[str, Any]:
        """Flat, with the keys of vLLM's result file; null = no data."""
        facts: dict[str, Any] = {
            "duration": self.duration_s,
            "completed": self.completed,
            "failed": self.failed,
            "total_input_tokens": self.total_input_tokens,
            "total_output_tokens": self.total_output_tokens,
            "request_throughput": self.request_throughput,
            "request_goodput": self.request_goodput,
            "output_throughput": self.output_throughput,
            "total_token_throughput": self.total_token_throughput,
            "max_output_tokens_per_s": self.max_output_tokens_per_s,
            "max_concurrent_requests": self.max_concurrent_requests,
            "client_cpu": self.client_cpu,
            "short_outputs": self.short_outputs,
            "chunks_per_token": self.chunks_per_token,
            "steady_state": None if self.window is None else vars(self.window),
        }
        for name, spread in self.spreads.items():
            for part in ("mean", "median", "std"):
                facts[f"{part}_{name}_ms"] = None if spread is None else getattr(spread, part)
            facts[f"max_{name}_ms"] = None if spread is None else spread.maximum
            for p, value in ({} if spread is None else spread.percentiles).items():
                facts[f"p{p:g}_{name}_ms"] = value
        return facts


def serve_stats(
    raw: RawRun, percentiles: Sequence[float] = (99.0,), goodput: dict[str, float] | None = None
) -> ServeStats:
    """Statistics of ``raw``. ``goodput``: milliseconds by "ttft", "tpot" or "e2el"."""
    done = [request for request in raw.requests if request.is_success]
    duration = raw.run.duration_s
    total_input = sum(request.prompt_len for request in done)
    total_output = sum(request.output_len for request in done)
    num_chunks = sum(len(request.events_s) for request in done)
    fullest, concurrent = _fullest_second(done)
    good = sum(_is_good(request, goodput) for request in done) if goodput else 0
    queue = [r.start_s - r.arrival_s for r in done] if raw.run.max_concurrency else []
    samples = {
        "ttft": [r.ttft_s for r in done],
        "tpot": [tpot for r in done if (tpot := r.tpot_s) is not None],
        "itl": [gap for r in done for gap in r.gaps_s],
        "e2el": [r.latency_s for r in done],
        "client_queue_time": queue,
    }
    if queue and raw.run.request_rate is not None:
        samples["e2el_including_client_queue"] = [
            r.latency_s + wait for r, wait in zip(done, queue, strict=True)
        ]
    return ServeStats(
        duration_s=duration,
        completed=len(done),
        failed=len(raw.requests) - len(done),
        total_input_tokens=total_input,
        total_output_tokens=total_output,
        request_throughput=len(done) / duration,
        output_throughput=total_output / duration,
        total_token_throughput=(total_input + total_output) / duration,
        request_goodput=good / duration if goodput else None,
        max_output_tokens_per_s=fullest,
        max_concurrent_requests=concurrent,
        client_cpu=raw.run.client_cpu_s / duration,
        short_outputs=sum(r.output_len < r.asked_len for r in done),
        chunks_per_token=num_chunks / total_output if total_output else None,
        spreads={name: Spread.of(values, percentiles) for name, values in samples.items()},
        window=steady_window(raw),
    )


def _is_good(request: RequestRecord, goals: dict[str, float]) -> bool:
    """Whether every goal is met; a single token has a TPOT of 0 here, as in vLLM."""
    found = {
        "ttft": request.ttft_s,
        "tpot": request.tpot_s or 0.0,
        "e2el": request.latency_s,
    }
    return all(found[name] * 1e3 <= goal for name, goal in goals.items())


def _fullest_second(done: Sequence[RequestRecord]) -> tuple[float | None, int | None]:
    """Most chunks in one second, and most requests that touch one, counted from the first start."""
    if not done:
        return None, None
    zero = min(request.start_s for request in done)
    seconds = math.ceil(max(request.end_s for request in done) - zero) + 1
    chunks, active = np.zeros(seconds), np.zeros(seconds, int)
    for request in done:
        start = request.start_s - zero
        times = start + np.asarray(request.events_s)
        np.add.at(chunks, times.astype(int), 1)
        active[int(start) : int(times[-1]) + 1] += 1
    return float(chunks.max()), int(active.max())


def steady_window(raw: RawRun) -> Window | None:
    """From the moment when ``max_concurrency`` requests are in flight to the last dispatch: before
    it seats fill, after it they empty. None for an open loop or when no request lies inside."""
    limit = raw.run.max_concurrency
    done = [request for request in raw.requests if request.is_success]
    if limit is None or len(done) <= limit:
        return None
    starts = sorted(request.start_s for request in done)
    begin, end = starts[limit - 1], starts[-1]
    inside = [r for r in done if r.start_s >= begin and r.end_s <= end]
    if not inside or end <= begin:
        return None
    tokens = 0.0
    for request in done:
        times = request.start_s + np.asarray(request.events_s)
        share = float(np.mean((times >= begin) & (times <= end)))
        tokens += share * request.output_len
    ended = sum(begin <= request.end_s <= end for request in done)
    length = end - begin
    return Window(begin, end, len(inside), tokens / length, ended / length)
