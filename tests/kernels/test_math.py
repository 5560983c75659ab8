"""The vector exp, silu and bf16 rounding against float64."""

from __future__ import annotations

import ctypes

import numpy as np

from tests.kernels.oplib import OpLib, to_bits


def _map(ops: OpLib, what: int, x: np.ndarray) -> np.ndarray:
    y = np.empty_like(x)
    ops.lib.ot_map(what, *(ctypes.c_void_p(a.ctypes.data) for a in (x, y)), len(x))
    return y


def test_exp_is_within_two_ulp(ops: OpLib) -> None:
    x = np.linspace(-87, 88, 160_000, dtype=np.float32)
    truth = np.exp(x.astype(np.float64))
    ulp = np.spacing(truth.astype(np.float32)).astype(np.float64)
    assert np.max(np.abs(_map(ops, 0, x) - truth) / ulp) <= 2.0


def test_exp_at_its_edges(ops: OpLib) -> None:
    x = np.array([0, -0.0, -np.inf, -1e30, -87.4, 1000, np.inf, np.nan] * 2, np.float32)
    y = _map(ops, 0, x)
    assert np.array_equal(y[:2], [1, 1]), "merging a chunk with itself must be exact"
    assert np.array_equal(y[2:5], [0, 0, 0])
    assert np.array_equal(y[5:7], [np.inf, np.inf])
    assert np.isnan(y[7])


def test_silu(ops: OpLib) -> None:
    x = np.linspace(-80, 80, 64_000, dtype=np.float32)
    wide = x.astype(np.float64)
    truth = wide / (1 + np.exp(-wide))
    assert np.allclose(_map(ops, 1, x), truth, rtol=6e-7, atol=1e-37)
    edges = _map(ops, 1, np.array([-np.inf, np.inf, np.nan, 0] * 4, np.float32))
    assert edges[1] == np.inf
    assert np.isnan(edges[2])
    assert edges[3] == 0


def test_narrowing_rounds_to_nearest_even(ops: OpLib) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 64_000, dtype=np.uint64).astype(np.uint32)
    halves = (np.arange(32_000, dtype=np.uint32) << 16) + np.uint32(0x8000)  # ties
    x = np.concatenate([bits, halves]).view(np.float32)
    x = x[(np.abs(x) >= np.finfo(np.float32).tiny) | np.isnan(x)]
    x = x[: len(x) // 16 * 16].copy()
    vector, scalar = (np.empty(len(x), np.uint16) for _ in range(2))
    ops.lib.ot_narrow(*(ctypes.c_void_p(a.ctypes.data) for a in (x, vector, scalar)), len(x))
    nan = np.isnan(x)
    for got in (vector, scalar):
        assert np.array_equal(got[~nan], to_bits(x)[~nan])
        assert np.all((got[nan] & 0x7FC0) == 0x7FC0)
