"""Quantised GEMM ops at odd shapes: bit for bit against the NumPy twin, whose integer dot products
are int64. Weight-only formats also against float64 by a bound.
"""

from __future__ import annotations

import numpy as np
import pytest

from sinterlm.ir.bf16 import round_bf16, to_bf16
from sinterlm.ir.reference_codes import code_rows, coded_gemm, weight_only_gemm
from tests.kernels.coded import CODED, FORMATS, WIDE_DTYPE, CodedLib, quantised
from tests.kernels.oplib import pad, round_up

SHAPES = [(1, 16, 16), (3, 72, 40), (7, 200, 96), (13, 1100, 144), (97, 136, 72)]
EVERY = pytest.mark.parametrize("number", range(len(FORMATS)))
EVERY_CODED = pytest.mark.parametrize("number", CODED)


def data(rows: int, k: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Activations with a few outliers, and weights."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(rows, k)) * np.where(rng.random((rows, k)) < 0.01, 30, 1)
    return a.astype("f4"), (rng.normal(size=(n, k)) / k**0.5).astype("f4")


def expected(lib: CodedLib, number: int, a: np.ndarray, w: np.ndarray) -> np.ndarray:
    """a @ wᵀ as the kernel computes it."""
    form = FORMATS[number]
    rows = code_rows(pad(a, round_up(a.shape[1], 64)), form)
    return coded_gemm(rows, quantised(w, form), lib.instruction)


@EVERY_CODED
def test_stored_activations(lib: CodedLib, number: int) -> None:
    """Codes, scales and sums, exactly; also of groups that are zero, tiny, damaged or saturated."""
    values = data(6, 192, 1)[0]
    values[1, :64] = 0
    values[2, :64] = 1e-35
    values[3, 70], values[4, 5], values[5, 130] = np.nan, np.inf, -np.inf
    values[0, 64:128] = np.linspace(-3e38, 3e38, 64)
    codes, scales, sums = lib.store(number, values)
    want = code_rows(values, FORMATS[number])
    assert np.array_equal(codes, want.codes)
    assert np.array_equal(scales, want.scales, equal_nan=True)
    assert np.array_equal(sums, want.sums())
    assert not codes[2, :16].any() and scales[2, 0] == 0
    assert np.isnan(scales).sum() == 3 and np.abs(codes).max() == 127


@EVERY_CODED
@pytest.mark.parametrize(("rows", "k", "h"), SHAPES)
def test_residual_bit_for_bit(lib: CodedLib, number: int, rows: int, k: int, h: int) -> None:
    a, w = data(rows, k, h)
    norm = np.random.default_rng(1).normal(size=h).astype("f4")
    zero = np.zeros((rows, h), "f4")
    coded = quantised(w, FORMATS[number])
    out, xw, ssq = lib.residual(number, a, coded, None, norm, zero, threads=2)
    want = expected(lib, number, a, w)
    assert np.array_equal(out, want)
    stored = code_rows(pad(want * norm, round_up(h, 64)), FORMATS[number])
    assert np.array_equal(xw, stored.dequantise()[:, :h])
    wide = pad(want, ssq.shape[1] * 16).astype("f8").reshape(rows, -1, 16)
    assert np.allclose(ssq, (wide**2).sum(-1), rtol=1e-5)


@EVERY
def test_bias_and_residual(lib: CodedLib, number: int) -> None:
    a, w = data(5, 136, 72)
    rng = np.random.default_rng(1)
    bias, norm, x = (rng.normal(size=s).astype("f4") for s in (72, 72, (5, 72)))
    coded = quantised(w, FORMATS[number])
    plain = lib.residual(number, a, coded, None, norm, np.zeros_like(x))[0]
    out = lib.residual(number, a, coded, bias, norm, x, threads=3)[0]
    assert np.array_equal(out, (plain + bias) + x)


@pytest.mark.parametrize("number", WIDE_DTYPE)
@pytest.mark.parametrize(("rows", "k", "h"), SHAPES)
def test_weight_only_bit_for_bit(lib: CodedLib, number: int, rows: int, k: int, h: int) -> None:
    is_bf16 = WIDE_DTYPE[number] == "bf16"
    a, w = data(rows, k, h)
    coded = quantised(w, FORMATS[number])
    zero = np.zeros((rows, h), "f4")
    out, xw, _ = lib.residual(number, a, coded, None, np.ones(h, "f4"), zero, threads=2)
    operand = pad(a, round_up(k, 64))
    instruction = lib.bf16_dot if is_bf16 else lib.instruction
    want = weight_only_gemm(to_bf16(operand) if is_bf16 else operand, coded, instruction)
    assert np.array_equal(out, want)
    assert np.array_equal(xw, round_bf16(out) if is_bf16 else out)
    truth = (round_bf16(a) if is_bf16 else a).astype("f8")
    scale = np.abs(coded.dequantise()) + (
        0 if coded.offsets is None else 2 * np.abs(coded.offsets).max()
    )
    bound = (2 * k + 8) * 2.0**-24 * (np.abs(truth) @ scale.T.astype("f8"))
    assert np.all(np.abs(out - truth @ coded.dequantise().astype("f8").T) <= bound)


@EVERY
def test_rows_do_not_see_each_other_nor_the_workers(lib: CodedLib, number: int) -> None:
    a, w = data(130, 1100, 80)
    x, norm = np.zeros((130, 80), "f4"), np.ones(80, "f4")
    coded = quantised(w, FORMATS[number])

    def run(rows: slice, threads: int) -> tuple[bytes, bytes]:
        out, xw, _ = lib.residual(number, a[rows], coded, None, norm, x[rows], threads=threads)
        return out.tobytes(), xw.tobytes()

    alone = [run(slice(i, i + 1), 1) for i in range(130)]
    for rows in [*range(1, 14), 47, 96, 97, 128, 130]:
        together = b"".join(o for o, _ in alone[:rows]), b"".join(s for _, s in alone[:rows])
        for threads in (1, 3, 7):
            assert run(slice(0, rows), threads) == together, (rows, threads)


@EVERY_CODED
def test_gate_up_does_not_see_the_workers(lib: CodedLib, number: int) -> None:
    """More workers than groups of activations: a group's columns meet in shared memory."""
    xw, w = data(50, 136, 100)
    coded = quantised(w, FORMATS[number])
    ssq = np.random.default_rng(3).uniform(1, 20, size=(50, 12)).astype("f4")
    for rows in (1, 13, 50):
        seen = {
            lib.gate_up(
                number, xw[:rows], coded, coded, ssq[:rows], 1e-5, threads=threads
            ).tobytes()
            for threads in (1, 3, 16)
        }
        assert len(seen) == 1, rows


@EVERY_CODED
def test_extreme_codes_do_not_saturate(lib: CodedLib, number: int) -> None:
    """Largest codes everywhere, of either sign, at a depth beyond one pass."""
    form, k = FORMATS[number], 2304
    a = np.where(np.arange(3)[:, None] == 1, -1, 1) * np.ones((3, k))
    a[2, ::2] = -1
    w = np.ones((32, k), "f4")
    w[1::2], w[3, ::2] = -1, -1
    a = a.astype("f4")
    coded = quantised(w, form)
    out = lib.residual(number, a, coded, None, np.ones(32, "f4"), np.zeros((3, 32), "f4"))[0]
    assert np.array_equal(out, expected(lib, number, a, w))
    assert np.allclose(out[0, 0], k, rtol=1e-3) and np.allclose(out[1, 0], -k, rtol=1e-3)


@EVERY
def test_damage_reaches_its_row_or_column_alone(lib: CodedLib, number: int) -> None:
    a, w = data(3, 256, 32)
    a[1, 7], w[5, 9] = np.nan, np.nan
    coded = quantised(w, FORMATS[number])
    out = lib.residual(number, a, coded, None, np.ones(32, "f4"), np.zeros((3, 32), "f4"))[0]
    assert np.isnan(out[1]).all() and np.isnan(out[:, 5]).all()
    assert np.isfinite(np.delete(out[[0, 2]], 5, axis=1)).all()


@EVERY_CODED
def test_gate_up(lib: CodedLib, number: int) -> None:
    xw, gate = data(5, 136, 100)
    up = data(5, 136, 100, seed=2)[1]
    form = FORMATS[number]
    ssq = np.random.default_rng(3).uniform(1, 20, size=(5, 12)).astype("f4")
    h = lib.gate_up(number, xw, quantised(gate, form), quantised(up, form), ssq, 1e-5, threads=3)
    rstd = 1 / np.sqrt(ssq.astype("f8").sum(1, keepdims=True) / 136 + 1e-5)
    g, u = (expected(lib, number, xw, w) * rstd for w in (gate, up))
    truth = g / (1 + np.exp(-g)) * u
    groups = np.abs(pad(truth, 128)).reshape(5, -1, form.act_group).max(2)
    step = np.repeat(groups / 127, form.act_group, axis=1)[:, :100]
    assert np.all(np.abs(h - truth) <= 0.501 * step + 1e-5 * np.abs(truth))


@EVERY_CODED
def test_lm_head_projects_the_asked_rows(lib: CodedLib, number: int) -> None:
    xw, w = data(9, 136, 131)
    ssq = np.random.default_rng(5).uniform(1, 9, size=(9, 12)).astype("f4")
    rows = np.array([0, 3, 8])
    logits = lib.lm_head(number, xw, ssq, rows, quantised(w, FORMATS[number]), 1e-6, threads=2)
    rstd = 1 / np.sqrt(ssq.astype("f8").sum(1, keepdims=True) / 136 + 1e-6)
    truth = (expected(lib, number, xw, w) * rstd)[rows]
    assert np.allclose(logits, truth, rtol=1e-6, atol=0)


@EVERY
def test_embed_gathers_what_the_codes_stand_for(lib: CodedLib, number: int) -> None:
    rng = np.random.default_rng(6)
    table, norm = rng.normal(size=(131, 72)).astype("f4"), rng.normal(size=72).astype("f4")
    ids = np.array([0, 130, 63, 64, 65, 64])
    coded = quantised(table, FORMATS[number])
    x, xw, _ = lib.embed(number, ids, coded, norm, threads=2)
    want = coded.dequantise()[ids]
    assert np.array_equal(x, want)
    form = FORMATS[number]
    if number in CODED:
        stored = code_rows(pad(want * norm, 128), form).dequantise()[:, :72]
        assert np.array_equal(xw, stored)
    else:
        narrow = round_bf16 if WIDE_DTYPE[number] == "bf16" else np.asarray
        assert np.array_equal(xw, narrow(want * norm))
