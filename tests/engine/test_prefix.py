"""Prefix caching: what is shared, with whom, for how long, and what it saves."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest

from sinterlm.engine import prefix
from sinterlm.engine.engine import Engine
from sinterlm.engine.outputs import RequestOutput
from sinterlm.engine.prefix import root_digest
from sinterlm.engine.sampling import SamplingParams
from tests.engine.fakes import FakeModel, make_engine

GREEDY = SamplingParams(temperature=0.0, max_tokens=2)
PROMPT = list(range(3, 43))  # ten pages of four


def run(
    engine: Engine,
    *prompts: list[int],
    params: SamplingParams = GREEDY,
    cache_salt: str | None = None,
) -> list[RequestOutput]:
    """All prompts at once."""
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, params, cache_salt=cache_salt)
    done = {}
    while engine.has_unfinished:
        done |= {d.request_id: d.output for d in engine.step() if d.output is not None}
    return [done[str(i)] for i in range(len(prompts))]


def computed(engine: Engine) -> int:
    """Tokens that the model was given so far."""
    model = engine._model
    assert isinstance(model, FakeModel)
    return model.num_tokens


def tokens(output: RequestOutput) -> tuple[int, ...]:
    return output.outputs[0].token_ids


def test_a_prompt_seen_before_computes_its_last_page_alone() -> None:
    engine = make_engine(max_num_batched_tokens=64)
    (first,) = run(engine, PROMPT)
    before = computed(engine)
    (again,) = run(engine, PROMPT)
    # Nine pages are found; of the tenth, the last token has to be computed, so all of it is.
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 36)
    assert computed(engine) - before == 4 + 1
    assert tokens(again) == tokens(first) == tokens(run(make_engine(), PROMPT)[0])
    stats = engine.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (80, 36)
    assert stats.kv_pages_used == 0 and stats.kv_pages_cached == 10


def test_only_what_is_equal_from_the_beginning_is_shared() -> None:
    engine = make_engine(max_num_batched_tokens=64)
    run(engine, PROMPT)
    changed = PROMPT.copy()
    changed[9] += 1  # in the third page
    (other,) = run(engine, changed)
    assert other.num_cached_tokens == 8
    (later,) = run(engine, PROMPT[4:])  # the same pages, one place further on
    assert later.num_cached_tokens == 0


def test_salts_keep_requests_apart() -> None:
    engine = make_engine(max_num_batched_tokens=64)
    found = [
        run(engine, PROMPT, cache_salt=salt)[0].num_cached_tokens
        for salt in (None, "a", "b", "a", None)
    ]
    assert found == [0, 0, 0, 36, 36]


def test_names_are_a_chain_of_sha256() -> None:
    engine = make_engine(page_tokens=4, max_num_batched_tokens=64)
    run(engine, PROMPT[:9], params=SamplingParams(max_tokens=1), cache_salt="ä")
    name, names = root_digest("ä"), []
    for start in (0, 4):
        page = np.array(PROMPT[start : start + 4], "<i4")
        name = hashlib.sha256(name + page.tobytes()).digest()
        names.append(name)
    pool = engine.scheduler.pool
    assert [pool.find(name) is not None for name in names] == [True, True]
    assert len({root_digest(None), root_digest("a"), root_digest("b")}) == 3


def test_each_page_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, real = [], hashlib.sha256

    def sha256(data: bytes) -> object:
        hashed.append(data)
        return real(data)

    monkeypatch.setattr(prefix, "hashlib", SimpleNamespace(sha256=sha256))
    engine = make_engine(max_num_batched_tokens=5, max_num_seqs=1)
    engine.add_request("r", PROMPT, SamplingParams(temperature=0.0, max_tokens=20))
    engine.add_request("waits", PROMPT, SamplingParams(temperature=0.0, max_tokens=20))
    while engine.has_unfinished:
        engine.step()
    root, pages = 1, (40 + 19) // 4
    assert len(hashed) == 2 * (root + pages)


def test_n_sequences_compute_their_prompt_once() -> None:
    engine = make_engine(max_num_batched_tokens=64)
    params = SamplingParams(n=4, seed=1, max_tokens=1)
    (output,) = run(engine, PROMPT, params=params)
    # All four start in one step: three of them read what the first writes in it.
    assert computed(engine) == 40 + 3 * 4
    assert len({one.token_ids for one in output.outputs}) > 1
    assert output.num_cached_tokens == 0, "the first sequence found nothing"


@pytest.mark.parametrize("budget", [7, 16, 64])
def test_equal_prompts_that_arrive_together_are_computed_once(budget: int) -> None:
    engine = make_engine(max_num_batched_tokens=budget)
    params = SamplingParams(temperature=0.0, max_tokens=1)
    outputs = run(engine, PROMPT, PROMPT, PROMPT, params=params)
    assert len({tokens(output) for output in outputs}) == 1
    # Each computes its last page; where chunks end inside a page, two may compute that page.
    assert computed(engine) <= 40 + 2 * 4 + 3 * 4


def test_an_answer_is_found_by_the_next_turn() -> None:
    engine = make_engine(max_num_batched_tokens=64)
    (first,) = run(engine, PROMPT, params=SamplingParams(temperature=0.0, max_tokens=21))
    turn = PROMPT + list(tokens(first)) + [1, 2, 3]
    (second,) = run(engine, turn)
    assert second.num_cached_tokens == 60  # the 21st token was drawn, never computed
    assert tokens(second) == tokens(run(make_engine(), turn)[0])


def test_least_recently_used_goes_first() -> None:
    engine = make_engine(num_pages=24, max_num_batched_tokens=64, max_num_seqs=1)
    first, second = PROMPT, [t + 1 for t in PROMPT]
    run(engine, first, second)  # ten pages each, and one more that is not full
    run(engine, first)  # used again
    run(engine, [t + 2 for t in PROMPT])  # takes what is free, then the oldest: the second's tail
    assert run(engine, first)[0].num_cached_tokens == 36
    assert run(engine, second)[0].num_cached_tokens < 36


def test_reset_forgets() -> None:
    engine = make_engine(max_num_batched_tokens=64)
    run(engine, PROMPT)
    engine.add_request("running", PROMPT, SamplingParams(temperature=0.0, max_tokens=9))
    engine.step()
    engine.reset_prefix_cache()
    assert engine.stats().kv_pages_cached == 0 < engine.stats().kv_pages_used
    (again,) = run(engine, PROMPT)
    assert again.num_cached_tokens == 0
    assert run(engine, PROMPT)[0].num_cached_tokens == 36


def test_without_caching_nothing_is_found() -> None:
    engine = make_engine(max_num_batched_tokens=64, prefix_caching=False)
    outputs = run(engine, PROMPT, PROMPT) + run(engine, PROMPT)
    assert [o.num_cached_tokens for o in outputs] == [0, 0, 0]
    stats = engine.stats()
    assert stats.prefix_cache_queries == stats.prefix_cache_hits == stats.kv_pages_cached == 0


def test_prompt_logprobs_are_computed_and_leave_pages_behind() -> None:
    engine = make_engine(max_num_batched_tokens=64, max_sample_rows=9)
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=1)
    (first,) = run(engine, PROMPT, params=params)
    (again,) = run(engine, PROMPT, params=params)
    assert again.num_cached_tokens == 0 and again.prompt_logprobs == first.prompt_logprobs
    assert run(engine, PROMPT)[0].num_cached_tokens == 36


def test_preempted_requests_find_their_pages_again() -> None:
    def total(caching: bool) -> int:
        engine = make_engine(num_pages=64, max_num_seqs=1, prefix_caching=caching)
        engine.add_request("late", PROMPT, SamplingParams(temperature=0.0, max_tokens=9))
        for _ in range(5):
            engine.step()
        engine.add_request("urgent", [1, 2, 3], GREEDY, priority=-1)
        while engine.has_unfinished:
            engine.step()
        assert engine.stats().num_preemptions == 1
        return computed(engine)

    assert total(caching=True) <= total(caching=False) - 40
