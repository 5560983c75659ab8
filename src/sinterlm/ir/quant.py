"""The nouns of quantisation: how one GEMM's weights and activations are stored (GemmFormat), and a
weight matrix in codes (CodedMatrix). Nothing here chooses scales or packs.

A weight is ``w[n, k] = scale[n, g] * code[n, k] + offset[n, g]`` with g = k // group. Symmetric
formats have one offset for all, ``-2 ** (bits - 1) * scale``, which is not stored; fp8 numbers have
none, and their scales are fp32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sinterlm.ir.fp8 import Fp8Name, fn_to_fnuz, from_fp8

#: What activations are turned into before they meet coded weights: ``int8``, one scale per token
#: and group of k; ``fp8`` likewise, beside fp8 weights; or the graph's own dtype (weight-only).
ActDType = Literal["int8", "fp8", "graph"]
#: What a code is: an unsigned whole number, or an fp8 number as a device writes it.
CodeName = Literal["int"] | Fp8Name


@dataclass(frozen=True)
class GemmFormat:
    """Storage of one GEMM's operands. Part of the layout, and so of both keys."""

    bits: Literal[8, 4]  #: of a weight's code
    group: int  #: weights along k that share a scale; 0 = the whole row (per output channel)
    symmetric: bool  #: False: an offset per group is stored beside its scale
    act: ActDType
    act_group: int  #: activations along k that share a scale, unless act="graph"; 0 = a whole row
    code: CodeName = "int"
    rows: int = 1  #: output channels that share a scale; more than 1 only where codes are fp8

    @property
    def is_fp8(self) -> bool:
        """Whether weights are fp8 numbers."""
        return self.code != "int"

    @property
    def scale_bytes(self) -> int:
        """Of one scale as it is packed."""
        return 4 if self.is_fp8 or not self.group else 2

    def holds_weights_of(self, other: GemmFormat) -> bool:
        """Whether weights in ``other`` become weights in this format exactly, scale by scale."""
        same = (self.bits, self.group, self.symmetric, self.is_fp8)
        return same == (other.bits, other.group, other.symmetric, other.is_fp8) and (
            other.rows % self.rows == 0
        )

    @property
    def block(self) -> int:
        """Products along k that are summed as integers before a scale meets them (act="int8")."""
        return min(self.act_group, self.group or self.act_group)

    def operand_row_bytes(self, width: int) -> int:
        """Most bytes of a row of ``width`` int8 activations at any ISA level: codes (16 bits wide
        where 8-bit weights have no byte dot product), a scale per group, a sum per block."""
        codes = width * (2 if self.bits == 8 else 1)
        return codes + 4 * (width // self.act_group) + 4 * (width // self.block)

    @property
    def name(self) -> str:
        """For people: ``w4g32-a8g64``, ``w4g128z`` (offsets), ``w8`` (weight-only, per channel),
        ``e4m3fn``, ``e4m3fn-b128`` (a scale per block of 128 × 128)."""
        group = f"g{self.group}" if self.group else ""
        if self.is_fp8:
            weights = f"{self.code}-b{self.rows}" if self.rows > 1 else f"{self.code}{group}"
        else:
            weights = f"w{self.bits}{group}{'' if self.symmetric else 'z'}"
        if self.act == "graph":
            return weights
        return f"{weights}-a8" + (f"g{self.act_group}" if self.act_group else "")


@dataclass(frozen=True, eq=False)
class CodedMatrix:
    """A weight matrix [N, K] in codes. G = ceil(K / group), or 1 for group 0."""

    codes: NDArray[np.uint8]  #: [N, K], each below 2 ** bits, or fp8 numbers
    scales: NDArray[np.float32]  #: [N, G]
    offsets: NDArray[np.float32] | None  #: [N, G]; None = symmetric
    bits: Literal[8, 4]
    group: int
    code: CodeName = "int"

    def dequantise(self) -> NDArray[np.float32]:
        """The weights [N, K] that the codes stand for, in fp32."""
        size = self.group or self.codes.shape[1]
        scales = np.repeat(self.scales, size, axis=1)[:, : self.codes.shape[1]]
        if self.code != "int":
            return scales * from_fp8(self.codes, self.code)
        if self.offsets is None:
            centre = np.float32(1 << (self.bits - 1))
            return scales * (self.codes.astype(np.float32) - centre)
        offsets = np.repeat(self.offsets, size, axis=1)[:, : self.codes.shape[1]]
        return scales * self.codes.astype(np.float32) + offsets

    def written_as(self, code: CodeName) -> CodedMatrix:
        """The same weights, fp8 numbers as ``code`` has them: e4m3fnuz has half of e4m3fn's values,
        so scales are doubled, which is exact."""
        if code == self.code:
            return self
        assert (self.code, code) == ("e4m3fn", "e4m3fnuz"), f"{self.code} is not written as {code}"
        doubled = self.scales * np.float32(2)
        return replace(self, codes=fn_to_fnuz(self.codes), scales=doubled, code=code)


#: Columns of a panel (the whole file format counts on it).
PANEL_COLUMNS = 64


@dataclass(frozen=True)
class PanelShape:
    """The bytes of one packed panel of 64 columns in codes, of depth ``k``; see ``ir/plan.py``.
    Where output channels share scales, a panel has one scale per group."""

    form: GemmFormat
    k: int

    @property
    def group(self) -> int:
        """Weights along k that share a scale."""
        return self.form.group or self.k

    @property
    def num_groups(self) -> int:
        """Groups of k, the last one perhaps shorter."""
        return -(-self.k // self.group)

    @property
    def scale_columns(self) -> int:
        """Scales of one group: one for each column, or one for all."""
        return 1 if self.form.rows > 1 else PANEL_COLUMNS

    @property
    def tail_bytes(self) -> int:
        """Scales and offsets of one group."""
        offsets = 0 if self.form.symmetric else 4 * PANEL_COLUMNS
        return self.scale_columns * self.form.scale_bytes + offsets

    @property
    def nbytes(self) -> int:
        """The whole panel, a multiple of 64 so that loads are aligned."""
        used = PANEL_COLUMNS * self.k * self.form.bits // 8 + self.num_groups * self.tail_bytes
        return -(-used // 64) * 64
