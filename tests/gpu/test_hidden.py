"""The kernels that give hidden states out and take them again, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from sinterlm.ir.bf16 import error_bound
from tests.gpu import oplib
from tests.gpu.oplib import Tile
from tests.gpu.test_kernels import data, exact, scales

pytestmark = pytest.mark.usefixtures("triton")


def test_a_head_of_normed_rows() -> None:
    """Sums of squares are not read, whatever they hold."""
    hidden, w = data(5, 128, 131)
    ssq, rows = np.full((5, 8), np.nan, "f4"), list(range(5))
    zeros = [0] * 5
    logits, ids, *_ = oplib.draw(hidden, ssq, rows, w, [0.0] * 5, zeros, zeros, Tile(BN=64),
                                 is_normed=True)  # fmt: skip
    truth = exact(hidden, w)
    assert np.all(np.abs(logits - truth) <= error_bound(hidden, w) + 2e-6 * (np.abs(truth) + 1))
    assert ids.tolist() == truth.argmax(1).tolist()


@pytest.mark.parametrize(("rows", "hidden", "stride", "width"),
                         [(1, 64, 64, 64), (5, 192, 208, 64), (3, 1024, 1040, 1024)])  # fmt: skip
def test_final_norm(rows: int, hidden: int, stride: int, width: int) -> None:
    rng = np.random.default_rng(8)
    x = rng.normal(scale=30, size=(rows, hidden)).astype("f4")
    x[-1] *= 1e-6  # below eps
    norm = rng.normal(size=hidden).astype("f4")
    ssq = (x.astype("f8") ** 2).reshape(rows, -1, 16).sum(-1).astype("f4")
    truth = x.astype("f8") * scales(ssq, hidden) * norm
    found = oplib.final_norm(x, ssq, norm, stride, width)
    assert np.all(np.abs(found - truth) <= (2.0**-8 + 1e-6) * np.abs(truth))


def test_final_norm_keeps_nan_in_its_row() -> None:
    x, norm = np.ones((3, 64), "f4"), np.ones(64, "f4")
    x[1, 5] = np.nan
    ssq = (x**2).reshape(3, -1, 16).sum(-1)
    found = oplib.final_norm(x, ssq, norm, 64, 64)
    assert np.isnan(found[1]).all() and np.isfinite(found[[0, 2]]).all()
