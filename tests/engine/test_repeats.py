"""Several decode steps in one native call: when, and when not."""

from __future__ import annotations

import pytest

from sinterlm.engine.engine import Engine
from sinterlm.engine.outputs import Delta
from sinterlm.engine.sampling import SamplingParams
from tests.engine.fakes import make_engine

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def run(engine: Engine, *requests: SamplingParams, stream: bool = False) -> list[list[Delta]]:
    """What each call of ``step`` gave, the requests submitted at once."""
    for i, params in enumerate(requests):
        engine.add_request(str(i), [1, 2, 3 + i], params, stream=stream)
    calls = []
    while engine.has_unfinished:
        calls.append(engine.step(may_repeat=True))
    return calls


def tokens(calls: list[list[Delta]]) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {}
    for delta in (delta for call in calls for delta in call):
        out.setdefault(delta.request_id, []).extend(delta.token_ids)
    return out


def test_decodes_run_on_until_the_first_is_full() -> None:
    plain, repeated = make_engine(), make_engine(num_scheduler_steps=8)
    requests = GREEDY, SamplingParams(temperature=1, seed=4, max_tokens=12, ignore_eos=True)
    want, got = run(plain, *requests), run(repeated, *requests)
    assert tokens(got) == tokens(want)
    # The prompts and 1 token; 8; the 3 that the second one has left; 8 more of the first.
    assert [len(call) for call in got] == [2, 16, 6, 8]
    assert repeated.stats().steps == 20 and repeated.stats().kv_pages_used == 0


def test_a_stop_token_ends_the_call() -> None:
    free = tokens(run(make_engine(), GREEDY))["0"]
    stop = free[6]
    params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[stop])
    engine = make_engine(num_scheduler_steps=8)
    calls = run(engine, params)
    assert tokens(calls)["0"] == free[: free.index(stop) + 1]
    last = calls[-1][-1]
    assert (last.finish_reason, last.stop_reason) == ("stop", stop)
    assert engine.stats().steps == free.index(stop) + 1, "nothing is computed past it"


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, max_tokens=20, presence_penalty=0.5),
        SamplingParams(temperature=0, max_tokens=20, min_tokens=20, stop_token_ids=[5]),
    ],
)
def test_rules_that_change_keep_to_single_steps(params: SamplingParams) -> None:
    assert all(len(call) == 1 for call in run(make_engine(num_scheduler_steps=8), params))


def test_not_while_something_waits() -> None:
    engine = make_engine(max_num_seqs=1, num_scheduler_steps=8)
    calls = run(engine, GREEDY, GREEDY)
    sizes = [len(call) for call in calls]
    assert sizes[:20] == [1] * 20 and sizes[20:] == [1, 8, 8, 3]


def test_not_unless_the_caller_allows_it() -> None:
    engine = make_engine(num_scheduler_steps=8)
    engine.add_request("0", [1, 2, 3], GREEDY)
    while engine.has_unfinished:
        assert len(engine.step()) == 1


def test_only_as_far_as_pages_reach() -> None:
    """A pool of 6 pages of 4: two sequences of 3 + 20 tokens cannot both be whole."""
    engine = make_engine(num_pages=6, num_scheduler_steps=8, prefix_caching=False)
    want = tokens(run(make_engine(), GREEDY, GREEDY))
    assert tokens(run(engine, GREEDY, GREEDY)) == want
    assert engine.stats().num_preemptions > 0 and engine.stats().kv_pages_used == 0
