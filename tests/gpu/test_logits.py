"""scripts/gpu_logits.py: what a device's logits are measured by, on numbers that are made up."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sinterlm.errors import RuntimeFault
from tests.conftest import ROOT


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module("gpu_logits")


def made_up(logits: ModuleType) -> Any:
    """A reference of 2 x 30 rows, whose bf16 is off by as much as bf16 may be."""
    rng = np.random.default_rng(5)
    fp32 = rng.normal(scale=3, size=(58, 100)).astype("f4")
    bf16 = fp32 + rng.normal(scale=2e-3, size=fp32.shape).astype("f4")
    sequences = [rng.integers(0, 100, 30).astype("i4") for _ in range(2)]
    return logits.Reference((20, 20), sequences, bf16, fp32)


def test_a_reference_is_kept_as_it_is(logits: ModuleType, tmp_path: Path) -> None:
    wanted = made_up(logits)
    assert wanted.is_answer.sum() == 2 * 9 and len(wanted.targets) == 58
    for held in (wanted, logits.Reference(wanted.pieces, wanted.sequences, wanted.bf16, None)):
        held.save(tmp_path / "held.npz")
        again = logits.Reference.load(tmp_path / "held.npz")
        assert again.pieces == held.pieces
        assert all(map(np.array_equal, again.sequences, held.sequences))
        assert np.array_equal(again.bf16, held.bf16)
        assert again.fp32 is None if held.fp32 is None else np.array_equal(again.fp32, held.fp32)
    assert "KL(fp32||device)" not in logits.verdict(again, again.bf16)


@pytest.mark.parametrize(
    ("noise", "rows", "named"),
    [
        (2e-3, slice(None), None),
        (0.5, slice(0, 20), "KL of prompts is beyond"),
        (0.5, slice(20, 29), "KL of answers is beyond"),
        (2e-2, slice(None), "more than 4 times that of the CPU's bf16"),
        (np.nan, slice(4, 5), "not finite|NaN"),
    ],
)
def test_a_bound_for_each_distance(
    logits: ModuleType, noise: float, rows: slice, named: str | None
) -> None:
    wanted = made_up(logits)
    found = wanted.fp32.copy()
    found[rows] += np.random.default_rng(6).normal(size=found[rows].shape) * noise
    if named is None:
        assert logits.verdict(wanted, found)["tokens"] == 58
        return
    with pytest.raises((AssertionError, RuntimeFault), match=named):
        logits.verdict(wanted, found)


def test_best_tokens_are_the_cpus(logits: ModuleType) -> None:
    """Few may be others, and an answer may part at a near tie alone."""
    wanted = made_up(logits)
    best, second = np.argsort(-wanted.bf16, axis=1)[:, :2].T

    def other(rows: range, margin: float) -> np.ndarray:
        """Rows whose second token leads in the reference's stead, by nothing there."""
        found = wanted.bf16.copy()
        for row in rows:
            wanted.bf16[row, second[row]] = wanted.bf16[row, best[row]] - margin
            found[row, second[row]] = wanted.bf16[row, best[row]] + 1e-4
        return found

    facts = logits.verdict(wanted, other(range(22, 23), 1e-3))
    assert facts["answers that part, by the margin"] == [pytest.approx(1e-3, abs=1e-5)]
    with pytest.raises(AssertionError, match="fewer than 97% of"):
        logits.verdict(wanted, other(range(4), 1e-3))
    with pytest.raises(AssertionError, match="an answer parts where"):
        logits.verdict(wanted, other(range(22, 23), 0.12))


def test_a_token_that_is_not_the_best_is_seen(logits: ModuleType) -> None:
    wanted = made_up(logits)

    def step(batch: Any) -> Any:
        rows = np.zeros((batch.num_tokens, 100), "f4")
        rows[:, 7] = 1
        return SimpleNamespace(logits=rows, tokens=np.full(batch.num_tokens, drawn, np.int32))

    model, drawn = SimpleNamespace(step=step, alloc_kv=lambda *_: None), 7
    assert np.isfinite(logits.forced_logits(model, wanted)).all()
    drawn = 8
    with pytest.raises(AssertionError, match="not the best"):
        logits.forced_logits(model, wanted)
