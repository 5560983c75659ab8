"""Rotary embedding, KV cache and attention in NumPy: no pages, one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinterlm.ir.graph import Rope

Array = NDArray[Any]

#: Keys that share one softmax maximum, on an absolute grid of positions. It shows in bf16 alone,
#: where probabilities are rounded relative to the maximum of their chunk, as kernels do.
CHUNK = 256


class RefCache:
    """Keys and values [tokens, Hkv, D] of each layer and sequence. A sequence is any int."""

    def __init__(self) -> None:
        self._kv: dict[tuple[int, int], tuple[Array, Array]] = {}

    def append(self, layer: int, seq: int, first: int, k: Array, v: Array) -> None:
        """Store k, v [n, Hkv, D] at positions first, first + 1, … and forget all later ones.

        Raises ValueError when positions before ``first`` are missing.
        """
        held = self.length(layer, seq)
        if first > held:
            raise ValueError(f"layer {layer} of sequence {seq} holds {held} tokens, not {first}")
        if held:
            old_k, old_v = self._kv[layer, seq]
            k, v = np.concatenate([old_k[:first], k]), np.concatenate([old_v[:first], v])
        self._kv[layer, seq] = (k, v)

    def read(self, layer: int, seq: int) -> tuple[Array, Array]:
        """All k, v [tokens, Hkv, D] of a sequence."""
        return self._kv[layer, seq]

    def length(self, layer: int, seq: int) -> int:
        """Tokens held."""
        held = self._kv.get((layer, seq))
        return 0 if held is None else len(held[0])

    def free(self, seq: int) -> None:
        """Forget a sequence."""
        self._kv = {key: kv for key, kv in self._kv.items() if key[1] != seq}


def rotate(x: Array, positions: NDArray[np.int64], rope: Rope) -> Array:
    """x [T, heads, D] with pairs (i, i + D/2) turned by position · inv_freq[i] (NeoX order).

    Angles, cos and sin are float64, then rounded to x's dtype; both are times attention_factor.
    """
    angle = positions[:, None].astype(np.float64) * np.array(rope.inv_freq, np.float64)
    cos, sin = (
        (f(angle) * rope.attention_factor).astype(x.dtype)[:, None, :] for f in (np.cos, np.sin)
    )
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def visible(positions: NDArray[np.int64], num_keys: int, window: int) -> NDArray[np.bool_]:
    """[n, num_keys]: whether the query at position p sees key j: p - window < j <= p."""
    p, j = positions[:, None], np.arange(num_keys)[None, :]
    return np.asarray((j <= p) & ((j > p - window) if window > 0 else True))


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: NDArray[np.bool_],
    scale: float,
    narrow: Callable[[Array], Array],
) -> Array:
    """softmax(q kᵀ · scale, over the keys that mask [n, L] shows) v, per head.

    q [n, Hq, D]; k, v [L, Hkv, D]; query head i belongs to KV head i // (Hq / Hkv). Probabilities
    pass through ``narrow`` before they weigh v; their sum does not. Returns [n, Hq, D].
    """
    n, num_heads, dim = q.shape
    num_kv_heads, num_keys = k.shape[1], k.shape[0]
    group = num_heads // num_kv_heads
    rows = q.reshape(n, num_kv_heads, group, dim).transpose(1, 2, 0, 3)  # [Hkv, G, n, D]
    keys, vals = k.transpose(1, 2, 0)[:, None], v.transpose(1, 0, 2)[:, None]
    score = np.where(mask, (rows @ keys) * q.dtype.type(scale), -np.inf)  # [Hkv, G, n, L]

    starts = np.arange(0, num_keys, CHUNK)
    widths = np.diff(starts, append=num_keys)
    top = np.maximum.reduceat(score, starts, axis=-1)
    share = np.exp(top - top.max(axis=-1, keepdims=True))
    top = np.where(np.isneginf(top), 0, top)  # a chunk with no visible key has no maximum
    prob = np.exp(score - np.repeat(top, widths, axis=-1))
    share = np.repeat(share, widths, axis=-1)
    total = (prob * share).sum(axis=-1, keepdims=True)
    out = ((narrow(prob) * share) @ vals) / total
    return np.asarray(out.transpose(2, 0, 1, 3).reshape(n, num_heads, dim))
