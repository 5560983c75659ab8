"""Guesses come from where the text stood before; what they change is the number of steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinterlm.engine.sampling import SamplingParams
from sinterlm.engine.speculation import NgramProposer
from tests.engine.fakes import make_engine
from tests.engine.test_engine import script, text_engine


def propose(
    history: list[int], *, num_tokens: int = 3, shortest: int = 1, longest: int = 3, most: int = 99
) -> list[int]:
    proposer = NgramProposer(num_tokens, shortest=shortest, longest=longest)
    return proposer.propose(np.array(history, np.int32), most).tolist()


@pytest.mark.parametrize(
    ("history", "options", "guess"),
    [
        ([1, 2, 3, 4, 9, 1, 2], {}, [3, 4, 9]),
        ([1, 2, 3, 4, 9, 1, 2], {"most": 2}, [3, 4]),
        ([1, 2, 3, 4, 9, 1, 2], {"most": 0}, []),
        ([1, 2, 3, 4, 9, 1, 2], {"shortest": 3}, []),
        ([1, 2, 5, 7, 2, 6, 8, 8, 1, 2], {}, [5, 7, 2]),  # the longer match, though older
        ([1, 2, 5, 7, 2, 6, 8, 8, 1, 2], {"longest": 1}, [6, 8, 8]),  # the latest
        ([4, 4, 4, 4, 4, 4], {}, [4, 4, 4]),  # not the latest of all: one token stands behind it
        ([4, 4], {"num_tokens": 5}, [4]),
        ([1, 2, 3], {}, []),
        ([1], {}, []),
    ],
)
def test_guesses(history: list[int], options: dict[str, int], guess: list[int]) -> None:
    assert propose(history, **options) == guess


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=40),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_a_guess_is_what_followed_the_longest_match(
    history: list[int], num_tokens: int, shortest: int, more: int
) -> None:
    expected: list[int] = []
    for length in range(shortest + more, shortest - 1, -1):
        ends = [
            i for i in range(length, len(history)) if history[i - length : i] == history[-length:]
        ]
        if length < len(history) and ends:
            complete = [i for i in ends if i + num_tokens <= len(history)]
            start = complete[-1] if complete else ends[0]
            expected = history[start : start + num_tokens]
            break
    found = propose(history, num_tokens=num_tokens, shortest=shortest, longest=shortest + more)
    assert found == expected


def test_right_guesses_save_steps_and_end_where_the_text_does() -> None:
    outputs = []
    for width in (0, 4):
        engine = text_engine(num_speculative_tokens=width, max_num_batched_tokens=32)
        script(engine, "abcabcabcabcabcabc stop abc")
        params = SamplingParams(max_tokens=40, temperature=0.0, stop="stop", logprobs=2)
        engine.add_request("r", [1], params, stream=True)
        deltas = []
        while engine.has_unfinished:
            deltas += engine.step()
        assert all(len(delta.token_ids) == 1 for delta in deltas)
        output = deltas[-1].output
        assert output is not None and "".join(d.text for d in deltas) == output.outputs[0].text
        outputs.append(output.outputs)
        stats = engine.stats()
        if width:
            assert stats.spec_accepted_tokens > 8 and stats.steps < len(deltas) - 8
        assert stats.generation_tokens_total == len(deltas)
        assert stats.kv_pages_used == 0
    assert outputs[0] == outputs[1]


def test_no_guess_while_min_tokens_bars_an_ending() -> None:
    engine = make_engine(num_speculative_tokens=4, max_num_batched_tokens=64)
    params = SamplingParams(max_tokens=6, min_tokens=6, stop_token_ids=[5], temperature=0.0)
    engine.add_request("r", [1, 2, 1, 2, 1, 2], params)
    while engine.has_unfinished:
        engine.step()
    assert engine.stats().spec_draft_tokens == 0
