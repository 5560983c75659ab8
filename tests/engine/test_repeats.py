"""Several decode steps in one native call: when, and when not."""

from __future__ import annotations

import pytest

from sinterlm.engine.engine import Engine
from sinterlm.engine.outputs import Delta
from sinterlm.engine.sampling import SamplingParams
from tests.engine.fakes import make_engine
from tests.engine.texts import chat_assets, vocab_size

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def run(
    engine: Engine, *requests: SamplingParams, stream: bool = False, max_steps: int = 8
) -> list[list[Delta]]:
    """What each call of ``step`` gave, the requests submitted at once."""
    for i, params in enumerate(requests):
        engine.add_request(str(i), [1, 2, 3 + i], params, stream=stream)
    calls = []
    while engine.has_unfinished:
        calls.append(engine.step(max_steps=max_steps))
    return calls


def tokens(calls: list[list[Delta]]) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {}
    for delta in (delta for call in calls for delta in call):
        out.setdefault(delta.request_id, []).extend(delta.token_ids)
    return out


def test_decodes_run_on_until_the_first_is_full() -> None:
    plain, repeated = make_engine(), make_engine()
    requests = GREEDY, SamplingParams(temperature=1, seed=4, max_tokens=12, ignore_eos=True)
    want, got = run(plain, *requests, max_steps=1), run(repeated, *requests)
    assert tokens(got) == tokens(want)
    # The prompts and 1 token; 8; the 3 that the second one has left; 8 more of the first.
    assert [len(call) for call in got] == [2, 16, 6, 8]
    assert repeated.stats().steps == 20 and repeated.stats().kv_pages_used == 0


def test_a_stop_token_ends_the_call() -> None:
    free = tokens(run(make_engine(), GREEDY, max_steps=1))["0"]
    stop = free[6]
    params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[stop])
    engine = make_engine()
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
    assert all(len(call) == 1 for call in run(make_engine(), params))


def test_streamed_text_is_the_same_and_only_a_stop_string_keeps_to_single_steps() -> None:
    def text(calls: list[list[Delta]]) -> str:
        return "".join(delta.text for call in calls for delta in call)

    def engine() -> Engine:
        return make_engine(vocab_size=vocab_size(), assets=chat_assets())

    want = run(engine(), GREEDY, stream=True, max_steps=1)
    got = run(engine(), GREEDY, stream=True)
    assert text(got) == text(want) != "" and [len(call) for call in got] == [1, 8, 8, 3]
    assert [d.token_ids for call in got for d in call] == [d.token_ids for (d,) in want]
    stopped = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop=("never said",))
    calls = run(engine(), stopped, stream=True)
    assert text(calls) == text(want) and all(len(call) == 1 for call in calls)


def test_not_while_something_waits() -> None:
    engine = make_engine(max_num_seqs=1)
    calls = run(engine, GREEDY, GREEDY)
    sizes = [len(call) for call in calls]
    assert sizes[:20] == [1] * 20 and sizes[20:] == [1, 8, 8, 3]


def test_not_unless_the_caller_allows_it() -> None:
    engine = make_engine()
    engine.add_request("0", [1, 2, 3], GREEDY)
    while engine.has_unfinished:
        assert len(engine.step()) == 1


def test_only_as_far_as_pages_reach() -> None:
    """A pool of 6 pages of 4: two sequences of 3 + 20 tokens cannot both be whole."""
    engine = make_engine(num_pages=6, prefix_caching=False)
    want = tokens(run(make_engine(), GREEDY, GREEDY, max_steps=1))
    assert tokens(run(engine, GREEDY, GREEDY)) == want
    assert engine.stats().num_preemptions > 0 and engine.stats().kv_pages_used == 0
