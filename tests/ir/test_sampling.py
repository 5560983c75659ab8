"""The sampling twin against what the words of ``abi.h`` say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinterlm.ir.reference_sampling import (
    RowSampling,
    adjust,
    gumbel,
    keep,
    log_softmax,
    mix64,
    sample,
    uniform,
)

LOGITS = np.array([1.0, 3.0, 2.0, 3.0, -1.0, 0.0], np.float32)


def test_greedy_takes_the_lowest_of_the_best() -> None:
    drawn = sample(LOGITS, RowSampling(num_logprobs=3))
    assert drawn.token_id == 1 and drawn.rank == 1 and drawn.gap == 0
    assert drawn.top_ids == (1, 3, 2)
    assert drawn.logprob == drawn.top_logprobs[0] == pytest.approx(log_softmax(LOGITS)[1])
    assert np.exp(log_softmax(LOGITS)).sum() == pytest.approx(1, abs=1e-12)


def test_logprob_and_rank_are_of_the_raw_logits() -> None:
    drawn = sample(LOGITS, RowSampling(bias={4: 100.0}))
    assert drawn.token_id == 4 and drawn.rank == 6
    assert drawn.logprob == pytest.approx(log_softmax(LOGITS)[4])


def test_penalties_as_vllm_defines_them() -> None:
    params = RowSampling(
        repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5,
        prompt_tokens=(1, 4), output_tokens=(2, 2, 4),
    )  # fmt: skip
    expected = [1, 3 / 2, 2 / 2 - 2 * 0.5 - 0.25, 3, -1 * 2 - 0.5 - 0.25, 0]
    assert adjust(LOGITS, params).tolist() == expected


def test_mask_and_bias_come_first() -> None:
    params = RowSampling(bias={0: 5.0, 3: -np.inf}, allowed=(0, 2, 3), temperature=0.5)
    ninf = -np.inf
    assert adjust(LOGITS, params).tolist() == [12, ninf, 4, ninf, ninf, ninf]
    assert keep(adjust(LOGITS, params), params).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, [1, 3, 2, 0, 5, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 4}, [1, 3, 2, 0]),
        ({"top_k": 99}, [1, 3, 2, 0, 5, 4]),
        ({"min_p": 1.0}, [1, 3]),
        ({"min_p": 0.3}, [1, 3, 2]),
        ({"top_p": 1e-6}, [1]),
        ({"top_p": 0.5}, [1, 3]),  # shares add up to 0.389, 0.778, 0.921, 0.974, …
        ({"top_p": 0.8}, [1, 3, 2]),
        ({"top_p": 0.95}, [1, 3, 2, 0]),
        ({"min_p": 0.3, "top_p": 0.8}, [1, 3]),  # shares of what min_p left: 0.423, 0.845, 1
        ({"min_p": 0.3, "top_p": 0.9}, [1, 3, 2]),
        ({"top_k": 2, "top_p": 0.6}, [1, 3]),
        ({"top_k": 2, "top_p": 0.49}, [1]),
    ],
)
def test_filters(fields: dict[str, float], kept: list[int]) -> None:
    params = RowSampling(temperature=1.0, **fields)
    assert keep(LOGITS, params).tolist() == kept


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=60),
    st.floats(2.0**-7, 1.0, width=32),
    st.floats(0.0, 1.0, width=32),
    st.integers(0, 70),
)
def test_top_p_keeps_the_fewest_that_reach_it(
    logits: list[float], top_p: float, min_p: float, top_k: int
) -> None:
    scores = np.array(logits, np.float32)
    open_params = RowSampling(temperature=1.0, min_p=min_p, top_k=top_k)
    params = RowSampling(temperature=1.0, min_p=min_p, top_k=top_k, top_p=top_p)
    before, after = keep(scores, open_params), keep(scores, params)
    assert 1 <= len(after) <= len(before)
    assert np.array_equal(after, before[: len(after)]), "a prefix of the same order"
    weight = np.exp(scores[before].astype(np.float64) - scores.max())
    share = np.cumsum(weight) / weight.sum()
    assert share[len(after) - 1] >= top_p - 1e-9 or len(after) == len(before)
    assert len(after) == 1 or share[len(after) - 2] < top_p + 1e-9


def test_splitmix_finaliser() -> None:
    """The first outputs of splitmix64 seeded with 0, as published with its reference code."""
    golden = 0x9E3779B97F4A7C15
    states = np.array([golden * i % 2**64 for i in (1, 2, 3)], np.uint64)
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert mix64(states).tolist() == expected


def test_noise_depends_on_seed_position_and_id_alone() -> None:
    ids = np.arange(1000)
    u = uniform(3, 5, ids)
    assert np.array_equal(u.astype(np.float32).astype(np.float64), u), "exact in float32"
    assert u.min() > 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.03
    assert np.array_equal(uniform(3, 5, ids[17:18]), u[17:18])
    for other in (uniform(4, 5, ids), uniform(3, 6, ids)):
        assert abs(np.corrcoef(u, other)[0, 1]) < 0.1
    assert uniform(2**64 - 1, 2**31 - 1, ids).shape == u.shape


def test_draws_follow_the_softmax() -> None:
    probability = np.exp(log_softmax(LOGITS))
    draws = [
        sample(LOGITS, RowSampling(temperature=1.0, seed=9, position=p)).token_id
        for p in range(4000)
    ]
    share = np.bincount(draws, minlength=6) / len(draws)
    assert np.abs(share - probability).max() < 0.025
    cold = {sample(LOGITS, RowSampling(temperature=0.01, position=p)).token_id for p in range(50)}
    assert cold <= {1, 3}


def test_the_draw_is_the_largest_perturbed_score() -> None:
    params = RowSampling(temperature=0.7, top_k=4, seed=11, position=2)
    drawn = sample(LOGITS, params)
    ids = np.array([0, 1, 2, 3])
    scores = (LOGITS / np.float32(0.7))[ids] + gumbel(11, 2, ids)
    assert drawn.token_id == ids[scores.argmax()]
    assert drawn.gap == pytest.approx(np.sort(scores)[-1] - np.sort(scores)[-2])


def test_refuses_what_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="not finite"):
        sample(np.array([0, np.nan], np.float32), RowSampling())
    with pytest.raises(ValueError, match="no token is allowed"):
        sample(LOGITS, RowSampling(allowed=()))
