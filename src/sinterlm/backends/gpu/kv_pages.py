"""KV pages of fp8 in a launch table: the scales that kernels are given, and how attention reads."""

from __future__ import annotations

from typing import Any

import numpy as np

from sinterlm.backends.gpu.devices import Device
from sinterlm.backends.gpu.tuning import Entry
from sinterlm.ir.graph import Graph


def fp8_of_pages(graph: Graph, device: Device) -> str:
    """The kind of fp8 that pages hold on ``device``; "" = they hold bf16."""
    return device.fp8 if graph.kv_scales else ""


def kv_scales(graph: Graph, layer: int, fp8: str) -> tuple[np.float32, np.float32]:
    """What numbers of K and V in pages are times: e4m3fnuz has half of e4m3fn's values, so scales
    are doubled, as those of weights are."""
    if not fp8:
        return np.float32(1), np.float32(1)
    k, v = graph.kv_scales[layer]
    factor = np.float32(2 if fp8 == "e4m3fnuz" else 1)
    return np.float32(k) * factor, np.float32(v) * factor


def keys_of_tile(
    entry: Entry, device: Device, fp8: str, head_dim: int, is_decode: bool, has_window: bool
) -> tuple[int, dict[str, Any]]:
    """Keys of a tile of attention, and options; an entry that was measured has both.

    Each thread loads 16 bytes for decoding rows, by fewer warps where heads are narrow, and of fp8
    8 for prompts, by more keys: registers end there. Decoding rows take half of the keys where fp8
    is widened by whole numbers, which takes registers, and where they have a window and warps have
    64 threads: what is masked takes two scalar registers for each number of a thread."""
    tile, options, warp = entry.tile["TILE"], entry.options, device.warp
    if entry.made_for is not None:
        return tile, options
    if is_decode:
        is_widened = fp8 != "" and device.rounding == "bits" and head_dim > 64
        if is_widened or (has_window and warp == 64):
            tile //= 2
        most = max(1, tile * head_dim * (1 if fp8 else 2) // 16 // warp)
        return tile, {**options, "num_warps": min(options["num_warps"], most)}
    if fp8:
        tile = max(tile, 8 * options["num_warps"] * warp // head_dim)
    return tile, options


def number(value: np.float32) -> str:
    """A scalar of a launch, in as many digits as tell it from its neighbours."""
    return f"number:{float(np.float32(value))!r}"
