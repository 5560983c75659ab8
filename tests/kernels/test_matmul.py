"""The GEMM ops (o/down residual, gate_up, lm_head, embed) against float64 at odd shapes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.oplib import OpLib, rounded

SHAPES = [(1, 16, 16), (3, 72, 40), (7, 200, 96), (13, 1100, 144), (97, 136, 72), (130, 64, 200)]


def bound(a: np.ndarray, w: np.ndarray) -> np.ndarray:
    """|fp32 sum - exact| <= gamma * sum |a||w|; gamma = K * 2^-24, K products and K sums."""
    k = a.shape[1]
    return (2 * k + 8) * 2.0**-24 * (np.abs(a).astype(np.float64) @ np.abs(w).astype(np.float64).T)


def data(rows: int, k: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, k)).astype("f4"), (rng.normal(size=(n, k)) / k**0.5).astype("f4")


def check_stream(
    x: np.ndarray, xw: np.ndarray, ssq: np.ndarray, norm: np.ndarray, bf16: bool
) -> None:
    """The by-products follow from x: exactly for xw, to rounding for the sums."""
    want = rounded(x * norm, bf16)
    assert np.array_equal(xw, want)
    wide = np.zeros((len(x), ssq.shape[1] * 16))
    wide[:, : x.shape[1]] = x
    assert np.allclose(ssq, (wide**2).reshape(len(x), -1, 16).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(("rows", "k", "h"), SHAPES)
def test_residual(ops: OpLib, rows: int, k: int, h: int, bf16: bool) -> None:
    a, w = data(rows, k, h)
    rng = np.random.default_rng(1)
    bias, norm, x = (rng.normal(size=s).astype("f4") for s in (h, h, (rows, h)))
    out, xw, ssq = ops.residual(a, w, bias, norm, x, bf16=bf16, threads=2)
    ra, rw = rounded(a, bf16), rounded(w, bf16)
    truth = x + bias + ra.astype("f8") @ rw.astype("f8").T
    assert np.all(np.abs(out - truth) <= bound(ra, rw) + 4e-7 * (np.abs(truth) + np.abs(x) + 1))
    check_stream(out, xw, ssq, norm, bf16)


@pytest.mark.parametrize("bf16", [True, False])
def test_rows_do_not_see_each_other_nor_the_workers(ops: OpLib, bf16: bool) -> None:
    """gemm(A)[i] == gemm(A[i:i+1]) bit for bit, for many M and thread counts."""
    a, w = data(130, 1100, 80)
    x, norm = np.zeros((130, 80), "f4"), np.ones(80, "f4")
    alone = np.concatenate(
        [ops.residual(a[i : i + 1], w, None, norm, x[:1], bf16=bf16)[0] for i in range(130)]
    )
    for rows in [*range(1, 14), 47, 96, 97, 128, 130]:
        for threads in (1, 2, 3, 7, 16):
            out, _, _ = ops.residual(a[:rows], w, None, norm, x[:rows], bf16=bf16, threads=threads)
            assert out.tobytes() == alone[:rows].tobytes(), (rows, threads)


def test_adversarial_values(ops: OpLib) -> None:
    """Cancellation keeps the order of the sum; NaN and infinity reach exactly their outputs."""
    k, h = 256, 32
    a, w = np.zeros((3, k), "f4"), np.ones((h, k), "f4")
    a[0, :4] = [2.0**60, 1, -(2.0**60), 1]
    a[1, 7], a[2, 9] = np.nan, np.inf
    w[5, 9] = 0
    out, _, _ = ops.residual(a, w, None, np.ones(h, "f4"), np.zeros((3, h), "f4"), bf16=True)
    assert np.all(out[0] == out[0, 0])
    assert np.isnan(out[1]).all()
    assert np.isnan(out[2, 5])
    assert np.all(np.isinf(np.delete(out[2], 5)))


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(("rows", "k", "f"), [(1, 48, 64), (5, 72, 100), (50, 200, 136)])
def test_gate_up(ops: OpLib, rows: int, k: int, f: int, bf16: bool) -> None:
    xw, gate = data(rows, k, f)
    up = data(rows, k, f, seed=2)[1]
    rng = np.random.default_rng(3)
    gb, ub = (rng.normal(size=f).astype("f4") for _ in range(2))
    kp = -(-k // 16) * 16
    ssq = rng.uniform(1, 20, size=(rows, kp // 16)).astype("f4")
    h = ops.gate_up(xw, gate, up, ssq, 1e-5, gb, ub, bf16=bf16, threads=3)
    rstd = 1 / np.sqrt(ssq.astype("f8").sum(1, keepdims=True) / k + 1e-5)
    rx = rounded(xw, bf16).astype("f8")
    g = rx @ rounded(gate, bf16).astype("f8").T * rstd + gb
    u = rx @ rounded(up, bf16).astype("f8").T * rstd + ub
    truth = g / (1 + np.exp(-g)) * u
    tolerance = 2.0**-8 if bf16 else 2e-6
    assert np.all(np.abs(h - truth) <= tolerance * np.abs(truth) + 1e-5)


@pytest.mark.parametrize("bf16", [True, False])
def test_lm_head_projects_the_asked_rows(ops: OpLib, bf16: bool) -> None:
    xw, w = data(9, 72, 131)
    ssq = np.random.default_rng(5).uniform(1, 9, size=(9, 5)).astype("f4")
    rows = np.array([0, 3, 8])
    logits = ops.lm_head(xw, ssq, rows, w, 1e-6, bf16=bf16, threads=2)
    rstd = 1 / np.sqrt(ssq.astype("f8").sum(1, keepdims=True) / 72 + 1e-6)
    rx, rw = rounded(xw, bf16), rounded(w, bf16)
    truth = (rx.astype("f8") @ rw.astype("f8").T * rstd)[rows]
    assert np.all(np.abs(logits - truth) <= (bound(rx, rw) * rstd)[rows] + 1e-6)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_embed(ops: OpLib, bf16: bool, tied: bool) -> None:
    rng = np.random.default_rng(6)
    table, norm = rng.normal(size=(131, 72)).astype("f4"), rng.normal(size=72).astype("f4")
    ids = np.array([0, 130, 63, 64, 65, 64])
    x, xw, ssq = ops.embed(ids, table, norm, bf16=bf16, tied=tied, threads=2)
    assert np.array_equal(x, rounded(table, bf16)[ids])
    check_stream(x, xw, ssq, norm, bf16)
