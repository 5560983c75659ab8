"""bf16 rounding, and dot products bit for bit as the instructions of each ISA level compute them.

A kernel is compared with ``gemm_exact`` by ``==``, and ``gemm_exact`` with float64 by the bound of
``error_bound``. bf16 travels as uint16, the upper half of a float32.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Bits = NDArray[np.uint16]
Instruction = Literal["tdpbf16ps", "vdpbf16ps", "fma", "mul_add"]

#: Unit roundoff of float32.
U32 = 2.0**-24

_TINY = np.float32(2.0**-126)  # the smallest normal float32


def to_bf16(values: NDArray[Any]) -> Bits:
    """bf16 bits of float32 values: to nearest, ties to even; NaN stays NaN, with its sign."""
    wide = np.ascontiguousarray(values, np.float32)
    bits = wide.view(np.uint32)
    with np.errstate(over="ignore"):  # wraps only for NaN, replaced below
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    quiet = (bits >> 16) | np.uint32(0x40)
    return np.where(np.isnan(wide), quiet, rounded).astype(np.uint16)


def from_bf16(bits: Bits) -> F32:
    """float32 values of bf16 bits, exactly."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def round_bf16(values: NDArray[Any]) -> F32:
    """The nearest bf16 of each value, as float32."""
    return from_bf16(to_bf16(values))


def fma(a: NDArray[Any], b: NDArray[Any], c: NDArray[Any]) -> F32:
    """float32 a * b + c with one rounding, to nearest even.

    The product of two float32 is exact in float64. The sum is made odd in its last bit when it is
    inexact (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008), so that the
    second rounding, to float32, cannot see a false tie.
    """
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
        addend = np.asarray(c, np.float64)
        total = np.asarray(product + addend)
        back = total - product
        error = (product - (total - back)) + (addend - back)  # Knuth's TwoSum
        bits = total.view(np.int64)
        outward = (error > 0) == (total > 0)
        odd = bits + np.where(outward, 1, -1)
        inexact = (error != 0) & np.isfinite(total) & ((bits & 1) == 0)
        return np.where(inexact, odd, bits).view(np.float64).astype(np.float32)


def flush(values: F32) -> F32:
    """Denormals as zeros of their sign."""
    return np.where(np.abs(values) < _TINY, np.copysign(np.float32(0), values), values)


def vdpbf16ps(acc: F32, a: Bits, b: Bits) -> F32:
    """acc[...] + a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] as the instruction adds them.

    Denormal inputs count as zero. The odd element of the pair is added first, then the even one,
    each as an fma rounded to nearest even, and denormal results become zero. (Intel's Software
    Developer's Manual, VDPBF16PS; MXCSR plays no part.)
    """
    wide_a, wide_b = flush(from_bf16(a)), flush(from_bf16(b))
    for at in (1, 0):
        acc = flush(fma(wide_a[..., at], wide_b[..., at], flush(acc)))
    return acc


def tdpbf16ps(acc: F32, a: Bits, b: Bits) -> F32:
    """acc[...] + the dot product of a[..., K] and b[..., K] as the instruction adds it, K <= 32.

    Even and odd elements are two chains of fma from zero, k ascending; their sum is added. All is
    rounded to nearest even, and denormals count as zero. (Intel's Software Developer's Manual,
    TDPBF16PS.)
    """
    wide_a, wide_b = flush(from_bf16(a)), flush(from_bf16(b))
    chains = []
    for first in (0, 1):
        chain = np.zeros(np.broadcast_shapes(a.shape, b.shape)[:-1], np.float32)
        for k in range(first, a.shape[-1], 2):
            chain = flush(fma(wide_a[..., k], wide_b[..., k], chain))
        chains.append(chain)
    with np.errstate(invalid="ignore", over="ignore"):
        return flush(flush(acc) + flush(chains[0] + chains[1]))


def gemm_exact(a: NDArray[Any], w: NDArray[Any], instruction: Instruction) -> F32:
    """a[M, K] @ w[N, K]ᵀ as float32 [M, N]: one chain per output, k ascending, as the kernels do.

    bf16 operands are uint16 bits with an even K. ``"tdpbf16ps"`` is bf16 at the amx level, blocks
    of 32 k; ``"vdpbf16ps"`` is bf16 at the avx512bf16 level; ``"fma"`` is avx512 and avx2, and
    float32 at these two; ``"mul_add"``, a product and a sum each rounded, is generic. The last two
    keep denormals, so they stand for kernels that flush them only as long as no product or sum is
    one.
    """
    acc = np.zeros((a.shape[0], w.shape[0]), np.float32)
    if instruction == "tdpbf16ps":
        for k in range(0, a.shape[1], 32):
            acc = tdpbf16ps(acc, a[:, None, k : k + 32], w[None, :, k : k + 32])
        return acc
    if instruction == "vdpbf16ps":
        for k in range(0, a.shape[1], 2):
            acc = vdpbf16ps(acc, a[:, None, k : k + 2], w[None, :, k : k + 2])
        return acc
    wide_a, wide_w = (from_bf16(x) if x.dtype == np.uint16 else x for x in (a, w))
    for k in range(a.shape[1]):
        x, y = wide_a[:, None, k], wide_w[None, :, k]
        acc = fma(x, y, acc) if instruction == "fma" else acc + x * y
    return acc


def error_bound(a: NDArray[Any], w: NDArray[Any]) -> F64:
    """|c - exact| of a[M, K] @ w[N, K]ᵀ for any order of K float32 roundings, as float64 [M, N].

    gamma * sum |a| |w| with gamma = K u / (1 - K u), u = 2**-24 (Higham, "Accuracy and Stability of
    Numerical Algorithms", 3.1), for operands taken as they are, products exact or fused, and no
    underflow. A result stored as bf16 adds ``2**-8 * |c|``.
    """
    depth = a.shape[1] * U32
    assert depth < 1, "the bound holds for K < 2**24"
    size = np.abs(np.asarray(a, np.float64)) @ np.abs(np.asarray(w, np.float64)).T
    return np.asarray(size * (depth / (1 - depth)))
