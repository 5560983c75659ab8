"""A GEMM library that is not there: what fake_gemm.cpp hands over is checked as hipBLASLt or
cuBLASLt would, against the launch table and the memory of the driver of no device, and multiplied
by the twin. A fault is remembered in the driver's ``faults`` and the call fails.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sinterlm.backends.gpu.table import Kernel
from sinterlm.backends.gpu.vendor import VENDOR_GEMM, multiply
from tests.gpu.recording import CALL, Fault, Launched, RecordingDriver

#: What cuBLASLt answers, and hipBLASLt in its place.
NO_MEMORY, INVALID, EXECUTION, INTERNAL, NOT_SUPPORTED = 3, 7, 13, 14, 15
HIP_CODES = {NO_MEMORY: 2, INVALID: 3, EXECUTION: 5, INTERNAL: 6, NOT_SUPPORTED: 7}
FP32, BF16 = 0, 14
#: Compute type, not transposed, transposed, the attributes that transpose A and B; by vendor, as
#: the next one: bytes of an algorithm.
NUMBERS = {"hip": (2, 111, 112, 0, 1), "cuda": (68, 0, 1, 3, 4)}
ALGORITHM = {"hip": 24, "cuda": 64}
NEEDED = 1 << 20  #: bytes of workspace that an algorithm asks for


@dataclass(frozen=True)
class Matrix:
    """Columns of ``rows`` elements, ``pitch`` apart."""

    kind: int
    rows: int
    columns: int
    pitch: int

    @property
    def nbytes(self) -> int:
        return ((self.columns - 1) * self.pitch + self.rows) * (4 if self.kind == FP32 else 2)


@dataclass
class Algorithm:
    """What a heuristic chose, and for what."""

    w: Matrix
    a: Matrix
    sums: Matrix
    is_loaded: bool = False  #: its code came to the device when it first ran


@dataclass
class RecordingGemm:
    """The library beside ``driver``; buffers of its table have room for ``most_tokens``."""

    driver: RecordingDriver
    most_tokens: int
    calls: list[str] = field(default_factory=list)
    handles: dict[int, Any] = field(default_factory=dict)
    algorithms: dict[int, Algorithm] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)  #: of each product of a step
    fails: dict[str, int] = field(default_factory=dict)  #: cuBLASLt's code to answer a call with
    finds_none: bool = False
    needed: int = NEEDED

    def attach(self, path: Path) -> None:
        """Answer the calls of the fake library at ``path``, in this process."""
        self._library = ctypes.CDLL(str(path))
        self._callback = CALL(self._answer)
        self._library.fake_gemm_use(self._callback)

    def _answer(self, name: bytes, words: Any, count: int) -> int:
        call = name.decode()
        self.calls.append(call)
        if call in self.fails:
            return self.code(self.fails[call])
        try:
            if call != "matmul":
                self.driver._not_in_capture()  # a library may allocate, or ask the device
            method: Callable[..., None] = getattr(self, f"on_{call}")
            method(*words[:count])
        except Fault as fault:
            self.driver.faults.append(f"{call}: {fault.why}")
            return self.code(fault.code)
        except Exception as exc:  # a ctypes callback would print it and answer 0
            self.driver.faults.append(f"{call}: {type(exc).__name__}: {exc}")
            return self.code(INTERNAL)
        return 0

    def code(self, code: int) -> int:
        """What this vendor answers in place of cuBLASLt's ``code``."""
        return HIP_CODES.get(code, code) if self.vendor == "hip" else code

    # -- what is made ------------------------------------------------------------------------------

    @property
    def vendor(self) -> str:
        return self.driver.device.vendor

    def _make(self, to: int, what: Any) -> None:
        number = 0x500000 + 16 * (len(self.calls) + 1)
        self.handles[number] = what
        ctypes.c_uint64.from_address(to).value = number

    def _get(self, handle: int, kind: type) -> Any:
        found = self.handles.get(handle)
        if not isinstance(found, kind):
            raise Fault(INVALID, f"{handle:#x} is no {kind.__name__} of this library")
        return found

    def _drop(self, handle: int, kind: type) -> None:
        self._get(handle, kind)
        del self.handles[handle]

    def on_create(self, to: int) -> None:
        self._make(to, "library")

    def on_destroy(self, handle: int) -> None:
        self._drop(handle, str)

    def on_desc_create(self, to: int, compute: int, scale: int) -> None:
        if (compute, scale) != (NUMBERS[self.vendor][0], FP32):
            raise Fault(INVALID, f"compute type {compute} with scales of type {scale}")
        not_transposed = NUMBERS[self.vendor][1]
        self._make(to, dict.fromkeys(NUMBERS[self.vendor][3:], not_transposed))

    def on_desc_set(self, desc: int, attribute: int, start: int, size: int) -> None:
        held = self._get(desc, dict)
        if attribute not in held or size != 4:
            raise Fault(INVALID, f"attribute {attribute} in {size} bytes")
        held[attribute] = struct.unpack("<i", ctypes.string_at(start, 4))[0]

    def on_desc_destroy(self, desc: int) -> None:
        self._drop(desc, dict)

    def on_layout_create(self, to: int, kind: int, rows: int, columns: int, pitch: int) -> None:
        if kind not in (FP32, BF16) or min(rows, columns) < 1 or pitch < rows:
            raise Fault(INVALID, f"type {kind}, {rows} x {columns}, columns {pitch} apart")
        self._make(to, Matrix(kind, rows, columns, pitch))

    def on_layout_destroy(self, layout: int) -> None:
        self._drop(layout, Matrix)

    def on_preference_create(self, to: int) -> None:
        self._make(to, [])

    def on_preference_set(self, preference: int, attribute: int, start: int, size: int) -> None:
        sizes = {1: 8, 6: 4} if self.vendor == "cuda" else {1: 8}
        if sizes.get(attribute) != size:
            raise Fault(INVALID, f"attribute {attribute} in {size} bytes")
        value = int.from_bytes(ctypes.string_at(start, size), "little")
        self._get(preference, list).append((attribute, value))

    def on_preference_destroy(self, preference: int) -> None:
        self._drop(preference, list)

    def on_heuristic(
        self, handle: int, desc: int, w: int, a: int, c: int, d: int, preference: int, asked: int,
        to: int, found: int,
    ) -> None:  # fmt: skip
        self._get(handle, str)
        _, not_transposed, transposed, *attributes = NUMBERS[self.vendor]
        if [self._get(desc, dict)[i] for i in attributes] != [transposed, not_transposed]:
            raise Fault(
                NOT_SUPPORTED, "our products are of a transposed matrix and one that is not"
            )
        left, right, out, again = (self._get(layout, Matrix) for layout in (w, a, d, c))
        if [m.kind for m in (left, right, out, again)] != [BF16, BF16, FP32, FP32]:
            raise Fault(NOT_SUPPORTED, "other types than bf16 with sums in fp32")
        if left.rows != right.rows or (left.columns, right.columns) != (out.rows, out.columns):
            raise Fault(INVALID, f"{left} and {right} give no {out}")
        if again != out or asked < 1:
            raise Fault(INVALID, "what is added lies otherwise than what is stored")
        wanted = dict(self._get(preference, list))
        if wanted.get(1, 0) > self._workspace_bytes():
            raise Fault(INVALID, f"{wanted[1]} bytes of workspace, which the table does not have")
        if self.vendor == "cuda" and wanted.get(6, 256) > 64:
            raise Fault(INVALID, "activations are not aligned so")
        ctypes.c_int.from_address(found).value = 0 if self.finds_none else 1
        if self.finds_none:
            return
        number = len(self.algorithms) + 1
        self.algorithms[number] = Algorithm(left, right, out)
        answer = struct.pack("<Q", number).ljust(ALGORITHM[self.vendor], b"\xee")
        answer += struct.pack("<Qif4i", self.needed, 0, 1.0, 0, 0, 0, 0)
        ctypes.memmove(to, answer, len(answer))

    def _workspace_bytes(self) -> int:
        return next(b.nbytes for b in self.driver.table.buffers if b.name == "vendor_workspace")

    # -- what is run -------------------------------------------------------------------------------

    def on_matmul(
        self, handle: int, desc: int, alpha: int, w: int, wt: int, a: int, at: int, beta: int,
        c: int, ct: int, d: int, dt: int, chosen: int, workspace: int, nbytes: int, stream: int,
    ) -> None:  # fmt: skip
        driver = self.driver
        driver._on_stream(stream)
        self._get(handle, str), self._get(desc, dict)
        factors = [ctypes.c_float.from_address(place).value for place in (alpha, beta)]
        if factors != [1.0, 0.0] or (c, ct) != (d, dt):
            raise Fault(INVALID, f"alpha and beta are {factors}")
        size = ALGORITHM[self.vendor]
        raw = ctypes.string_at(chosen, size)
        number = int.from_bytes(raw[:8], "little")
        if number not in self.algorithms or raw[8:] != b"\xee" * (size - 8):
            raise Fault(INVALID, "an algorithm that no heuristic gave")
        algorithm = self.algorithms[number]
        layouts = [self._get(layout, Matrix) for layout in (wt, at, dt)]
        if layouts != [algorithm.w, algorithm.a, algorithm.sums]:
            raise Fault(INVALID, "an algorithm of other matrices")
        if nbytes > self._workspace_bytes() or nbytes < self.needed:
            raise Fault(INVALID, f"{nbytes} bytes of workspace")
        for address, count, align in (
            (w, algorithm.w.nbytes, 256),
            (a, algorithm.a.nbytes, 64),
            (d, algorithm.sums.nbytes, 256),
            (workspace, nbytes, 256),
        ):
            driver.bytes_from(address, count)
            if address % align:
                raise Fault(INVALID, f"{address:#x} is not aligned to {align} bytes")
        self._check_rows(algorithm)
        kernel = self._kernel(algorithm)
        launched = Launched(kernel, (algorithm.a.columns,), (a, w, d, workspace))
        if algorithm.is_loaded:
            driver._check_order(launched)
            self.rows.append(algorithm.a.columns)
        elif stream in driver.capturing:
            driver.spoiled = True
            raise Fault(INVALID, "its code is loaded, which is not allowed while captured")
        algorithm.is_loaded = True
        if stream in driver.capturing:
            driver.capturing[stream].append(lambda: self._run(launched))
        else:
            self._run(launched)

    def _check_rows(self, algorithm: Algorithm) -> None:
        """Rows of padding must lie within the buffers, too."""
        sums = next(b for b in self.driver.table.buffers if b.name == "sums")
        room = sums.nbytes * self.most_tokens
        if algorithm.a.columns > self.most_tokens or algorithm.sums.nbytes > room:
            raise Fault(
                INVALID, f"{algorithm.sums} leaves the buffers of {self.most_tokens} tokens"
            )

    def _kernel(self, algorithm: Algorithm) -> Kernel:
        """The table's kernel for such matrices."""
        w = algorithm.w
        for kernel in self.driver.table.kernels:
            shape = {"N": w.columns, "K": w.rows, "W_PITCH": w.pitch}
            if kernel.name == VENDOR_GEMM and kernel.constants == shape:
                return kernel
        raise Fault(INVALID, f"no matrix of the table lies as {w} does")

    def _run(self, launched: Launched) -> None:
        driver = self.driver
        driver.trace.append(launched)
        driver.clock += 1.0
        if driver.run is not None:
            driver.run(launched)
            return
        a, w, d, _ = launched.args
        arrays = [driver.bytes_from(place) for place in (a, w, d)]
        kinds = (np.uint16, np.uint16, np.float32)
        views = [x[: x.nbytes // 4 * 4].view(k) for x, k in zip(arrays, kinds, strict=True)]
        multiply(views[0], views[1], views[2], launched.grid[0], launched.kernel.constants)
