"""The roofline's counts against counting one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinterlm.artifact.manifest import OpCost
from sinterlm.runtime.roofline import Step, load_of, roof_seconds, step_loads, total_bytes


@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 50))
def test_pairs_and_cached_tokens_as_counted(tokens: int, before: int, window: int) -> None:
    context = tokens + before
    seen: set[int] = set()
    pairs = 0
    for query in range(before, context):
        first = max(0, query - window + 1) if window else 0
        keys = range(first, query + 1)
        pairs += len(keys)
        seen.update(keys)
    step = Step(tokens, context)
    assert step.pairs(window) == pairs
    assert step.cached_tokens(window) == len(seen)


def test_load_is_the_formula_of_op_cost() -> None:
    op = OpCost("attention", 0, 1000, 10, 7, 3, 100, 50, 2)
    load = load_of(op, Step(num_tokens=4, context_len=6, num_rows=2))
    assert load.nbytes == 1000 + 4 * 10 + 2 * 7 + 6 * 3
    assert load.flops == 4 * 100 + 2 * 50 + (3 + 4 + 5 + 6) * 2


def test_roof_is_the_slower_of_the_two_per_op() -> None:
    streams = OpCost("norm_lm_head_sample", -1, 1000, 0, 0, 0, 10, 0, 0)
    computes = OpCost("norm_gate_up_act", 0, 10, 0, 0, 0, 1000, 0, 0)
    loads = step_loads([streams, computes], [0], Step(1, 1))
    assert total_bytes(loads) == 1010
    assert roof_seconds(loads, 100.0, 50.0) == pytest.approx(1000 / 100 + 1000 / 50)
    assert [load.is_memory_bound(100.0, 50.0) for load in loads] == [True, False]


def test_windows_apply_to_their_own_layer() -> None:
    attention = [OpCost("attention", layer, 0, 0, 0, 1, 0, 0, 1) for layer in (0, 1)]
    full, windowed = step_loads(attention, [0, 8], Step(1, 100))
    assert (full.nbytes, full.flops) == (100, 100)
    assert (windowed.nbytes, windowed.flops) == (8, 8)
