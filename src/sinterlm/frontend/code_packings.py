"""How quantised safetensors pack one matrix: the names, shapes and bit order of its parts.

Each packing turns stored words into codes [N, K] and zeros [N, G] of unsigned bytes, and scales
[N, G]. Shapes are checked by the caller against ``stored_shapes``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import numpy as np

from sinterlm.frontend.codes import F32, Bytes, fields_along_rows, fields_of
from sinterlm.frontend.numeric import Array
from sinterlm.ir.quant import CodeName

Bits = Literal[8, 4]
Shapes = dict[str, tuple[int, ...]]

#: Rows, and columns, that share a scale where fp8 numbers have scales of blocks.
FP8_BLOCK = 128


class Packing(ABC):
    """Parts are called codes, scales, zeros, index, shape and act_scale; "" means there is none."""

    codes: str
    scales: str
    zeros: str
    index = ""
    shape = ""
    act_scale = ""  #: of activations, which no kernel of ours takes from a checkpoint
    code_dtype = "int32"
    code: CodeName = "int"

    @abstractmethod
    def size(self, stored: tuple[int, int], bits: Bits) -> tuple[int, int]:
        """Rows N and depth K of a matrix whose codes are stored in this shape."""

    @abstractmethod
    def stored_shapes(self, rows: int, depth: int, groups: int, bits: Bits) -> Shapes:
        """Shapes of codes, scales and zeros."""

    @abstractmethod
    def read_codes(self, stored: Array, bits: Bits) -> Bytes:
        """[N, K]."""

    @abstractmethod
    def read_zeros(self, stored: Array, bits: Bits) -> Bytes:
        """[N, G], as stored; perhaps with rows of padding below."""

    def read_scales(self, stored: F32, rows: int) -> F32:
        """[N, G] of a matrix of ``rows`` rows."""
        return stored


class Gptq(Packing):
    """Fields of a word are neighbours along k; scales and zeros have groups first."""

    codes, scales, zeros, index = "qweight", "scales", "qzeros", "g_idx"

    def size(self, stored: tuple[int, int], bits: Bits) -> tuple[int, int]:
        """See Packing."""
        return stored[1], stored[0] * (32 // bits)

    def stored_shapes(self, rows: int, depth: int, groups: int, bits: Bits) -> Shapes:
        """See Packing."""
        return {
            "codes": (depth * bits // 32, rows),
            "scales": (groups, rows),
            "zeros": (groups, rows * bits // 32),
        }

    def read_codes(self, stored: Array, bits: Bits) -> Bytes:
        """See Packing."""
        return fields_along_rows(stored, bits)

    def read_zeros(self, stored: Array, bits: Bits) -> Bytes:
        """See Packing."""
        return np.ascontiguousarray(fields_of(stored, bits).T)

    def read_scales(self, stored: F32, rows: int) -> F32:
        """See Packing."""
        return np.ascontiguousarray(stored.T)


class Awq(Gptq):
    """Nibbles of a word are neighbours along n: even columns below, odd ones above."""

    index = ""
    #: Nibble that holds each of a word's eight columns.
    nibbles = (0, 4, 1, 5, 2, 6, 3, 7)

    def size(self, stored: tuple[int, int], bits: Bits) -> tuple[int, int]:
        """See Packing."""
        return stored[1] * (32 // bits), stored[0]

    def stored_shapes(self, rows: int, depth: int, groups: int, bits: Bits) -> Shapes:
        """See Packing."""
        words = rows * bits // 32
        return {"codes": (depth, words), "scales": (groups, rows), "zeros": (groups, words)}

    def read_codes(self, stored: Array, bits: Bits) -> Bytes:
        """See Packing."""
        nibbles = fields_of(stored, 4).reshape(*stored.shape, 8)[..., self.nibbles]
        return np.ascontiguousarray(nibbles.reshape(len(stored), -1).T)

    def read_zeros(self, stored: Array, bits: Bits) -> Bytes:
        """See Packing."""
        return self.read_codes(stored, bits)


class IntQuantized(Packing):
    """One signed byte per weight."""

    codes, scales, zeros = "weight", "weight_scale", "weight_zero_point"
    code_dtype = "int8"

    def size(self, stored: tuple[int, int], bits: Bits) -> tuple[int, int]:
        """See Packing."""
        return stored

    def stored_shapes(self, rows: int, depth: int, groups: int, bits: Bits) -> Shapes:
        """See Packing."""
        return {"codes": (rows, depth), "scales": (rows, groups), "zeros": (rows, groups)}

    def read_codes(self, stored: Array, bits: Bits) -> Bytes:
        """See Packing."""
        return stored.view(np.uint8) ^ np.uint8(128)

    def read_zeros(self, stored: Array, bits: Bits) -> Bytes:
        """See Packing."""
        return stored.view(np.uint8) ^ np.uint8(128)


class PackQuantized(Packing):
    """Fields of a word are neighbours along k, and those of zeros along n."""

    codes, scales, zeros = "weight_packed", "weight_scale", "weight_zero_point"
    index, shape = "weight_g_idx", "weight_shape"

    def size(self, stored: tuple[int, int], bits: Bits) -> tuple[int, int]:
        """See Packing."""
        return stored[0], stored[1] * (32 // bits)

    def stored_shapes(self, rows: int, depth: int, groups: int, bits: Bits) -> Shapes:
        """See Packing."""
        per_word = 32 // bits
        return {
            "codes": (rows, depth // per_word),
            "scales": (rows, groups),
            "zeros": (-(-rows // per_word), groups),
        }

    def read_codes(self, stored: Array, bits: Bits) -> Bytes:
        """See Packing."""
        return fields_of(stored, bits)

    def read_zeros(self, stored: Array, bits: Bits) -> Bytes:
        """See Packing."""
        return np.ascontiguousarray(fields_along_rows(stored, bits).T)


class Fp8(Packing):
    """One e4m3fn number per weight; a scale for all of a matrix (``scale_rows`` 0), for each row,
    or for each block of so many rows and columns."""

    codes, zeros = "weight", ""
    act_scale = "input_scale"
    code_dtype = "e4m3fn"
    code: CodeName = "e4m3fn"

    def __init__(self, scale_rows: int, scales: str = "weight_scale") -> None:
        self.scale_rows, self.scales = scale_rows, scales

    def size(self, stored: tuple[int, int], bits: Bits) -> tuple[int, int]:
        """See Packing."""
        return stored

    def stored_shapes(self, rows: int, depth: int, groups: int, bits: Bits) -> Shapes:
        """See Packing."""
        size = self.scale_rows
        return {"codes": (rows, depth), "scales": (-(-rows // size), groups) if size else ()}

    def read_codes(self, stored: Array, bits: Bits) -> Bytes:
        """See Packing."""
        return stored

    def read_zeros(self, stored: Array, bits: Bits) -> Bytes:
        """There are none."""
        raise AssertionError("fp8 numbers have no zeros")

    def read_scales(self, stored: F32, rows: int) -> F32:
        """See Packing."""
        if not self.scale_rows:
            return np.full((rows, 1), stored.reshape(()), np.float32)
        return np.repeat(stored, self.scale_rows, axis=0)[:rows]


PACKINGS: dict[str, Packing] = {
    "gptq": Gptq(),
    "awq": Awq(),
    "int-quantized": IntQuantized(),
    "pack-quantized": PackQuantized(),
    "fp8-tensor": Fp8(0),
    "fp8-channel": Fp8(1),
    "fp8-block": Fp8(FP8_BLOCK),
    "fp8-block-inv": Fp8(FP8_BLOCK, "weight_scale_inv"),
}
