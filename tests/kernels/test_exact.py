"""GEMM kernels equal the bit-exact emulation of their instruction, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest

from sinterlm.ir.bf16 import Instruction, gemm_exact, to_bf16
from tests.kernels.oplib import OpLib, pad, round_up


def instruction(isa: str, bf16: bool) -> Instruction:
    if bf16 and isa in ("amx", "avx512bf16"):
        return "tdpbf16ps" if isa == "amx" else "vdpbf16ps"
    return "mul_add" if isa == "generic" else "fma"


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("shape", [(1, 64, 80), (7, 37, 33), (13, 128, 1056)])
def test_residual_sums(ops: OpLib, shape: tuple[int, int, int], bf16: bool) -> None:
    m, n, k = shape
    rng = np.random.default_rng(k)
    scale = 2.0 ** rng.integers(-12, 12, (m, k))  # so that the order of the sum shows
    a = (rng.standard_normal((m, k)) * scale).astype(np.float32)
    w = rng.standard_normal((n, k)).astype(np.float32)
    zeros, ones = np.zeros((m, n), np.float32), np.ones(n, np.float32)
    x, _, _ = ops.residual(a, w, None, ones, zeros, bf16=bf16)
    padded = (pad(t, round_up(k, 16)) for t in (a, w))
    left, right = (to_bf16(t) if bf16 else t for t in padded)
    expected = gemm_exact(left, right, instruction(ops.isa, bf16))
    assert np.array_equal(x.view(np.uint32), (expected + zeros).view(np.uint32))
