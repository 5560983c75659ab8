"""Quantised checkpoints for tests, packed field by field from their published layouts, with the
floats they stand for in float64: nothing here is shared with the reader under test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.frontend.builders import Arrays, tiny_arrays, tiny_config


@dataclass(frozen=True)
class Codes:
    """One matrix: w[n, k] = scales[n, index[k]] * (codes[n, k] − zeros[n, index[k]])."""

    codes: Any  #: int [N, K], unsigned
    zeros: Any  #: int [N, G], unsigned
    scales: Any  #: float32 [N, G], numbers that 16 bits hold
    index: Any  #: int [K]

    def floats(self) -> Any:
        index = self.index
        return self.scales.astype(np.float64)[:, index] * (self.codes - self.zeros[:, index])


def draw(
    rows: int, depth: int, bits: int, group: int, symmetric: bool, rng: Any, shuffle: bool = False
) -> Codes:
    """Random codes with every value in use, and zeros at both ends."""
    groups = depth // group
    high = 1 << bits
    codes = rng.integers(0, high, (rows, depth))
    zeros = rng.integers(0, high, (rows, groups))
    zeros[0, 0], zeros[-1, -1] = 0, high - 1
    if symmetric:
        zeros[:] = high // 2
    scales = (rng.uniform(0.001, 0.05, (rows, groups))).astype(np.float16).astype(np.float32)
    index = np.arange(depth) // group
    return Codes(codes, zeros, scales, rng.permutation(index) if shuffle else index)


def words_along(values: Any, axis: int, bits: int, order: tuple[int, ...] | None = None) -> Any:
    """int32 words of ``values`` [a, b] along ``axis``; field i of one is its order[i]-th value."""
    values = np.moveaxis(np.asarray(values), axis, -1)
    per_word = 32 // bits
    order = order or tuple(range(per_word))
    padded = np.zeros((values.shape[0], -(-values.shape[1] // per_word) * per_word), np.int64)
    padded[:, : values.shape[1]] = values
    words = np.zeros((len(padded), padded.shape[1] // per_word), np.uint64)
    for word in range(words.shape[1]):
        for field, which in enumerate(order):
            value = padded[:, word * per_word + which].astype(np.uint64)
            words[:, word] |= value << np.uint64(field * bits)
    return np.moveaxis(words.astype(np.uint32).view(np.int32), -1, axis)


def gptq(path: str, c: Codes, bits: int, less_one: int = 1) -> Arrays:
    high = 1 << bits
    return {
        f"{path}.qweight": words_along(c.codes.T, 0, bits),
        f"{path}.qzeros": words_along((c.zeros.T - less_one) % high, 1, bits),
        f"{path}.scales": c.scales.T.astype(np.float16),
        f"{path}.g_idx": c.index.astype(np.int32),
    }


def awq(path: str, c: Codes, bits: int = 4) -> Arrays:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        f"{path}.qweight": words_along(c.codes.T, 1, bits, order),
        f"{path}.qzeros": words_along(c.zeros.T, 1, bits, order),
        f"{path}.scales": c.scales.T.astype(np.float16),
    }


def int_quantized(path: str, c: Codes, bits: int = 8, symmetric: bool = True) -> Arrays:
    parts = {
        f"{path}.weight": (c.codes - 128).astype(np.int8),
        f"{path}.weight_scale": c.scales,
    }
    if not symmetric:
        parts[f"{path}.weight_zero_point"] = (c.zeros - 128).astype(np.int8)
    return parts


def pack_quantized(path: str, c: Codes, bits: int = 4, symmetric: bool = True) -> Arrays:
    parts = {
        f"{path}.weight_packed": words_along(c.codes, 1, bits),
        f"{path}.weight_scale": c.scales.astype(np.float16),
        f"{path}.weight_shape": np.array(c.codes.shape, np.int64),
    }
    if not symmetric:
        parts[f"{path}.weight_zero_point"] = words_along(c.zeros, 0, bits)
    return parts


def compressed_config(packing: str, weights: dict[str, Any], act: bool) -> dict[str, Any]:
    """quantization_config as llm-compressor writes it."""
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token",
                   "dynamic": True, "group_size": None}  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": packing,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": activations if act else None,
                "output_activations": None,
                "weights": {"type": "int", "dynamic": False} | weights,
            }
        },
    }


#: Of 2 layers: hidden 64, heads 4 of 16, 2 kv heads, mlp 128.
DATA = tiny_config(hidden_size=64, intermediate_size=128)


def quantised_arrays(
    write: Callable[[str, Codes], Arrays],
    codes_of: Callable[[int, int], Codes],
    data: dict[str, Any] = DATA,
) -> tuple[Arrays, dict[str, Codes]]:
    """Tensors of a checkpoint whose projections are in codes, and the codes by name of weight."""
    arrays: Arrays = {}
    codes: dict[str, Codes] = {}
    for name, floats in tiny_arrays(data).items():
        if name.startswith("model.layers.") and name.endswith("_proj.weight"):
            codes[name] = codes_of(*floats.shape)
            arrays |= write(name.removesuffix(".weight"), codes[name])
        else:
            arrays[name] = floats.astype(np.float16)
    return arrays, codes
