"""Metrics on made-up logits: by hand, against plain formulas, and where they must refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinterlm.bench import eval_metrics
from sinterlm.bench.eval_metrics import bootstrap_mean, compare, log_softmax, perplexity, token_nll
from sinterlm.errors import RuntimeFault

#: Probabilities 1/2, 1/4, 1/4 and 1/4, 1/4, 1/2, shifted by constants that softmax ignores.
P = np.log(np.array([[0.5, 0.25, 0.25]], np.float32)) + np.float32(3.0)
Q = np.log(np.array([[0.25, 0.25, 0.5]], np.float32)) - np.float32(1.0)
TARGET = np.array([2], np.int32)


def test_by_hand() -> None:
    deltas = compare(P, Q, TARGET)
    # ½·ln(½ / ¼) + ¼·ln 1 + ¼·ln(¼ / ½) = ¼·ln 2
    assert deltas.kl == pytest.approx([0.25 * math.log(2)], rel=1e-6)
    assert deltas.nll == pytest.approx([math.log(2)], rel=1e-6)
    assert deltas.agrees.tolist() == [False]
    assert deltas.max_delta == pytest.approx([4 + math.log(2)], rel=1e-6)
    assert token_nll(P, TARGET) == pytest.approx([math.log(4)], rel=1e-6)


def test_perplexity_of_a_fair_die_is_its_sides() -> None:
    assert perplexity(token_nll(np.zeros((4, 6), np.float32), np.arange(4, dtype=np.int32))) == (
        pytest.approx(6.0, rel=1e-12)
    )


def test_kl_has_a_direction() -> None:
    skewed = np.array([[2.0, 0.0, -3.0]], np.float32)
    there, back = compare(P, skewed, TARGET).kl[0], compare(skewed, P, TARGET).kl[0]
    assert abs(there - back) > 0.1


def test_identical_logits_diverge_by_nothing() -> None:
    logits = np.random.default_rng(1).normal(0, 9, (50, 301)).astype(np.float32)
    deltas = compare(logits, logits.copy(), np.zeros(50, np.int32))
    assert not deltas.kl.any() and not deltas.max_delta.any() and deltas.agrees.all()


def test_a_tie_goes_to_the_lowest_id() -> None:
    tied, first = np.float32([[1, 1, 0]]), np.float32([[1, 0, 0]])
    assert compare(tied, first, TARGET).agrees[0]
    assert not compare(tied, np.float32([[0, 1, 0]]), TARGET).agrees[0]


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 200.0))
def test_kl_is_the_plain_formula_and_never_negative(seed: int, scale: float) -> None:
    generator = np.random.default_rng(seed)
    p, q = (generator.normal(0, scale, (3, 40)).astype(np.float32) for _ in range(2))
    kl = compare(p, q, np.zeros(3, np.int32)).kl
    log_p, log_q = (
        x.astype(float) - np.logaddexp.reduce(x.astype(float), axis=1, keepdims=True)
        for x in (p, q)
    )
    np.testing.assert_allclose(kl, (np.exp(log_p) * (log_p - log_q)).sum(axis=1), rtol=1e-9,
                               atol=1e-12)  # fmt: skip
    assert (kl >= -1e-12).all()


def test_huge_logits_stay_finite() -> None:
    row = log_softmax(np.float32([[3e38, -3e38, 0]]))
    assert row[0, 0] == 0.0 and np.isfinite(row).all()


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(2)
    p, q = (generator.normal(size=(17, 23)).astype(np.float32) for _ in range(2))
    targets = generator.integers(0, 23, 17).astype(np.int32)
    whole, whole_nll = compare(p, q, targets), token_nll(p, targets)
    monkeypatch.setattr(eval_metrics, "_BLOCK_ELEMENTS", 23 * 5)
    parts = compare(p, q, targets)
    for name in ("nll", "kl", "agrees", "max_delta"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    np.testing.assert_array_equal(token_nll(p, targets), whole_nll)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_refused(
    bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_metrics, "_BLOCK_ELEMENTS", 8)  # two rows a block: rows are counted on
    good, broken = np.zeros((6, 4), np.float32), np.zeros((6, 4), np.float32)
    broken[3, 1] = bad
    targets = np.zeros(6, np.int32)
    for attempt in (
        lambda: compare(good, broken, targets),
        lambda: compare(broken, good, targets),
        lambda: token_nll(broken, targets),
    ):
        with pytest.raises(RuntimeFault, match="row 3 "):
            attempt()


def test_interval_of_a_constant_is_the_constant() -> None:
    assert bootstrap_mean(np.full(10, 0.5), [3, 3, 4]) == (0.5, 0.5)


def test_interval_weighs_windows_by_their_tokens() -> None:
    """Twenty windows of one token at 1 and twenty of nine at 0: 0.1 by token, 0.5 by window."""
    values = np.repeat([1.0, 0.0], [20, 180])
    low, high = bootstrap_mean(values, [1] * 20 + [9] * 20) or (1.0, 0.0)
    assert 0.03 < low < 0.1 < high < 0.25


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(60):
        values = np.random.default_rng(seed).exponential(1.0, 400)
        low, high = bootstrap_mean(values, [10] * 40) or (1.0, 0.0)
        assert low < values.mean() < high
        hits += low < 1.0 < high
    assert 50 <= hits < 60


def test_one_window_has_no_interval() -> None:
    assert bootstrap_mean(np.ones(5), [5]) is None
