"""DummyCheckpoint: seeded random weights of any shape, for tests and measurements without a model.

Each tensor depends on (seed, name) alone: matrices and biases are normal with standard deviation
0.02, norm weights are normal around 1. Drawn by mapping 16 random bits through the quantiles of the
normal distribution, which is several times faster than a rejection sampler. Codes are drawn in the
same way, without a float in between.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from sinterlm.artifact.text import TextAssets
from sinterlm.frontend.checkpoint import DIGEST_CHUNK, Checkpoint, TensorInfo
from sinterlm.frontend.decoder import build_graph
from sinterlm.frontend.numeric import Array, ReadDType, bf16_to_fp32, fp32_to_bf16
from sinterlm.ir.fp8 import FP8_MAX, to_fp8
from sinterlm.ir.graph import DecoderConfig
from sinterlm.ir.quant import CodedMatrix, GemmFormat

STD = 0.02
#: Elements drawn per call of the bit generator (a multiple of 4).
_DRAW = 1 << 22


class DummyCheckpoint(Checkpoint):
    """Random weights for ``config``. They are drawn in ``dtype``: with "bf16" both dtypes read the
    same rounded values, with "fp32" reading bf16 rounds them."""

    def __init__(
        self,
        name: str,
        config: DecoderConfig,
        *,
        seed: int = 0,
        dtype: ReadDType = "bf16",
        text: TextAssets | None = None,
    ) -> None:
        self.name, self.path, self.files = name, None, ()
        self.config, self.seed, self._dtype = config, seed, dtype
        self._text = text or TextAssets()
        size = 2 if dtype == "bf16" else 4
        self.tensors = {
            weight.name: TensorInfo(weight.shape, dtype, size * int(np.prod(weight.shape)))
            for weight in build_graph(config, dtype).weights.values()
        }

    @property
    def text(self) -> TextAssets:
        """The text assets it was given, or empty ones."""
        return self._text

    def read(self, name: str, dtype: ReadDType) -> Array:
        """Draw the tensor ``name``; the same values on every call."""
        info = self._info(name)
        out = np.empty(info.shape, np.uint16 if dtype == "bf16" else np.float32)
        flat = out.reshape(-1)
        table = self._table(name, dtype)
        at = 0
        for bits in self._random_bits(name, flat.size):
            np.take(table, bits, out=flat[at : at + bits.size])
            at += bits.size
        return out

    def read_coded(self, name: str, form: GemmFormat) -> CodedMatrix:
        """Draw the matrix ``name`` as codes: normal, of the same deviation, one scale for all."""
        rows, depth = self._info(name).shape
        codes = np.empty(rows * depth, np.uint8)
        centre = 1 << (form.bits - 1)
        normal = self._quantiles[128::256]
        if form.code != "int":
            step = np.float32(STD * 4 / FP8_MAX[form.code])
            table = to_fp8((normal * (STD / step)).astype(np.float32), form.code)
        else:
            step = np.float32(np.float16(STD * 3 / centre))
            table = np.rint(normal * STD / step) + centre
            table = np.clip(table, 0, 2 * centre - 1).astype(np.uint8)
        at = 0
        for words in self._random_bits(f"{name}\0codes", -(-codes.size // 2)):
            drawn = table[words.view(np.uint8)][: codes.size - at]
            codes[at : at + drawn.size] = drawn
            at += drawn.size
        scales = np.full((rows, -(-depth // (form.group or depth))), step, np.float32)
        offsets = None if form.symmetric else -scales * np.float32(centre)
        return CodedMatrix(
            codes.reshape(rows, depth), scales, offsets, form.bits, form.group, form.code
        )

    def digest(self, progress: object = None) -> str:
        """Hex SHA-256 of what decides every value: generator, seed, dtype, names and shapes."""
        parts = [f"dummy 1 seed={self.seed} dtype={self._dtype}"]
        parts += [f"{name}{info.shape}" for name, info in sorted(self.tensors.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def close(self) -> None:
        """Nothing to release."""

    def _stored_bytes(self, name: str) -> Iterator[memoryview]:
        data = self.read(name, self._dtype).reshape(-1).data.cast("B")
        for start in range(0, len(data), DIGEST_CHUNK):
            yield data[start : start + DIGEST_CHUNK]

    def _random_bits(self, name: str, count: int) -> Iterator[NDArray[np.uint16]]:
        """``count`` random uint16, in pieces; a stable stream by NumPy's compatibility policy."""
        key = hashlib.sha256(f"{self.seed}\0{name}".encode()).digest()
        generator = np.random.PCG64(int.from_bytes(key[:16], "little"))
        for start in range(0, count, _DRAW):
            wanted = min(_DRAW, count - start)
            words = np.asarray(generator.random_raw(-(-wanted // 4)), np.dtype("<u8"))
            yield words.view(np.uint16)[:wanted]

    def _table(self, name: str, dtype: ReadDType) -> Array:
        """Value for each of the 65536 random codes, in ``dtype``."""
        centre = 1.0 if name.endswith("norm.weight") else 0.0
        values = (centre + STD * self._quantiles).astype(np.float32)
        if self._dtype == "bf16":
            values = bf16_to_fp32(fp32_to_bf16(values))
        return fp32_to_bf16(values) if dtype == "bf16" else values

    @cached_property
    def _quantiles(self) -> NDArray[np.float64]:
        normal = NormalDist()
        half = np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(32768)])
        half = half.round(9)  # where two machines' logarithms differ in the last bit
        return np.concatenate([half, -half[::-1]])
