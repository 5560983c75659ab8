"""Whole schedules: whatever arrives when, however it is cut and preempted, the tokens are those of
each request computed by itself."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinterlm.engine.engine import Engine
from sinterlm.engine.outputs import RequestOutput
from sinterlm.engine.sampling import SamplingParams
from sinterlm.engine.scheduler import Schedule
from sinterlm.errors import ResourceError
from tests.engine.fakes import draw, make_engine

VOCAB = 97


@dataclass(frozen=True)
class Ask:
    prompt: tuple[int, ...]
    params: SamplingParams
    arrival: int


asks = st.builds(
    Ask,
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40).map(tuple),
    st.builds(
        SamplingParams,
        max_tokens=st.integers(1, 24),
        temperature=st.sampled_from([0.0, 1.0]),
        seed=st.integers(0, 3),
        n=st.sampled_from([1, 1, 1, 2]),
        logprobs=st.sampled_from([None, 0, 3]),
        stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=4),
    ),
    st.integers(0, 12),
)


def truth(ask: Ask, engine: Engine) -> list[int]:
    """The first sequence's tokens, computed one after the other from the whole history."""
    engine.add_request("truth", ask.prompt, ask.params)
    row = engine._groups["truth"].requests[0].row
    engine.abort(["truth"])
    history, out = list(ask.prompt), []
    while len(out) < ask.params.max_tokens:
        out.append(draw(history, VOCAB, row))
        history.append(out[-1])
        if out[-1] in ask.params.stop_ids:
            break
    return out


def watch(engine: Engine) -> None:
    """Check, after every decision, the order that the scheduler promises."""
    scheduler = engine.scheduler
    decide = scheduler.schedule

    def schedule() -> Schedule:
        decided = decide()
        running = [r.arrival for r in scheduler._running]
        waiting = [r.arrival for r in scheduler._waiting]
        assert running == sorted(running) and waiting == sorted(waiting)
        assert not running or not waiting or running[-1] < waiting[0]
        lost = {r.arrival for r in decided.preempted}
        assert lost <= set(waiting), "who lost pages waits"
        used = decided.num_tokens
        assert used <= scheduler.max_num_batched_tokens
        planned = {c.request.arrival: c.num_tokens for c in decided.chunks}
        assert set(planned) <= set(running)
        if set(running) - set(planned):
            assert used == scheduler.max_num_batched_tokens, "left out with budget to spare"
        for request in scheduler._running:
            assert request.pages and request.slot >= 0
        slots = [r.slot for r in scheduler._running]
        assert len(set(slots)) == len(slots)
        return decided

    scheduler.schedule = schedule  # type: ignore[method-assign]


def replay(engine: Engine, requests: list[Ask]) -> list[RequestOutput]:
    watch(engine)
    done: dict[str, RequestOutput] = {}
    pending = sorted(range(len(requests)), key=lambda i: (requests[i].arrival, i))
    step = 0
    while pending or engine.has_unfinished:
        while pending and requests[pending[0]].arrival <= step:
            i = pending.pop(0)
            engine.add_request(str(i), requests[i].prompt, requests[i].params)
        deltas = engine.step()
        assert len(deltas) <= engine._max_num_seqs
        done |= {d.request_id: d.output for d in deltas if d.output is not None}
        step += 1
        assert step < 5000, "starved"
    return [done[str(i)] for i in range(len(requests))]


@settings(max_examples=150)
@given(
    requests=st.lists(asks, min_size=1, max_size=12),
    page_tokens=st.integers(1, 9),
    spare_pages=st.integers(0, 6),
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(1, 40),
)
def test_any_schedule_gives_the_tokens_of_running_alone(
    requests: list[Ask], page_tokens: int, spare_pages: int, max_num_seqs: int, budget: int
) -> None:
    longest = max(len(a.prompt) + a.params.max_tokens - 1 for a in requests)
    engine = make_engine(
        num_pages=-(-longest // page_tokens) + spare_pages,
        page_tokens=page_tokens,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
    )
    outputs = replay(engine, requests)
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages
    assert engine._model.most_seqs <= max_num_seqs
    assert engine._model.most_tokens <= budget
    alone = make_engine(max_model_len=256)
    for ask, output in zip(requests, outputs, strict=True):
        assert output.prompt_token_ids == ask.prompt
        assert len(output.outputs) == ask.params.n
        first = output.outputs[0]
        assert list(first.token_ids) == truth(ask, alone)
        stopped = first.token_ids[-1] in ask.params.stop_ids
        assert first.finish_reason == ("stop" if stopped else "length")
        assert (first.logprobs is None) == (ask.params.logprobs is None)


def test_pages_running_out_preempt_and_recompute() -> None:
    """The schedules above do reach preemption; here it is certain."""
    params = SamplingParams(max_tokens=20, temperature=0.0)
    requests = [Ask((i, i + 1), params, 0) for i in range(4)]
    engine = make_engine(num_pages=8, page_tokens=3)
    outputs = replay(engine, requests)
    assert engine.scheduler.num_preemptions > 0
    for ask, output in zip(requests, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == truth(ask, make_engine())


def test_first_come_first_served() -> None:
    params = SamplingParams(max_tokens=6, temperature=0.0)
    requests = [Ask((i,) * (5 + i), params, 0) for i in range(6)]
    engine = make_engine(num_pages=6, page_tokens=4, max_num_seqs=2)
    firsts: list[str] = []
    for i, ask in enumerate(requests):
        engine.add_request(str(i), ask.prompt, ask.params)
    while engine.has_unfinished:
        for delta in engine.step():
            if delta.request_id not in firsts:
                firsts.append(delta.request_id)
    assert firsts == [str(i) for i in range(6)]


def test_decodes_go_before_prefill_chunks() -> None:
    engine = make_engine(max_num_batched_tokens=4, page_tokens=4)
    params = SamplingParams(max_tokens=30, temperature=0.0)
    engine.add_request("decode", [1], params)
    engine.step()
    engine.add_request("prefill", [2] * 30, params)
    for _ in range(5):  # three prompt tokens a step beside the decode: it never waits
        assert [d.request_id for d in engine.step()] == ["decode"]


def test_a_request_that_can_never_fit_is_refused_with_the_numbers() -> None:
    engine = make_engine(num_pages=4, page_tokens=4)  # 16 tokens
    with pytest.raises(ResourceError, match=r"10 tokens with up to 8 new.*5 KV pages.*4"):
        engine.add_request("a", [1] * 10, SamplingParams(max_tokens=8))
    assert not engine.has_unfinished
    engine.add_request("b", [1] * 10, SamplingParams(max_tokens=7))  # the last one is not cached
    while engine.has_unfinished:
        engine.step()


def test_abort_frees_pages_whether_running_or_waiting() -> None:
    engine = make_engine(max_num_seqs=1)
    for name in ("running", "waiting"):
        engine.add_request(name, [1, 2, 3], SamplingParams(max_tokens=50, temperature=0.0))
    engine.step()
    engine.step()
    outputs = engine.abort(["running", "waiting", "unknown"])
    assert [o.outputs[0].finish_reason for o in outputs] == ["abort", "abort"]
    assert [len(o.outputs[0].token_ids) for o in outputs] == [2, 0]
    assert outputs[1].metrics.first_token_time is None
    assert not engine.has_unfinished and engine.step() == []
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages
