"""Whole schedules: whatever arrives when, however it is cut, shared, guessed and preempted, the
tokens are those of each request computed by itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from sinterlm.engine.engine import Engine
from sinterlm.engine.outputs import PromptLogprobs, RequestOutput
from sinterlm.engine.sampling import SamplingParams
from sinterlm.engine.schedule import Schedule
from sinterlm.errors import ResourceError
from tests.engine.fakes import draw, make_engine, ranking

VOCAB = 11  # few enough that a guess is often right
#: Beginnings that prompts share, up to any length.
HEADS = tuple(tuple((i * i + i * step) % VOCAB for i in range(30)) for step in (1, 4))


@dataclass(frozen=True)
class Ask:
    prompt: tuple[int, ...]
    params: SamplingParams
    arrival: int
    priority: int = 0
    cache_salt: str | None = None


prompts = st.builds(
    lambda head, shared, tail: HEADS[head][:shared] + tail,
    st.integers(0, len(HEADS) - 1),
    st.integers(0, 30),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12).map(tuple),
)
asks = st.builds(
    Ask,
    prompts,
    st.builds(
        SamplingParams,
        max_tokens=st.integers(1, 24),
        temperature=st.sampled_from([0.0, 1.0]),
        seed=st.integers(0, 3),
        n=st.sampled_from([1, 1, 1, 2]),
        logprobs=st.sampled_from([None, 0, 3]),
        prompt_logprobs=st.sampled_from([None, None, 0, 2]),
        frequency_penalty=st.sampled_from([0.0, 0.0, 0.5]),
        min_tokens=st.sampled_from([0, 0, 1]),
        stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=2),
        allowed_token_ids=st.sampled_from([None, None, (1, 4, 8), range(2, VOCAB)]).map(
            lambda ids: None if ids is None else list(ids)
        ),
    ),
    st.integers(0, 12),
    st.sampled_from([0, 0, 1, -3]),
    st.sampled_from([None, None, "a"]),
)


def truth(ask: Ask, engine: Engine) -> list[int]:
    """The first sequence's tokens, computed one after the other from the whole history."""
    engine.add_request("truth", ask.prompt, ask.params)
    request = engine._groups["truth"].requests[0]
    engine.abort(["truth"])
    row, later = request.row, request.row_after_min_tokens
    history, out = list(ask.prompt), []
    while len(out) < ask.params.max_tokens:
        if later is not None and len(out) >= ask.params.min_tokens:
            row, later = later, None
        out.append(draw(history, VOCAB, row))
        history.append(out[-1])
        if out[-1] in ask.params.stop_ids and len(out) >= ask.params.min_tokens:
            break
    return out


def check_prompt_logprobs(ask: Ask, told: PromptLogprobs | None) -> None:
    """Each prompt token's rank among the model's opinions of what comes before it."""
    wanted = ask.params.prompt_logprobs
    if wanted is None or told is None:
        assert wanted is told
        return
    assert len(told) == len(ask.prompt) and told[0] is None
    for i, entry in enumerate(told[1:], start=1):
        order = ranking(ask.prompt[:i], VOCAB, None)
        assert entry is not None and next(iter(entry)) == ask.prompt[i]
        assert set(entry) == {ask.prompt[i], *order[:wanted]}
        for token, told_of in entry.items():
            assert told_of.rank == order.index(token) + 1
            assert told_of.logprob == -0.5 * told_of.rank


def watch(engine: Engine) -> None:
    """Check, after every decision, what the scheduler promises."""
    scheduler = engine.scheduler
    decide = scheduler.schedule

    def schedule(*, max_steps: int = 1, prompts_first: bool = False) -> Schedule:
        decoding = {r for r in scheduler._running if r.num_uncomputed == 1}
        decided = decide(max_steps=max_steps, prompts_first=prompts_first)
        assert 1 <= decided.num_steps <= max_steps
        check_queues(engine, decided)
        check_room(engine, decided, decoding, prompts_first)
        check_pages(engine)
        return decided

    scheduler.schedule = schedule  # type: ignore[method-assign]


def check_queues(engine: Engine, decided: Schedule) -> None:
    scheduler = engine.scheduler
    running, waiting = scheduler._running, scheduler._waiting
    assert [r.order for r in running] == sorted(r.order for r in running)
    assert [r.order for r in waiting] == sorted(r.order for r in waiting)
    for priority in {r.group.priority for r in running}:
        lasts = [r.arrival for r in running if r.group.priority == priority]
        firsts = [r.arrival for r in waiting if r.group.priority == priority]
        assert max(lasts) < min(firsts, default=1 << 30), "overtaken within a priority"
    assert set(decided.preempted) <= set(waiting), "who lost pages waits"
    assert {c.request for c in decided.chunks} <= set(running)
    slots = [r.slot for r in running]
    assert len(set(slots)) == len(slots) and all(slot >= 0 for slot in slots)


def check_room(
    engine: Engine, decided: Schedule, decoding: set[object], prompts_first: bool
) -> None:
    limits = engine.step_limits
    used = decided.num_tokens
    rows = sum(chunk.num_rows for chunk in decided.chunks)
    prefill = sum(c.num_tokens - c.num_drafts for c in decided.chunks if c.request not in decoding)
    assert used <= limits.max_num_batched_tokens and rows <= limits.max_sample_rows
    decodes = [c for c in decided.chunks if c.request in decoding]
    most_prefill = limits.max_mixed_prefill_tokens if decodes else limits.max_num_batched_tokens
    assert prefill <= most_prefill
    left_out = set(engine.scheduler._running) - {c.request for c in decided.chunks}
    if prompts_first and not decodes and decided.chunks:
        left_out -= decoding  # they wait for prompts
    assert not left_out & decoding or used == limits.max_num_batched_tokens
    if left_out:
        full = used == limits.max_num_batched_tokens or rows == limits.max_sample_rows
        assert full or prefill == most_prefill, "left out for no reason"


def check_pages(engine: Engine) -> None:
    pool, running = engine.scheduler.pool, engine.scheduler._running
    holders = Counter(page for request in running for page in request.pages)
    assert all(pool.ref_count(page) == holders[page] for page in range(pool.num_pages))
    assert pool.num_free == pool.num_pages - len(holders)
    for request in running:
        assert len(set(request.pages)) == len(request.pages) >= 1
        assert request.num_computed < request.num_tokens
        for page in request.pages[request.num_named :]:
            assert holders[page] == 1, "a page that is not full is shared"


def replay(
    engine: Engine, requests: list[Ask], *, prompts_first: bool = False
) -> list[RequestOutput]:
    watch(engine)
    done: dict[str, RequestOutput] = {}
    pending = sorted(range(len(requests)), key=lambda i: (requests[i].arrival, i))
    step = 0
    while pending or engine.has_unfinished:
        while pending and requests[pending[0]].arrival <= step:
            i = pending.pop(0)
            ask = requests[i]
            engine.add_request(
                str(i), ask.prompt, ask.params, priority=ask.priority, cache_salt=ask.cache_salt
            )
        deltas = engine.step(
            max_steps=1 if pending else engine.step_limits.num_scheduler_steps,
            prompts_first=prompts_first,
        )
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
    mixed=st.integers(1, 40),
    spare_rows=st.integers(0, 8),
    prefix_caching=st.booleans(),
    num_speculative_tokens=st.sampled_from([0, 0, 1, 4]),
    num_scheduler_steps=st.sampled_from([1, 2, 5]),
    prompts_first=st.booleans(),
)
def test_any_schedule_gives_the_tokens_of_running_alone(
    requests: list[Ask],
    page_tokens: int,
    spare_pages: int,
    max_num_seqs: int,
    budget: int,
    mixed: int,
    spare_rows: int,
    prefix_caching: bool,
    num_speculative_tokens: int,
    num_scheduler_steps: int,
    prompts_first: bool,
) -> None:
    longest = max(len(a.prompt) + a.params.max_tokens - 1 for a in requests)
    engine = make_engine(
        vocab_size=VOCAB,
        num_pages=-(-longest // page_tokens) + spare_pages,
        page_tokens=page_tokens,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_mixed_prefill_tokens=mixed,
        max_sample_rows=max_num_seqs + spare_rows,
        prefix_caching=prefix_caching,
        num_speculative_tokens=num_speculative_tokens,
        num_scheduler_steps=num_scheduler_steps,
    )
    outputs = replay(engine, requests, prompts_first=prompts_first)
    stats = engine.stats()
    assert stats.kv_pages_used == 0
    assert engine._model.most_seqs <= max_num_seqs
    assert engine._model.most_tokens <= budget
    check_counters(engine, outputs)
    alone = make_engine(vocab_size=VOCAB, max_model_len=256)
    for ask, output in zip(requests, outputs, strict=True):
        assert output.prompt_token_ids == ask.prompt
        assert len(output.outputs) == ask.params.n
        first = output.outputs[0]
        assert list(first.token_ids) == truth(ask, alone)
        stopped = first.token_ids[-1] in ask.params.stop_ids
        assert first.finish_reason == "length" or stopped
        assert (first.logprobs is None) == (ask.params.logprobs is None)
        check_prompt_logprobs(ask, output.prompt_logprobs)
    event(f"preempted: {stats.num_preemptions > 0}")
    event(f"found in the cache: {stats.prefix_cache_hits > 0}")
    event(f"guessed right: {stats.spec_accepted_tokens > 0}")
    event(f"several steps at once: {engine._model.num_repeats > 0}")


def check_counters(engine: Engine, outputs: list[RequestOutput]) -> None:
    stats = engine.stats()
    drawn = sum(len(c.token_ids) for o in outputs for c in o.outputs)
    assert stats.generation_tokens_total == drawn
    assert stats.prompt_tokens_total == sum(len(o.prompt_token_ids) for o in outputs)
    assert stats.steps == engine._model.num_steps and stats.step_seconds_total > 0
    assert sum(stats.requests_finished.values()) == sum(len(o.outputs) for o in outputs)
    assert stats.spec_accepted_tokens <= stats.spec_draft_tokens
    assert (stats.prefix_cache_queries > 0) == engine._prefix_caching
    assert stats.prefix_cache_hits >= sum(o.num_cached_tokens for o in outputs)
    assert stats.prefix_cache_hits <= stats.prefix_cache_queries
    for output in outputs:
        assert 0 <= output.num_cached_tokens < len(output.prompt_token_ids)


def test_pages_running_out_preempt_and_recompute() -> None:
    """The schedules above do reach preemption; here it is certain."""
    params = SamplingParams(max_tokens=20, temperature=0.0)
    requests = [Ask((i, i + 1), params, 0) for i in range(4)]
    engine = make_engine(num_pages=8, page_tokens=3, vocab_size=VOCAB)
    outputs = replay(engine, requests)
    assert engine.stats().num_preemptions > 0
    for ask, output in zip(requests, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == truth(ask, make_engine(vocab_size=VOCAB))


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


def test_decodes_wait_for_prompts_that_fill_half_a_step() -> None:
    engine = make_engine(max_num_batched_tokens=16, page_tokens=4, max_mixed_prefill_tokens=4)
    params = SamplingParams(max_tokens=30, temperature=0.0)
    engine.add_request("decode", [1], params)
    engine.step(prompts_first=True)
    engine.add_request("long", [2] * 20, params)
    assert engine.step(prompts_first=True) == []  # 16 tokens of the prompt, alone
    drew = [d.request_id for d in engine.step(prompts_first=True)]
    assert drew == ["decode", "long"]  # the 4 that were left, beside the decode
    engine.add_request("half", [3] * 8, params)
    assert [d.request_id for d in engine.step(prompts_first=True)] == ["half"]
    engine.add_request("short", [4] * 3, params)
    drew = [d.request_id for d in engine.step(prompts_first=True)]
    assert drew == ["decode", "long", "half", "short"]


def test_prompts_without_pages_do_not_keep_decodes_waiting() -> None:
    engine = make_engine(num_pages=6, page_tokens=4, max_num_batched_tokens=16)
    params = SamplingParams(max_tokens=8, temperature=0.0)
    for name in ("a", "b", "c"):
        engine.add_request(name, [1] * 12, params)
    for _ in range(60):
        engine.step(prompts_first=True)
    assert not engine.has_unfinished


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
