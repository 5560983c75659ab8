"""Every metric against figures worked out by hand, and nothing printed as 0 that is no data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scripts.vllm_metrics import DURATION_S, GOLDENS, GOODPUT, PERCENTILES, records

from sinterlm.bench.raw import RawRun, RequestRecord, RunRecord, read_raw, write_raw
from sinterlm.bench.serve_stats import ServeStats, serve_stats, steady_window
from sinterlm.errors import ResourceError, UsageError


def record(index: int, start: float, events: tuple[float, ...], **changes: object) -> RequestRecord:
    made = RequestRecord(index, f"bench-{index}", 10, len(events), start, start, events,
                         usage_tokens=len(events), finish_reason="length", status=200)  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def run(*requests: RequestRecord, duration: float = 2.0, limit: int | None = None) -> RawRun:
    line = RunRecord(duration, duration, 0.5, "2026-11-25T12:00:00+00:00", limit, None)
    return RawRun(line, requests)


def spread(stats: ServeStats, name: str, part: str = "mean") -> float:
    found = stats.spreads[name]
    assert found is not None
    return float(getattr(found, part))


def test_by_hand() -> None:
    stats = serve_stats(
        run(record(0, 0.0, (0.1, 0.2, 0.4)), record(1, 0.5, (0.3, 0.5), asked_len=4)), (50, 99)
    )
    assert (stats.completed, stats.failed, stats.short_outputs) == (2, 0, 1)
    assert stats.total_input_tokens == 20
    assert stats.total_output_tokens == 5
    assert stats.request_throughput == 1.0
    assert stats.output_throughput == 2.5
    assert stats.total_token_throughput == 12.5
    assert spread(stats, "ttft") == pytest.approx(200)
    assert spread(stats, "tpot") == pytest.approx((150 + 200) / 2)
    assert spread(stats, "itl") == pytest.approx((100 + 200 + 200) / 3)
    assert spread(stats, "e2el") == pytest.approx(450)
    assert spread(stats, "ttft", "std") == pytest.approx(100)
    p99 = stats.spreads["e2el"]
    assert p99 is not None
    assert p99.percentiles[99] == pytest.approx(np.percentile([400, 500], 99))
    assert stats.client_cpu == 0.25


def test_chunks_of_several_tokens() -> None:
    stats = serve_stats(run(record(0, 0.0, (0.1, 0.5), usage_tokens=9)))
    assert spread(stats, "tpot") == pytest.approx(50)  # per token
    assert spread(stats, "itl") == pytest.approx(400)  # per chunk
    assert stats.chunks_per_token == pytest.approx(2 / 9)


def test_a_server_that_does_not_count_is_counted_by_its_text() -> None:
    silent = record(0, 0.0, (0.1, 0.5), usage_tokens=None, text_tokens=5)
    assert serve_stats(run(silent)).total_output_tokens == 5
    assert serve_stats(run(replace(silent, text_tokens=None))).total_output_tokens == 1


def test_failures_count_nowhere() -> None:
    broken = record(1, 0.0, (0.1, 0.2), error="HTTP 503")
    stats = serve_stats(run(record(0, 0.0, (0.1, 0.3)), broken, record(2, 0.0, (), usage_tokens=0)))
    assert (stats.completed, stats.failed, stats.total_output_tokens) == (1, 2, 2)
    assert spread(stats, "ttft", "count") == 1


def test_no_data_is_none() -> None:
    stats = serve_stats(run(record(0, 0.0, (0.1,))))
    assert stats.spreads["tpot"] is None
    assert stats.spreads["itl"] is None
    facts = stats.to_json()
    assert facts["mean_tpot_ms"] is None
    assert facts["mean_ttft_ms"] == pytest.approx(100)
    nothing = serve_stats(run(record(0, 0.0, (), error="x"))).to_json()
    assert nothing["mean_ttft_ms"] is None
    assert nothing["max_output_tokens_per_s"] is None
    assert nothing["output_throughput"] == 0  # nothing was put out: that is data


@pytest.mark.parametrize(
    ("goals", "good"),
    [({"ttft": 100.0}, 1), ({"ttft": 300.0}, 2), ({"ttft": 300.0, "tpot": 149.0}, 0),
     ({"e2el": 400.1, "tpot": 150.1}, 1)],
)  # fmt: skip
def test_goodput(goals: dict[str, float], good: int) -> None:
    both = run(record(0, 0.0, (0.1, 0.25, 0.4)), record(1, 0.5, (0.3, 0.6)))
    assert serve_stats(both, goodput=goals).request_goodput == good / 2.0
    assert serve_stats(both).request_goodput is None


def test_fullest_second_and_queue() -> None:
    waited = replace(record(1, 1.2, (0.1, 0.3)), arrival_s=0.2)
    stats = serve_stats(run(record(0, 0.0, (0.1, 0.2, 0.9)), waited, limit=1))
    assert stats.max_output_tokens_per_s == 3
    assert stats.max_concurrent_requests == 1
    assert spread(stats, "client_queue_time", "maximum") == pytest.approx(1000)


def test_steady_window() -> None:
    # Two seats: filled at 0.1; the last request starts at 1.0.
    lines = [record(0, 0.0, (0.2, 0.5)), record(1, 0.1, (0.2, 0.9)), record(2, 0.5, (0.1, 0.4)),
             record(3, 1.0, (0.2, 0.6))]  # fmt: skip
    window = steady_window(run(*lines, limit=2))
    assert window is not None
    assert (window.start_s, window.end_s) == (0.1, 1.0)
    assert window.num_requests == 2
    assert window.output_throughput == pytest.approx((2 + 2 + 2) / 0.9)
    assert steady_window(run(*lines)) is None
    assert steady_window(run(*lines[:2], limit=2)) is None


def test_raw_round_trip_gives_the_same_statistics(tmp_path: Path) -> None:
    raw = run(record(0, 0.25, (0.1, 0.2, 0.4), text="hé"), record(1, 0.5, (), error="no"), limit=4)
    path = tmp_path / "deep" / "raw.jsonl"
    write_raw(path, raw)
    assert read_raw(path) == raw
    assert serve_stats(read_raw(path)) == serve_stats(raw)
    assert [p.name for p in path.parent.iterdir()] == ["raw.jsonl"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda lines: [], "not a raw record"),
        (lambda lines: [lines[0].replace('"format": 1', '"format": 2'), *lines[1:]], "format 2"),
        (lambda lines: [lines[0], lines[1].replace("0.4", "0.15")], "clock goes backwards"),
        (lambda lines: [lines[0], lines[1].replace("index", "indx")], "indx"),
        (lambda lines: ["{", *lines], "not a raw record"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path: Path, change: object, told: str) -> None:
    path = tmp_path / "raw.jsonl"
    write_raw(path, run(record(0, 0.0, (0.1, 0.2, 0.4))))
    lines = path.read_text().splitlines()
    path.write_text("\n".join(change(lines)))  # type: ignore[operator]
    with pytest.raises(UsageError, match=told):
        read_raw(path)


def test_a_full_disk_leaves_what_was_there() -> None:
    with pytest.raises(ResourceError, match="full"):
        write_raw_to_full()


def write_raw_to_full() -> None:
    import errno
    from unittest import mock

    with mock.patch("os.fsync", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        write_raw(Path("/tmp/sinterlm-never-written.jsonl"), run(record(0, 0.0, (0.1,))))


def test_a_clock_that_was_set_is_noticed() -> None:
    line = RunRecord(10.0, -50.0, 0.1, "2026-11-25T12:00:00+00:00", None, None)
    assert line.clock_jump_s == -60
    assert replace(line, wall_s=10.2).clock_jump_s is None


def test_json_is_strict() -> None:
    json.dumps(serve_stats(run(record(0, 0.0, (0.1,)))).to_json(), allow_nan=False)


def test_every_statistic_is_vllms() -> None:
    """The same records through vLLM's own ``calculate_metrics``; ``scripts/vllm_metrics.py``."""
    from itertools import accumulate

    theirs = json.loads(GOLDENS.read_text())
    lines = []
    for i, made in enumerate(records()):
        events = tuple(accumulate(made["gaps"], initial=made["ttft"]))
        lines.append(
            record(i, made["start"], events, usage_tokens=made["tokens"],
                   prompt_len=made["prompt_len"], error="x" if made["fails"] else None)
        )  # fmt: skip
    stats = serve_stats(run(*lines, duration=DURATION_S), PERCENTILES, GOODPUT)
    ours = stats.to_json()
    names = {"total_input": "total_input_tokens", "total_output": "total_output_tokens"}
    compared = {k: v for k, v in theirs.items() if k not in ("vllm", "rtfx")}
    assert len(compared) >= 30
    for name, value in compared.items():
        assert ours[names.get(name, name)] == pytest.approx(value, rel=1e-9), name
