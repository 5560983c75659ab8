"""How many steps a server takes in one native call."""

from __future__ import annotations

import pytest

from sinterlm.serve.pace import PERIOD_S, Pace


@pytest.mark.parametrize(
    ("step_s", "expected"), [(0.0, 1), (1e-9, 8), (0.004, 8), (0.008, 4), (0.02, 1), (5.0, 1)]
)
def test_as_many_steps_as_fit_in_a_period(step_s: float, expected: int) -> None:
    pace = Pace(None, most=8)
    assert pace.max_steps == 1, "nothing is known yet"
    pace.note(step_s)
    assert pace.max_steps == expected
    assert pace.max_steps == 1 or pace.max_steps * step_s <= PERIOD_S


def test_it_follows_the_last_call() -> None:
    pace = Pace(None, most=8)
    seen = []
    for step_s in (0.001, 0.1, 0.01):
        pace.note(step_s)
        seen.append(pace.max_steps)
    assert seen == [8, 1, 3]


def test_a_fixed_number_stays() -> None:
    pace = Pace(5, most=2)
    pace.note(1.0)
    assert pace.max_steps == 5
