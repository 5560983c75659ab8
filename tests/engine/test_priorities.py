"""Who goes first: priorities, arrival, room for short prompts beside long ones, and deadlines."""

from __future__ import annotations

import time

import pytest

from sinterlm.engine.engine import Engine
from sinterlm.engine.outputs import Delta
from sinterlm.engine.sampling import SamplingParams
from sinterlm.errors import UsageError
from tests.engine.fakes import make_engine
from tests.engine.test_engine import script, text_engine


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens)


def drain(engine: Engine) -> list[Delta]:
    deltas = []
    while engine.has_unfinished:
        deltas += engine.step()
    return deltas


def ends(deltas: list[Delta]) -> list[str]:
    return [delta.request_id for delta in deltas if delta.output is not None]


def alone(prompt: list[int], params: SamplingParams) -> tuple[int, ...]:
    engine = make_engine()
    engine.add_request("r", prompt, params)
    output = drain(engine)[-1].output
    assert output is not None
    return output.outputs[0].token_ids


def test_lower_runs_earlier_and_ties_by_arrival() -> None:
    engine = make_engine(max_num_seqs=1)
    for name, priority in (("c", 5), ("b1", 0), ("b2", 0), ("a", -2), ("d", 6)):
        engine.add_request(name, [1, 2], greedy(2), priority=priority)
    assert ends(drain(engine)) == ["a", "b1", "b2", "c", "d"]


def test_a_better_priority_takes_a_seat_and_an_equal_one_does_not() -> None:
    engine = make_engine(max_num_seqs=1)
    engine.add_request("batch", [5, 6, 7], greedy(12), priority=1)
    for _ in range(3):
        engine.step()
    engine.add_request("equal", [1, 2], greedy(3), priority=1)
    assert [d.request_id for d in engine.step()] == ["batch"]
    engine.add_request("urgent", [3, 4], greedy(3), priority=0)
    assert [d.request_id for d in engine.step()] == ["urgent"]
    deltas = drain(engine)
    assert ends(deltas) == ["urgent", "batch", "equal"]
    outputs = {d.request_id: d.output for d in deltas if d.output is not None}
    assert outputs["batch"].outputs[0].token_ids == alone([5, 6, 7], greedy(12))
    assert engine.stats().num_preemptions == 1


def test_the_last_in_order_gives_way_and_no_more_than_needed() -> None:
    engine = make_engine(num_pages=9, page_tokens=4, max_num_seqs=4)
    for name, priority in (("worst", 9), ("bad", 5), ("good", 1)):
        engine.add_request(name, list(range(10)), greedy(3), priority=priority, cache_salt=name)
    engine.step()  # three pages each: all nine
    engine.add_request("urgent", list(range(20, 28)), greedy(4), priority=0)
    engine.step()
    running = [r.group.request_id for r in engine.scheduler._running]
    assert running == ["urgent", "good", "bad"]
    assert ends(drain(engine)) == ["good", "bad", "urgent", "worst"]


def test_nobody_gives_way_in_vain() -> None:
    engine = make_engine(num_pages=10, page_tokens=4, max_num_seqs=4)
    engine.add_request("equal", list(range(30)), greedy(9), priority=0)
    engine.add_request("worse", [1, 2], greedy(9), priority=1)
    for _ in range(3):
        engine.step()
    engine.add_request("long", list(range(40, 60)), greedy(2), priority=0)  # even both would not do
    engine.step()
    assert engine.stats().num_preemptions == 0 and engine.stats().num_running == 2
    drain(engine)


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    engine = make_engine(max_num_batched_tokens=16, max_model_len=256, num_pages=80)
    engine.add_request("long", [i % 97 for i in range(200)], greedy(1))
    engine.add_request("short", [1, 2, 3], greedy(1))
    assert [d.request_id for d in engine.step()] == ["short"]
    engine.step()  # alone again, the long one has the whole step
    assert engine.scheduler._running[0].num_computed == 16 - 3 + 16
    rest = 0
    while engine.has_unfinished:
        engine.step()
        rest += 1
    assert rest == -(-(200 - 29) // 16)


def test_prompts_that_fit_go_in_order_of_arrival() -> None:
    engine = make_engine(max_num_batched_tokens=16)
    for i in range(4):
        engine.add_request(str(i), [i] * 8, greedy(1))
    assert [[d.request_id for d in engine.step()] for _ in range(2)] == [["0", "1"], ["2", "3"]]


def test_prefill_beside_decodes_has_a_budget_of_its_own() -> None:
    engine = make_engine(max_num_batched_tokens=16, max_mixed_prefill_tokens=5)
    engine.add_request("decode", [1], greedy(30))
    engine.step()
    engine.add_request("prompt", [2] * 16, greedy(1))
    for done in (5, 10, 15):
        assert [d.request_id for d in engine.step()] == ["decode"]
        assert engine.scheduler._running[1].num_computed == done


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("priority", 1.0), ("priority", True), ("priority", "high"), ("deadline", "soon"),
        ("deadline", float("nan")), ("deadline", True), ("cache_salt", ""), ("cache_salt", 7),
    ],
)  # fmt: skip
def test_bad_places(name: str, value: object) -> None:
    engine = make_engine()
    with pytest.raises(UsageError, match=f"{name}={value!r}"):
        engine.add_request("r", [1], greedy(1), **{name: value})  # type: ignore[arg-type]
    assert not engine.has_unfinished


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that ``perf_counter`` tells, in its only element."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_deadlines_end_what_runs_and_what_waits(clock: list[float]) -> None:
    engine = text_engine(max_num_seqs=2)
    script(engine, "abcdefghij")
    params = SamplingParams(max_tokens=50, n=2)
    engine.add_request("runs", [1], params, stream=True, deadline=103.0)
    engine.add_request("waits", [2], SamplingParams(), deadline=102.0)
    engine.add_request("later", [3], greedy(1), deadline=float("inf"))
    for now in (100.0, 101.9):
        clock[0] = now
        assert len(engine.step()) == 2
    clock[0] = 102.0
    first, *_ = engine.step()
    assert (first.request_id, first.token_ids, first.text) == ("waits", (), "")
    assert (first.finish_reason, first.stop_reason) == ("abort", "deadline")
    assert first.output is not None and first.output.outputs[0].token_ids == ()
    clock[0] = 110.0
    ended = engine.step()[:2]
    assert [(d.request_id, d.index, d.output is None) for d in ended] == [
        ("runs", 0, True), ("runs", 1, False),
    ]  # fmt: skip
    output = ended[1].output
    assert output is not None and [o.text for o in output.outputs] == ["abc", "abc"]
    assert {o.stop_reason for o in output.outputs} == {"deadline"}
    assert ends(drain(engine)) == ["later"] or not engine.has_unfinished
    stats = engine.stats()
    assert stats.kv_pages_used == 0 and stats.requests_finished["abort"] == 3


def test_a_deadline_in_time_changes_nothing(clock: list[float]) -> None:
    engine = make_engine()
    engine.add_request("r", [1], greedy(2), deadline=101.0)
    assert ends(drain(engine)) == ["r"]
    clock[0] = 200.0
    engine.add_request("r", [1], greedy(2))  # the same id again, without one
    assert ends(drain(engine)) == ["r"]
    assert engine.stats().requests_finished["abort"] == 0


def test_a_step_that_only_ends_things(clock: list[float]) -> None:
    engine = make_engine()
    engine.add_request("r", [1], greedy(2), deadline=99.0)
    (delta,) = engine.step()
    assert delta.stop_reason == "deadline" and not engine.has_unfinished
    assert engine.stats().steps == 0
