"""fp8 against arithmetic by the book: every code, every rounding."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from sinterlm.ir.bf16 import round_bf16
from sinterlm.ir.fp8 import FP8_MAX, fn_to_fnuz, from_fp8, to_fp8
from sinterlm.ir.quant import CodedMatrix, GemmFormat
from sinterlm.ir.reference_codes import fp8_rows

NAMES = pytest.mark.parametrize("name", ["e4m3fn", "e4m3fnuz"])
EVERY = np.arange(256, dtype=np.uint8)


def value(code: int, name: str) -> float:
    """Sign, four bits of exponent, three of mantissa."""
    nan = (0x7F, 0xFF) if name == "e4m3fn" else (0x80,)
    if code in nan:
        return math.nan
    bias = 7 if name == "e4m3fn" else 8
    exponent, mantissa = code >> 3 & 15, Fraction(code & 7, 8)
    power = Fraction(2) ** (max(exponent, 1) - bias)
    return float((-1 if code & 128 else 1) * power * (mantissa + (exponent > 0)))


@NAMES
def test_every_code_has_its_value(name: str) -> None:
    want = [value(code, name) for code in range(256)]
    assert np.array_equal(from_fp8(EVERY, name), np.array(want, "f4"), equal_nan=True)
    assert np.nanmax(want) == FP8_MAX[name]


@NAMES
def test_rounding_is_to_the_nearest_and_even_at_ties(name: str) -> None:
    """Every code's value, every middle of two neighbours, and the floats beside both."""
    table = np.unique([v for code in range(256) if not math.isnan(v := value(code, name))])
    points = np.concatenate([table, (table[1:] + table[:-1]) / 2]).astype("f4")
    points = np.concatenate([points, np.nextafter(points, np.float32(np.inf)),
                             np.nextafter(points, np.float32(-np.inf))])  # fmt: skip
    points = np.clip(points, -FP8_MAX[name], FP8_MAX[name])
    found = to_fp8(points, name)
    for point, code in zip(points.astype("f8"), found, strict=True):
        distance = np.abs(table - point)
        nearest = table[distance == distance.min()]
        got = value(int(code), name)
        assert got in nearest
        if len(nearest) == 2:
            assert code & 1 == 0
    again = EVERY.copy()
    if name == "e4m3fn":
        again[0xFF] = 0x7F  # one NaN is enough
    assert np.array_equal(to_fp8(from_fp8(EVERY, name), name), again)


@NAMES
def test_what_is_too_large_saturates_and_nan_stays(name: str) -> None:
    given = np.array([1e30, -1e30, np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-40, -1e-40], "f4")
    found = from_fp8(to_fp8(given, name), name)
    top = np.float32(FP8_MAX[name])
    assert np.array_equal(found, [top, -top, top, -top, np.nan, 0, 0, 0, 0], equal_nan=True)
    assert np.signbit(found[6]) == (name == "e4m3fn")


def test_fnuz_codes_of_fn_have_half_the_value() -> None:
    found = from_fp8(fn_to_fnuz(EVERY), "e4m3fnuz")
    assert np.array_equal(2 * found, from_fp8(EVERY, "e4m3fn"), equal_nan=True)
    matrix = CodedMatrix(EVERY[None], np.full((1, 1), 0.3, "f4"), None, 8, 0, "e4m3fn")
    written = matrix.written_as("e4m3fnuz")
    assert np.array_equal(written.dequantise(), matrix.dequantise(), equal_nan=True)
    with pytest.raises(AssertionError):
        written.written_as("e4m3fn")


@NAMES
def test_rows_in_fp8_are_as_near_as_three_bits_are(name: str) -> None:
    """Half a step of the mantissa beside what is small in its group; whatever the padding."""
    form = GemmFormat(8, 0, True, "fp8", 128, name)
    rows = round_bf16(np.random.default_rng(0).normal(size=(9, 300)) * 2.0**40)
    rows[3] = 0
    found = fp8_rows(rows, form)
    assert found.shape == rows.shape and not found[3].any()
    groups = np.pad(rows, ((0, 0), (0, 84))).reshape(9, 3, 128)
    top = np.repeat(np.abs(groups).max(-1), 128, axis=1)[:, :300]
    assert np.all(np.abs(found - rows) <= 2.0**-4 * np.abs(rows) + top * 2.0**-17)
    assert np.abs(found).max() <= top.max() * (1 + 2.0**-22)
