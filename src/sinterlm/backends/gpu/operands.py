"""What a packed matrix means to the kernels that read it: constants, arguments, tiles.

Refuses by name the formats that no kernel has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sinterlm.backends.gpu.devices import Rounding
from sinterlm.backends.gpu.tuning import Stored
from sinterlm.ir.plan import PackedTensor, pitch_of
from sinterlm.ir.quant import PANEL_COLUMNS, GemmFormat, PanelShape

#: Constants of a kernel that reads bf16 in tiles; in rows, W_PITCH is the elements of one.
WIDE: dict[str, Any] = {
    "BITS": 16, "W_GROUP": 0, "W_OFFSETS": False, "W_PITCH": 0, "FP8": "", "W_SHARED": False,
    "A_FP8": "",
}  # fmt: skip


@dataclass(frozen=True)
class Operand:
    """One matrix, wide or in codes."""

    constants: dict[str, Any]
    args: tuple[str, str, str]  #: what fills the matrix, its scales, its offsets
    stored: Stored  #: the entries of the tile table that fit
    suffix: str  #: of a slot: layers whose matrices are stored alike share kernels
    #: Most of k that a step of a GEMM's loop may take; of fp8 activations, all that it takes.
    deepest: int = 1 << 30

    def bind(self, matrix: str = "w") -> dict[str, str]:
        """The arguments by name, the matrix's own being ``matrix``."""
        return dict(zip((matrix, "w_scale", "w_offset"), self.args, strict=True))


def operand(tensor: PackedTensor, rounding: Rounding = "cvt") -> Operand:
    """How ``tensor`` is read, and what activations beside it are rounded to fp8 by, if they are."""
    form, at = tensor.format, tensor.offset
    if form is None and tensor.kind == "pitched":
        pitched = {**WIDE, "W_PITCH": pitch_of(tensor.k)}
        return Operand(pitched, (f"weight:{at}", "null", "null"), "bf16", "")
    if form is None:
        return Operand(WIDE, (f"weight:{at}", "null", "null"), "bf16", "")
    shape = PanelShape(form, tensor.k)
    scales = at + PANEL_COLUMNS * tensor.k * form.bits // 8
    offsets = scales + PANEL_COLUMNS * shape.num_groups * form.scale_bytes
    constants = {
        "BITS": form.bits, "W_GROUP": form.group, "W_OFFSETS": not form.symmetric,
        "W_PITCH": shape.nbytes, "FP8": "" if form.code == "int" else form.code,
        "W_SHARED": form.rows > 1, "A_FP8": rounding if form.act == "fp8" else "",
    }  # fmt: skip
    args = (
        f"weight:{at}", f"weight:{scales}", "null" if form.symmetric else f"weight:{offsets}",
    )  # fmt: skip
    stored: Stored = "fp8-a8" if form.act == "fp8" else "fp8" if form.is_fp8 else "codes"
    deepest = form.act_group if form.act == "fp8" else deepest_block(form.group)
    return Operand(constants, args, stored, f".{form.name}", deepest)


def deepest_block(group: int) -> int:
    """Most of k that a step of a GEMM's loop may take, a power of two: 64 of groups of 32, which it
    scales one by one; what divides a group; any number where a column has one scale."""
    return 1 << 30 if group == 0 else max(64, group & -group)


def unsupported(form: GemmFormat) -> str | None:
    """Why no kernel reads a format; None = one does."""
    if form.act == "int8":
        return "int8 activations"
    if form.is_fp8 and form.group not in (0, 128):
        return f"fp8 weights in groups of {form.group}"
    if form.group != 32 and form.group % 64:
        return f"weights in groups of {form.group}"
    return None
