"""The vendor's GEMM in a launch table: what it multiplies, at how many rows, and its twin.

The library (hipBLASLt, cuBLASLt) is opened by the host alone, when a bundle that asks for it is.
It reads bf16 matrices as rows and leaves sums in fp32 for a kernel of ``kernels/epilogues.py``. Its
algorithm depends on the number of rows, so a row's bits depend on the batch: off unless asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinterlm.backends.gpu.devices import Vendor
from sinterlm.ir.bf16 import from_bf16

#: The name of the kernel that is no kernel of ours.
VENDOR_GEMM = "vendor_gemm"
#: What follows it in place of one of ours.
EPILOGUES = {"norm_qkv_rope_kv": "qkv_epilogue", "norm_gate_up_act": "gate_up_epilogue",
             "residual_matmul": "residual_epilogue"}  # fmt: skip
#: Fewest rows of a step that the vendor's GEMM is used for.
LEAST_ROWS = 256
#: Rows of a step are rounded up to so many, for each of which an algorithm is chosen beforehand: as
#: many as a tile of our own GEMM has.
ROWS_STEP = 128
#: Of the device's memory, for the vendor's GEMM to work in: what both vendors recommend.
WORKSPACE_BYTES = 32 << 20


@dataclass(frozen=True)
class Library:
    """A vendor's GEMM library."""

    name: str  #: as its maker calls it
    files: tuple[str, ...]  #: that the loader is asked for, in order
    package: str  #: what brings it


LIBRARIES: dict[Vendor, Library] = {
    "hip": Library("hipBLASLt", ("libhipblaslt.so", "libhipblaslt.so.1", "libhipblaslt.so.0"),
                   "hipblaslt of ROCm 6 or 7"),
    "cuda": Library("cuBLASLt", ("libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"),
                    "libcublas of CUDA 12 or 13"),
}  # fmt: skip


def rows_of(rows: int, most: int) -> int:
    """The rows that the GEMM multiplies for a step of ``rows``, of ``most`` that buffers have."""
    return min(-(-rows // ROWS_STEP) * ROWS_STEP, most)


def multiply(
    a: NDArray[np.uint16], w: NDArray[np.uint16], sums: NDArray[np.float32], rows: int,
    constants: dict[str, Any],
) -> None:  # fmt: skip
    """The twin: sums[rows, N] = a[rows, K] @ w[N, K]ᵀ, fp32. ``a`` and ``w`` are bf16 bits from the
    first element on, a row of w being W_PITCH elements; sums of more rows are not touched."""
    n, k, pitch = (int(constants[name]) for name in ("N", "K", "W_PITCH"))
    left = from_bf16(a[: rows * k]).reshape(rows, k)
    right = np.lib.stride_tricks.as_strided(w[: (n - 1) * pitch + k], (n, k), (2 * pitch, 2))
    with np.errstate(invalid="ignore", over="ignore"):  # rows of padding hold anything
        sums[: rows * n] = (left @ from_bf16(right).T).reshape(-1)
