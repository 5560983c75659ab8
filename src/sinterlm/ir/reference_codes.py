"""What quantised activations and integer GEMMs mean, bit for bit as the kernels compute them.

The codes, scales and sums of a row are float32 arithmetic that every ISA level does alike; a GEMM
is integer dot products of blocks, or products of activations and codes, and one fma per block (a
product and a sum at ``generic``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinterlm.ir.bf16 import Instruction, fma, from_bf16, gemm_exact, round_bf16, to_bf16
from sinterlm.ir.fp8 import FP8_MAX, from_fp8, to_fp8
from sinterlm.ir.quant import CodedMatrix, GemmFormat

F32 = NDArray[np.float32]

#: A group whose largest magnitude is below this is stored as zeros.
SMALLEST = np.float32(2.0**-100)


@dataclass(frozen=True, eq=False)
class CodedRows:
    """Activations [T, K] as int8 codes; K a multiple of the format's ``act_group``."""

    codes: NDArray[np.int8]  #: [T, K]
    scales: F32  #: [T, K / act_group]
    form: GemmFormat

    def dequantise(self) -> F32:
        """The activations [T, K] that the codes stand for."""
        scales = np.repeat(self.scales, self.form.act_group, axis=1)
        return np.asarray(self.codes * scales, np.float32)

    def sums(self) -> NDArray[np.int32]:
        """Sums of codes over the format's blocks, [T, K / block]."""
        cut = self.codes.reshape(len(self.codes), -1, self.form.block)
        return np.asarray(cut.sum(axis=2), np.int32)


def code_groups(values: NDArray[Any]) -> tuple[NDArray[np.int8], F32]:
    """Codes [..., n] and scales [...] of groups ``values`` [..., n]: scale = amax / 127, rounded to
    nearest even. A group that holds NaN or infinity gets NaN for its scale."""
    wide = np.asarray(values, np.float32)
    finite = np.isfinite(wide).all(axis=-1)
    amax = np.where(finite, np.abs(wide).max(axis=-1), np.float32(0)).astype(np.float32)
    coded = finite & (amax >= SMALLEST)
    safe = np.where(coded, amax, np.float32(1))
    inverse = np.where(coded, np.float32(127) / safe, np.float32(0)).astype(np.float32)
    usable = np.where(coded[..., None], wide, np.float32(0))
    codes = np.rint(usable * inverse[..., None]).astype(np.int8)
    small = np.where(finite, np.float32(0), np.float32(np.nan))
    scales = np.where(coded, safe / np.float32(127), small).astype(np.float32)
    return codes, scales


def code_rows(values: NDArray[Any], form: GemmFormat) -> CodedRows:
    """``values`` [T, K] in codes; K is padded with zeros to whole groups."""
    wide = np.pad(np.asarray(values, np.float32), ((0, 0), (0, -values.shape[1] % form.act_group)))
    codes, scales = code_groups(wide.reshape(len(wide), -1, form.act_group))
    return CodedRows(codes.reshape(wide.shape), scales, form)


def fp8_rows(values: NDArray[Any], form: GemmFormat) -> F32:
    """``values`` [T, K], bf16 or about to be rounded to it, as the numbers that they stand for once
    they are fp8 with a scale for each row and ``act_group`` of k: amax over the largest fp8 number.
    A group that holds NaN or infinity is NaN."""
    assert form.code != "int"
    size, largest = form.act_group, np.float32(FP8_MAX[form.code])
    wide = round_bf16(values)
    cut = np.pad(wide, ((0, 0), (0, -wide.shape[1] % size))).reshape(len(wide), -1, size)
    with np.errstate(invalid="ignore"):
        top = np.abs(cut).max(axis=2, keepdims=True)
        is_zero = top < SMALLEST
        inverse = np.where(is_zero, np.float32(0), largest / np.where(is_zero, np.float32(1), top))
        found = from_fp8(to_fp8(cut * inverse, form.code), form.code) * (top / largest)
    return np.asarray(found.reshape(len(wide), -1)[:, : wide.shape[1]], np.float32)


def coded_heads(values: NDArray[Any]) -> F32:
    """What K or V [T, Hkv, D] stand for once they are in int8 pages, in fp32: one scale per token
    and head. A kernel multiplies by the scale after the sum over D, or before that over tokens."""
    codes, scales = code_groups(values)
    return np.asarray(codes * scales[..., None], np.float32)


def fp8_heads(values: NDArray[Any], scale: float) -> F32:
    """What K or V [T, Hkv, D] stand for once they are in pages of e4m3fn numbers that are times
    ``scale``, in fp32: what is beyond the largest number becomes it, and NaN stays. e4m3fnuz holds
    the same with twice the scale. A kernel multiplies by the scale after the sum over D, or over
    tokens."""
    with np.errstate(over="ignore"):
        numbers = np.asarray(values, np.float32) * (np.float32(1) / np.float32(scale))
    return from_fp8(to_fp8(numbers, "e4m3fn"), "e4m3fn") * np.float32(scale)


def coded_gemm(a: CodedRows, w: CodedMatrix, instruction: Instruction) -> F32:
    """a [M, K] @ w [N, K]ᵀ as float32 [M, N]. ``w`` may lack the padding of ``a``'s K."""
    form, depth = a.form, a.codes.shape[1]
    centre = 0 if w.offsets is not None else 1 << (w.bits - 1)
    codes = np.full((len(w.codes), depth), centre, np.int64)
    codes[:, : w.codes.shape[1]] = w.codes
    wide, sums = a.codes.astype(np.int64), a.sums()
    acc = np.zeros((len(wide), len(codes)), np.float32)
    one_scale = form.group == 0 and w.offsets is None  # it meets the whole sum
    for block in range(depth // form.block):
        k = slice(block * form.block, (block + 1) * form.block)
        dot = (wide[:, k] @ (codes[:, k] - centre).T).astype(np.float32)  # exact: below 2**24
        group = 0 if form.group == 0 else k.start // form.group
        if group >= w.scales.shape[1]:
            break  # padding of k alone
        act = a.scales[:, [k.start // form.act_group]]
        scale = act if one_scale else w.scales[None, :, group] * act
        acc = _add(dot, scale, acc, instruction)
        if w.offsets is not None:
            offsets = w.offsets[None, :, group] * act
            acc = _add(sums[:, [block]].astype(np.float32), offsets, acc, instruction)
    return acc * w.scales[None, :, 0] if one_scale else acc


def weight_only_gemm(a: NDArray[Any], w: CodedMatrix, instruction: Instruction) -> F32:
    """a [M, K] @ w [N, K]ᵀ as float32 [M, N], codes less their centre multiplied as they are: bf16
    bits (uint16) of even K, or float32, K a multiple of 16. ``w`` may lack the padding of K.

    Blocks are the groups of weights, or 256 of k where all of a row is one.
    """
    depth, block = a.shape[1], w.group or 256
    centre = 0 if w.offsets is not None else 1 << (w.bits - 1)
    codes = np.full((len(w.codes), depth), centre, np.float32)
    codes[:, : w.codes.shape[1]] = w.codes
    codes -= centre
    narrow = to_bf16(codes) if a.dtype == np.uint16 else codes
    wide = from_bf16(a) if a.dtype == np.uint16 else a
    acc = np.zeros((len(a), len(codes)), np.float32)
    for start in range(0, depth, block):
        k = slice(start, min(depth, start + block))
        group = start // w.group if w.group else 0
        if group >= w.scales.shape[1]:
            break  # padding of k alone
        sums = gemm_exact(a[:, k], narrow[:, k], instruction)
        acc = _add(sums, np.broadcast_to(w.scales[None, :, group], acc.shape), acc, instruction)
        if w.offsets is not None:
            acc = _add(_sum_lanes(wide[:, k])[:, None], w.offsets[None, :, group], acc, instruction)
    return acc


def _sum_lanes(values: F32) -> F32:
    """Sums of rows [M, n], n a multiple of 16: lane by lane, then halves, quarters and pairs."""
    lanes = np.zeros((len(values), 16), np.float32)
    for i in range(0, values.shape[1], 16):
        lanes = lanes + values[:, i : i + 16]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def _add(x: F32, y: F32, acc: F32, instruction: Instruction) -> F32:
    """acc + x * y."""
    with np.errstate(invalid="ignore", over="ignore"):
        return acc + x * y if instruction == "mul_add" else fma(x, y, acc)
