"""Calls an op-test library of quantised GEMMs with NumPy arrays and CodedMatrix."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

from sinterlm.ir.bf16 import Instruction
from sinterlm.ir.plan import PackedTensor
from sinterlm.ir.quant import CodedMatrix, GemmFormat, PanelShape
from sinterlm.options import IsaName
from sinterlm.passes.packing_codes import PanelWriter, rows_of
from sinterlm.passes.quantise import quantise
from tests.kernels.oplib import LANES, PANEL, aligned, call, pad, round_up

SOURCE = Path(__file__).with_name("optest_coded.cpp")

#: In the order of with_format() in optest_coded.cpp.
FORMATS = (
    GemmFormat(8, 0, True, "int8", 64),
    GemmFormat(8, 32, True, "int8", 16),
    GemmFormat(4, 32, True, "int8", 64),
    GemmFormat(4, 128, False, "int8", 32),
    GemmFormat(8, 0, False, "int8", 64),
    GemmFormat(4, 64, False, "graph", 0),
    GemmFormat(8, 0, True, "graph", 0),
    GemmFormat(8, 32, True, "graph", 0),
)
WIDE_DTYPE = {5: "bf16", 6: "fp32", 7: "bf16"}  #: of the activations of weight-only formats
CODED = range(5)

Array = np.ndarray


def quantised(matrix: Array, form: GemmFormat) -> CodedMatrix:
    return quantise(matrix, form.bits, form.group, form.symmetric)


def packed(form: GemmFormat, k: int, columns: int, *parts: tuple[int, CodedMatrix]) -> Array:
    """Panels of ``parts``, (first column, matrix) each."""
    n = round_up(columns, PANEL)
    size = n // PANEL * PanelShape(form, k).nbytes
    tensor = PackedTensor("t", "panels", "int8", n, k, k, (), 0, size, form)
    writer = PanelWriter(tensor, n)
    for at, matrix in parts:
        writer.put(at, matrix)
    return aligned(writer.panels())


class CodedLib:
    """The quantised kernels of one ISA level, in the library of ``SOURCE`` at ``path``."""

    def __init__(self, isa: IsaName, path: Path) -> None:
        self.isa = isa
        self.lib = ctypes.CDLL(str(path))
        self.lib.oc_isa.restype = ctypes.c_char_p
        assert self.lib.oc_isa().decode() == isa

    @property
    def bf16_dot(self) -> Instruction:
        """What products of bf16 are computed with."""
        return "vdpbf16ps" if self.isa in ("amx", "avx512bf16") else self.instruction

    @property
    def instruction(self) -> Instruction:
        return "mul_add" if self.isa == "generic" else "fma"

    def store(self, number: int, values: Array) -> tuple[Array, Array, Array]:
        """values[T, K] -> codes[T, K], scales[T, K/group], sums[T, K/block]."""
        form, (rows, k) = FORMATS[number], values.shape
        codes = np.zeros((rows, k), np.int32)
        scales = np.zeros((rows, k // form.act_group), np.float32)
        sums = np.zeros((rows, k // form.block), np.int32)
        call(self.lib.oc_store, number, rows, k, np.ascontiguousarray(values), codes, scales, sums)
        return codes, scales, sums

    def residual(
        self, number: int, a: Array, w: CodedMatrix, bias: Array | None, norm: Array, x: Array, *,
        threads: int = 1,
    ) -> tuple[Array, Array, Array]:  # fmt: skip
        """a[T, K], w[H, K], x[T, H] -> x'[T, H], xw[T, H] as its reader sees it, ssq[T, Hp/16]."""
        (rows, k), h = a.shape, len(w.codes)
        kp, hp = round_up(k, PANEL), round_up(h, PANEL)
        out, xw = (np.full((rows, hp), np.nan, np.float32) for _ in range(2))
        ssq = np.full((rows, hp // LANES), np.nan, np.float32)
        panels = packed(FORMATS[number], kp, hp, (0, w))
        call(
            self.lib.oc_residual, number, threads, rows, kp, hp, pad(a, kp), panels,
            None if bias is None else pad(bias, hp), pad(norm, hp), pad(x, hp), out, xw, ssq,
        )  # fmt: skip
        assert not out[np.isfinite(a).all(axis=1), h:].any()
        return out[:, :h], xw[:, :h], ssq

    def gate_up(
        self, number: int, xw: Array, gate: CodedMatrix, up: CodedMatrix, ssq: Array, eps: float, *,
        threads: int = 1,
    ) -> Array:  # fmt: skip
        """xw[T, H], gate[F, H], up[F, H] -> h[T, F] as its reader sees it."""
        (rows, h), f = xw.shape, len(gate.codes)
        hp, fp = round_up(h, PANEL), round_up(f, PANEL)
        parts = []
        for first in range(0, f, PANEL):
            for half, matrix in enumerate((gate, up)):
                piece = rows_of(matrix, first, min(f, first + PANEL))
                parts.append((2 * first + half * PANEL, piece))
        panels = packed(FORMATS[number], hp, 2 * fp, *parts)
        out = np.full((rows, fp), np.nan, np.float32)
        call(
            self.lib.oc_gate_up, number, threads, rows, h, hp, fp, pad(xw, hp), ssq, panels, None,
            float(eps), out,
        )  # fmt: skip
        assert not out[:, f:].any()
        return out[:, :f]

    def lm_head(
        self, number: int, xw: Array, ssq: Array, rows: Array, w: CodedMatrix, eps: float, *,
        threads: int = 1,
    ) -> Array:  # fmt: skip
        """xw[T, H], rows[R], w[V, H] -> logits[R, V]."""
        h, v = xw.shape[1], len(w.codes)
        hp, vp = round_up(h, PANEL), round_up(v, PANEL)
        logits = np.full((len(rows), vp), np.nan, np.float32)
        call(
            self.lib.oc_lm_head, number, threads, len(xw), len(rows), h, hp, v, vp, pad(xw, hp),
            ssq, np.asarray(rows, np.int32), packed(FORMATS[number], hp, vp, (0, w)), float(eps),
            logits,
        )  # fmt: skip
        return logits[:, :v]

    def embed(
        self, number: int, ids: Array, table: CodedMatrix, norm: Array, *, threads: int = 1
    ) -> tuple[Array, Array, Array]:
        """table[V, H] -> x[T, H], xw[T, H] as its reader sees it, ssq[T, Hp/16]."""
        h = table.codes.shape[1]
        hp = round_up(h, PANEL)
        x, xw = (np.full((len(ids), hp), np.nan, np.float32) for _ in range(2))
        ssq = np.full((len(ids), hp // LANES), np.nan, np.float32)
        call(
            self.lib.oc_embed, number, threads, len(ids), np.asarray(ids, np.int32), h, hp,
            packed(FORMATS[number], hp, len(table.codes), (0, table)), pad(norm, hp), x, xw, ssq,
        )  # fmt: skip
        assert not x[:, h:].any()
        return x[:, :h], xw[:, :h], ssq
