"""The client against a server that answers by a script: what it saw, and when."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from scripts.mock_openai import Plan

from sinterlm.bench import client
from sinterlm.bench.client import Target
from sinterlm.bench.load import run_load
from sinterlm.bench.raw import RawRun, RequestRecord, read_raw
from sinterlm.bench.serve_stats import METRICS, serve_stats
from sinterlm.bench.workload import Load, Request
from sinterlm.errors import RuntimeFault, UsageError
from tests.bench.mock import Mock


def requests(count: int, output_len: int = 3) -> list[Request]:
    return [Request(f"bench-t-{i}", f"prompt {i}", 5, output_len, (1, 2, i)) for i in range(count)]


def ask(mock: Mock, plans: Sequence[Plan], load: Load | None = None, **target: Any) -> RawRun:
    mock.script(plans)
    to = Target(mock.url, "mock", **target)
    return run_load(to, load or Load(max_concurrency=4), requests(len(plans)))


def sent_run(mock: Mock, raw: RawRun) -> RawRun:
    """The run with the times at which the server sent; both share one clock."""
    notes = mock.sent()["sent"]
    lines = []
    for record in raw.requests:
        start = raw.run.zero_s + record.start_s
        events = tuple(at - start for at in notes[record.request_id][1:])
        lines.append(RequestRecord(**{**vars(record), "events_s": events}))
    return RawRun(raw.run, tuple(lines))


def test_every_metric_within_a_millisecond(mock: Mock) -> None:
    """Of what the server did; a machine that is busy elsewhere gets more than one try."""
    plans = [Plan((0.02 + 0.003 * i, *[0.004 + 0.001 * (i % 3)] * (4 + i % 4))) for i in range(12)]
    worst: dict[str, float] = {}
    for _ in range(8):
        raw = ask(mock, plans)
        theirs, ours = serve_stats(sent_run(mock, raw)), serve_stats(raw)
        worst = {}
        for name in METRICS:
            a, b = ours.spreads[name], theirs.spreads[name]
            assert a is not None and b is not None
            worst[name] = max(abs(a.mean - b.mean), abs(a.median - b.median))
        if max(worst.values()) < 1.0:
            break
    assert max(worst.values()) < 1.0, worst
    assert ours.total_output_tokens == sum(plan.num_tokens for plan in plans)
    for record, plan in zip(raw.requests, plans, strict=True):
        assert record.ttft_s >= plan.delays_s[0]
        assert record.latency_s >= sum(plan.delays_s)


def test_what_is_posted(mock: Mock) -> None:
    ask(mock, [Plan()], ignore_eos=True, extra_body={"temperature": 0.0}, send_token_ids=True)
    body = mock.sent()["bodies"]["bench-t-0"]
    assert body == {
        "model": "mock", "prompt": [1, 2, 0], "repetition_penalty": 1.0, "max_tokens": 3,
        "logprobs": None, "stream": True, "stream_options": {"include_usage": True},
        "ignore_eos": True, "temperature": 0.0,
    }  # fmt: skip
    ask(mock, [Plan()], backend="openai-chat")
    body = mock.sent()["bodies"]["bench-t-0"]
    assert body["messages"] == [{"role": "user", "content": "prompt 0"}]
    assert body["max_completion_tokens"] == 3
    assert "ignore_eos" not in body


def test_usage_wins_and_brings_the_prompt_length(mock: Mock) -> None:
    raw = ask(mock, [Plan((0.001, 0.001), tokens=(2, 5)), Plan((0.001,), sends_usage=False)])
    counted, silent = raw.requests
    assert (counted.output_len, counted.prompt_len) == (7, 7)
    assert (silent.usage_tokens, silent.output_len, silent.prompt_len) == (None, 1, 5)
    assert len(counted.events_s) == 2
    assert counted.text == " word" * 7


def test_usage_beside_choices_counts_for_a_sweep_alone(mock: Mock) -> None:
    (record,) = ask(mock, [Plan((0.001, 0.001), tokens=(2, 5), merges_usage=True)]).requests
    assert (record.usage_tokens, record.told_tokens, record.output_len) == (None, 7, 1)
    assert record.as_told().output_len == 7
    assert len(record.events_s) == 3


@pytest.mark.parametrize(
    ("fault", "told"),
    [("http", "HTTP 503.*overloaded"), ("drop", "Error"), ("error", "the engine died"),
     ("garbage", "JSONDecodeError"), ("cut", "broke off"), ("empty", "no chunk")],
)  # fmt: skip
def test_failures(mock: Mock, fault: Any, told: str) -> None:
    raw = ask(mock, [Plan((0.001, 0.001)), Plan((0.001, 0.001), fault=fault)])
    good, bad = raw.requests
    assert good.is_success
    assert not bad.is_success
    assert bad.error is not None

    assert re.search(told, bad.error), bad.error
    stats = serve_stats(raw)
    assert (stats.completed, stats.failed) == (1, 1)
    assert stats.total_output_tokens == 2


def test_an_early_end_is_counted(mock: Mock) -> None:
    raw = ask(mock, [Plan((0.001,)), Plan()])
    assert serve_stats(raw).short_outputs == 1


def test_no_server() -> None:
    raw = run_load(Target("http://127.0.0.1:9", "m"), Load(), requests(2))
    assert [record.is_success for record in raw.requests] == [False, False]
    with pytest.raises(RuntimeFault, match="warm-up"):
        run_load(Target("http://127.0.0.1:9", "m"), Load(num_warmups=1), requests(2))


def test_closed_loop_keeps_its_seats(mock: Mock) -> None:
    raw = ask(mock, [Plan((0.02,))] * 6, Load(max_concurrency=2))
    ends = sorted(record.end_s for record in raw.requests)
    starts = sorted(record.start_s for record in raw.requests)
    for number, start in enumerate(starts[2:]):
        assert start >= ends[number]
    assert max(r.start_s - r.arrival_s for r in raw.requests) > 0.03


def test_open_loop_sends_at_its_times(mock: Mock) -> None:
    raw = ask(mock, [Plan((0.2,))] * 6, Load(request_rate=100.0, burstiness=float("inf")))
    starts = [record.start_s for record in raw.requests]
    assert all(start >= 0.01 * (i + 1) - 1e-3 for i, start in enumerate(starts))
    assert raw.run.request_rate == 100.0


def test_conversations_carry_what_was_said(mock: Mock) -> None:
    mock.script([Plan((0.001, 0.001))])
    turns = [Request(f"bench-t-{i}", f"q{i}", 1, 2, conversation=i // 2) for i in range(4)]
    raw = run_load(Target(mock.url, "mock", backend="openai-chat"), Load(), turns)
    bodies = mock.sent()["bodies"]
    assert bodies["bench-t-2"]["messages"] == [{"role": "user", "content": "q2"}]
    assert [m["content"] for m in bodies["bench-t-3"]["messages"]] == ["q2", " word word", "q3"]
    assert raw.requests[3].start_s >= raw.requests[2].end_s


def test_target_refuses() -> None:
    with pytest.raises(UsageError, match="no URL"):
        Target("localhost:8000", "m")
    with pytest.raises(UsageError, match="token ids"):
        Target("http://x", "m", backend="openai-chat", send_token_ids=True)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name == "aiohttp":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UsageError, match=r"pip install 'sinterlm\[bench\]'"):
        client.import_http()


def test_chunks_split_anywhere() -> None:
    text = b'data: {"choices": [{"text": "\xc3\xa9"}]}\r\n\r\n: ping\n\ndata: [DONE]\n\n'
    whole, pieces = client._Stream(), client._Stream()
    whole.push(text, 1.0)
    for i in range(len(text)):
        pieces.push(text[i : i + 1], 1.0)
    for stream in (whole, pieces):
        stream.end()
        made = stream.record(requests(1)[0], 0, 0.0, 0.0, 200)
        assert (made.text, made.events_s, made.error) == ("é", (1.0,), None)


def test_command(
    mock: Mock, tmp_path: Path, capsys: pytest.CaptureFixture[str], test_environment: Path
) -> None:
    from sinterlm import cli
    from tests.bench.conftest import TINY

    raw = tmp_path / "raw.jsonl"
    words = ["bench", "serve", "--base-url", mock.url, "--tokenizer", str(TINY), "--num-prompts",
             "5", "--random-input-len", "4", "--random-output-len", "3", "--max-concurrency", "2",
             "--save-raw", str(raw), "--goodput", "ttft:1000", "--metric-percentiles", "50,90",
             "--save-result", "--result-dir", str(tmp_path), "--label", "x"]  # fmt: skip
    assert cli.main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["completed"], facts["model_id"], facts["max_concurrency"]) == (5, "mock", 2)
    assert facts["request_goodput"] == pytest.approx(facts["request_throughput"])
    assert {"p50_ttft_ms", "p90_itl_ms", "median_e2el_ms", "client_cpu"} <= set(facts)
    assert [p.name for p in tmp_path.glob("x-infqps-concurrency2-mock-*.json")]
    assert all(b["ignore_eos"] for b in mock.sent()["bodies"].values())
    assert cli.main(["bench", "recompute", str(raw), "--metric-percentiles", "50,90",
                     "--goodput", "ttft:1000", "--json"]) == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out) == facts
    mock.script([Plan((0.001,), fault="error")])
    assert cli.main(words) == 2
    told = capsys.readouterr()
    assert "no data" in told.out
    assert "all 5 requests failed" in told.err
    assert "the engine died" in told.err


def test_ctrl_c_keeps_what_was_answered(mock: Mock, tmp_path: Path, test_environment: Path) -> None:
    from tests.bench.conftest import TINY

    mock.script([Plan((0.001,)), Plan((0.001,)), Plan((30.0,))])
    raw = tmp_path / "raw.jsonl"
    words = ["--tokenizer", str(TINY), "--num-prompts", "3", "--random-input-len", "4"]
    words += ["--random-output-len", "1", "--max-concurrency", "1", "--save-raw", str(raw)]
    serve = [sys.executable, "-m", "sinterlm", "bench", "serve", "--base-url", mock.url]
    command = [*serve, *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + 60
        while len(mock.sent()["sent"]) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"interrupted" in said
    kept = read_raw(raw)
    assert not kept.run.is_complete
    assert [record.is_success for record in kept.requests] == [True, True]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--request-rate", "0"), "--request-rate 0"),
        (("--burstiness", "-1"), "--burstiness"),
        (("--dataset-name", "sharegpt"), "--dataset-path"),
        (("--dataset-path", "x"), "takes no --dataset-path"),
        (("--self-timed",), "timed_trace"),
        (("--ramp-up-strategy", "linear"), "--ramp-up-start-rps"),
        (("--ramp-up-strategy", "exponential", "--ramp-up-start-rps", "0", "--ramp-up-end-rps",
          "3"), "cannot start at 0"),
        (("--port", "9"), "names no model"),
    ],
)  # fmt: skip
def test_refused(words: Sequence[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    from sinterlm import cli

    assert cli.main(["bench", "serve", *words]) == 2
    assert told in capsys.readouterr().err
