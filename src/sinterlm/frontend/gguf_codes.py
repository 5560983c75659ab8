"""GGUF's Q4_0, Q4_1 and Q8_0 blocks as they are: codes with one fp16 scale (and offset) per 32.

The other block types have scales of scales or fields of other widths, which no GEMM here reads.
"""

from __future__ import annotations

import numpy as np

from sinterlm.frontend.gguf_header import BLOCK_TYPES
from sinterlm.frontend.numeric import Array
from sinterlm.ir.quant import CodedMatrix, GemmFormat

GROUP = 32

#: Block types that are kept. llama.cpp declares no dtype of activations, so it is the graph's.
FORMATS: dict[str, GemmFormat] = {
    "q4_0": GemmFormat(4, GROUP, symmetric=True, act="graph", act_group=64),
    "q4_1": GemmFormat(4, GROUP, symmetric=False, act="graph", act_group=64),
    "q8_0": GemmFormat(8, GROUP, symmetric=True, act="graph", act_group=64),
}

_BLOCK_BYTES = {block.name: block.nbytes for block in BLOCK_TYPES.values()}


def read_blocks(raw: Array, dtype: str, shape: tuple[int, ...]) -> CodedMatrix:
    """The codes of a matrix [N, K] from its blocks, uint8 [bytes]; K is a multiple of 32."""
    rows, depth = shape
    form, blocks = FORMATS[dtype], raw.reshape(-1, _BLOCK_BYTES[dtype])
    num_floats = 1 if form.symmetric else 2
    floats = np.ascontiguousarray(blocks[:, : 2 * num_floats]).view("<f2").astype(np.float32)
    stored = blocks[:, 2 * num_floats :]
    codes = np.empty((len(blocks), GROUP), np.uint8)
    if form.bits == 8:
        np.bitwise_xor(stored, 128, out=codes)  # signed bytes, counted from −128
    else:
        np.bitwise_and(stored, 15, out=codes[:, :16])
        np.right_shift(stored, 4, out=codes[:, 16:])
    per_row = floats.reshape(rows, depth // GROUP, num_floats)
    return CodedMatrix(
        codes=codes.reshape(rows, depth),
        scales=np.ascontiguousarray(per_row[:, :, 0]),
        offsets=None if form.symmetric else np.ascontiguousarray(per_row[:, :, 1]),
        bits=form.bits,
        group=GROUP,
    )
