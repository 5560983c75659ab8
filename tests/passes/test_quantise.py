"""The quantiser against rounding to nearest and llama.cpp's formats, on easy and hard weights."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from sinterlm.passes.quantise import quantise

ROWS, DEPTH = 48, 1024
BITS = pytest.mark.parametrize("bits", [8, 4])
GROUPS = pytest.mark.parametrize("group", [0, 32, 64, 128])
SYMMETRIC = pytest.mark.parametrize("symmetric", [True, False])


def weights(kind: str) -> Any:
    """float32 [ROWS, DEPTH] of deviation about 0.02."""
    rng = np.random.default_rng(7)
    drawn = {
        "gaussian": lambda: rng.standard_normal((ROWS, DEPTH)),
        "heavy_tailed": lambda: rng.standard_t(3, (ROWS, DEPTH)),
        "outlier_channels": lambda: (
            rng.standard_normal((ROWS, DEPTH)) * np.where(rng.random(DEPTH) < 0.01, 20.0, 1.0)
        ),
        "shifted": lambda: rng.standard_normal((ROWS, DEPTH)) + 5.0,
    }[kind]()
    return (0.02 * drawn).astype(np.float32)


KINDS = pytest.mark.parametrize("kind", ["gaussian", "heavy_tailed", "outlier_channels"])


def error(back: Any, matrix: Any) -> float:
    """Squared error over squared weights."""
    wide = matrix.astype(np.float64)
    return float(((back - wide) ** 2).sum() / (wide**2).sum())


def nearest(matrix: Any, bits: int, group: int) -> Any:
    """Rounding to nearest with the largest weight at the last code, the usual baseline."""
    cut = matrix.reshape(len(matrix), -1, group or matrix.shape[1])
    high = (1 << (bits - 1)) - 1
    scale = np.abs(cut).max(axis=2, keepdims=True) / high
    return (np.clip(np.rint(cut / scale), -high - 1, high) * scale).reshape(matrix.shape)


@KINDS
@BITS
@GROUPS
def test_never_worse_than_rounding_to_nearest(kind: str, bits: int, group: int) -> None:
    matrix = weights(kind)
    ours = error(quantise(matrix, bits, group, True).dequantise(), matrix)
    assert ours < error(nearest(matrix, bits, group), matrix)
    offsets = error(quantise(matrix, bits, group, False).dequantise(), matrix)
    assert offsets < ours * 1.02  # a freedom more; with rows as groups it buys next to nothing


@pytest.mark.parametrize(
    ("theirs", "bits", "symmetric", "at_most"),
    [("Q4_0", 4, True, 0.98), ("Q4_1", 4, False, 0.86), ("Q8_0", 8, True, 0.98)],
)
@KINDS
def test_better_than_llama_cpp_in_as_many_bits(
    theirs: str, bits: int, symmetric: bool, at_most: float, kind: str
) -> None:
    matrix, number = weights(kind), GGMLQuantizationType[theirs]
    blocks = quants.quantize(matrix, number)
    reference = error(quants.dequantize(blocks, number).reshape(matrix.shape), matrix)
    ours = error(quantise(matrix, bits, 32, symmetric).dequantise(), matrix)
    assert ours <= at_most * reference


def test_offsets_take_up_a_common_shift() -> None:
    matrix = weights("shifted")
    centred = matrix - matrix.mean()
    coded = quantise(matrix, 4, 32, False).dequantise() - matrix
    assert (coded**2).mean() < 1.05 * error(
        quantise(centred, 4, 32, False).dequantise(), centred
    ) * (centred**2).mean()


@BITS
@SYMMETRIC
def test_weights_on_a_grid_come_back_as_they_were(bits: int, symmetric: bool) -> None:
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 1 << bits, (8, 4, 32))
    codes[:, :, 0], codes[:, :, 1] = 0, (1 << bits) - 1  # the whole range is in use
    scales = rng.uniform(0.01, 0.02, (8, 4, 1)).astype(np.float16).astype(np.float32)
    grid = (scales * (codes - (1 << (bits - 1)))).astype(np.float32).reshape(8, 128)
    back = quantise(grid, bits, 32, symmetric).dequantise()
    assert np.abs(back - grid).max() <= 2**-10 * np.abs(grid).max()


@BITS
@GROUPS
@SYMMETRIC
def test_rows_stand_alone_and_a_short_last_group_is_a_group(
    bits: int, group: int, symmetric: bool
) -> None:
    matrix = weights("gaussian")[:9, :150]
    whole = quantise(matrix, bits, group, symmetric)
    assert whole.codes.shape == (9, 150)
    assert whole.scales.shape == (9, -(-150 // (group or 150)))
    for row in (0, 8):
        alone = quantise(matrix[row : row + 1], bits, group, symmetric)
        assert np.array_equal(alone.codes[0], whole.codes[row])
        assert np.array_equal(alone.dequantise()[0], whole.dequantise()[row])
    assert error(whole.dequantise(), matrix) < (0.02 if bits == 4 else 2e-4)


@SYMMETRIC
def test_scales_that_fp16_cannot_hold_are_marked(symmetric: bool) -> None:
    matrix = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)
    assert np.isnan(quantise(matrix * np.float32(1e8), 4, 32, symmetric).dequantise()).all()
    assert np.isfinite(quantise(matrix * np.float32(1e8), 4, 0, symmetric).dequantise()).all()


def damaged(matrix: Any) -> Any:
    """The same with rows of zeros, denormals, huge and equal numbers, NaN and infinity."""
    matrix[3], matrix[5, :40], matrix[6], matrix[8] = 0, 0, 3.5, -0.0
    matrix[7, 3], matrix[9, 5], matrix[12, ::2] = np.nan, -np.inf, 1e35
    matrix[10] *= np.float32(1e-40)
    matrix[11] *= np.float32(1e30)
    return matrix


@pytest.mark.parametrize(
    ("bits", "symmetric", "digest"),
    [
        (4, True, "32f6675e84fe9ec7"),
        (4, False, "a0181720fb051952"),
        (8, True, "07ef295e136b2a02"),
        (8, False, "f867bdd8bf3bdbf4"),
    ],
)
def test_codes_are_these_on_every_machine(bits: int, symmetric: bool, digest: str) -> None:
    sha = hashlib.sha256()
    for kind in ("gaussian", "heavy_tailed", "shifted"):
        for group in (0, 32, 64, 128):
            coded = quantise(damaged(weights(kind))[:, :1000], bits, group, symmetric)
            parts = [coded.codes, coded.scales] + ([] if symmetric else [coded.offsets])
            for part in parts:
                clean = np.where(np.isnan(part), np.float32(0.5), part)  # a NaN has no one form
                sha.update(clean.astype("<f4").tobytes())
    assert sha.hexdigest()[:16] == digest
