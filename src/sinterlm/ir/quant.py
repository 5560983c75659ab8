"""The nouns of quantisation: how one GEMM's weights and activations are stored (GemmFormat), and a
weight matrix in codes (CodedMatrix). Nothing here chooses scales or packs.

A weight is ``w[n, k] = scale[n, g] * code[n, k] + offset[n, g]`` with g = k // group. Symmetric
formats have one offset for all, ``-2 ** (bits - 1) * scale``, which is not stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

#: What activations are turned into before they meet coded weights: ``int8``, one scale per token
#: and group of k; or the graph's own dtype (weight-only quantisation).
ActDType = Literal["int8", "graph"]


@dataclass(frozen=True)
class GemmFormat:
    """Storage of one GEMM's operands. Part of the layout, and so of both keys."""

    bits: Literal[8, 4]  #: of a weight's code
    group: int  #: weights along k that share a scale; 0 = the whole row (per output channel)
    symmetric: bool  #: False: an offset per group is stored beside its scale
    act: ActDType
    act_group: int  #: activations along k that share a scale, for act="int8"; 0 = the whole row

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
        """For people: ``w4g32-a8g64``, ``w4g128z`` (offsets), ``w8`` (weight-only, per channel)."""
        group = f"g{self.group}" if self.group else ""
        weights = f"w{self.bits}{group}{'' if self.symmetric else 'z'}"
        if self.act == "graph":
            return weights
        return f"{weights}-a8" + (f"g{self.act_group}" if self.act_group else "")


@dataclass(frozen=True, eq=False)
class CodedMatrix:
    """A weight matrix [N, K] in codes. G = ceil(K / group), or 1 for group 0."""

    codes: NDArray[np.uint8]  #: [N, K], each below 2 ** bits
    scales: NDArray[np.float32]  #: [N, G]
    offsets: NDArray[np.float32] | None  #: [N, G]; None = symmetric
    bits: Literal[8, 4]
    group: int

    def dequantise(self) -> NDArray[np.float32]:
        """The weights [N, K] that the codes stand for, in fp32."""
        size = self.group or self.codes.shape[1]
        scales = np.repeat(self.scales, size, axis=1)[:, : self.codes.shape[1]]
        if self.offsets is None:
            centre = np.float32(1 << (self.bits - 1))
            return scales * (self.codes.astype(np.float32) - centre)
        offsets = np.repeat(self.offsets, size, axis=1)[:, : self.codes.shape[1]]
        return scales * self.codes.astype(np.float32) + offsets


#: Columns of a panel (the whole file format counts on it).
PANEL_COLUMNS = 64


@dataclass(frozen=True)
class PanelShape:
    """The bytes of one packed panel of 64 columns in codes, of depth ``k``; see ``ir/plan.py``."""

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
    def tail_bytes(self) -> int:
        """Scales and offsets of one group."""
        return PANEL_COLUMNS * ((2 if self.form.group else 4) + (0 if self.form.symmetric else 4))

    @property
    def nbytes(self) -> int:
        """The whole panel."""
        return PANEL_COLUMNS * self.k * self.form.bits // 8 + self.num_groups * self.tail_bytes
