"""Rounding to bf16, and the emulated instructions against exact rationals and the machine."""

from __future__ import annotations

import ctypes
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinterlm.backends.cxx.isa import available_isas
from sinterlm.backends.cxx.toolchain import compile_library
from sinterlm.ir.bf16 import (
    error_bound,
    flush,
    fma,
    from_bf16,
    gemm_exact,
    round_bf16,
    tdpbf16ps,
    to_bf16,
    vdpbf16ps,
)

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def bits_of(x: np.ndarray) -> np.ndarray:
    """For comparison: equal bits, all NaN alike."""
    return np.where(np.isnan(x), 0x7FC00000, x.view(np.uint32))


def test_every_bf16_is_itself() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    nan = np.isnan(from_bf16(bits))
    assert nan.sum() == 2 * 127
    assert np.array_equal(to_bf16(from_bf16(bits))[~nan], bits[~nan])
    assert np.isnan(round_bf16(from_bf16(bits))[nan]).all()


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (0x3F800000, 0x3F80),
        (0x3F808000, 0x3F80),  # tie to even, down
        (0x3F818000, 0x3F82),  # tie to even, up
        (0x3F808001, 0x3F81),
        (0x7F7FFFFF, 0x7F80),  # the largest float32 becomes infinity
        (0xFF800000, 0xFF80),
        (0x7F800001, 0x7FC0),  # a NaN whose payload would be cut off stays a NaN
        (0xFFFFFFFF, 0xFFFF),
        (0x80000000, 0x8000),
        (0x00008000, 0x0000),  # denormals round like the rest
        (0x00018000, 0x0002),
    ],
)
def test_rounding(bits: int, expected: int) -> None:
    assert to_bf16(np.array([bits], np.uint32).view(np.float32))[0] == expected


def nearest_float32(exact: Fraction) -> np.float32:
    """To nearest, ties to even, by looking at both neighbours."""
    guess = np.float32(float(exact))
    candidates = [np.nextafter(guess, np.float32(d)) for d in (-np.inf, np.inf)] + [guess]
    finite = [c for c in candidates if np.isfinite(c)]
    return min(finite, key=lambda c: (abs(Fraction(float(c)) - exact), int(c.view(np.uint32)) & 1))


@given(floats, floats, floats)
def test_fma_rounds_once(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    got = fma(np.float32([a]), np.float32([b]), np.float32([c]))[0]
    if abs(exact) < Fraction(2) ** 127:
        assert got == nearest_float32(exact)


def test_fma_where_two_roundings_would_show() -> None:
    """(1 + 2^-12)² is a tie; float64 has no room for the 2^-80 that decides it."""
    a, c = np.float32([1 + 2.0**-12]), np.float32([2.0**-80])
    down, up = 1 + 2.0**-11, 1 + 2.0**-11 + 2.0**-23
    assert fma(a, a, 0 * c)[0] == down  # to even
    assert fma(a, a, c)[0] == up
    assert fma(a, a, -c)[0] == down
    assert fma(-a, a, -c)[0] == -up


def test_odd_element_first() -> None:
    """Above 2^24 float32 counts in twos: the order within the pair decides how ties fall."""
    acc, one = np.float32([2.0**24]), to_bf16(np.ones((1, 2)))

    def add(even: float, odd: float) -> float:
        return float(vdpbf16ps(acc, to_bf16(np.array([[even, odd]])), one)[0]) - 2.0**24

    assert add(1.0, 1.5) == 4  # +1.5 rounds to +2, then +3 to +4
    assert add(1.5, 1.0) == 2  # +1 rounds to 0, then +1.5 to +2
    assert add(-1.0, 1.0) == -1
    assert add(1.0, -1.0) == 0


def test_denormals_count_as_zero() -> None:
    tiny = np.float32([2.0**-130])
    one = to_bf16(np.ones((1, 2)))
    assert vdpbf16ps(tiny, to_bf16(np.zeros((1, 2))), one)[0] == 0
    assert np.signbit(flush(-tiny))[0]
    small = to_bf16(np.array([[2.0**-64, 0]]))
    assert vdpbf16ps(np.zeros(1, np.float32), small, small)[0] == 0


SOURCE = """
#include <immintrin.h>
#include <stdint.h>
extern "C" __attribute__((visibility("default"))) void dot(
    const float* acc, const uint16_t* a, const uint16_t* b, float* out, int n) {
  for (int i = 0; i < n; i += 16)
    _mm512_storeu_ps(out + i, _mm512_dpbf16_ps(_mm512_loadu_ps(acc + i),
        (__m512bh)_mm512_loadu_si512(a + 2 * i), (__m512bh)_mm512_loadu_si512(b + 2 * i)));
}
"""


@pytest.mark.skipif("avx512bf16" not in available_isas(), reason="this machine has no AVX512_BF16")
@pytest.mark.parametrize("kind", ["near one", "spread", "any bits", "cancelling", "denormal"])
def test_emulation_is_the_instruction(tmp_path: Path, kind: str) -> None:
    compile_library(SOURCE, tmp_path / "dot.so", "avx512bf16")
    dot = ctypes.CDLL(str(tmp_path / "dot.so")).dot
    rng, n = np.random.default_rng(7), 1 << 16
    low, high = {"spread": (-40, 40), "denormal": (-66, -60)}.get(kind, (0, 1))
    a, b = (
        to_bf16(rng.standard_normal((n, 2)) * 2.0 ** rng.integers(low, high, (n, 2)))
        for _ in range(2)
    )
    acc = (rng.standard_normal(n) * 2.0 ** rng.integers(2 * low, 2 * high, n)).astype(np.float32)
    if kind == "any bits":
        a, b = (rng.integers(0, 1 << 16, (n, 2)).astype(np.uint16) for _ in range(2))
        acc = rng.integers(0, 1 << 32, n).astype(np.uint32).view(np.float32)
    elif kind == "cancelling":
        acc = -(from_bf16(a) * from_bf16(b)).sum(axis=1)
    out = np.empty_like(acc)
    dot(*(ctypes.c_void_p(x.ctypes.data) for x in (acc, a, b, out)), ctypes.c_int(n))
    assert np.array_equal(bits_of(vdpbf16ps(acc, a, b)), bits_of(out))


TILES = """
#include <immintrin.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>
struct Config {
  uint8_t palette = 1, start = 0, zeros[14] = {};
  uint16_t bytes[16] = {64, 64, 64};
  uint8_t rows[16] = {16, 16, 16};
};
extern "C" __attribute__((visibility("default"))) int dot(
    const float* acc, const uint16_t* a, const uint16_t* b, float* out, int n) {
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return 1;
  const Config config;
  _tile_loadconfig(&config);
  for (int i = 0; i < n; ++i, acc += 256, a += 512, b += 512, out += 256) {
    asm volatile("" ::: "memory");
    _tile_loadd(0, acc, 64);
    _tile_loadd(1, a, 64);
    _tile_loadd(2, b, 64);
    _tile_dpbf16ps(0, 1, 2);
    _tile_stored(0, out, 64);
    asm volatile("" ::: "memory");
  }
  _tile_release();
  return 0;
}
"""


@pytest.mark.skipif("amx" not in available_isas(), reason="this machine has no AMX")
@pytest.mark.parametrize("kind", ["near one", "spread", "any bits", "cancelling", "denormal"])
def test_emulation_is_the_tile_instruction(tmp_path: Path, kind: str) -> None:
    compile_library(TILES, tmp_path / "dot.so", "amx")
    dot = ctypes.CDLL(str(tmp_path / "dot.so")).dot
    rng, n = np.random.default_rng(7), 64
    low, high = {"spread": (-40, 40), "denormal": (-66, -60)}.get(kind, (0, 1))
    a, w = (
        to_bf16(rng.standard_normal((n, 16, 32)) * 2.0 ** rng.integers(low, high, (n, 16, 32)))
        for _ in range(2)
    )
    size = (n, 16, 16)
    acc = (rng.standard_normal(size) * 2.0 ** rng.integers(2 * low, 2 * high, size)).astype("f4")
    if kind == "any bits":
        a, w = (rng.integers(0, 1 << 16, (n, 16, 32)).astype(np.uint16) for _ in range(2))
        acc = rng.integers(0, 1 << 32, size).astype(np.uint32).view(np.float32)
    elif kind == "cancelling":
        acc = -(from_bf16(a) @ from_bf16(w).transpose(0, 2, 1)).astype(np.float32)
    panel = np.ascontiguousarray(w.reshape(n, 16, 16, 2).transpose(0, 2, 1, 3))  # [k/2][column][2]
    out = np.empty_like(acc)
    pointers = (ctypes.c_void_p(x.ctypes.data) for x in (acc, a, panel, out))
    assert dot(*pointers, ctypes.c_int(n)) == 0
    expected = tdpbf16ps(acc, a[:, :, None], w[:, None])
    assert np.array_equal(bits_of(expected), bits_of(out))


@pytest.mark.parametrize("instruction", ["tdpbf16ps", "vdpbf16ps", "fma", "mul_add"])
def test_gemm_is_within_its_bound(instruction: str) -> None:
    rng = np.random.default_rng(1)
    a, w = (to_bf16(rng.standard_normal((m, 300)) * 100) for m in (3, 5))
    wide_a, wide_w = (from_bf16(x).astype(np.float64) for x in (a, w))
    exact = wide_a @ wide_w.T
    bound = error_bound(wide_a, wide_w)
    got = gemm_exact(a, w, instruction)
    assert (np.abs(got - exact) <= bound).all()
    assert (got != exact).any(), "float32 sums of this size are not exact"
    assert (np.abs(got[:, :1] - exact[:, 1:2]) > bound[:, :1]).any(), (
        "the bound must be able to fail"
    )
    assert np.array_equal(gemm_exact(a[1:2], w, instruction), got[1:2])
