"""Metrics of a server in Prometheus' text format, under vLLM's names where the meaning is equal.

Engine figures are read when they are scraped; latencies are recorded as they happen, all in
seconds. Each server has a registry of its own, nothing is global. Names that vLLM does not have
begin with ``sinterlm:``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from sinterlm.engine.stats import EngineStats, FinishKind

_LABELS = ("model_name", "engine")
#: There is one engine in a process; vLLM labels its engines by number.
_ENGINE = "0"

# Bounds of vLLM's histograms, so that its dashboards and alert rules read ours.
_TTFT_BOUNDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_BOUNDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
_REQUEST_BOUNDS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_N_BOUNDS = (1, 2, 5, 10, 20)


@dataclass(frozen=True)
class HistogramSnapshot:
    """A histogram at one moment, for the page."""

    bounds: tuple[float, ...]  #: upper bound of each bucket, the last one infinite
    counts: tuple[int, ...]  #: observations of each bucket alone, not cumulated
    total: float  #: sum of all observations


class Metrics:
    """What one server counts and measures. All methods are for the event loop's thread.

    ``read_stats`` is called at every scrape; ``cache`` are the labels of
    ``vllm:cache_config_info``. Completions of one request (``n``) count as one request each,
    as in vLLM.
    """

    def __init__(
        self,
        model_name: str,
        max_model_len: int,
        read_stats: Callable[[], EngineStats],
        cache: Mapping[str, str],
    ) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._registry)
        self._registry.register(_EngineCollector(model_name, read_stats, cache))
        self._model_name = model_name
        tokens = _one_two_five(max_model_len)
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _TTFT_BOUNDS
        )
        self._itl = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a sequence.", _TOKEN_BOUNDS
        )
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time per token after the first one, of a finished request.",
            _TOKEN_BOUNDS,
        )
        phases = {
            "e2e_request_latency": "From arrival to the end.",
            "request_queue_time": "From arrival to the first step that took the request up.",
            "request_prefill_time": "From there to the first token.",
            "request_decode_time": "From the first token to the end.",
            "request_inference_time": "From the first step to the end.",
        }
        self._phases = {
            name: self._histogram(f"{name}_seconds", text, _REQUEST_BOUNDS)
            for name, text in phases.items()
        }
        self._prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a finished request.", tokens
        )
        self._output_tokens = self._histogram(
            "request_generation_tokens", "Generated tokens of a finished request.", tokens
        )
        self._n = self._histogram("request_params_n", "Parameter n of a request.", _N_BOUNDS)
        self._max_tokens = self._histogram(
            "request_params_max_tokens", "Parameter max_tokens of a request.", tokens
        )
        self._rejections = Counter(
            "sinterlm:requests_rejected",
            "Requests that were not admitted, by HTTP status.",
            ["model_name", "code"],
            registry=self._registry,
        )
        self._responses = Counter(
            "sinterlm:http_responses",
            "HTTP responses, by route and status.",
            ["route", "code"],
            registry=self._registry,
        )

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        made = Histogram(f"vllm:{name}", text, _LABELS, buckets=bounds, registry=self._registry)
        return made.labels(self._model_name, _ENGINE)

    # -- recording -------------------------------------------------------------------------------

    def request_started(self, *, n: int, max_tokens: int) -> None:
        """A request was admitted."""
        self._n.observe(n)
        self._max_tokens.observe(max_tokens)

    def first_token(self, ttft_s: float) -> None:
        """A request drew its first token, ``ttft_s`` after its arrival."""
        self._ttft.observe(ttft_s)

    def token(self, itl_s: float) -> None:
        """A sequence drew a further token, ``itl_s`` after its last one."""
        self._itl.observe(itl_s)

    def finished(
        self,
        *,
        e2e_s: float,
        prompt_tokens: int,
        output_tokens: int,
        ttft_s: float | None,
        queue_s: float | None,
    ) -> None:
        """A sequence ended after ``e2e_s``; how is counted by the engine itself.

        ``ttft_s`` is None when it never drew a token, ``queue_s`` when no step took it up.
        """
        self._prompt_tokens.observe(prompt_tokens)
        self._output_tokens.observe(output_tokens)
        self._phases["e2e_request_latency"].observe(e2e_s)
        if queue_s is not None:
            self._phases["request_queue_time"].observe(queue_s)
            self._phases["request_inference_time"].observe(e2e_s - queue_s)
        if ttft_s is None:
            return
        self._phases["request_decode_time"].observe(e2e_s - ttft_s)
        if queue_s is not None:
            self._phases["request_prefill_time"].observe(ttft_s - queue_s)
        if output_tokens > 1:
            self._tpot.observe((e2e_s - ttft_s) / (output_tokens - 1))

    def rejected(self, code: int) -> None:
        """A request was refused before it reached the engine, with this HTTP status."""
        self._rejections.labels(self._model_name, str(code)).inc()

    def responded(self, route: str, code: int) -> None:
        """A response began. ``route`` is a route's pattern, never a path a client made up."""
        self._responses.labels(route, str(code)).inc()

    # -- reading ---------------------------------------------------------------------------------

    def render(self, accept: str | None) -> tuple[bytes, str]:
        """The body of ``GET /metrics`` and its content type, as the Accept header asks."""
        encode, content_type = choose_encoder(accept or "")
        return encode(self._registry), content_type

    def ttft(self) -> HistogramSnapshot:
        """Times to first token so far, seconds."""
        return _snapshot(self._ttft)

    def itl(self) -> HistogramSnapshot:
        """Times between tokens so far, seconds."""
        return _snapshot(self._itl)


def _snapshot(histogram: Histogram) -> HistogramSnapshot:
    bounds, cumulated, total = [], [], 0.0
    for metric in histogram.collect():
        for sample in metric.samples:
            if sample.name.endswith("_bucket"):
                bounds.append(float(sample.labels["le"]))
                cumulated.append(int(sample.value))
            elif sample.name.endswith("_sum"):
                total = sample.value
    counts = [this - last for last, this in zip([0, *cumulated], cumulated, strict=False)]
    return HistogramSnapshot(tuple(bounds), tuple(counts), total)


def _one_two_five(highest: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, … up to ``highest`` tokens."""
    scales = (10**exponent for exponent in range(len(str(highest))))
    bounds = [digit * scale for scale in scales for digit in (1, 2, 5)]
    return tuple(bound for bound in bounds if bound <= highest)


class _EngineCollector:
    """The engine's own counters and gauges, read at the moment of a scrape."""

    def __init__(
        self, model_name: str, read_stats: Callable[[], EngineStats], cache: Mapping[str, str]
    ) -> None:
        self._labels = [model_name, _ENGINE]
        self._read_stats = read_stats
        self._cache = {**cache, "engine": _ENGINE}

    def collect(self) -> Iterator[Metric]:
        """One family after the other."""
        stats = self._read_stats()
        for name, text, value in _gauges(stats):
            yield self._filled(GaugeMetricFamily(name, text, labels=_LABELS), value)
        for name, text, count in _counters(stats):
            yield self._filled(CounterMetricFamily(name, text, labels=_LABELS), count)
        ended = CounterMetricFamily(
            "vllm:request_success",
            "Requests that ended, by why.",
            labels=[*_LABELS, "finished_reason"],
        )
        for reason in _REASONS:
            ended.add_metric([*self._labels, reason], stats.requests_finished.get(reason, 0))
        yield ended
        yield from self._ops(stats)
        info = GaugeMetricFamily(
            "vllm:cache_config_info", "The KV cache; always 1.", labels=list(self._cache)
        )
        info.add_metric(list(self._cache.values()), 1)
        yield info

    def _filled(self, family: Metric, value: float) -> Metric:
        family.add_metric(self._labels, value)  # type: ignore[attr-defined]  # both kinds have it
        return family

    def _ops(self, stats: EngineStats) -> Iterator[Metric]:
        labels = [*_LABELS, "op"]
        calls = CounterMetricFamily("sinterlm:op_calls", "Calls of a fused op.", labels=labels)
        seconds = CounterMetricFamily("sinterlm:op_seconds", "Time in a fused op.", labels=labels)
        roof = GaugeMetricFamily(
            "sinterlm:op_roof_fraction",
            "Of what this machine's bandwidth or arithmetic would allow.",
            labels=labels,
        )
        for op in stats.ops:
            where = [*self._labels, op.name]
            calls.add_metric(where, op.calls)
            seconds.add_metric(where, op.seconds)
            if op.roof_fraction is not None:
                roof.add_metric(where, op.roof_fraction)
        yield from (calls, seconds, roof)


_REASONS: tuple[FinishKind, ...] = ("stop", "length", "abort", "error")


def _gauges(stats: EngineStats) -> list[tuple[str, str, float]]:
    total = stats.kv_pages_total
    return [
        ("vllm:num_requests_running", "Sequences that hold KV pages.", stats.num_running),
        ("vllm:num_requests_waiting", "Sequences that wait for pages.", stats.num_waiting),
        (
            "vllm:kv_cache_usage_perc",
            "Share of KV pages that sequences hold; 1 = all.",
            stats.kv_pages_used / total if total else 0.0,
        ),
        ("sinterlm:kv_pages_cached", "Free KV pages whose content may be reused.",
         stats.kv_pages_cached),
    ]  # fmt: skip


def _counters(stats: EngineStats) -> list[tuple[str, str, float]]:
    return [
        ("vllm:prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_cache_queries),
        ("vllm:prefix_cache_hits", "Prompt tokens found.", stats.prefix_cache_hits),
        ("vllm:num_preemptions", "Preemptions.", stats.num_preemptions),
        ("vllm:prompt_tokens", "Prompt tokens, cached ones included.", stats.prompt_tokens_total),
        ("vllm:generation_tokens", "Generated tokens.", stats.generation_tokens_total),
        ("vllm:spec_decode_num_draft_tokens", "Tokens proposed by speculation.",
         stats.spec_draft_tokens),
        ("vllm:spec_decode_num_accepted_tokens", "Proposed tokens that were kept.",
         stats.spec_accepted_tokens),
        ("sinterlm:engine_steps", "Steps of the engine.", stats.steps),
        ("sinterlm:engine_step_seconds", "Time in native steps.", stats.step_seconds_total),
    ]  # fmt: skip
