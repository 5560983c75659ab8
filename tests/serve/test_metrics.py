"""/metrics: vLLM's names, labels and buckets, with what the engine and the protocol counted."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.parser import text_string_to_metric_families

from sinterlm.engine.stats import EngineStats, OpStats
from sinterlm.serve.metrics import Metrics

STATS = EngineStats(
    num_running=3,
    num_waiting=4,
    num_preemptions=5,
    kv_pages_total=100,
    kv_pages_used=25,
    kv_pages_cached=30,
    prefix_cache_queries=1000,
    prefix_cache_hits=640,
    prompt_tokens_total=2000,
    generation_tokens_total=300,
    spec_draft_tokens=40,
    spec_accepted_tokens=30,
    requests_finished={"stop": 7, "length": 8, "abort": 9, "error": 0},
    steps=11,
    step_seconds_total=1.5,
    ops=(OpStats("attention", 12, 0.5, 0.75), OpStats("down_residual", 13, 0.25, None)),
)


def made_metrics() -> Metrics:
    return Metrics("m", 8192, lambda: STATS, {"block_size": "64", "num_gpu_blocks": "100"})


def samples(metrics: Metrics) -> Iterator[tuple[str, dict[str, str], float]]:
    body, content_type = metrics.render(None)
    assert content_type.startswith("text/plain")
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


def one(metrics: Metrics, name: str, **labels: str) -> float:
    """The one sample of that name and those labels."""
    wanted = {"model_name": "m", "engine": "0", **labels}
    (value,) = [v for n, given, v in samples(metrics) if n == name and given == wanted]
    return value


def test_what_the_engine_counts_is_read_at_the_scrape() -> None:
    metrics = made_metrics()
    for name, value in {
        "vllm:num_requests_running": 3, "vllm:num_requests_waiting": 4,
        "vllm:num_preemptions_total": 5, "vllm:kv_cache_usage_perc": 0.25,
        "vllm:prefix_cache_queries_total": 1000, "vllm:prefix_cache_hits_total": 640,
        "vllm:prompt_tokens_total": 2000, "vllm:generation_tokens_total": 300,
        "vllm:spec_decode_num_draft_tokens_total": 40,
        "vllm:spec_decode_num_accepted_tokens_total": 30, "sinterlm:kv_pages_cached": 30,
        "sinterlm:engine_steps_total": 11, "sinterlm:engine_step_seconds_total": 1.5,
    }.items():  # fmt: skip
        assert one(metrics, name) == value, name
    assert one(metrics, "vllm:request_success_total", finished_reason="length") == 8
    assert one(metrics, "sinterlm:op_seconds_total", op="attention") == 0.5
    assert one(metrics, "sinterlm:op_calls_total", op="down_residual") == 13
    assert one(metrics, "sinterlm:op_roof_fraction", op="attention") == 0.75
    unmeasured = [given for name, given, _ in samples(metrics) if name.endswith("roof_fraction")]
    assert [given["op"] for given in unmeasured] == ["attention"]
    info = {"block_size": "64", "num_gpu_blocks": "100", "engine": "0"}
    assert ("vllm:cache_config_info", info, 1.0) in list(samples(metrics))


def test_latencies_are_histograms_in_vllms_buckets() -> None:
    metrics = made_metrics()
    metrics.request_started(n=2, max_tokens=50)
    metrics.first_token(0.03)
    metrics.token(0.012)
    metrics.finished(e2e_s=2.0, prompt_tokens=10, output_tokens=11, ttft_s=0.5, queue_s=0.2)
    for name, total in {
        "time_to_first_token_seconds": 0.03, "inter_token_latency_seconds": 0.012,
        "request_time_per_output_token_seconds": 0.15, "e2e_request_latency_seconds": 2.0,
        "request_queue_time_seconds": 0.2, "request_prefill_time_seconds": 0.3,
        "request_decode_time_seconds": 1.5, "request_inference_time_seconds": 1.8,
        "request_prompt_tokens": 10, "request_generation_tokens": 11, "request_params_n": 2,
        "request_params_max_tokens": 50,
    }.items():  # fmt: skip
        assert abs(one(metrics, f"vllm:{name}_sum") - total) < 1e-9, name
        assert one(metrics, f"vllm:{name}_count") == 1, name
    bucket = "vllm:time_to_first_token_seconds_bucket"
    assert [one(metrics, bucket, le=le) for le in ("0.02", "0.04")] == [0, 1]
    bounds = [
        labels["le"] for name, labels, _ in samples(metrics)
        if name == "vllm:request_prompt_tokens_bucket"
    ]  # fmt: skip
    assert bounds[:4] == ["1.0", "2.0", "5.0", "10.0"]
    assert bounds[-2:] == ["5000.0", "+Inf"], "the context ends at 8192"


def test_a_request_that_never_drew_a_token_has_no_rate() -> None:
    metrics = made_metrics()
    metrics.finished(e2e_s=1.0, prompt_tokens=1, output_tokens=0, ttft_s=None, queue_s=None)
    metrics.finished(e2e_s=1.0, prompt_tokens=1, output_tokens=1, ttft_s=0.5, queue_s=None)
    assert one(metrics, "vllm:e2e_request_latency_seconds_count") == 2
    assert one(metrics, "vllm:request_time_per_output_token_seconds_count") == 0
    assert one(metrics, "vllm:request_queue_time_seconds_count") == 0


def test_snapshots_count_each_bucket_alone() -> None:
    metrics = made_metrics()
    for seconds in (0.0005, 0.03, 0.03, 1e6):
        metrics.first_token(seconds)
    snapshot = metrics.ttft()
    assert sum(snapshot.counts) == 4
    assert (snapshot.counts[0], snapshot.counts[-1]) == (1, 1)
    assert snapshot.counts[snapshot.bounds.index(0.04)] == 2
    assert snapshot.bounds[-1] == float("inf")
    assert snapshot.total > 1e6


def test_refusals_and_responses() -> None:
    metrics = made_metrics()
    metrics.rejected(429)
    metrics.responded("/v1/completions", 200)
    found = {name: labels for name, labels, value in samples(metrics) if value == 1}
    assert found["sinterlm:requests_rejected_total"] == {"model_name": "m", "code": "429"}
    assert found["sinterlm:http_responses_total"] == {"route": "/v1/completions", "code": "200"}


def test_openmetrics_on_request_and_a_registry_of_its_own() -> None:
    body, content_type = made_metrics().render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    made_metrics(), made_metrics()  # a second server in one process: nothing is registered twice
