"""The meaning of sampling: what ``sl_sampling`` in ``artifact/abi.h`` asks for, one row at a time.

Logits are changed in float32, as a library does; probabilities, logarithms and sums are float64.
Hence a library may choose another token only where ``Sampled.gap`` is below 1e-4, or where a
probability stands within rounding of the edge that min_p or top_p draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U64 = NDArray[np.uint64]


@dataclass(frozen=True)
class RowSampling:
    """How to draw one token; the fields mean what they mean in ``sl_sampling``."""

    temperature: float = 0.0  #: 0 = greedy
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0  #: 0 = all
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    position: int = 0
    num_logprobs: int = 0  #: how many of the best tokens to report
    prompt_tokens: tuple[int, ...] = ()
    output_tokens: tuple[int, ...] = ()
    bias: Mapping[int, float] = field(default_factory=dict)
    allowed: tuple[int, ...] | None = None  #: token ids; None = all


@dataclass(frozen=True)
class Sampled:
    """A drawn token, and what the raw logits say of it."""

    token_id: int
    logprob: float  #: log-softmax of the raw logits
    rank: int  #: 1 + how many logits are greater
    top_ids: tuple[int, ...]  #: best first, ties by lower id
    top_logprobs: tuple[float, ...]
    gap: float  #: by how much the token's score beats the next one's; inf when it was alone


def sample(logits: F32, params: RowSampling) -> Sampled:
    """Draw a token from raw logits [V].

    Order: bias and allowed mask, penalties, temperature, min_p, top_k, top_p, draw. Raises
    ValueError when no token is allowed or a logit is not finite.
    """
    raw = np.asarray(logits, np.float32)
    if not np.isfinite(raw).all():
        raise ValueError("a logit is not finite")
    scores = adjust(raw, params)
    kept = keep(scores, params)
    if kept.size == 0:
        raise ValueError("no token is allowed")
    final = scores.astype(np.float64)
    if params.temperature > 0:
        final[kept] += gumbel(params.seed, params.position, kept)
    best = best_first(final, kept)
    token = int(best[0])
    gap = float(final[best[0]] - final[best[1]]) if len(best) > 1 else np.inf
    logprobs = log_softmax(raw)
    top = best_first(raw, np.arange(raw.size))[: max(params.num_logprobs, 0)]
    return Sampled(
        token_id=token,
        logprob=float(logprobs[token]),
        rank=1 + int((raw > raw[token]).sum()),
        top_ids=tuple(int(i) for i in top),
        top_logprobs=tuple(float(logprobs[i]) for i in top),
        gap=gap,
    )


def log_softmax(logits: F32) -> F64:
    """Log-probabilities of raw logits, in float64."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def adjust(logits: F32, params: RowSampling) -> F32:
    """Logits after bias, mask (-inf), penalties and temperature, in float32.

    Penalties as in vLLM: repetition over prompt and output divides a positive logit and multiplies
    any other; frequency counts, and presence notes, the tokens of the output.
    """
    out = logits.astype(np.float32)
    for token, bias in params.bias.items():
        out[token] += np.float32(bias)
    if params.allowed is not None:
        masked = np.ones(out.size, bool)
        masked[list(params.allowed)] = False
        out[masked] = -np.inf
    counts = np.bincount(np.array(params.output_tokens, np.int64), minlength=out.size)
    seen = counts > 0
    seen[list(params.prompt_tokens)] = True
    penalty = np.float32(params.repetition_penalty)
    out = np.where(seen, np.where(out > 0, out / penalty, out * penalty), out)
    out -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
    out -= np.float32(params.presence_penalty) * (counts > 0).astype(np.float32)
    return np.asarray(out / np.float32(params.temperature) if params.temperature > 0 else out)


def keep(scores: F32, params: RowSampling) -> NDArray[np.int64]:
    """Ids that may be drawn, best first. A greedy row keeps all that are allowed.

    Each filter keeps a prefix of one order (score descending, id ascending) and sees what the one
    before left: min_p the tokens with p >= min_p * p_max, top_k exactly k, top_p the fewest whose
    share of the mass reaches p, at least one.
    """
    order = best_first(scores, np.flatnonzero(scores > -np.inf))
    if params.temperature <= 0 or order.size == 0:
        return order
    weight = np.exp(scores[order].astype(np.float64) - float(scores[order[0]]))
    count = int((weight >= np.float32(params.min_p)).sum())
    if params.top_k > 0:
        count = min(count, params.top_k)
    if params.top_p < 1:
        mass = np.cumsum(weight[:count])
        count = int(np.searchsorted(mass, float(np.float32(params.top_p)) * mass[-1])) + 1
    return order[:count]


def best_first(scores: NDArray[np.floating], ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """``ids`` (ascending) by score descending, ties by lower id."""
    ids = np.sort(ids)
    return ids[np.argsort(-scores[ids], kind="stable")]


def gumbel(seed: int, position: int, ids: NDArray[np.int64]) -> F64:
    """-log(-log u) for each token id: noise that depends on (seed, position, id) alone.

    Adding it to log-weights and taking the largest draws from the softmax: the Gumbel-max trick.
    """
    return np.asarray(-np.log(-np.log(uniform(seed, position, ids))))


def uniform(seed: int, position: int, ids: NDArray[np.int64]) -> F64:
    """u in (0, 1) for each token id: 23 random bits and a half, exact in float32 too."""
    word = np.array([position], np.int64).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    key = mix64(np.uint64(seed % 2**64) ^ mix64(word))
    hashed = mix64(key + ids.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03))
    return ((hashed >> np.uint64(41)).astype(np.float64) + 0.5) * 2.0**-23


def mix64(x: U64) -> U64:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), modulo 2**64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
